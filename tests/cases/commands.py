"""Running our commands in processes of their own, on one device, as a user's shell would."""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import IO

TOY = "--config=configs/quickstart_toy.py"
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Calls commands as it is told, line by line: importing JAX costs more than most of them.
DRIVER = """
import contextlib, importlib, io, json, os, sys
from experiments import cli
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
  order, told = json.loads(line), []
  os.chdir(order["cwd"])
  for name, argv in order["calls"]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = cli.call(importlib.import_module(f"experiments.{name}").main, [name, *argv])
    told.append([code, out.getvalue(), err.getvalue()])
  os.chdir("/")
  print(json.dumps(told), file=answers, flush=True)
"""


@functools.cache
def _driver(extra: tuple[tuple[str, str], ...], number: int) -> tuple[subprocess.Popen, IO[str]]:
  """Returns a process that drives commands while the tests last, and where its errors go."""
  errors = tempfile.TemporaryFile("w+")
  process = subprocess.Popen(
    [sys.executable, "-W", "error", "-c", DRIVER], text=True, stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, stderr=errors, env=environment(**dict(extra)),
  )
  atexit.register(_end, process, errors)
  return process, errors


def _end(process: subprocess.Popen, errors: IO[str]) -> None:
  process.stdin.close()
  process.wait()
  process.stdout.close()
  errors.close()


# How often a driver has died of a bug in a command; the next test gets a new one.
_DIED: list[str] = []


def environment(**extra: str) -> dict[str, str]:
  """Returns the environment of a user with one device who runs this checkout from anywhere."""
  return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | extra


def drive(calls, *, cwd: pathlib.Path, **extra: str) -> list[tuple[int, str, str]]:
  """Returns exit code, output and error output of each call `(command, arguments)`.

  Calls with the same environment share a process, one after the other; `extra` are its variables.
  """
  process, errors = _driver(tuple(sorted(extra.items())), len(_DIED))
  order = {"cwd": str(cwd), "calls": [[name, list(argv)] for name, argv in calls]}
  try:
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
  except BrokenPipeError:
    line = ""
  if not line:
    process.wait()
    errors.seek(0)
    _DIED.append(errors.read()[-4000:])
    raise AssertionError(f"the process that runs commands ended: {_DIED[-1]}")
  return [tuple(told) for told in json.loads(line)]


def command(name: str, *argv: str) -> list[str]:
  """Returns the command line of `python -m experiments.NAME`."""
  return [sys.executable, "-m", f"experiments.{name}", *argv]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns every file below a folder and its bytes."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob("*")) if path.is_file()
  }
