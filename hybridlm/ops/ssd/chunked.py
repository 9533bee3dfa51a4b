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
# A step that keeps less than the smallest float32 of the state counts as one of this logarithm:
# a larger one would drown those after it in the sums of a chunk.
LEAST_LOG = -104.0


class Decay(NamedTuple):
  """How much of the past survives inside one chunk; all from exp of non-positive numbers."""

  within_BGHQS: Array  # from source S to position Q >= S of the same run
  first_BGHQ: Array  # from the state before the chunk to position Q
  last_BGHQ: Array  # from position Q to the state after the chunk
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

  L is a multiple of `chunk`; the state is dropped before tokens where `fresh_BL`. Kept are the
  states before every chunk.
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
    last_BGQH1 = _spread(decay.last_BGHQ * decay.dt_BGHQ)
    added_BGHPN = _dot("bgqhp,bgqn->bghpn", x_BGQHP * last_BGQH1, b_BGQN)
    state_BGHPN = state_BGHPN * decay.whole_BGH[..., None, None] + added_BGHPN
    return state_BGHPN, y_BLGHP, state_CBGHPN

  chunks = x_BLGHP.shape[1] // chunk
  y_BLGHP = jnp.zeros(x_BLGHP.shape, dtype)
  state_CBGHPN = jnp.zeros((chunks if keep else 0, *state_BGHPN.shape), dtype)
  carry = (state_BGHPN, y_BLGHP, state_CBGHPN)
  state_BGHPN, y_BLGHP, state_CBGHPN = jax.lax.fori_loop(0, chunks, step, carry)
  y_BLGHP += skip_GH[..., None] * x_BLGHP.astype(dtype)
  return y_BLGHP.astype(x_BLGHP.dtype), state_BGHPN, (state_CBGHPN,) if keep else ()


