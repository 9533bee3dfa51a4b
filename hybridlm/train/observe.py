"""What a run shows of itself beside its losses: use of the hardware, memory, a trace for XProf."""

import contextlib
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

TRACE = "trace"
Record = dict[str, Any]


class Watch(NamedTuple):
  """What to measure of a run.

  Attributes:
    flops: tokens a row -> FLOPs a token by what needs them: "model" (the trained model, forward and
      backward) and, where there is one, "teacher" (its forward); None: utilisation is left out.
    peak: FLOP/s that all devices together can do at most; None: not known.
    profile: (start, stop): the steps after the first `start` up to step `stop` are traced.
  """

  flops: Callable[[int], Mapping[str, float]] | None = None
  peak: float | None = None
  profile: tuple[int, int] | None = None


NOTHING = Watch()


def check_profile(profile: tuple[int, int] | None) -> None:
  """Raises unless the steps to trace are some.

  Raises:
    ValueError: a start that is negative, or a stop that does not come after it.
  """
  if profile is not None and not 0 <= profile[0] < profile[1]:
    start, stop = profile
    raise ValueError(f"profile {start}:{stop}: START is at least 0 and STOP comes after it")


def positions(batch: Mapping[str, Any]) -> tuple[int, int]:
  """Returns rows and tokens a row of a batch, padding included; (0, 0) if no leaf says."""
  shapes = (value.shape for name, value in batch.items() if name == "token_BL")
  return next(shapes, (0, 0))


def utilisation(watch: Watch, shapes: list[tuple[int, int]], seconds: float) -> Record:
  """Returns what the steps of these shapes made of the hardware in so many seconds.

  `model_flops_per_second`, `mfu` (of the devices' peak) and, where there is a teacher, the same
  for its forward pass as `teacher_flops_per_second` and `teacher_mfu`. They count what the model's
  mathematics needs: not what rematerialisation computes again.
  """
  out: Record = {}
  if watch.flops is None:
    return out
  total: dict[str, float] = {}
  for rows, length in shapes:
    for name, each in watch.flops(length).items() if length else ():
      total[name] = total.get(name, 0.0) + each * rows * length
  for name, flops in total.items():
    out[f"{name}_flops_per_second"] = flops / seconds
    if watch.peak is not None:
      out["mfu" if name == "model" else f"{name}_mfu"] = flops / seconds / watch.peak
  return out


def memory() -> Record:
  """Returns the most bytes in use so far: `device_memory_bytes`, of the fullest device here, or,
  where devices do not count them, `process_memory_bytes`."""
  found = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
  if peaks:
    return {"device_memory_bytes": max(peaks)}
  unit = 1 if sys.platform == "darwin" else 1024
  return {"process_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


@contextlib.contextmanager
def taken(name: str) -> Iterator[Record]:
  """Yields a record which, when the block is over, holds under a name the seconds it took."""
  record: Record = {}
  start = time.perf_counter()
  yield record
  record[name] = time.perf_counter() - start


class Trace:
  """Writes what host and devices did in some steps into the folder `trace`, for XProf.

  Process 0 writes, and only where there is a workdir. Steps are marked by their numbers.
  """

  def __init__(self, profile: tuple[int, int] | None, workdir: pathlib.Path | None):
    here = workdir is not None and jax.process_index() == 0
    self._profile, self._running = profile if here else None, False
    self._folder, self._spent = workdir and workdir / TRACE, 0.0

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_: Any) -> None:
    if self._running:
      self._running = False
      with self._counted():
        jax.profiler.stop_trace()

  @contextlib.contextmanager
  def _counted(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self._spent += time.perf_counter() - start

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """Returns what a step is to be called in; starts the trace before its first step."""
    if self._profile is None or not self._profile[0] < number <= self._profile[1]:
      return contextlib.nullcontext()
    if not self._running:
      self._running = True
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # calls of Python would slow the steps that are looked at
      with self._counted():
        jax.profiler.start_trace(self._folder, profiler_options=options)
    return jax.profiler.StepTraceAnnotation("step", step_num=number)

  def done(self, number: int, results: Any) -> float:
    """Ends the trace after its last step, when that step's results are there.

    Returns the seconds that starting and ending it took since the last call: no part of a step.
    """
    if self._running and number >= self._profile[1]:
      jax.block_until_ready(results)
      self.__exit__()
    spent, self._spent = self._spent, 0.0
    return spent
