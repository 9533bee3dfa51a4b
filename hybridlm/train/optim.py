"""AdamW with the learning-rate schedules and the decay rule of the house."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hybridlm import axes


class Optimizer(NamedTuple):
  """An optax transformation (init, update) together with the learning rate it uses, by step."""

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]
  schedule: Callable[[Any], Any]


def _cosine(progress):
  return 0.5 * (1 + jnp.cos(math.pi * progress))


def _linear(progress):
  return 1 - progress


# First words of projections, also of those inside a Mamba-1 mixer, and of embeddings.
DECAYED = ("w", "in", "meta")
# How the rate falls from its peak (1) to its floor (0) over the decay.
SHAPES: Mapping[str, Callable] = {"cosine": _cosine, "wsd": _linear}


def schedule(
  name: str, *, peak: float, steps: int, warmup: int = 0, floor: float = 0.0, decay: int = 0
) -> Callable[[Any], Any]:
  """Returns the learning rate as a function of the number of updates already made.

  It rises in a line from peak/(warmup + 1) at update 0 to `peak` at update `warmup`, so that no
  update is wasted on a rate of zero, and would reach `floor` at update `steps`.

  Args:
    name: "cosine" falls from the end of the warm-up on; "wsd" (warm-up, stable, decay) stays at
      the peak and falls in a line over the last `decay` updates (none: it stays).
    peak: the highest rate.
    steps: updates of the whole run.
    warmup: updates of the rise.
    floor: the rate at the end.
    decay: updates of the fall; "wsd" only.

  Raises:
    ValueError: an unknown name, rates or numbers of steps that no run can have.

  Source: cosine, arXiv 1608.03983; warm-up, stable, decay, arXiv 2404.06395 §4.
  """
  if name not in SHAPES:
    raise ValueError(f"schedule {name!r} is not one of {', '.join(SHAPES)}")
  if steps < 1 or warmup < 0 or decay < 0:
    raise ValueError(f"schedule: steps={steps} must be positive, warmup={warmup} and decay={decay} "
                     "not negative")
  if warmup > steps:
    raise ValueError(f"schedule: warmup={warmup} is longer than the run of steps={steps}")
  if name == "cosine" and decay:
    raise ValueError(f"schedule: decay={decay} belongs to wsd, cosine falls over all steps")
  if warmup + decay > steps:
    raise ValueError(f"schedule: warmup={warmup} and decay={decay} exceed steps={steps}")
  if not 0 <= floor <= peak or not 0 < peak < math.inf:
    raise ValueError(f"schedule: rates must satisfy 0 <= floor={floor} <= peak={peak}, peak > 0")
  start = warmup if name == "cosine" else steps - decay
  length = max(1, steps - start)

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    rising = peak * (step + 1) / (warmup + 1)
    progress = jnp.clip((step - start) / length, 0.0, 1.0) if start < steps else 0.0
    falling = floor + (peak - floor) * SHAPES[name](progress)
    return jnp.where(step < warmup, rising, falling)

  return rate


def decays(name: str) -> bool:
  """Returns whether weight decay applies to a leaf: to projections, embeddings and taps only.

  Gains, biases, A_log, D (`skip`) and dt_bias are left alone.
  """
  words = axes.stem(name).split("_")
  return words[0] in DECAYED or (words[0] == "conv" and "bias" not in words)


def decay_mask(params: Any) -> Any:
  """Returns the tree of booleans that says which leaves decay, read from their names."""
  return jax.tree_util.tree_map_with_path(lambda path, _: decays(path[-1].key), params)


def _check_adam(beta1: float, beta2: float, eps: float, weight_decay: float, clip: float | None):
  for name, beta in (("beta1", beta1), ("beta2", beta2)):
    if not 0 <= beta < 1:
      raise ValueError(f"optimiser: {name}={beta} must lie in [0, 1)")
  if not eps > 0 or not weight_decay >= 0:
    raise ValueError(f"optimiser: eps={eps} must be positive, weight_decay={weight_decay} not "
                     "negative")
  if clip is not None and not clip > 0:
    raise ValueError(f"optimiser: clip={clip} must be positive, or None for no clipping")


def make(
  *,
  peak: float,
  steps: int,
  warmup: int = 0,
  floor: float = 0.0,
  decay: int = 0,
  name: str = "cosine",
  beta1: float = 0.9,
  beta2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  clip: float | None = 1.0,
) -> Optimizer:
  """Returns AdamW on a schedule; its state is float32, or float64 of such parameters.

  Args:
    peak: see `schedule`, as for steps, warmup, floor, decay and name.
    steps: updates of the whole run.
    warmup: updates of the rise.
    floor: the rate at the end.
    decay: updates of the fall, for "wsd".
    name: the schedule.
    beta1: memory of the mean gradient.
    beta2: memory of the mean squared gradient.
    eps: added to its root.
    weight_decay: times the learning rate, taken off the leaves that `decays` names.
    clip: largest global norm of a gradient; None clips nothing.

  Raises:
    ValueError: a value out of range, or a schedule that cannot be.
  """
  _check_adam(beta1, beta2, eps, weight_decay, clip)
  rate = schedule(name, peak=peak, steps=steps, warmup=warmup, floor=floor, decay=decay)
  chain = optax.chain(
    optax.identity() if clip is None else optax.clip_by_global_norm(clip),
    optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=decay_mask),
    optax.scale_by_learning_rate(rate),
  )
  return Optimizer(lambda params: chain.init(_wide(params)), chain.update, rate)


def _wide(tree: Any) -> Any:
  return jax.tree.map(
    lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree
  )
