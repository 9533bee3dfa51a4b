"""The one training loop: steps, metrics, validation, checkpoints, and a guard against bad steps."""

import contextlib
import errno
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from hybridlm.train import checkpoint, look, metrics, observe, sealed, stop, together
from hybridlm.train import guard as guards
from hybridlm.train import state as states
from hybridlm.train.guard import NotFinite, Spike

__all__ = ["CHECKPOINTS", "METRICS", "NotFinite", "Spike", "run"]

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
  step: Callable[..., tuple[states.TrainState, dict[str, Any]]],
  state: states.TrainState,
  data: Any,
  *,
  steps: int,
  frozen: Any = None,
  workdir: str | pathlib.Path | None = None,
  config: Mapping[str, Any] | None = None,
  validate: Callable[[Any], Mapping[str, float]] | None = None,
  log_every: int = 10,
  validate_every: int = 0,
  save_every: int = 0,
  keep: int = 3,
  progress: str = "bar",
  watch: observe.Watch = observe.NOTHING,
  guard: guards.Guard = guards.STOP,
) -> tuple[states.TrainState, list[metrics.Record]]:
  """Returns the state after `steps` updates and the history: all records, those of before a
  restart included.

  With a workdir the run goes on from its newest good checkpoint, and `metrics.jsonl` is cut back
  to that step, so that no step is in it twice. Steps are dispatched without waiting for results;
  those are looked at every `log_every` steps and before anything is saved. Training goes on while
  a checkpoint is written. Of several processes each calls this with the same arguments; process 0
  writes the metrics, and its workdir is that of all.

  Args:
    step: from `make_step`, made to skip where the guard does; it donates the state, so the one
      given must not be used afterwards.
    state: where to start if there is no checkpoint.
    data: an iterator of batches with `get_state` and `set_state`.
    steps: updates the run has made in the end, those before a restart included.
    frozen: passed to every step, e.g. the teacher's parameters.
    workdir: where checkpoints and metrics go; None keeps everything in memory.
    config: saved with every checkpoint; one of another config is refused.
    validate: metrics of the parameters, e.g. `make_eval(...)` with its other arguments bound.
    log_every: steps a training record, which is their mean.
    validate_every: steps between validations; 0: at the end only.
    save_every: steps between checkpoints; 0: at the end only.
    keep: checkpoints to hold on to.
    progress: "bar", "auto" (on a terminal only) or "off".
    watch: what else to measure, see `observe.Watch`.
    guard: what a bad step is, and what is done about it.

  Raises:
    NotFinite: a loss, gradient, parameter or validation result is, and the guard does not go on;
      nothing of it is saved.
    Spike: the same of a loss far above those before it.
    NotSaved: a checkpoint could not be written; those before it are whole.
    ValueError: impossible arguments, data that ends early, checkpoints that cannot be used.
    Stopped: after SIGTERM, once the state is saved; it ends the process with code 143.
  """
  plan = _Plan(
    steps, None if workdir is None else pathlib.Path(workdir), dict(config or {}), validate,
    log_every, validate_every, save_every, keep, progress, watch, guard,
  )
  _check(plan)
  if workdir is not None:
    plan = plan._replace(workdir=pathlib.Path(together.first(lambda: str(plan.workdir))))
  together.check(_error(lambda: states.check_apart(state, frozen)))
  like = jax.tree.map(_shape, state)
  leg = _resume(state, data, plan)
  if int(leg.state.step) == steps:
    return leg.state, leg.history
  try:
    with stop.Stop(wanted=workdir is not None) as asked, _saver(plan) as saver:
      return _legs(_Job(step, frozen, data, plan, saver, asked), leg, like)
  except OSError as error:
    if error.errno not in _FULL:
      raise
    raise checkpoint.NotSaved(
      f"{error.filename or plan.workdir} could not be written: {checkpoint.reason(error)}; "
      "checkpoints before it are whole"
    ) from error


class _Plan(NamedTuple):
  """What `run` was asked for, under its names."""

  steps: int
  workdir: pathlib.Path | None
  config: dict[str, Any]
  validate: Callable[[Any], Mapping[str, float]] | None
  log_every: int
  validate_every: int
  save_every: int
  keep: int
  progress: str
  watch: observe.Watch
  guard: guards.Guard

  @property
  def folder(self) -> pathlib.Path:
    """Where checkpoints go."""
    return self.workdir / CHECKPOINTS

  def checks(self, number: int) -> bool:
    """Returns whether step `number` ends with a validation."""
    return self.validate is not None and self._due(number, self.validate_every)

  def saves(self, number: int) -> bool:
    """Returns whether step `number` ends with a checkpoint."""
    return self.workdir is not None and self._due(number, self.save_every)

  def looks(self, number: int) -> bool:
    """Returns whether results are fetched after step `number`."""
    return self._due(number, self.log_every) or self.checks(number) or self.saves(number)

  def _due(self, number: int, every: int) -> bool:
    return number == self.steps or (every > 0 and number % every == 0)


