"""Sums over the vocabulary where a device has all columns of the logits, or its share of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The logit of a row that is padding or does not stay: exp gives exactly 0, and differences of two
# give 0, not NaN.
OUT = -1e30


class Vocabulary(NamedTuple):
  """Columns [V] of logits: `columns` here, and as many on every device along a mesh axis.

  Those from `real` on, counted over all devices, are padding. With an axis, methods that reduce
  run inside `jax.shard_map` and return the same on all of its devices.
  """

  real: int
  columns: int
  axis: str | None = None

  def numbers(self, shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Returns for logits of a shape which token each column is."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) + self._first()

  def _first(self):
    return 0 if self.axis is None else jax.lax.axis_index(self.axis) * self.columns

  def sum(self, value_BQV: jax.Array) -> jax.Array:
    """Returns sums over the vocabulary, [B, Q, 1]."""
    total_BQ1 = value_BQV.sum(-1, keepdims=True)
    return total_BQ1 if self.axis is None else jax.lax.psum(total_BQ1, self.axis)

  def max(self, value_BQV: jax.Array) -> jax.Array:
    """Returns maxima over the vocabulary, [B, Q, 1]."""
    top_BQ1 = value_BQV.max(-1, keepdims=True)
    return top_BQ1 if self.axis is None else jax.lax.pmax(top_BQ1, self.axis)

  def first(self, hit_BQV: Bool[Array, "B Q V"]) -> Int[Array, "B Q"]:
    """Returns the first token that is hit; XLA's argmax is a slow reduction of pairs on the CPU."""
    beyond = jnp.iinfo(jnp.int32).max
    first_BQ = jnp.where(hit_BQV, self.numbers(hit_BQV.shape), beyond).min(-1)
    return first_BQ if self.axis is None else jax.lax.pmin(first_BQ, self.axis)

  def top(
    self, value_BQV: Float[Array, "B Q V"], count: int
  ) -> tuple[Float[Array, "B Q T"], Int[Array, "B Q T"]]:
    """Returns the greatest values in descending order, the first of equals first, and whose."""
    value_BQT, id_BQT = jax.lax.top_k(value_BQV, min(count, self.columns))
    id_BQT = id_BQT + self._first()
    if self.axis is not None:
      value_BQT, id_BQT = (
        jax.lax.all_gather(v, self.axis, axis=2, tiled=True) for v in (value_BQT, id_BQT)
      )
      value_BQT, place_BQT = jax.lax.top_k(value_BQT, count)
      id_BQT = jnp.take_along_axis(id_BQT, place_BQT, axis=2)
    return value_BQT, id_BQT

  def take(
    self, value_BQV: Float[Array, "B Q V"], id_BQT: Int[Array, "B Q T"]
  ) -> Float[Array, "B Q T"]:
    """Returns the values of some tokens."""
    place_BQT, here_BQT = self._places(id_BQT)
    value_BQT = jnp.take_along_axis(value_BQV, jnp.where(here_BQT, place_BQT, 0), axis=2)
    if self.axis is None:
      return value_BQT
    return jax.lax.psum(jnp.where(here_BQT, value_BQT, 0), self.axis)

  def put(
    self, value_BQV: Float[Array, "B Q V"], id_BQT: Int[Array, "B Q T"], new_BQT: jax.Array | float
  ) -> Float[Array, "B Q V"]:
    """Returns a copy with new values for some tokens."""
    place_BQT, here_BQT = self._places(id_BQT)
    rows, tokens, _ = id_BQT.shape
    row_B11, token_1Q1 = jnp.arange(rows)[:, None, None], jnp.arange(tokens)[None, :, None]
    place_BQT = jnp.where(here_BQT, place_BQT, self.columns)  # beyond the last: dropped
    return value_BQV.at[row_B11, token_1Q1, place_BQT].set(new_BQT, mode="drop")

  def _places(self, id_BQT):
    """Returns the columns of tokens, and whether this device has them."""
    place_BQT = id_BQT - self._first()
    return place_BQT, (place_BQT >= 0) & (place_BQT < self.columns)


class Soft(NamedTuple):
  """A softmax of logits, not divided yet, so that what needs no division does not pay for it.

  logits: [B, Q, V].  part: exp((logits − maximum) / temperature).  total: the sum of part,
  [B, Q, 1].  log: the logarithm of Σ exp(logits / temperature), [B, Q, 1].
  """

  logits: jax.Array
  part: jax.Array
  total: jax.Array
  log: jax.Array
  temperature: float

  def probabilities(self) -> jax.Array:
    """Returns probabilities."""
    return self.part / self.total

  def logs(self) -> jax.Array:
    """Returns logarithms of probabilities, finite where a probability is 0."""
    return self.logits / self.temperature - self.log


def logits(
  x_BQD: Float[Array, "B Q D"],
  head_DV: Float[Array, "D V"],
  vocabulary: Vocabulary,
  stay_V: Bool[Array, "V"] | None,
  *,
  padded: bool,
) -> Float[Array, "B Q V"]:
  """Returns logits in float32 or wider, those that are no choice at `OUT`.

  `padded`: whether there are columns that are padding.
  """
  dtype = jnp.promote_types(x_BQD.dtype, jnp.float32)
  logits_BQV = jnp.einsum("BQD,DV->BQV", x_BQD, head_DV, preferred_element_type=dtype)
  if padded:
    logits_BQV = jnp.where(
      vocabulary.numbers(logits_BQV.shape) < vocabulary.real, logits_BQV, OUT
    )
  return logits_BQV if stay_V is None else jnp.where(stay_V, logits_BQV, OUT)


def softmax(logits_BQV: jax.Array, top_BQ1: jax.Array, temperature: float, vocabulary) -> Soft:
  """Returns the softmax of logits whose maxima are known."""
  part_BQV = jnp.exp((logits_BQV - top_BQ1) / temperature)
  total_BQ1 = vocabulary.sum(part_BQV)
  log_BQ1 = top_BQ1 / temperature + jnp.log(total_BQ1)
  return Soft(logits_BQV, part_BQV, total_BQ1, log_BQ1, temperature)
