"""A search killed while it scores, while it evolves and while it distils ends as a calm one."""

import shutil
import signal
import subprocess
import sys

import pytest

from cases import commands

ARGS = ["--config=configs/search_toy.py", "--config.search.method=milp",
        "--config.search.finalists=2", "--config.distil.save_every=1"]
# Ends itself, as kill -9 would, with a piece of work done and not yet written down: the COUNT-th
# whose record has the WORD in it.
DRIVER = """
import json, os, signal, sys
from experiments import cli, search
from experiments.ledger import Ledger
word, left = sys.argv[1], int(sys.argv[2])
once = Ledger.once
def dying(self, key, make):
  def last():
    global left
    record = make()
    left -= word in json.dumps(record)
    if left == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return record
  return once(self, key, last)
Ledger.once = dying
sys.exit(cli.call(search.main, ["search", *sys.argv[3:]]))
"""
# A word and a count, as above; the file that was being written, and those that are not there yet.
POINTS = (
  ('"block"', 4, "replacements.jsonl", ("candidates.jsonl", "rungs.jsonl")),
  ('"evolve"', 3, "candidates.jsonl", ("rungs.jsonl",)),
  ('"valid_ce"', 2, "rungs.jsonl", ("front.json",)),
)
SAME = ("plan.json", "candidates.jsonl", "replacements.jsonl", "rungs.jsonl", "front.json",
        "search.md")


def run(place, workdir, *line):
  """Returns the exit code and the output of a search in a process of its own."""
  done = subprocess.run(
    [sys.executable, *line, *ARGS, f"--workdir={workdir}"], cwd=place, text=True, check=False,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=commands.environment(),
  )
  return done.returncode, done.stdout


@pytest.mark.slow
def test_kills_at_three_points_change_nothing_of_the_result(place):
  code, out = run(place, "calm", "-m", "experiments.search")
  assert code == 0, out
  calm, killed = place / "calm" / "search", place / "killed" / "search"
  shutil.copytree(calm.parent, killed.parent)  # teacher and scores are the same
  shutil.rmtree(killed)
  partial = killed.with_name("search.partial")
  for word, count, name, later in POINTS:
    code, out = run(place, "killed", "-c", DRIVER, word, str(count))
    assert code == -signal.SIGKILL, out
    written, whole = ((folder / name).read_text().splitlines() for folder in (partial, calm))
    assert written == whole[: len(written)] and len(written) < len(whole)
    assert sum(word in line for line in written) == count - 1
    assert not any((partial / each).exists() for each in later)
  code, out = run(place, "killed", "-m", "experiments.search")
  assert code == 0 and "search: resume" in out, out
  for name in SAME:
    assert (calm / name).read_bytes() == (killed / name).read_bytes(), name
  plans = [sorted(path.name for path in (folder / "plans").iterdir()) for folder in (calm, killed)]
  assert plans[0] == plans[1] and not (killed / "course").exists()
