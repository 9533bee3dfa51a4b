"""Losses of candidates as masked parents: one compiled program scores all of them.

What differs between candidates is a tree of zeros and ones whose shapes follow from the parent
alone (`cut.stays`), so the mask itself is part of the program. The teacher's hidden states are
computed once a batch.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.config import ModelConfig
from hybridlm.distill import loss
from hybridlm.prune import cut
from hybridlm.prune.plan import Plan

# `(cfg, params, batch, kept) -> (hidden_BLD, head_DV)`
Hidden = Callable[..., tuple[jax.Array, jax.Array]]
LOSSES = ("kl", "ce", "agree")


class NotFinite(ValueError, FloatingPointError):
  """A loss is NaN or infinity."""


class Held(NamedTuple):
  """A batch on the device, and what the teacher makes of it."""

  batch: Mapping[str, jax.Array]
  teacher_BLD: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "hidden"))
def _teacher(cfg: ModelConfig, hidden: Hidden, params, batch):
  return hidden(cfg, params, batch, None)


@functools.partial(jax.jit, static_argnames=("cfg", "hidden"))
def _sums(cfg: ModelConfig, hidden: Hidden, params, teacher_head_DV, stays, held: Held):
  masked, kept = cut.mask_by(cfg, params, stays)
  student_BLD, head_DV = hidden(cfg, masked, held.batch, kept)
  return loss.sums(
    student_BLD, head_DV, held.batch["target_BL"], held.batch["weight_BL"],
    teacher_BLD=held.teacher_BLD, teacher_head_DV=teacher_head_DV, kl=1.0, ce=1.0,
    vocabulary=cfg.real_vocabulary, stay_V=kept["stay_V"],
  )


class Scorer:
  """The losses of plans of one parent on fixed batches.

  Args:
    cfg: the parent.
    hidden: how it computes, the same function every time: it is part of the program's key.
    params: its parameters.
    batches: dicts with `token_BL`, `target_BL`, `weight_BL` and `segment_BL`.

  Raises:
    ValueError: no batch.
  """

  def __init__(
    self, cfg: ModelConfig, hidden: Hidden, params: Mapping[str, Any],
    batches: Sequence[Mapping[str, Any]],
  ):
    if not batches:
      raise ValueError("search: no batch to score candidates on")
    self._cfg, self._hidden, self._params = cfg, hidden, params
    self._held, self._head_DV = [], None
    for batch in batches:
      batch = {name: jnp.asarray(batch[name]) for name in batch}
      teacher_BLD, self._head_DV = _teacher(cfg, hidden, params, batch)
      self._held.append(Held(batch, teacher_BLD))

  def __call__(self, plan: Plan) -> dict[str, float]:
    """Returns means a token of what a plan leaves: "kl" to the parent and "ce" in nats, "agree".

    The plan is taken for one of this parent: comparing hashes costs more than scoring.

    Raises:
      NotFinite: a loss is.
    """
    stays = cut.stays(plan)
    parts = [
      _sums(self._cfg, self._hidden, self._params, self._head_DV, stays, held)
      for held in self._held
    ]
    found = jax.device_get(parts)
    weight = math.fsum(float(part["weight"]) for part in found)
    means = {name: math.fsum(float(part[name]) for part in found) / weight for name in LOSSES}
    for name, value in means.items():
      if not math.isfinite(value):
        raise NotFinite(f"search: {name} of a candidate is {value}")
    return means


def programs() -> int:
  """Returns how many programs have been compiled for scoring in this process."""
  return _sums._cache_size()
