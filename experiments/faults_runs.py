"""Distillations in processes of their own, to be hurt: see `experiments.faults`."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hybridlm.train import loop, sealed

CONFIG = "configs/quickstart_toy.py"
STEPS, SAVE_EVERY = 60, 3
DISTIL, MODEL = "distil", "model/model.safetensors"
PATIENCE = 600.0
# What a process has imported before it is started, so that a start costs little.
_IMPORTS = ["experiments.cli", "experiments.pipeline", "experiments.faults_runs"]


class Injury(NamedTuple):
  """What goes wrong inside a process: its files may grow to `limit` bytes once `after` checkpoints
  are whole, or the batch of step `nan` has infinite weights."""

  limit: int | None = None
  after: int = 0
  nan: int | None = None


UNHURT = Injury()


class Place(NamedTuple):
  """Where a job works, and the arguments and devices of it."""

  folder: pathlib.Path
  arguments: tuple[str, ...] = ()
  devices: int = 1

  @property
  def log(self) -> pathlib.Path:
    """What its processes said; beside the folder, which may be a disk that is full."""
    return self.folder.with_name(f"{self.folder.name}.txt")

  def stage(self) -> pathlib.Path:
    """The folder of the distillation, done or not."""
    done = self.folder / "job" / DISTIL
    return done if done.is_dir() else done.with_name(f"{DISTIL}.partial")

  def checkpoints(self) -> list[pathlib.Path]:
    """The whole checkpoints of a distillation that is not done."""
    return sealed.complete(self.stage() / loop.CHECKPOINTS)

  def unfinished(self) -> set[str]:
    """The checkpoints that lie there without their manifests, by name."""
    found = {path.name for path in sealed.numbered(self.stage() / loop.CHECKPOINTS)}
    return found - {path.name for path in self.checkpoints()}

  def records(self, split: str = "train") -> list[dict[str, Any]]:
    """The records of one kind, as far as they are written."""
    path = self.stage() / loop.METRICS
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["split"] == split]

  def step(self) -> int:
    """The last step that is logged."""
    return max((record["step"] for record in self.records()), default=0)

  def result(self) -> str:
    """A checksum of the model that came out."""
    return hashlib.sha256((self.stage() / MODEL).read_bytes()).hexdigest()

  def last_line(self) -> str:
    """The last line that was said, without what a library logged."""
    lines = self.log.read_text("utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line and line[0] not in " \t"), "")


def _work(place: Place, stage: str, more: Sequence[str], injury: Injury) -> None:
  """Runs the stages up to one, in a process of its own."""
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={place.devices}"
  said = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(said, 1)
  os.dup2(said, 2)
  from experiments import cli, pipeline

  _hurt(place, injury)
  fixed = [
    f"--config={CONFIG}", f"--config.distil.steps={STEPS}",
    *(f"--config.{run}.batch=8" for run in ("teacher", "distil", "calibrate", "evaluate",
                                            "findings")),
    f"--config.distil.save_every={SAVE_EVERY}", "--config.distil.validate_every=0",
    "--config.teacher.steps=2", "--config.teacher.warmup=0",
    f"--workdir={place.folder / 'job'}", f"--cache_dir={place.folder / 'cache'}",
  ]
  argv = [DISTIL, *fixed, *place.arguments, *more]
  sys.exit(cli.call(lambda job: pipeline.execute(job, stage), argv))


def _hurt(place: Place, injury: Injury) -> None:
  """Makes a process go wrong at a batch."""
  from experiments import training

  fetch = training.Spread.__next__

  def hurting(self: Any) -> Any:
    import resource

    import jax.numpy as jnp

    number = self.get_state()["grain"]["next_index"] + 1
    batch = fetch(self)
    if injury.limit is not None and len(place.checkpoints()) >= injury.after:
      hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
      resource.setrlimit(resource.RLIMIT_FSIZE, (injury.limit, hard))
    if number == injury.nan:
      batch = dict(batch) | {"weight_BL": batch["weight_BL"] * jnp.float32(jnp.inf)}
    return batch

  if injury != UNHURT:
    training.Spread.__next__ = hurting


def start(
  place: Place, *more: str, injury: Injury = UNHURT, stage: str = DISTIL
) -> multiprocessing.process.BaseProcess:
  """Returns a process that distils in a place, from wherever that stands.

  Programs are taken from the place's cache where an earlier process has compiled the same.

  Args:
    place: where.
    *more: arguments beside its own.
    injury: what goes wrong in it.
    stage: the last one to run.
  """
  place.folder.mkdir(parents=True, exist_ok=True)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(_IMPORTS)
  made = context.Process(target=_work, args=(place, stage, more, injury))
  made.start()
  return made


def together(place: Place, count: int) -> list[multiprocessing.process.BaseProcess]:
  """Returns so many processes that distil together in one place."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    start(place, f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={each}",
          "--heartbeat=10")
    for each in range(count)
  ]


def until(process: multiprocessing.process.BaseProcess, true: Callable[[], bool]) -> bool:
  """Returns whether a condition came true before a process was over."""
  end = time.monotonic() + PATIENCE
  while not true():
    if process.exitcode is not None:
      return False
    if time.monotonic() > end:
      process.kill()
      raise RuntimeError(f"nothing moved in {PATIENCE:g} s")
    time.sleep(0.005)
  return True


def finish(place: Place, *, injury: Injury = UNHURT, stage: str = DISTIL) -> int:
  """Returns the exit code of a process that distils, or runs another stage, to the end."""
  process = start(place, injury=injury, stage=stage)
  process.join(PATIENCE)
  if process.exitcode is None:
    process.kill()
    process.join()
  return process.exitcode


def end(process: multiprocessing.process.BaseProcess, how: signal.Signals) -> int:
  """Returns the exit code of a process that was sent a signal."""
  if process.exitcode is None:
    os.kill(process.pid, how)
  process.join()
  return process.exitcode
