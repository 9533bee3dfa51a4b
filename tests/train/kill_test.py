"""Kill -9 at any moment, resume, and end with the same parameters, bit for bit."""

import importlib.util
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from cases import tiny
from hybridlm.train import loop, metrics, sealed

SCRIPT = pathlib.Path(__file__).with_name("killed_run.py")
ROOT = SCRIPT.parents[2]
PATIENCE = 120.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The same run in this process: its state and records."""
  spec = importlib.util.spec_from_file_location("killed_run", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.run(tmp_path_factory.mktemp("whole")), module


def start(workdir, *arguments):
  """Returns a process that works on the run."""
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  command = [sys.executable, str(SCRIPT), str(workdir), *arguments]
  return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})


def folders(workdir):
  """Returns the checkpoint folders and those of them without a manifest."""
  folder = workdir / loop.CHECKPOINTS
  found = {p.name for p in folder.iterdir() if p.name.isdigit()} if folder.is_dir() else set()
  return found, found - {path.name for path in sealed.complete(folder)}


def wait(process, condition):
  """Returns once the condition holds; the process must still be at work then."""
  end = time.monotonic() + PATIENCE
  while not condition():
    assert process.poll() is None, f"the run ended with {process.returncode} too early"
    assert time.monotonic() < end, "the run made no progress"
    time.sleep(0.001)


def kill(process):
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


def kill_after(workdir, process, saves, delay):
  """Kills a process some seconds after it has written its `saves`-th checkpoint."""
  seen = set(folders(workdir)[0])
  wait(process, lambda: seen.update(folders(workdir)[0]) or len(seen) > saves)
  time.sleep(delay)
  kill(process)


def kill_in_a_save(workdir, process):
  """Kills a process while a checkpoint it has begun lacks its manifest."""
  before = folders(workdir)[0]
  wait(process, lambda: folders(workdir)[1] - before)
  kill(process)


def losses(records):
  """Returns what every training record says but for its times."""
  return [(r["step"], r["loss"], r["weight"]) for r in records if r["split"] == "train"]


def finish(workdir, undisturbed):
  """Ends the run and compares what came out with the undisturbed one."""
  (state, history), module = undisturbed
  resumed, records = module.run(workdir)
  assert int(resumed.step) == module.STEPS
  assert tiny.same(resumed, state)
  assert losses(records) == losses(history)
  assert metrics.read(workdir / loop.METRICS) == records
  names, unfinished = folders(workdir)
  assert len(names) == 2 and not unfinished


def test_three_kills_one_of_them_inside_a_save_change_nothing(tmp_path, undisturbed):
  rng = random.Random()
  process = start(tmp_path)
  kill_after(tmp_path, process, saves=2, delay=rng.uniform(0, 0.3))
  process = start(tmp_path)
  kill_in_a_save(tmp_path, process)
  process = start(tmp_path, "3")
  assert process.wait(PATIENCE) == -signal.SIGKILL
  # The last one died with all of a checkpoint but its manifest on the disk.
  _, unfinished = folders(tmp_path)
  (name,) = unfinished
  assert (tmp_path / loop.CHECKPOINTS / name / "config.json").is_file()
  finish(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_at_random_moments_change_nothing(tmp_path, undisturbed, seed):
  rng = random.Random(seed)
  for number in range(10):
    process = start(tmp_path)
    if number % 3 == 2:
      kill_in_a_save(tmp_path, process)
    else:
      time.sleep(rng.uniform(0, 2.5))  # also while it imports, compiles and restores
      if process.poll() is None:
        kill(process)
  finish(tmp_path, undisturbed)
