"""Running our commands in processes of their own, on one device, as a user's shell would."""

import json
import os
import pathlib
import subprocess
import sys

TOY = "--config=configs/quickstart_toy.py"
ROOT = pathlib.Path(__file__).resolve().parents[2]
# Calls commands one after the other in one process: importing JAX costs more than most of them.
DRIVER = """
import contextlib, importlib, io, json, sys
from experiments import cli
for name, argv in json.load(sys.stdin):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = cli.call(importlib.import_module(f"experiments.{name}").main, [name, *argv])
  print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def environment(**extra: str) -> dict[str, str]:
  """Returns the environment of a user with one device who runs this checkout from anywhere."""
  return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | extra


def drive(calls, *, cwd: pathlib.Path, **extra: str) -> list[tuple[int, str, str]]:
  """Returns exit code, output and error output of each call `(command, arguments)`.

  `extra` are environment variables.
  """
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", DRIVER], input=json.dumps(list(calls)), text=True,
    capture_output=True, cwd=cwd, env=environment(**extra), check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def command(name: str, *argv: str) -> list[str]:
  """Returns the command line of `python -m experiments.NAME`."""
  return [sys.executable, "-m", f"experiments.{name}", *argv]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns every file below a folder and its bytes."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob("*")) if path.is_file()
  }
