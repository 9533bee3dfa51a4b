"""A job that is killed again and again ends with the parameters of one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from cases import commands

STEPS, KILLS, EVERY = 60, 10, 5
ARGS = [commands.TOY, f"--config.distil.steps={STEPS}", "--config.distil.save_every=1",
        "--config.distil.validate_every=7"]
DISTIL = "import sys; from experiments import cli, pipeline; " \
         "sys.exit(cli.call(lambda job: pipeline.execute(job, 'distil'), sys.argv))"


def launch(place, workdir):
  """Starts the stages up to distillation in a process of their own."""
  return subprocess.Popen(
    [sys.executable, "-c", DISTIL, *ARGS, f"--workdir={workdir}"], cwd=place, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=commands.environment(),
  )


def last_step(place) -> int:
  """Returns the last step that the running distillation has logged."""
  path = place / "job" / "distil.partial" / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.is_file() else []
  return json.loads(lines[-1])["step"] if lines else 0


def kill_after(process, place, step: int, delay: float) -> None:
  """Kills the process some time after it has logged a step, wherever it is then."""
  while last_step(place) < step:
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.01)
  time.sleep(delay)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


def flip(place) -> None:
  """Flips one bit in the newest complete checkpoint."""
  saved = (place / "job" / "distil.partial" / "checkpoints").glob("*/manifest.json")
  newest = max(path.parent for path in saved)
  path = max((p for p in (newest / "state").rglob("*") if p.is_file()),
             key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.slow
def test_kills_and_a_flipped_bit_change_no_bit_of_the_result(place):
  calm = launch(place, "calm")
  out, _ = calm.communicate()
  assert calm.returncode == 0, out
  delays = random.Random(20)
  for kill in range(1, KILLS + 1):
    kill_after(launch(place, "job"), place, kill * EVERY, delays.uniform(0, 0.3))
  flip(place)
  again = launch(place, "job")
  out, _ = again.communicate()
  assert again.returncode == 0, out
  assert "distil: resume" in out and "falling back to the one before" in out
  for name in ("model.safetensors", "model.json"):
    one, two = (place / folder / "distil" / "model" / name for folder in ("calm", "job"))
    assert one.read_bytes() == two.read_bytes()
  records = [json.loads(line) for line in (
    place / "job" / "distil" / "metrics.jsonl").read_text().splitlines()]
  steps = [record["step"] for record in records if record["split"] == "train"]
  assert steps == list(range(1, STEPS + 1))