def _check(plan: _Plan) -> None:
  for name in ("steps", "log_every", "keep"):
    if getattr(plan, name) < 1:
      raise ValueError(f"loop: {name}={getattr(plan, name)} must be at least 1")
  for name in ("validate_every", "save_every"):
    if getattr(plan, name) < 0:
      raise ValueError(f"loop: {name}={getattr(plan, name)} must not be negative")
  if plan.save_every and plan.workdir is None:
    raise ValueError(f"loop: save_every={plan.save_every} needs a workdir to save in")
  metrics.check_progress(plan.progress)
  observe.check_profile(plan.watch.profile)
  guards.check(plan.guard, keep=plan.keep)
  if plan.guard.action == "rollback" and plan.workdir is None:
    raise ValueError("loop: guard.action='rollback' needs a workdir with checkpoints to go back to")
  json.dumps(plan.config, allow_nan=False)  # what no checkpoint could hold fails here, not later


class _Leg(NamedTuple):
  """Where steps go on from, at the start, after a restart, or after going back."""

  state: states.TrainState
  history: list[metrics.Record]
  memory: guards.Memory
  ledger: guards.Ledger


class _Job(NamedTuple):
  """What stays the same from step to step."""

  step: Callable[..., Any]
  frozen: Any
  data: Any
  plan: _Plan
  saver: checkpoint.Saver | None
  stop: stop.Stop


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _error(check: Callable[[], None]) -> ValueError | None:
  """Returns what a check raises in this process."""
  try:
    check()
  except ValueError as error:
    return error
  return None


def _saver(plan: _Plan):
  if plan.workdir is None:
    return contextlib.nullcontext()
  return checkpoint.Saver(plan.folder, config=plan.config, keep=plan.keep)


def _resume(state, data, plan: _Plan) -> _Leg:
  """Returns where to go on from; moves the data to the saved position.

  The state that was given goes before another is restored: devices may not hold two.
  """
  workdir, like = plan.workdir, jax.tree.map(_shape, state)
  if workdir and _saved(plan):
    for leaf in jax.tree.leaves(state):
      leaf.delete()
  found = workdir and checkpoint.restore(plan.folder, like, config=plan.config)
  state = found.state if found else state
  done = int(state.step)
  if done > plan.steps:
    where = workdir or "the state"
    raise ValueError(f"{where} is at step {done}, beyond the {plan.steps} asked for")
  if found:
    data.set_state(found.position)
  history = _cut_back(plan, done) if workdir else []
  memory = guards.recalled(found.notes) if found else guards.Memory()
  return _Leg(state, history, memory, guards.read(plan.folder) if workdir else guards.Ledger())


def _saved(plan: _Plan) -> bool:
  """Returns whether there is a checkpoint, damaged perhaps."""
  return together.first(lambda: bool(sealed.complete(plan.folder)))


def _cut_back(plan: _Plan, done: int) -> list[metrics.Record]:
  return together.first(lambda: metrics.truncate(plan.workdir / METRICS, last=done))


def _legs(job: _Job, leg: _Leg, like) -> tuple[states.TrainState, list[metrics.Record]]:
  """Returns the state and history at the end, however often the run goes back on the way."""
  if job.plan.guard.action == "rollback" and not _saved(job.plan):
    _save(job, leg.state, leg.memory)
    job.saver.wait()
  while True:
    try:
      return _train(job, leg)
    except guards.Bad as bad:
      _check_back(job.plan, leg.ledger, bad)
      # Without the traceback, whose frames hold the state: devices may not hold two.
      met, leg = bad.with_traceback(None), leg._replace(state=None)
    leg = _back(job, leg.ledger, met, like)


def _check_back(plan: _Plan, ledger: guards.Ledger, bad: guards.Bad) -> None:
  """Raises the error of a bad step unless the guard goes back, and may once more."""
  if plan.guard.action != "rollback" or bad.position is None:
    raise bad
  if len(ledger.records) >= plan.guard.limit:
    raise guards.exhausted(plan.guard, bad)


