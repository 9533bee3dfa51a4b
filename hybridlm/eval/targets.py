"""Log-probabilities of chosen next tokens, and whether greedy decoding would choose them too."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybridlm.eval.lm import Hidden

# `score(params, batch)` returns float32 log-probabilities (nats) and flags, both [B, L].
Score = Callable[[Any, Any], tuple[Any, Any]]
# Tokens whose logits are held at a time.
_TOKENS = 256


def make(hidden: Hidden, *, vocabulary: int | None = None, chunk: int | None = None) -> Score:
  """Returns `score(params, batch) -> (logprob_BL, greedy_BL)`, compiled once a shape.

  At each position of weight above 0: the log-probability of its target in nats, and whether the
  target is the first maximum of the logits. Both are 0 elsewhere, and chunks without any weight
  are not computed, so that scoring the end of long rows does not meet the head for their start.

  Args:
    hidden: the model's apply function, called with `(params, batch)`.
    vocabulary: real rows of the head; None: all. Targets from there on give NaN.
    chunk: positions whose logits are held at a time; None: about 256 tokens a batch.
  """

  def score(params, batch):
    hidden_BLD, head_DV = hidden(params, batch)
    real_DV = head_DV if vocabulary is None else head_DV[:, :vocabulary]
    target_BL, weight_BL = jnp.asarray(batch["target_BL"]), jnp.asarray(batch["weight_BL"])
    rows, length = target_BL.shape
    size = min(length, max(1, _TOKENS // rows) if chunk is None else chunk)
    short = -length % size

    def cut(x_BL):
      padded = jnp.pad(x_BL, [(0, 0), (0, short)] + [(0, 0)] * (x_BL.ndim - 2))
      return jnp.moveaxis(padded.reshape(rows, -1, size, *x_BL.shape[2:]), 1, 0)

    def some(x_BQD, target_BQ, weight_BQ):
      logprob_BQ, greedy_BQ = _chunk(x_BQD, real_DV, target_BQ)
      return jnp.where(weight_BQ > 0, logprob_BQ, 0.0), (weight_BQ > 0) & greedy_BQ

    def none(x_BQD, target_BQ, weight_BQ):
      return jnp.zeros(target_BQ.shape, jnp.float32), jnp.zeros(target_BQ.shape, bool)

    def body(parts):
      return jax.lax.cond((parts[2] > 0).any(), some, none, *parts)

    found = jax.lax.map(body, (cut(hidden_BLD), cut(target_BL), cut(weight_BL)))
    return tuple(jnp.moveaxis(x_CBQ, 0, 1).reshape(rows, -1)[:, :length] for x_CBQ in found)

  return jax.jit(score)


def _chunk(
  x_BQD: Float[Array, "B Q D"], head_DV: Float[Array, "D V"], target_BQ
) -> tuple[Float[Array, "B Q"], Any]:
  """Returns the targets' log-probabilities and whether each is the first maximum."""
  logits_BQV = jnp.einsum("BQD,DV->BQV", x_BQD, head_DV, preferred_element_type=jnp.float32)
  column_BQV = jax.lax.broadcasted_iota(jnp.int32, logits_BQV.shape, 2)
  top_BQ = logits_BQV.max(-1)
  total_BQ = jnp.exp(logits_BQV - top_BQ[..., None]).sum(-1)
  hit_BQV = column_BQV == target_BQ[..., None]
  chosen_BQ = jnp.where(hit_BQV, logits_BQV, 0.0).sum(-1)
  known_BQ = (target_BQ >= 0) & (target_BQ < head_DV.shape[1])
  logprob_BQ = jnp.where(known_BQ, chosen_BQ - top_BQ - jnp.log(total_BQ), jnp.nan)
  first_BQ = jnp.where(logits_BQV == top_BQ[..., None], column_BQV, head_DV.shape[1]).min(-1)
  return logprob_BQ, first_BQ == target_BQ


def rate(hits: int, count: int) -> dict[str, float]:
  """Returns "accuracy", its 95 % interval "low" to "high", and "count".

  Source: Wilson 1927, the score interval of a binomial share; it stays inside 0..1.

  Raises:
    ValueError: nothing was counted.
  """
  if not 0 <= hits <= count or count < 1:
    raise ValueError(f"{hits} hits of {count}: nothing to take a share of")
  z = 1.959963984540054
  share, scale = hits / count, 1 + z * z / count
  middle = (share + z * z / (2 * count)) / scale
  reach = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  return {
    "accuracy": share,
    "low": max(0.0, middle - reach),
    "high": min(1.0, middle + reach),
    "count": count,
  }
