"""The members of a sweep as processes: several at a time, tried again when they crash.

A member's folder below the sweep's holds `job` (the workdir of its command), `log.txt` (all that
it printed, every attempt) and, when it is finished, `finished.json`: what it was asked for.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from experiments import artefacts, cli, stages

JOB, LOG, FINISHED = "job", "log.txt", "finished.json"
MISTAKE = 2  # exit code of a user's mistake: the same again would end the same
IN_USE = "is in use by another run"  # another member makes what both need
LINES = 3  # of a failed member's log in the table
_TICK = 0.05  # seconds
_PATIENCE = 2.0  # seconds before a member that found something in use is started again


class Task(NamedTuple):
  """A member to run: its folder, what `python -m` runs, and all that decides its result."""

  name: str
  folder: pathlib.Path
  argv: tuple[str, ...]
  asked: Mapping[str, Any]


class Outcome(NamedTuple):
  """How a member ended: "done", "failed" or "not run"; seconds of its last attempt.

  said: the last lines of the log of a member that failed.
  """

  state: str
  attempts: int
  seconds: float
  said: tuple[str, ...] = ()


class _Running(NamedTuple):
  task: Task
  process: subprocess.Popen
  began: float
  log_start: int


def standing(task: Task) -> tuple[Outcome | None, str]:
  """Returns the outcome of a member that is finished as asked, or None; and why, in words."""
  record = task.folder / FINISHED
  if not record.is_file():
    started = (task.folder / JOB).exists()
    return None, "an earlier run left it unfinished" if started else "nothing there yet"
  held = artefacts.read_record(record, {"asked": dict})
  before, after = (stages.flat(each) for each in (held["asked"], task.asked))
  changes = [
    f"{key}: {before.get(key)} -> {after.get(key)}"
    for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)
  ]
  if changes:
    return None, ", ".join(changes)
  if not (task.folder / JOB).is_dir():
    return None, "its results are gone"
  return Outcome("done", held["attempts"], held["seconds"]), "finished as asked"


def run(
  tasks: Sequence[Task], *, jobs: int, retries: int, say: Callable[[str], None],
  ended: Callable[[str, Outcome], None],
) -> None:
  """Runs members, `jobs` at a time; `ended` takes each one's name and outcome as it ends.

  All that still run are killed when the block is left, whatever the reason. A member that crashed
  is started up to `retries` times again; one that ended over a mistake in its values is not.
  """
  waiting = list(tasks)
  attempts = {task.name: 0 for task in tasks}
  later: dict[str, float] = {}
  with _pipe() as (pipe, held), _stopping(held) as running:
    while waiting or running:
      now = time.monotonic()
      ready = [task for task in waiting if later.get(task.name, 0.0) <= now]
      for task in ready[: jobs - len(running)]:
        waiting.remove(task)
        attempts[task.name] += 1
        running.append(_start(task, pipe))
        say(f"{task.name}: started")
      for one in [one for one in running if one.process.poll() is not None]:
        running.remove(one)
        name, code, said = one.task.name, one.process.returncode, _said(one)
        seconds = time.monotonic() - one.began
        if code == MISTAKE and said and IN_USE in said[-1]:
          attempts[name] -= 1
          later[name] = time.monotonic() + _PATIENCE
          waiting.append(one.task)
        elif code not in (0, MISTAKE) and attempts[name] <= retries:
          say(f"{name}: crashed with code {code} after {seconds:.0f} s, started again")
          waiting.append(one.task)
        else:
          ended(name, _settle(one, attempts[name], seconds, said))
      time.sleep(_TICK)


def _settle(one: _Running, attempts: int, seconds: float, said: tuple[str, ...]) -> Outcome:
  """Returns the outcome of a member that is not tried again; writes down one that finished."""
  if one.process.returncode != 0:
    return Outcome("failed", attempts, seconds, said or (f"code {one.process.returncode}",))
  artefacts.write_json(one.task.folder / FINISHED, {
    "asked": dict(one.task.asked), "attempts": attempts, "seconds": seconds,
  })
  return Outcome("done", attempts, seconds)


def _start(task: Task, pipe: int) -> _Running:
  task.folder.mkdir(parents=True, exist_ok=True)
  (task.folder / FINISHED).unlink(missing_ok=True)
  environment = dict(os.environ)
  environment["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(cli.ROOT), environment.get("PYTHONPATH", "")) if part
  )
  with (task.folder / LOG).open("ab") as log:
    begin = log.tell()
    process = subprocess.Popen(
      [sys.executable, "-m", "experiments.watched", str(pipe), *task.argv], pass_fds=(pipe,),
      stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
    )
  return _Running(task, process, time.monotonic(), begin)


def _said(one: _Running) -> tuple[str, ...]:
  """Returns the last lines that a process printed."""
  with (one.task.folder / LOG).open("rb") as log:
    log.seek(one.log_start)
    lines = log.read().decode("utf-8", "replace").splitlines()
  return tuple([line.strip() for line in lines if line.strip()][-LINES:])


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, BinaryIO]]:
  """Yields the ends of a pipe; members read the first, and end when nobody holds the second."""
  reading, writing = os.pipe()
  with os.fdopen(writing, "wb") as held:
    try:
      yield reading, held
    finally:
      os.close(reading)


@contextlib.contextmanager
def _stopping(held: BinaryIO) -> Iterator[list[_Running]]:
  """Yields the list of what runs, all of which has ended when the block has; so has it on SIGTERM.

  Members end because `held` is closed: it is the end of the pipe that they watch.
  """
  running: list[_Running] = []

  def stop(number, frame):
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield running
  finally:
    signal.signal(signal.SIGTERM, before)
    held.close()
    for one in running:
      one.process.wait()
