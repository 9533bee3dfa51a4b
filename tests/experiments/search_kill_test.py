"""A search killed while it scores, while it evolves and while it distils ends as a calm one."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from cases import commands

ARGS = ["--config=configs/search_toy.py", "--config.search.method=milp",
        "--config.search.rungs=(3, 12)", "--config.distil.save_every=1"]
# What must be there for a kill: a file of the unfinished stage, and how many lines it has.
POINTS = (("replacements.jsonl", 5), ("candidates.jsonl", 9), ("rungs.jsonl", 1))
SAME = ("plan.json", "candidates.jsonl", "replacements.jsonl", "rungs.jsonl", "front.json",
        "search.md")


def launch(place, workdir):
  """Starts the search in a process of its own."""
  return subprocess.Popen(
    [*commands.command("search", *ARGS), f"--workdir={workdir}"], cwd=place, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=commands.environment(),
  )


def finish(process) -> str:
  """Returns the output of a process that is to end well."""
  out, _ = process.communicate()
  assert process.returncode == 0, out
  return out


def kill_at(process, path: pathlib.Path, count: int) -> None:
  """Kills the process as soon as a file has so many lines."""
  while not path.is_file() or path.read_bytes().count(b"\n") < count:
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


@pytest.mark.slow
def test_kills_at_three_points_change_nothing_of_the_result(place):
  finish(launch(place, "calm"))
  for name, count in POINTS:
    kill_at(launch(place, "killed"), place / "killed" / "search.partial" / name, count)
  out = finish(launch(place, "killed"))
  assert "search: resume" in out
  for name in SAME:
    one, two = (place / folder / "search" / name for folder in ("calm", "killed"))
    assert one.read_bytes() == two.read_bytes(), name
  plans = [sorted(path.name for path in (place / folder / "search" / "plans").iterdir())
           for folder in ("calm", "killed")]
  assert plans[0] == plans[1] and not (place / "killed" / "search" / "course").exists()
