"""Where numbers go (JSON lines, TensorBoard, a progress bar), and how long things took."""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from hybridlm.train import sealed

# `step`, `split` ("train" or "valid") and numbers by name.
Record = dict[str, Any]
# Seconds after which TensorBoard's events go to the disk.
_FLUSH = 120.0
# name -> tqdm's `disable`; None shows the bar on a terminal only.
PROGRESS: Mapping[str, bool | None] = {"bar": False, "auto": None, "off": True}


class JsonLines:
  """One JSON object a line, flushed line by line."""

  def __init__(self, path: str | os.PathLike):
    self._file = open(path, "a", encoding="utf-8")

  def write(self, record: Record) -> None:
    """Appends one line."""
    self._file.write(json.dumps(record, allow_nan=False) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read(path: str | os.PathLike, *, last: int | None = None) -> list[Record]:
  """Returns the records of a JSON-lines file up to step `last`; an unfinished last line is dropped.

  A file that does not exist holds no record.

  Raises:
    ValueError: a line that is not a record, other than an unfinished last one.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    return []
  records = []
  lines = path.read_text("utf-8").split("\n")[:-1]
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      step = record["step"]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path}, line {number} is not a metrics record") from error
    if last is None or step <= last:
      records.append(record)
  return records


def truncate(path: str | os.PathLike, *, last: int) -> list[Record]:
  """Returns the records up to step `last` and leaves only those in the file, in one rename."""
  path = pathlib.Path(path)
  records = read(path, last=last)
  text = "".join(json.dumps(record) + "\n" for record in records)
  if path.is_file() and path.read_text("utf-8") != text:
    sealed.write_text(path, text)
  return records


class TensorBoard:
  """Scalars named `split/metric`; events of steps that are done again are hidden.

  Whoever calls writes: a thread of its own that meets a full disk ends, and nobody empties its
  queue any more.
  """

  def __init__(self, folder: str | os.PathLike, *, first_step: int):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    # Files are named by the second; the suffix keeps a quick restart from overwriting.
    self._writer = EventsWriter(os.path.join(folder, "events"), f".from_{first_step:08d}")
    self._add(first_step, session_log=SessionLog(status=SessionLog.START))
    self._flushed = -math.inf

  def _add(self, step: int, **what: Any) -> None:
    self._writer.write_event(Event(wall_time=time.time(), step=step, **what))

  def write(self, record: Record) -> None:
    """Adds one scalar a number."""
    for name, value in record.items():
      if name not in ("step", "split") and not isinstance(value, str):
        self._add(record["step"], summary=scalar(f"{record['split']}/{name}", value))
    if time.monotonic() > self._flushed + _FLUSH:
      self._flushed = time.monotonic()
      self._writer.flush()

  def close(self) -> None:
    """Flushes and closes the event file."""
    self._writer.close()


class Bar:
  """A progress bar over steps with loss, real tokens a second and the time left."""

  def __init__(self, *, done: int, steps: int, progress: str):
    self._bar = tqdm.tqdm(
      initial=done, total=steps, unit="step", dynamic_ncols=True, disable=PROGRESS[progress]
    )
    self._shown: dict[str, str] = {}

  def write(self, record: Record) -> None:
    """Moves to the record's step and shows its numbers."""
    if record["split"] == "train":
      self._shown["loss"] = f"{record['loss']:.4f}"
      self._shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
    elif "loss" in record:
      self._shown["valid"] = f"{record['loss']:.4f}"
    self._bar.set_postfix(self._shown, refresh=False)
    self._bar.update(record["step"] - self._bar.n)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()


Sink = JsonLines | TensorBoard | Bar


def check_progress(progress: str) -> None:
  """Raises unless `progress` is a name of `PROGRESS`."""
  if progress not in PROGRESS:
    raise ValueError(f"progress {progress!r} is not one of {', '.join(PROGRESS)}")


@contextlib.contextmanager
def sinks(
  workdir: pathlib.Path | None, *, done: int, steps: int, progress: str
) -> Iterator[list[Sink]]:
  """Yields the sinks of a run that has `done` of its `steps` behind it, and closes them.

  Without a workdir there is the bar alone; else `metrics.jsonl` and `tensorboard/` are written too.
  """
  with contextlib.ExitStack() as stack:
    opened: list[Sink] = []
    if workdir is not None:
      workdir.mkdir(parents=True, exist_ok=True)
      opened.append(stack.enter_context(contextlib.closing(JsonLines(workdir / "metrics.jsonl"))))
      board = TensorBoard(workdir / "tensorboard", first_step=done + 1)
      opened.append(stack.enter_context(contextlib.closing(board)))
    bar = Bar(done=done, steps=steps, progress=progress)
    opened.append(stack.enter_context(contextlib.closing(bar)))
    yield opened


def write(opened: list[Sink], records: list[Record]) -> list[Record]:
  """Returns the records, after every sink has taken them."""
  for record in records:
    for sink in opened:
      sink.write(record)
  return records


class Timing(NamedTuple):
  """When one step was called and its call returned, in seconds of `time.perf_counter`, and when
  the device had finished it; and how long the host had waited for its batch."""

  data_seconds: float
  called: float
  returned: float
  ready: Any


class Stopwatch:
  """Notes when results are ready without holding up whoever dispatches them."""

  def __init__(self):
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "stopwatch")

  def __enter__(self) -> "Stopwatch":
    return self

  def __exit__(self, *_: Any) -> None:
    self._pool.shutdown()

  def ready(self, arrays: Any) -> concurrent.futures.Future:
    """Returns a future of the time at which the arrays are computed."""
    return self._pool.submit(_when_ready, arrays)


def _when_ready(arrays: Any) -> float:
  jax.block_until_ready(arrays)
  return time.perf_counter()


def durations(timings: list[Timing], *, fresh: bool) -> Record:
  """Returns mean seconds a step: `data_seconds` the host waited for batches, `idle_seconds` of them
  the device had nothing to do, `device_seconds` the device computed (a step starts when it is
  called or the one before is done, whichever is later).

  Args:
    timings: consecutive steps; nothing was running before the first.
    fresh: the first of them compiled; its call then counts as `compile_seconds` alone.
  """
  device, idle, free = 0.0, 0.0, 0.0
  for number, timing in enumerate(timings):
    idle += min(timing.data_seconds, max(0.0, timing.called - free))
    start = timing.returned if fresh and number == 0 else timing.called
    end = timing.ready.result()
    device += max(0.0, end - max(start, free))
    free = end
  count = len(timings)
  out = {"data_seconds": sum(t.data_seconds for t in timings) / count,
         "idle_seconds": idle / count, "device_seconds": device / count}
  if fresh:
    out["compile_seconds"] = timings[0].returned - timings[0].called
  return out
