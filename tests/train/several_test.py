"""Two processes save, end and go on together, and one alone goes on from what they saved."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from cases import tiny
from hybridlm.train import loop, optim, sealed, state, step

SCRIPT = pathlib.Path(__file__).with_name("several_run.py")
ROOT = SCRIPT.parents[2]
OPTIMIZER = optim.make(peak=0.02, steps=12, warmup=2)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """What two processes of two devices each say, and where they worked."""
  workdir = tmp_path_factory.mktemp("together")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  extra = {"PYTHONPATH": path, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  logs = [workdir / f"{process}.log" for process in range(2)]
  started = []
  for process, log in enumerate(logs):
    with log.open("wb") as said:
      started.append(subprocess.Popen(
        [sys.executable, str(SCRIPT), str(port), str(process), str(workdir)],
        env=os.environ | extra, stderr=said))
  try:
    for process, log in zip(started, logs, strict=True):
      assert process.wait(timeout=200) == 0, log.read_text()[-4000:]
  finally:
    for process in started:
      process.kill()
      process.wait()
  return workdir, [json.loads((workdir / f"{each}.json").read_text()) for each in range(2)]


@pytest.mark.slow
def test_processes_end_at_the_same_step_and_go_on_bit_for_bit(together):
  workdir, said = together
  assert said[0] == said[1]
  assert said[0]["code"] == 143 and "is saved in" in said[0]["text"] and said[0]["same"]
  assert (workdir / "ended0" / loop.METRICS).is_file() and not (workdir / "ended1").exists()


@pytest.mark.slow
def test_processes_go_back_together_and_refuse_in_the_same_words(together):
  workdir, said = together
  assert said[0]["back"] == [[4, 6]]
  assert "was made with steps = 12, this run has 13" in said[0]["refused"]
  for path in sealed.complete(workdir / "bad" / loop.CHECKPOINTS):
    assert sealed.damage(path) is None


@pytest.mark.slow
def test_one_process_goes_on_from_what_several_saved(together):
  workdir, said = together
  folder = workdir / "calm" / loop.CHECKPOINTS
  sealed.remove(folder / "00000012")
  _, history = loop.run(
    step.make_step(tiny.distillation, OPTIMIZER), state.create(tiny.init(rows=32), OPTIMIZER),
    tiny.Data(), steps=12, frozen=tiny.init(1, rows=32), workdir=workdir / "calm",
    config={"steps": 12}, log_every=3, save_every=4, progress="off",
  )
  found = {r["step"]: r["loss"] for r in history if r["split"] == "train"}
  assert found == pytest.approx(dict(said[0]["losses"]), rel=1e-4) and len(found) == 6