def _back(job: _Job, ledger: guards.Ledger, bad: guards.Bad, like) -> _Leg:
  """Returns where to go on from after a bad step: a checkpoint, past the step's batch.

  Later checkpoints go first. Whoever dies here and starts again meets the step again."""
  plan, data = job.plan, job.data
  job.saver.wait()
  found = checkpoint.restore(plan.folder, like, config=plan.config, skip=plan.guard.back - 1)
  step = int(found.state.step)
  data.set_state(json.loads(bad.position))
  _fetch(data, bad.step)
  ledger = guards.gone_back(ledger, bad, step=step, position=data.get_state())
  together.first(lambda: _go_back(plan, step, ledger))
  logging.warning("%s; going back to step %d, past that batch", bad, step)
  data.set_state(found.position)
  return _Leg(found.state, _cut_back(plan, step), guards.recalled(found.notes), ledger)


def _go_back(plan: _Plan, step: int, ledger: guards.Ledger) -> None:
  sealed.retain(plan.folder / f"{step:08d}", plan.keep)
  guards.write(plan.folder, ledger)


def _train(job: _Job, leg: _Leg) -> tuple[states.TrainState, list[metrics.Record]]:
  """Returns the state and history after the steps that are left."""
  plan, state, memory, waiting = job.plan, leg.state, leg.memory, []
  done, here = int(state.step), together.writes()
  with (
    metrics.sinks(
      plan.workdir if here else None, done=done, steps=plan.steps,
      progress=plan.progress if here else "off",
    ) as sinks,
    metrics.Stopwatch() as stopwatch,
    observe.Trace(plan.watch.profile, plan.workdir) as trace,
  ):
    untold = [record for record in leg.ledger.records if record not in leg.history]
    history = leg.history + metrics.write(sinks, untold)
    clock = time.perf_counter()
    for number in range(done + 1, plan.steps + 1):
      if number - 1 in leg.ledger.jumps:
        job.data.set_state(leg.ledger.jumps[number - 1])
      memory, more = _bound(plan.guard, memory, waiting, number)
      with trace.step(number):
        state, result = _advance(job, state, number, stopwatch, *more)
      clock += trace.done(number, result.metrics)
      waiting.append(result)
      stopping = job.stop.asked()
      if not plan.looks(number) and not stopping:
        continue
      fresh = waiting[0].number == done + 1
      memory, told = _told(plan, state, memory, waiting, clock, fresh=fresh)
      history = history + metrics.write(sinks, told)
      if plan.saves(number) or number == plan.steps or stopping:
        look.check_state(state, waiting[-1])
      if plan.saves(number) or stopping:
        saved = _save(job, state, memory, wait=stopping or number == plan.steps)
        history = history + metrics.write(sinks, [saved])
      if stopping:
        raise stop.saved(number, plan.folder)
      waiting, clock = [], time.perf_counter()
  if job.stop.asked():  # while the last step was saved
    raise stop.saved(plan.steps, plan.folder)
  return state, history


def _bound(guard: guards.Guard, memory: guards.Memory, waiting: list[look.Done], number: int):
  """Returns what is remembered, and what a step is told beside its batch: the bound of its loss."""
  if guard.action != "skip":
    return memory, ()
  if guard.spike:
    memory = look.listen(memory, waiting, upto=number - guards.LAG)
  return memory, (np.float32(guards.bound(guard, memory, number)),)


def _told(plan: _Plan, state, memory: guards.Memory, waiting: list[look.Done], clock, *, fresh):
  """Returns what is remembered after the steps waited for, and the records of them."""
  good, memory, told = look.judged(state.params, waiting, plan.guard, memory)
  told += look.summary(good, waiting, clock, plan.watch, fresh=fresh)
  number = waiting[-1].number
  if plan.checks(number):
    with observe.taken("validate_seconds") as times:
      valid = look.validation(plan.validate, state.params, number)
    told.append(valid | times)
  return memory, told


def _save(job: _Job, state, memory: guards.Memory, *, wait: bool = False) -> metrics.Record:
  """Starts a checkpoint; returns the record of how long that held training up."""
  notes = guards.notes(memory)
  with observe.taken("checkpoint_seconds") as times:
    job.saver.start(state, position=job.data.get_state(), notes=notes)
    if wait:
      job.saver.wait()
  return {"step": int(state.step), "split": "save", **times}


def _fetch(data, number: int):
  """Returns the next batch and where the data stood before it."""
  position = json.dumps(data.get_state())
  try:
    return next(data), position
  except StopIteration:
    raise ValueError(f"the data ended before step {number}, at position {position}") from None


def _advance(job: _Job, state, number, stopwatch, *more) -> tuple[states.TrainState, look.Done]:
  """Fetches a batch and dispatches a step; nothing waits for its result."""
  start = time.perf_counter()
  batch, position = _fetch(job.data, number)
  called = time.perf_counter()
  state, results = job.step(state, job.frozen, batch, *more)
  returned = time.perf_counter()
  timing = metrics.Timing(called - start, called, returned, stopwatch.ready(results))
  return state, look.Done(number, position, results, timing, observe.positions(batch))
