"""From logits to a token: the largest, or a draw from what temperature, top-k and top-p leave."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

# Below it, logits divided by the temperature leave float32.
SMALLEST = 1e-30


def check(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
  """Raises unless the numbers describe a way to draw tokens.

  Raises:
    ValueError: a temperature below 0 or next to it, a `top_k` below 1, or a `top_p` outside (0, 1].
  """
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"sampling: temperature={temperature!r} must be a number of at least 0")
  if 0 < temperature < SMALLEST:
    raise ValueError(f"sampling: temperature={temperature!r} must be 0 or at least {SMALLEST}")
  if top_k is not None and top_k < 1:
    raise ValueError(f"sampling: top_k={top_k} must be at least 1")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"sampling: top_p={top_p!r} must lie in (0, 1]")


def keys(seed: int, row_B: Int[Any, "B"]) -> jax.Array:
  """Returns one random key a row: it follows from the seed and the row's number alone."""
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(row_B))


def greedy(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
  """Returns the first of the largest; V, which is no token, where a logit is not a number.

  In two sums that vectorise: on CPU `argmax` takes ten times as long.
  """
  V = logits_BV.shape[1]
  largest_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
  return jnp.min(jnp.where(logits_BV == largest_B1, jnp.arange(V, dtype=jnp.int32), V), axis=1)


def draw(
  logits_BV: Float[Array, "B V"],
  key_B: jax.Array,
  *,
  temperature: ArrayLike,
  top_k: int | None = None,
  top_p: ArrayLike | None = None,
) -> Int[Array, "B"]:
  """Returns one token a row from softmax(logits / temperature), cut to `top_k`, then to `top_p`.

  Args:
    logits_BV: minus infinity where a token must never come.
    key_B: a key for each row.
    temperature: positive; towards 0 the largest logit always wins.
    top_k: only so many of the largest logits stay, earlier ids first among equals. None: all.
    top_p: of those, the fewest largest whose probabilities add up to it stay. None: all.

  A row of logits that are not numbers gives V, which is no token.
  Source: top-p is the nucleus of arXiv 1904.09751; the draw is the Gumbel maximum.
  """
  outside = logits_BV.shape[1]
  logits_BV = logits_BV.astype(jnp.float32)
  logits_BV = (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / temperature
  if top_k is None and top_p is None:
    return greedy(logits_BV + _noise(key_B, outside))
  kept = outside if top_k is None else min(top_k, outside)
  logits_BV, id_BV = jax.lax.top_k(logits_BV, kept)
  if top_p is not None:
    share_BV = jax.nn.softmax(logits_BV, axis=1)
    before_BV = jnp.cumsum(share_BV, axis=1) - share_BV
    logits_BV = jnp.where(before_BV >= top_p, -jnp.inf, logits_BV)
  choice_B = greedy(logits_BV + _noise(key_B, kept))
  # What `greedy` says of logits that are not numbers lies outside `id_BV`.
  token_B1 = jnp.take_along_axis(
    id_BV, choice_B[:, None], axis=1, mode="fill", fill_value=outside
  )
  return token_B1[:, 0]


def _noise(key_B, size):
  """Returns Gumbel noise, each row from its own key."""
  return jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(key_B)
