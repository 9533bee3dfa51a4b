"""The scan chunk by chunk in plain JAX: matrix products inside a chunk, a state between them.

Forward and backward are written out, so that a chunk's Q x Q products are made again instead of
kept: memory holds the arguments, y and one state a chunk. Everything runs in the dtype of the
state. Only plain products read slices of the arguments: XLA on CPU fuses a slice into its reader,
and exp over such a slice ran six times slower. Groups stand before positions, as batched products
want them: leaving that order to XLA cost an eighth of the time.
There are two chunks or more: a loop of one is inlined, and jaxlib 0.10.2 on CPU then reads memory
it never wrote when a product with the state's constant zeros is fused into a sum.
Source: Mamba-2 (arXiv 2405.21060), section 6, the block decomposition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LEAST_CHUNKS = 2
# Stands in for dt = 0, so that x_bar x / dt, a cotangent of dt, is right there too.
TINY = 1e-30


class Decay(NamedTuple):
  """How much of the past survives inside one chunk; all from exp of non-positive numbers."""

  within_BGHQS: Array  # from source S to position Q >= S of the same run
  first_BGHQ: Array  # from the state before the chunk to position Q
  last_BGHQ: Array  # from position Q to the state after the chunk, times dt
  whole_BGH: Array  # from the state before to the state after
  dt_BGHQ: Array


def forward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  state_BGHPN: Float[Array, "B G H P N"],
  *,
  chunk: int,
  keep: bool,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"], tuple[Array, ...]]:
  """Returns y in x's dtype, the state after the last token and, to keep, what `backward` wants.

  L is a multiple of `chunk`; the state is dropped before tokens where `fresh_BL`. Kept are y
  without the skip, in the state's dtype, and the states before every chunk.
  """
  dtype = state_BGHPN.dtype

  def step(i, carry):
    state_BGHPN, y_BLGHP, state_CBGHPN = carry
    decay = _decay(dt_BLGH, a_GH, fresh_BL, i, chunk)
    x_BGQHP, b_BGQN, c_BGQN = (_take(v, i, chunk, dtype) for v in (x_BLGHP, b_BLGN, c_BLGN))
    cb_BGQS = _dot("bgqn,bgsn->bgqs", c_BGQN, b_BGQN)
    mix_BGHQS = cb_BGQS[:, :, None] * decay.within_BGHQS * decay.dt_BGHQ[..., None, :]
    inner_BGHQP = _dot("bghqs,bghsp->bghqp", mix_BGHQS, jnp.swapaxes(x_BGQHP, 2, 3))
    outer_BGQHP = _dot("bgqn,bghpn->bgqhp", c_BGQN, state_BGHPN) * _spread(decay.first_BGHQ)
    y_BLGHP = _put(y_BLGHP, jnp.swapaxes(inner_BGHQP, 2, 3) + outer_BGQHP, i)
    if keep:
      state_CBGHPN = jax.lax.dynamic_update_index_in_dim(state_CBGHPN, state_BGHPN, i, 0)
    added_BGHPN = _dot("bgqhp,bgqn->bghpn", x_BGQHP * _spread(decay.last_BGHQ), b_BGQN)
    state_BGHPN = state_BGHPN * decay.whole_BGH[..., None, None] + added_BGHPN
    return state_BGHPN, y_BLGHP, state_CBGHPN

  chunks = x_BLGHP.shape[1] // chunk
  y_BLGHP = jnp.zeros(x_BLGHP.shape, dtype)
  state_CBGHPN = jnp.zeros((chunks if keep else 0, *state_BGHPN.shape), dtype)
  carry = (state_BGHPN, y_BLGHP, state_CBGHPN)
  state_BGHPN, y_BLGHP, state_CBGHPN = jax.lax.fori_loop(0, chunks, step, carry)
  skipped_BLGHP = y_BLGHP + skip_GH[..., None] * x_BLGHP.astype(dtype)
  kept = (y_BLGHP, state_CBGHPN) if keep else ()
  return skipped_BLGHP.astype(x_BLGHP.dtype), state_BGHPN, kept


def backward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  kept: tuple[Float[Array, "B L G H P"], Float[Array, "C B G H P N"]],
  y_bar_BLGHP: Float[Array, "B L G H P"],
  state_bar_BGHPN: Float[Array, "B G H P N"],
  *,
  chunk: int,
) -> tuple[
  Float[Array, "B L G H P"], Float[Array, "B L G H"], Float[Array, "G H"],
  Float[Array, "B L G N"], Float[Array, "B L G N"], Float[Array, "G H"],
  Float[Array, "B G H P N"],
]:
  """Returns the cotangents of x, dt, a, b, c, skip and the first state.

  Those of dt and a need no Q x Q sums: the logarithm of the decay up to a position scales y there
  and, inversely, x, so its cotangent is y_bar y - x_bar x, plus state_bar state after the chunk.
  """
  y_BLGHP, state_CBGHPN = kept
  dtype = state_CBGHPN.dtype
  dt_BLGH = jnp.where(dt_BLGH == 0, TINY, dt_BLGH)

  def step(k, carry):
    state_bar_BGHPN, x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, end_CBGH = carry
    i = state_CBGHPN.shape[0] - 1 - k
    decay = _decay(dt_BLGH, a_GH, fresh_BL, i, chunk)
    x_BGSHP, b_BGSN, c_BGQN = (_take(v, i, chunk, dtype) for v in (x_BLGHP, b_BLGN, c_BLGN))
    y_bar_BGQHP = _take(y_bar_BLGHP, i, chunk, dtype)
    x_BGHSP, y_bar_BGHQP = jnp.swapaxes(x_BGSHP, 2, 3), jnp.swapaxes(y_bar_BGQHP, 2, 3)
    state_BGHPN = jax.lax.dynamic_index_in_dim(state_CBGHPN, i, 0, keepdims=False)
    decay_BGHSQ = jnp.swapaxes(decay.within_BGHQS, 3, 4) * decay.dt_BGHQ[..., None]
    last_BGSH1 = _spread(decay.last_BGHQ)
    first_BGQHP = y_bar_BGQHP * _spread(decay.first_BGHQ)
    mix_BGHSQ = _dot("bgsn,bgqn->bgsq", b_BGSN, c_BGQN)[:, :, None] * decay_BGHSQ
    outer_BGSHP = _dot("bgsn,bghpn->bgshp", b_BGSN, state_bar_BGHPN) * last_BGSH1
    x_bar_BGHSP = _dot("bghsq,bghqp->bghsp", mix_BGHSQ, y_bar_BGHQP)
    mix_bar_BGHSQ = _dot("bghsp,bghqp->bghsq", x_BGHSP, y_bar_BGHQP)
    cb_bar_BGSQ = jnp.sum(mix_bar_BGHSQ * decay_BGHSQ, axis=2)
    c_bar_BGQN = _dot("bgsq,bgsn->bgqn", cb_bar_BGSQ, b_BGSN)
    c_bar_BGQN += _dot("bgqhp,bghpn->bgqn", first_BGQHP, state_BGHPN)
    b_bar_BGSN = _dot("bgsq,bgqn->bgsn", cb_bar_BGSQ, c_BGQN)
    b_bar_BGSN += _dot("bgshp,bghpn->bgsn", x_BGSHP * last_BGSH1, state_bar_BGHPN)
    end_BGH = jnp.sum(x_BGSHP * outer_BGSHP, axis=(2, 4))
    end_BGH += decay.whole_BGH * jnp.sum(state_bar_BGHPN * state_BGHPN, axis=(3, 4))
    state_bar_BGHPN *= decay.whole_BGH[..., None, None]
    state_bar_BGHPN += _dot("bgqhp,bgqn->bghpn", first_BGQHP, c_BGQN)
    x_bar_BLGHP = _put(x_bar_BLGHP, jnp.swapaxes(x_bar_BGHSP, 2, 3) + outer_BGSHP, i)
    b_bar_BLGN, c_bar_BLGN = _put(b_bar_BLGN, b_bar_BGSN, i), _put(c_bar_BLGN, c_bar_BGQN, i)
    end_CBGH = jax.lax.dynamic_update_index_in_dim(end_CBGH, end_BGH, i, 0)
    return state_bar_BGHPN, x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, end_CBGH

  zeros = (jnp.zeros(v.shape, dtype) for v in (x_BLGHP, b_BLGN, c_BLGN))
  carry = (state_bar_BGHPN, *zeros, jnp.zeros(state_CBGHPN.shape[:4], dtype))
  state_bar_BGHPN, x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, end_CBGH = jax.lax.fori_loop(
    0, state_CBGHPN.shape[0], step, carry
  )
  wide_BLGHP, y_bar_BLGHP = x_BLGHP.astype(dtype), y_bar_BLGHP.astype(dtype)
  share_BLGH = jnp.sum(wide_BLGHP * x_bar_BLGHP, axis=-1)
  sum_bar_BLGH = jnp.sum(y_bar_BLGHP * y_BLGHP, axis=-1) - share_BLGH
  log_bar_BLGH = _sum_later(sum_bar_BLGH, end_CBGH)
  dt_bar_BLGH = log_bar_BLGH * a_GH + share_BLGH / dt_BLGH
  a_bar_GH = jnp.sum(log_bar_BLGH * dt_BLGH, axis=(0, 1))
  skip_bar_GH = jnp.sum(y_bar_BLGHP * wide_BLGHP, axis=(0, 1, 4))
  x_bar_BLGHP += skip_GH[..., None] * y_bar_BLGHP
  return x_bar_BLGHP, dt_bar_BLGH, a_bar_GH, b_bar_BLGN, c_bar_BLGN, skip_bar_GH, state_bar_BGHPN


def _decay(dt_BLGH, a_GH, fresh_BL, i, chunk) -> Decay:
  """Returns the decays of chunk `i`."""
  dtype = a_GH.dtype
  dt_BQGH = jax.lax.dynamic_slice_in_dim(dt_BLGH, i * chunk, chunk, axis=1)
  B, Q, G, H = dt_BQGH.shape
  if fresh_BL is None:
    fresh_BQ = jnp.zeros((B, Q), dtype)
  else:
    fresh_BQ = jax.lax.dynamic_slice_in_dim(fresh_BL, i * chunk, chunk, axis=1).astype(dtype)
  upto_SQ = jnp.triu(jnp.ones((Q, Q), dtype))
  # One product sums decays and resets and, by an identity, copies dt out of its array.
  rows = [(dt_BQGH * a_GH).reshape(B, Q, G * H), dt_BQGH.reshape(B, Q, G * H), fresh_BQ[..., None]]
  sums = jnp.einsum(
    "bsr,sq->brq", jnp.concatenate(rows, axis=2),
    jnp.concatenate([upto_SQ, jnp.eye(Q, dtype=dtype)], axis=1), precision="highest",
  )
  sum_BGHQ = sums[:, : G * H, :Q].reshape(B, G, H, Q)
  dt_BGHQ = sums[:, G * H : -1, Q:].reshape(B, G, H, Q)
  run_BQ = sums[:, -1, :Q]
  seen_BQS = (run_BQ[:, :, None] == run_BQ[:, None, :]) & (upto_SQ.T == 1)
  log_BGHQS = jnp.minimum(sum_BGHQ[..., :, None] - sum_BGHQ[..., None, :], 0)
  within_BGHQS = jnp.where(seen_BQS[:, None, None], jnp.exp(log_BGHQS), 0)
  first_BGHQ = jnp.where((run_BQ == 0)[:, None, None], jnp.exp(sum_BGHQ), 0)
  is_last_BQ = run_BQ == run_BQ[:, -1:]
  last_BGHQ = jnp.where(is_last_BQ[:, None, None], jnp.exp(sum_BGHQ[..., -1:] - sum_BGHQ), 0)
  return Decay(within_BGHQS, first_BGHQ, last_BGHQ * dt_BGHQ, first_BGHQ[..., -1], dt_BGHQ)


def _sum_later(sum_bar_BLGH, end_CBGH):
  """Returns, for every position, the sum from it to the end of its chunk, `end_CBGH` included."""
  B, L, G, H = sum_bar_BLGH.shape
  C = end_CBGH.shape[0]
  sum_bar_BCQGH = sum_bar_BLGH.reshape(B, C, L // C, G, H)
  later_QS = jnp.triu(jnp.ones((L // C, L // C), sum_bar_BLGH.dtype))
  log_bar_BCQGH = jnp.einsum("bcsgh,qs->bcqgh", sum_bar_BCQGH, later_QS, precision="highest")
  log_bar_BCQGH += jnp.moveaxis(end_CBGH, 0, 1)[:, :, None]
  return log_bar_BCQGH.reshape(B, L, G, H)


def _dot(subscripts, left, right):
  return jnp.einsum(subscripts, left, right, preferred_element_type=left.dtype)


def _take(v_BLG, i, chunk, dtype):
  """Returns chunk `i` with the group before the position: v_BGQ and what follows."""
  v_BQG = jax.lax.dynamic_slice_in_dim(v_BLG, i * chunk, chunk, axis=1)
  return jnp.swapaxes(v_BQG.astype(dtype), 1, 2)


def _put(v_BLG, v_BGQ, i):
  """Returns `v_BLG` with chunk `i` replaced."""
  start = i * v_BGQ.shape[2]
  return jax.lax.dynamic_update_slice_in_dim(v_BLG, jnp.swapaxes(v_BGQ, 1, 2), start, axis=1)


def _spread(v_BGHQ):
  """Returns v_BGQH1."""
  return jnp.swapaxes(v_BGHQ, 2, 3)[..., None]
