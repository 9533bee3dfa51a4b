"""One update, and one evaluation, of any loss that returns sums."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybridlm.train import optim, state

LossFn = Callable[[Any, Any, Any], dict[str, Any]]
# What a step does with a bad update.
BAD = ("make", "skip")


def _micro_batches(batch: Any, accumulate: int) -> Any:
  """Returns arrays [accumulate, B / accumulate, ...]; every micro-batch takes every k-th row.

  Rows stay on the device that holds them when B is sharded.
  """
  def split(x_BL):
    rows = x_BL.shape[0]
    if rows % accumulate:
      raise ValueError(f"batch of {rows} rows is not a multiple of accumulate={accumulate}")
    return x_BL.reshape(rows // accumulate, accumulate, *x_BL.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def _gradients(
  loss_fn: LossFn, params: Any, frozen: Any, batch: Any, accumulate: int, shardings: Any
):
  """Returns the sums of a batch and the gradient of its summed loss, in float32 or wider.

  `shardings` is where it goes, micro-batch by micro-batch; None lets the compiler choose.
  """
  def summed(params, part):
    sums = loss_fn(params, frozen, part)
    return sums["loss"], sums

  def one(part):
    grads, sums = jax.grad(summed, has_aux=True)(params, part)
    if shardings is not None:
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    wide = functools.partial(jnp.promote_types, jnp.float32)
    return sums, jax.tree.map(lambda grad: grad.astype(wide(grad.dtype)), grads)

  if accumulate == 1:
    return one(batch)
  parts = _micro_batches(batch, accumulate)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
  start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def add(total, part):
    # Without it, XLA for TPUs (libtpu 0.0.52) fails on sums that it tries to move out of the loop.
    return jax.tree.map(jnp.add, total, jax.lax.optimization_barrier(one(part))), None

  return jax.lax.scan(add, start, parts)[0]


def _finite_leaves(tree: Any) -> list[Any]:
  return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]


def _health(params: Any, grads: Any, sums: dict[str, Any]) -> dict[str, Any]:
  """Returns whether all is finite, and the index of the first leaf that is not (-1: none).

  Parameters before the update come first, then gradients: `culprit` says which an index means.
  """
  good = jnp.stack(_finite_leaves(params) + _finite_leaves(grads))
  finite = good.all() & jnp.stack(_finite_leaves(sums)).all()
  return {"finite": finite, "culprit": jnp.where(good.all(), -1, jnp.argmin(good))}


def culprit(params: Any, index: int) -> str:
  """Returns what `index` of a step's "culprit" metric means: `gradient of blocks/07/w_up_DF`."""
  names = [name for name, _ in state.named_leaves(params)]
  kind, index = divmod(index, len(names))
  return f"{('parameter', 'gradient of')[kind]} {names[index]}"


def _updates(before: state.TrainState) -> Any:
  """Returns the updates made so far: an optimiser counts no skipped steps, where it counts."""
  counts = optax.tree.get_all_with_path(before.opt_state, "count")
  return counts[0][1] if counts else before.step


def make_step(
  loss_fn: LossFn, optimizer: optim.Optimizer, *, accumulate: int = 1, shardings: Any = None,
  bad: str = "make",
) -> Callable[[state.TrainState, Any, Any], tuple[state.TrainState, dict[str, Any]]]:
  """Returns `step(state, frozen, batch) -> (state, metrics)`, compiled; it donates the state alone.

  The gradient is that of Σ loss / Σ weight over the whole batch, however it is split.

  Args:
    loss_fn: `loss_fn(params, frozen, batch)` returns sums, "loss" and "weight" among them.
    optimizer: from `optim.make`.
    accumulate: micro-batches that the rows of a batch are split into, one after the other.
    shardings: where the new state goes, as the tree `mesh.shardings(mesh, state, rules)` returns;
      None lets the compiler choose.
    bad: "make" makes every update. "skip" makes the step `step(state, frozen, batch, bound)`, and
      where its loss is above the bound, or something of it is not finite, only its number changes.

  Returns:
    A function whose metrics are the sums divided by "weight" (which stays a sum), "grad_norm"
    (before clipping), "learning_rate", "finite", and "culprit" (see the function of that name);
    under "skip" also "skipped" and "bound".

  Raises:
    ValueError: `accumulate` is not positive, or, when called, does not divide the batch; an unknown
      name.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate={accumulate} must be at least 1")
  if bad not in BAD:
    raise ValueError(f"bad={bad!r} is not one of {', '.join(BAD)}")

  def step(before, frozen, batch):
    where = None if shardings is None else shardings.params
    sums, grads = _gradients(loss_fn, before.params, frozen, batch, accumulate, where)
    grads = jax.tree.map(lambda grad: grad / sums["weight"], grads)
    updates, opt_state = optimizer.update(grads, before.opt_state, before.params)
    after = state.TrainState(
      before.step + 1, optax.apply_updates(before.params, updates), opt_state
    )
    means = {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
    metrics = means | _health(before.params, grads, means) | {
      "weight": sums["weight"],
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": jnp.asarray(optimizer.schedule(_updates(before)), jnp.float32),
    }
    return after, metrics

  def skipping(before, frozen, batch, bound):
    after, metrics = step(before, frozen, batch)
    good = metrics["finite"] & (metrics["loss"] <= bound)
    good &= jnp.stack(_finite_leaves(after)).all()
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    return kept._replace(step=after.step), metrics | {"skipped": ~good, "bound": bound}

  placed = {} if shardings is None else {"out_shardings": (shardings, None)}
  return jax.jit(skipping if bad == "skip" else step, donate_argnums=0, **placed)


def make_eval(loss_fn: LossFn) -> Callable[[Any, Any, Iterable[Any]], dict[str, float]]:
  """Returns `evaluate(params, frozen, batches)`: means over all weights, and their sum "weight".

  Raises:
    ValueError: when called with no batch, or with batches of no weight.
  """
  compiled = jax.jit(loss_fn)

  def evaluate(params, frozen, batches):
    parts = jax.device_get([compiled(params, frozen, batch) for batch in batches])
    if not parts:
      raise ValueError("evaluation: there is no batch to evaluate on")
    totals = {name: math.fsum(float(part[name]) for part in parts) for name in parts[0]}
    if not totals["weight"] > 0:
      raise ValueError(f"evaluation: {len(parts)} batches of weight {totals['weight']}")
    means = {name: total / totals["weight"] for name, total in totals.items()}
    return means | {"weight": totals["weight"]}

  return evaluate
