"""Looking at the results of steps: their mean as a record, and which of them were bad."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.train import guard as guards
from hybridlm.train import metrics, observe
from hybridlm.train import state as states
from hybridlm.train import step as steps_of

# What a step says of itself beside its means.
_SIGNS = ("finite", "culprit", "skipped", "bound", "weight")


class Done(NamedTuple):
  """One dispatched step: its number, where the data stood before its batch, its results,
  and the rows and tokens a row of the batch."""

  number: int
  position: str
  metrics: dict[str, Any]
  timing: metrics.Timing
  shape: tuple[int, int]


def listen(memory: guards.Memory, waiting: list[Done], *, upto: int) -> guards.Memory:
  """Returns what is remembered after the steps up to a number; waits for those results alone."""
  for done in waiting:
    if memory.heard < done.number <= upto:
      loss, skipped = jax.device_get((done.metrics["loss"], done.metrics["skipped"]))
      memory = guards.heard(memory, done.number, float(loss), skipped=bool(skipped))
  return memory


def judged(
  params: Any, waiting: list[Done], guard: guards.Guard, memory: guards.Memory
) -> tuple[list[tuple[Done, dict[str, Any]]], guards.Memory, list[metrics.Record]]:
  """Returns the good steps with their values, what is remembered, and a record a skipped step.

  Raises:
    Bad: of the first step that is, unless its update was skipped and the limit allows it.
  """
  good, told = [], []
  values = jax.device_get([done.metrics for done in waiting])
  seen = list(zip(waiting, values, strict=True))
  before = memory.skipped - sum(
    bool(value.get("skipped")) for done, value in seen if done.number <= memory.heard
  )
  for done, value in seen:
    bad = _problem(params, done, value, guard, memory)
    if bad is None:
      good.append((done, value))
    elif not value.get("skipped", False):
      raise bad
    elif before + len(told) >= guard.limit:
      raise guards.exhausted(guard, bad)
    else:
      told.append({"step": done.number, "split": "guard", "action": "skip", "reason": str(bad)})
    memory = guards.heard(memory, done.number, float(value["loss"]), skipped=bad is not None)
  return good, memory, told


def _problem(
  params: Any, done: Done, value: Mapping[str, Any], guard: guards.Guard, memory: guards.Memory
) -> guards.Bad | None:
  """Returns what is bad about a step, or None."""
  where = f"batch at position {done.position}"
  about = {"step": done.number, "position": done.position}
  size = f"(loss {value['loss']}, gradient norm {value['grad_norm']})"
  if not value["finite"]:
    text = f"step {done.number}: {_blame(params, value)} is not finite {size}; {where}"
    return guards.NotFinite(text, **about)
  limit = value.get("bound", guards.bound(guard, memory, done.number))
  if value.get("skipped", value["loss"] > limit):
    what = f"the loss is above {limit:.6g}, {guard.spike:g} times the running median"
    if not value["loss"] > limit:
      what = "the update is not finite"
    return guards.Spike(f"step {done.number}: {what} {size}; {where}", **about)
  return None


def summary(
  good: list[tuple[Done, dict[str, Any]]], waiting: list[Done], clock: float,
  watch: observe.Watch, *, fresh: bool,
) -> list[metrics.Record]:
  """Returns the record of the steps since the last one, means over the weights of the good ones.

  There is none where no step was good.
  """
  if not good:
    return []
  values = [value for _, value in good]
  times = metrics.durations([done.timing for done in waiting], fresh=fresh)
  seconds = time.perf_counter() - clock - times.get("compile_seconds", 0.0)
  weights = [float(value["weight"]) for value in values]
  means = {
    name: math.fsum(w * float(value[name]) for w, value in zip(weights, values, strict=True))
    / math.fsum(weights)
    for name in values[0] if name not in _SIGNS
  }
  return [{
    "step": waiting[-1].number, "split": "train", **means,
    "learning_rate": float(values[-1]["learning_rate"]),
    "weight": math.fsum(weights),
    "tokens_per_second": math.fsum(weights) / seconds,
    "steps": len(waiting),
    "step_seconds": seconds / len(waiting),
    **times,
    **observe.utilisation(watch, [done.shape for done in waiting], seconds),
    **observe.memory(),
  }]


def _blame(params: Any, value: Mapping[str, Any]) -> str:
  """Returns what is not finite in one step, a leaf if there is one."""
  if not value["weight"] > 0:
    return f"the mean over a batch of weight {value['weight']}"
  if value["culprit"] >= 0:
    return steps_of.culprit(params, int(value["culprit"]))
  return next(f"the metric {name}" for name in sorted(value) if not math.isfinite(value[name]))


def validation(
  validate: Callable[[Any], Mapping[str, float]], params: Any, number: int
) -> metrics.Record:
  """Returns the record of a validation.

  Raises:
    NotFinite: a result is.
  """
  values = {name: float(value) for name, value in validate(params).items()}
  for name, value in values.items():
    if not math.isfinite(value):
      raise guards.NotFinite(f"step {number}: validation {name} is {value}", step=number)
  return {"step": number, "split": "valid", **values}


@jax.jit
def _finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def check_state(state: states.TrainState, last: Done) -> None:
  """Raises unless every number of a state that is to be saved or returned is finite.

  Raises:
    NotFinite: the first leaf that is not.
  """
  names, leaves = zip(*states.named_leaves(state), strict=True)
  good = jax.device_get(_finite(list(leaves)))
  if not good.all():
    name = names[int(good.argmin())]
    text = (f"step {last.number}: {name} is not finite after the update; batch at position "
            f"{last.position}")
    raise guards.NotFinite(text, step=last.number, position=last.position)
