"""The one training loop: steps, metrics, validation, checkpoints, and a guard against NaN."""

import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.train import checkpoint, metrics, observe
from hybridlm.train import state as states
from hybridlm.train import step as steps_of

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


class NotFinite(ValueError, FloatingPointError):
  """Training met NaN or infinity; the message names the step, the batch and the leaf."""


class _Done(NamedTuple):
  """One dispatched step: its number, where the data stood before its batch, its results,
  and the rows and tokens a row of the batch."""

  number: int
  position: str
  metrics: dict[str, Any]
  timing: metrics.Timing
  shape: tuple[int, int]


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
) -> tuple[states.TrainState, list[metrics.Record]]:
  """Returns the state after `steps` updates and the history: all records, those of before a
  restart included.

  With a workdir the run goes on from its newest good checkpoint, and `metrics.jsonl` is cut back
  to that step, so that no step is in it twice. Steps are dispatched without waiting for results;
  those are looked at every `log_every` steps and before anything is saved.

  Args:
    step: from `make_step`; it donates the state, so the one given must not be used afterwards.
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

  Raises:
    NotFinite: a loss, gradient, parameter or validation result is; nothing of it is saved.
    ValueError: impossible arguments, data that ends early, checkpoints that cannot be used.
  """
  plan = _Plan(
    steps, None if workdir is None else pathlib.Path(workdir), dict(config or {}), validate,
    log_every, validate_every, save_every, keep, progress, watch,
  )
  _check(plan)
  states.check_apart(state, frozen)
  state, history = _resume(state, data, plan)
  if int(state.step) == steps:
    return state, history
  return _train(step, state, frozen, data, plan, history)


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
  json.dumps(plan.config, allow_nan=False)  # what no checkpoint could hold fails here, not later


def _resume(state, data, plan: _Plan):
  """Returns the state and history to go on from; moves the data to the saved position."""
  workdir = plan.workdir
  found = workdir and checkpoint.restore(workdir / CHECKPOINTS, state, config=plan.config)
  state = found.state if found else state
  done = int(state.step)
  if done > plan.steps:
    where = workdir or "the state"
    raise ValueError(f"{where} is at step {done}, beyond the {plan.steps} asked for")
  if found:
    data.set_state(found.position)
  return state, metrics.truncate(workdir / METRICS, last=done) if workdir else []


def _train(step, state, frozen, data, plan: _Plan, history: list[metrics.Record]):
  """Returns the state and history after the steps that are left."""
  done, waiting = int(state.step), []
  with (
    metrics.sinks(plan.workdir, done=done, steps=plan.steps, progress=plan.progress) as sinks,
    metrics.Stopwatch() as stopwatch,
    observe.Trace(plan.watch.profile, plan.workdir) as trace,
  ):
    clock = time.perf_counter()
    for number in range(done + 1, plan.steps + 1):
      with trace.step(number):
        state, result = _advance(step, state, frozen, data, number, stopwatch)
      trace.done(number, result.metrics)
      waiting.append(result)
      if not plan.looks(number):
        continue
      fresh = waiting[0].number == done + 1
      records = [_summary(state.params, waiting, clock, plan.watch, fresh=fresh)]
      if plan.checks(number):
        with observe.taken("validate_seconds") as times:
          valid = _validation(plan.validate, state.params, number)
        records.append(valid | times)
      history = history + metrics.write(sinks, records)
      if plan.saves(number) or number == plan.steps:
        _check_state(state, waiting[-1])
      if plan.saves(number):
        folder, position = plan.workdir / CHECKPOINTS, data.get_state()
        with observe.taken("checkpoint_seconds") as times:
          checkpoint.save(folder, state, position=position, config=plan.config, keep=plan.keep)
        saved = {"step": number, "split": "save", **times}
        history = history + metrics.write(sinks, [saved])
      waiting, clock = [], time.perf_counter()
  return state, history


def _advance(step, state, frozen, data, number, stopwatch) -> tuple[states.TrainState, _Done]:
  """Fetches a batch and dispatches a step; nothing waits for its result."""
  position = json.dumps(data.get_state())
  start = time.perf_counter()
  try:
    batch = next(data)
  except StopIteration:
    raise ValueError(f"the data ended before step {number}, at position {position}") from None
  called = time.perf_counter()
  state, results = step(state, frozen, batch)
  returned = time.perf_counter()
  timing = metrics.Timing(called - start, called, returned, stopwatch.ready(results))
  return state, _Done(number, position, results, timing, observe.positions(batch))


def _summary(
  params, waiting: list[_Done], clock: float, watch: observe.Watch, *, fresh: bool
) -> metrics.Record:
  """Returns the record of the steps since the last one: means over their weights.

  Raises:
    NotFinite: of the first step that is.
  """
  values = jax.device_get([done.metrics for done in waiting])
  times = metrics.durations([done.timing for done in waiting], fresh=fresh)
  seconds = time.perf_counter() - clock - times.get("compile_seconds", 0.0)
  for done, value in zip(waiting, values, strict=True):
    if not value["finite"]:
      raise NotFinite(f"step {done.number}: {_blame(params, value)} is not finite (loss "
                      f"{value['loss']}, gradient norm {value['grad_norm']}); batch at position "
                      f"{done.position}")
  weights = [float(value["weight"]) for value in values]
  names = [name for name in values[0] if name not in ("finite", "culprit", "weight")]
  means = {
    name: math.fsum(w * float(value[name]) for w, value in zip(weights, values, strict=True))
    / math.fsum(weights)
    for name in names
  }
  return {
    "step": waiting[-1].number, "split": "train", **means,
    "learning_rate": float(values[-1]["learning_rate"]),
    "weight": math.fsum(weights),
    "tokens_per_second": math.fsum(weights) / seconds,
    "steps": len(waiting),
    "step_seconds": seconds / len(waiting),
    **times,
    **observe.utilisation(watch, [done.shape for done in waiting], seconds),
    **observe.memory(),
  }


def _blame(params, value: Mapping[str, Any]) -> str:
  """Returns what is not finite in one step, a leaf if there is one."""
  if not value["weight"] > 0:
    return f"the mean over a batch of weight {value['weight']}"
  if value["culprit"] >= 0:
    return steps_of.culprit(params, int(value["culprit"]))
  return next(f"the metric {name}" for name in sorted(value) if not math.isfinite(value[name]))


def _validation(validate, params, number: int) -> metrics.Record:
  values = {name: float(value) for name, value in validate(params).items()}
  for name, value in values.items():
    if not math.isfinite(value):
      raise NotFinite(f"step {number}: validation {name} is {value}")
  return {"step": number, "split": "valid", **values}


@jax.jit
def _finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _check_state(state, last: _Done) -> None:
  """Raises unless every number of a state that is to be saved or returned is finite."""
  names, leaves = zip(*states.named_leaves(state), strict=True)
  good = jax.device_get(_finite(list(leaves)))
  if not good.all():
    name = names[int(good.argmin())]
    raise NotFinite(f"step {last.number}: {name} is not finite after the update; batch at position "
                    f"{last.position}")