def backward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  kept: tuple[Float[Array, "C B G H P N"]],
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

  Those of dt and a come from the decays: what a token's own decay multiplies is what crosses it,
  and only that is summed. Differences of larger sums would leave noise where nothing crosses.
  """
  (state_CBGHPN,) = kept
  dtype = state_CBGHPN.dtype

  def step(k, carry):
    state_bar_BGHPN, x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, cross_CBGHQ, dt_bar_CBGHQ = carry
    i = state_CBGHPN.shape[0] - 1 - k
    decay = _decay(dt_BLGH, a_GH, fresh_BL, i, chunk)
    x_BGSHP, b_BGSN, c_BGQN = (_take(v, i, chunk, dtype) for v in (x_BLGHP, b_BLGN, c_BLGN))
    y_bar_BGQHP = _take(y_bar_BLGHP, i, chunk, dtype)
    state_BGHPN = jax.lax.dynamic_index_in_dim(state_CBGHPN, i, 0, keepdims=False)
    decay_BGHSQ = jnp.swapaxes(decay.within_BGHQS, 3, 4)
    dt_BGSH1, last_BGSH1 = _spread(decay.dt_BGHQ), _spread(decay.last_BGHQ)
    u_BGSHP, first_BGQHP = x_BGSHP * dt_BGSH1, y_bar_BGQHP * _spread(decay.first_BGHQ)
    u_BGHSP, y_bar_BGHQP = jnp.swapaxes(u_BGSHP, 2, 3), jnp.swapaxes(y_bar_BGQHP, 2, 3)
    mix_BGHSQ = _dot("bgsn,bgqn->bgsq", b_BGSN, c_BGQN)[:, :, None] * decay_BGHSQ
    mix_bar_BGHSQ = _dot("bghsp,bghqp->bghsq", u_BGHSP, y_bar_BGHQP)
    outer_BGSHP = _dot("bgsn,bghpn->bgshp", b_BGSN, state_bar_BGHPN) * last_BGSH1
    seen_BGQHP = _dot("bgqn,bghpn->bgqhp", c_BGQN, state_BGHPN)
    u_bar_BGHSP = _dot("bghsq,bghqp->bghsp", mix_BGHSQ, y_bar_BGHQP)
    u_bar_BGSHP = jnp.swapaxes(u_bar_BGHSP, 2, 3) + outer_BGSHP
    cross_BGHQ = _crossing(
      mix_BGHSQ * mix_bar_BGHSQ, jnp.sum(first_BGQHP * seen_BGQHP, axis=4),
      jnp.sum(u_BGSHP * outer_BGSHP, axis=4),
    )
    whole_BGH = decay.whole_BGH * jnp.sum(state_bar_BGHPN * state_BGHPN, axis=(3, 4))
    dt_bar_BGSH = jnp.sum(u_bar_BGSHP * x_BGSHP, axis=4)
    cb_bar_BGSQ = jnp.sum(mix_bar_BGHSQ * decay_BGHSQ, axis=2)
    c_bar_BGQN = _dot("bgsq,bgsn->bgqn", cb_bar_BGSQ, b_BGSN)
    c_bar_BGQN += _dot("bgqhp,bghpn->bgqn", first_BGQHP, state_BGHPN)
    b_bar_BGSN = _dot("bgsq,bgqn->bgsn", cb_bar_BGSQ, c_BGQN)
    b_bar_BGSN += _dot("bgshp,bghpn->bgsn", u_BGSHP * last_BGSH1, state_bar_BGHPN)
    state_bar_BGHPN *= decay.whole_BGH[..., None, None]
    state_bar_BGHPN += _dot("bgqhp,bgqn->bghpn", first_BGQHP, c_BGQN)
    x_bar_BLGHP = _put(x_bar_BLGHP, u_bar_BGSHP * dt_BGSH1, i)
    b_bar_BLGN, c_bar_BLGN = _put(b_bar_BLGN, b_bar_BGSN, i), _put(c_bar_BLGN, c_bar_BGQN, i)
    cross_CBGHQ = _put_chunk(cross_CBGHQ, cross_BGHQ + whole_BGH[..., None], i)
    dt_bar_CBGHQ = _put_chunk(dt_bar_CBGHQ, jnp.swapaxes(dt_bar_BGSH, 2, 3), i)
    return state_bar_BGHPN, x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, cross_CBGHQ, dt_bar_CBGHQ

  zeros = (jnp.zeros(v.shape, dtype) for v in (x_BLGHP, b_BLGN, c_BLGN))
  small_CBGHQ = jnp.zeros((*state_CBGHPN.shape[:4], chunk), dtype)
  state_bar_BGHPN, x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, *small = jax.lax.fori_loop(
    0, state_CBGHPN.shape[0], step, (state_bar_BGHPN, *zeros, small_CBGHQ, small_CBGHQ)
  )
  cross_BLGH, dt_bar_BLGH = (
    jnp.moveaxis(v_CBGHQ, (0, 4), (1, 2)).reshape(dt_BLGH.shape) for v_CBGHQ in small
  )
  cross_BLGH = jnp.where(dt_BLGH * a_GH < LEAST_LOG, 0, cross_BLGH)
  dt_bar_BLGH += cross_BLGH * a_GH
  a_bar_GH = jnp.sum(cross_BLGH * dt_BLGH, axis=(0, 1))
  y_bar_BLGHP = y_bar_BLGHP.astype(dtype)
  skip_bar_GH = jnp.sum(y_bar_BLGHP * x_BLGHP.astype(dtype), axis=(0, 1, 4))
  x_bar_BLGHP += skip_GH[..., None] * y_bar_BLGHP
  return x_bar_BLGHP, dt_bar_BLGH, a_bar_GH, b_bar_BLGN, c_bar_BLGN, skip_bar_GH, state_bar_BGHPN


def _crossing(mix_BGHSQ, reader_BGQH, source_BGSH):
  """Returns, for every position, the sum of what its decay lies under, but for the whole chunk's.

  That is every pair with S before it and Q at or after it, what the readers at or after it have
  of the state before the chunk, and what the sources before it add to the one after.
  """
  size, dtype = mix_BGHSQ.shape[-1], mix_BGHSQ.dtype
  ones_QS = jnp.ones((size, size), dtype)
  before_QS, after_QS = jnp.tril(ones_QS, -1), jnp.triu(ones_QS)
  pairs_BGHQS = jnp.einsum("bghsr,qs->bghqr", mix_BGHSQ, before_QS, precision="highest")
  readers_BGHQ = jnp.einsum("bgrh,qr->bghq", reader_BGQH, after_QS, precision="highest")
  sources_BGHQ = jnp.einsum("bgsh,qs->bghq", source_BGSH, before_QS, precision="highest")
  return jnp.sum(pairs_BGHQS * after_QS, axis=-1) + readers_BGHQ + sources_BGHQ


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
  log_BQGH = jnp.maximum(dt_BQGH * a_GH, LEAST_LOG)
  rows = [log_BQGH.reshape(B, Q, G * H), dt_BQGH.reshape(B, Q, G * H), fresh_BQ[..., None]]
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
  return Decay(within_BGHQS, first_BGHQ, last_BGHQ, first_BGHQ[..., -1], dt_BGHQ)


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


def _put_chunk(v_CBGHQ, v_BGHQ, i):
  """Returns `v_CBGHQ` with chunk `i` replaced."""
  return jax.lax.dynamic_update_index_in_dim(v_CBGHQ, v_BGHQ, i, 0)


def _spread(v_BGHQ):
  """Returns v_BGQH1."""
  return jnp.swapaxes(v_BGHQ, 2, 3)[..., None]
