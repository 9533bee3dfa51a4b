"""A teacher's most likely tokens and the mass of all others, without ever holding [B, L, V]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.distill import divergences
from hybridlm.distill.vocabulary import Vocabulary, logits, softmax


class Top(NamedTuple):
  """Ids and log-probabilities in descending order, and the logarithm of the mass that is left."""

  id_BLT: Int[Array, "B L T"]
  log_BLT: Float[Array, "B L T"]
  tail_log_BL: Float[Array, "B L"]


def of(
  hidden_BLD: Float[Array, "B L D"],
  head_DV: Float[Array, "D V"],
  *,
  count: int,
  temperature: float = 1.0,
  vocabulary: int | None = None,
  chunk: int = 128,
) -> Top:
  """Returns a model's `count` most likely tokens of every position.

  Args:
    hidden_BLD: final hidden states.
    head_DV: the output matrix.
    count: of tokens; all of them leave nothing.
    temperature: divides the logits.
    vocabulary: real rows; those from there on are padding.
    chunk: positions handled at a time.

  Raises:
    ValueError: a count that the vocabulary has not.
  """
  real = head_DV.shape[1] if vocabulary is None else vocabulary
  if not 1 <= count <= real:
    raise ValueError(f"the {count} most likely tokens of a vocabulary of {real}: choose 1..{real}")
  columns = Vocabulary(real, head_DV.shape[1])
  batch, length, width = hidden_BLD.shape
  chunk = min(chunk, length)
  parts = -(-length // chunk)
  x_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, parts * chunk - length), (0, 0)))
  x_CBQD = jnp.moveaxis(x_BLD.reshape(batch, parts, chunk, width), 1, 0)

  def one(x_BQD: jax.Array):
    logits_BQV = logits(x_BQD, head_DV, columns, None, padded=real < columns.columns)
    soft = softmax(logits_BQV, columns.max(logits_BQV), temperature, columns)
    return divergences.top_of(soft, count, columns)

  found = jax.lax.map(one, x_CBQD)
  return Top(*(jnp.moveaxis(each, 0, 1).reshape(batch, parts * chunk, *each.shape[3:])[:, :length]
               for each in found))
