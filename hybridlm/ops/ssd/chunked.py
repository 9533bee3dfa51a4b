"""The scan a few chunks at a time in plain JAX: products inside a chunk, a state between them.

Forward and backward are written out, so that a chunk's Q x Q products are made again instead of
kept: memory holds the arguments, y and one state a chunk. States lie as [N, H P]: all heads of a
group share B and C, so that every product with a state is one of [Q, N] or [Q, H P] a group.
Sums, decays and states have the state's dtype; products take operands of x's dtype, widened first
on CPU, where narrow ones are slow. What was measured, and why it looks so, is in docs/kernels.md:
on CPU only products read slices that feed exp (XLA fuses a slice into its reader, and exp over it
ran six times slower), and sums of products are einsums (a product fused into a partial sum ran
forty times slower).
There are two turns of the loop or more: a loop of one is inlined, and jaxlib 0.10.2 on CPU then
reads memory it never wrote when a product with the state's constant zeros is fused into a sum.
Source: Mamba-2 (arXiv 2405.21060), section 6, the block decomposition.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LEAST_CHUNKS = 2
# A step that keeps less than the smallest float32 of the state counts as one of this logarithm:
# a larger one would drown those after it in the sums of a chunk.
LEAST_LOG = -104.0
# Tokens whose chunks go through one turn of the loop. On CPU more no longer fit the cache; a
# device with many cores waits less often with more.
CPU_BLOCK, ACCELERATOR_BLOCK = 128, 1024


class Decay(NamedTuple):
  """Steps, and how much of the past survives; all from exp of non-positive numbers."""

  step_BLGH: Array  # dt
  log_BLGH: Array  # dt a, LEAST_LOG or more
  first_BLGH: Array  # from the state before the chunk to the position
  last_BLGH: Array  # from the position to the state after its chunk
  run_BL: Array | None  # resets in the chunk up to the position, where there are any


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
  states before every chunk, as BCGNHP.
  """
  dtype = state_BGHPN.dtype
  H, many = x_BLGHP.shape[3], _chunks_at_once(x_BLGHP.shape[1], chunk)
  turns = x_BLGHP.shape[1] // (many * chunk)
  decays = _decay(dt_BLGH, a_GH, fresh_BL, chunk)
  dot = functools.partial(_dot, operand=_operand(x_BLGHP.dtype, dtype), dtype=dtype)

  def step(i, carry):
    state_BGNHP, y_BLGHP, kept_BCGNHP = carry
    take = functools.partial(_take, i=i, many=many, chunk=chunk)
    x_BCGQHP, b_BCGQN, c_BCGQN = take(x_BLGHP), take(b_BLGN), take(c_BLGN)
    decay = jax.tree.map(take, decays)
    x_BCGQHP = x_BCGQHP.astype(dtype)
    u_BCGQHP = x_BCGQHP * decay.step_BLGH[..., None]
    last_BCGQHP = u_BCGQHP * decay.last_BLGH[..., None]
    added_BCGNHP = _unfold(dot("bcgqn,bcgqi->bcgni", b_BCGQN, _fold(last_BCGQHP)), H)
    before_BCGNHP, state_BGNHP = _pass(state_BGNHP, added_BCGNHP, decay, range(many))
    mix_BCGHQS = dot("bcgqn,bcgsn->bcgqs", c_BCGQN, b_BCGQN)[:, :, :, None] * _within(decay, -1)
    y_BCGHQP = dot("bcghqs,bcghsp->bcghqp", mix_BCGHQS, jnp.swapaxes(u_BCGQHP, 3, 4))
    y_BCGQHP = _unfold(dot("bcgqn,bcgni->bcgqi", c_BCGQN, _fold(before_BCGNHP)), H)
    y_BCGQHP = y_BCGQHP * decay.first_BLGH[..., None] + jnp.swapaxes(y_BCGHQP, 3, 4)
    y_BLGHP = _put(y_BLGHP, y_BCGQHP + skip_GH[:, None, :, None] * x_BCGQHP, i)
    if keep:
      kept_BCGNHP = _put_chunks(kept_BCGNHP, before_BCGNHP, i)
    return state_BGNHP, y_BLGHP, kept_BCGNHP

  state_BGNHP = jnp.moveaxis(state_BGHPN, 4, 2)
  B, *sizes = state_BGNHP.shape
  kept_BCGNHP = jnp.zeros((B, turns * many if keep else 0, *sizes), dtype)
  carry = (state_BGNHP, jnp.zeros_like(x_BLGHP), kept_BCGNHP)
  state_BGNHP, y_BLGHP, kept_BCGNHP = jax.lax.fori_loop(0, turns, step, carry)
  return y_BLGHP, jnp.moveaxis(state_BGNHP, 2, 4), (kept_BCGNHP,) if keep else ()


def backward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  kept: tuple[Float[Array, "B C G N H P"]],
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
  (kept_BCGNHP,) = kept
  dtype = kept_BCGNHP.dtype
  many = _chunks_at_once(x_BLGHP.shape[1], chunk)
  turns = x_BLGHP.shape[1] // (many * chunk)
  decays = _decay(dt_BLGH, a_GH, fresh_BL, chunk)
  dot = functools.partial(_dot, operand=_operand(x_BLGHP.dtype, dtype), dtype=dtype)

  def step(k, carry):
    state_bar_BGNHP, *bars, skip_bar_GH = carry
    i = turns - 1 - k
    take = functools.partial(_take, i=i, many=many, chunk=chunk)
    arrays = [take(v) for v in (x_BLGHP, b_BLGN, c_BLGN, y_bar_BLGHP)]
    state_BCGNHP = jax.lax.dynamic_slice_in_dim(kept_BCGNHP, i * many, many, axis=1)
    decay = jax.tree.map(take, decays)
    state_bar_BGNHP, u_bar_BCGSHP, *now = _turn_back(
      *arrays, decay, state_BCGNHP, state_bar_BGNHP, dot=dot
    )
    x_BCGSHP, y_bar_BCGSHP = arrays[0].astype(dtype), arrays[3].astype(dtype)
    share_BCGSH = _sum("bcgshp,bcgshp->bcgsh", x_BCGSHP, u_bar_BCGSHP)
    skip_bar_GH += jnp.sum(_sum("bcgshp,bcgshp->bcgsh", x_BCGSHP, y_bar_BCGSHP), axis=(0, 1, 3))
    x_bar_BCGSHP = u_bar_BCGSHP * decay.step_BLGH[..., None]
    x_bar_BCGSHP += skip_GH[:, None, :, None] * y_bar_BCGSHP
    now = (x_bar_BCGSHP, *now, share_BCGSH)
    bars = (_put(v, v_now, i) for v, v_now in zip(bars, now, strict=True))
    return state_bar_BGNHP, *bars, skip_bar_GH

  zeros = [jnp.zeros_like(v) for v in (x_BLGHP, b_BLGN, c_BLGN, dt_BLGH, dt_BLGH)]
  carry = (jnp.moveaxis(state_bar_BGHPN, 4, 2), *zeros, jnp.zeros_like(skip_GH))
  state_bar_BGNHP, *bars, cross_BLGH, share_BLGH, skip_bar_GH = jax.lax.fori_loop(
    0, turns, step, carry
  )
  x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN = bars
  cross_BLGH = jnp.where(dt_BLGH * a_GH < LEAST_LOG, 0, cross_BLGH)
  dt_bar_BLGH = cross_BLGH * a_GH + share_BLGH
  a_bar_GH = _sum("blgh,blgh->gh", cross_BLGH, dt_BLGH)
  state_bar_BGHPN = jnp.moveaxis(state_bar_BGNHP, 2, 4)
  return x_bar_BLGHP, dt_bar_BLGH, a_bar_GH, b_bar_BLGN, c_bar_BLGN, skip_bar_GH, state_bar_BGHPN


def _turn_back(
  x_BCGSHP, b_BCGSN, c_BCGQN, y_bar_BCGQHP, decay, state_BCGNHP, state_bar_BGNHP, *, dot
):
  """Returns the cotangents of the state before, of u, b and c, and what crosses each position.

  `state_BCGNHP` has the states before every chunk in hand.
  """
  many, H = x_BCGSHP.shape[1], x_BCGSHP.shape[4]
  dtype = state_bar_BGNHP.dtype
  y_bar_BCGQHP = y_bar_BCGQHP.astype(dtype)
  u_BCGSHP = x_BCGSHP.astype(dtype) * decay.step_BLGH[..., None]
  first_BCGQHP = y_bar_BCGQHP * decay.first_BLGH[..., None]
  first_BCGQI, last_BCGSI = _fold(first_BCGQHP), _fold(u_BCGSHP * decay.last_BLGH[..., None])
  added_BCGNHP = _unfold(dot("bcgqn,bcgqi->bcgni", c_BCGQN, first_BCGQI), H)
  after_BCGNHP, state_bar_BGNHP = _pass(
    state_bar_BGNHP, added_BCGNHP, decay, reversed(range(many))
  )
  within_BCGHSQ = _within(decay, -2)
  y_bar_BCGHQP = jnp.swapaxes(y_bar_BCGQHP, 3, 4)
  mix_BCGHSQ = dot("bcgsn,bcgqn->bcgsq", b_BCGSN, c_BCGQN)[:, :, :, None] * within_BCGHSQ
  mix_bar_BCGHSQ = dot("bcghsp,bcghqp->bcghsq", jnp.swapaxes(u_BCGSHP, 3, 4), y_bar_BCGHQP)
  u_bar_BCGHSP = dot("bcghsq,bcghqp->bcghsp", mix_BCGHSQ, y_bar_BCGHQP)
  outer_BCGSHP = _unfold(dot("bcgsn,bcgni->bcgsi", b_BCGSN, _fold(after_BCGNHP)), H)
  outer_BCGSHP *= decay.last_BLGH[..., None]
  seen_BCGQHP = _unfold(dot("bcgqn,bcgni->bcgqi", c_BCGQN, _fold(state_BCGNHP)), H)
  cross_BCGQH = _crossing(
    mix_BCGHSQ * mix_bar_BCGHSQ,
    _sum("bcgqhp,bcgqhp->bcgqh", first_BCGQHP, seen_BCGQHP),
    _sum("bcgshp,bcgshp->bcgsh", u_BCGSHP, outer_BCGSHP),
  )
  whole_BCGH = _sum("bcgnhp,bcgnhp->bcgh", after_BCGNHP, state_BCGNHP)
  cross_BCGQH += (whole_BCGH * decay.first_BLGH[:, :, :, -1])[:, :, :, None]
  cb_bar_BCGSQ = _sum("bcghsq,h->bcgsq", mix_bar_BCGHSQ * within_BCGHSQ, jnp.ones(H, dtype))
  c_bar_BCGQN = dot("bcgsq,bcgsn->bcgqn", cb_bar_BCGSQ, b_BCGSN)
  c_bar_BCGQN += dot("bcgqi,bcgni->bcgqn", first_BCGQI, _fold(state_BCGNHP))
  b_bar_BCGSN = dot("bcgsq,bcgqn->bcgsn", cb_bar_BCGSQ, c_BCGQN)
  b_bar_BCGSN += dot("bcgsi,bcgni->bcgsn", last_BCGSI, _fold(after_BCGNHP))
  u_bar_BCGSHP = jnp.swapaxes(u_bar_BCGHSP, 3, 4) + outer_BCGSHP
  return state_bar_BGNHP, u_bar_BCGSHP, b_bar_BCGSN, c_bar_BCGQN, cross_BCGQH


def _crossing(mix_BCGHSQ, reader_BCGQH, source_BCGSH):
  """Returns, for every position, the sum of what its decay lies under, but for the whole chunk's.

  That is every pair with S before it and Q at or after it, what the readers at or after it have
  of the state before the chunk, and what the sources before it add to the one after.
  """
  upto_SQ = _upto(mix_BCGHSQ.shape[-1], mix_BCGHSQ.dtype)
  before_SQ = upto_SQ - jnp.eye(*upto_SQ.shape, dtype=upto_SQ.dtype)
  # Plain products with a triangle; the one over S is a product with ones.
  later_BCGHSQ = _sum("bcghsr,qr->bcghsq", mix_BCGHSQ, upto_SQ) * before_SQ
  pairs_BCGHQ = _sum("bcghsq,s->bcghq", later_BCGHSQ, jnp.ones_like(upto_SQ[0]))
  readers_BCGQH = _sum("bcgrh,qr->bcgqh", reader_BCGQH, upto_SQ)
  sources_BCGQH = _sum("bcgsh,sq->bcgqh", source_BCGSH, before_SQ)
  return jnp.swapaxes(pairs_BCGHQ, 3, 4) + readers_BCGQH + sources_BCGQH


def _chunks_at_once(L, chunk):
  """Returns how many chunks go through one turn of the loop, which has two turns or more."""
  block = CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK
  chunks = L // chunk
  most = max(1, min(block // chunk, chunks // 2))
  return next(many for many in range(most, 0, -1) if chunks % many == 0)


def _operand(narrow, wide):
  """Returns the dtype that products read."""
  return wide if jax.default_backend() == "cpu" else narrow


def _decay(dt_BLGH, a_GH, fresh_BL, chunk) -> Decay:
  """Returns the decays of all positions; for every chunk from its own start."""
  B, L, G, H = dt_BLGH.shape
  log_BCQGH = jnp.maximum(dt_BLGH * a_GH, LEAST_LOG).reshape(B, L // chunk, chunk, G, H)
  sum_BCQGH = _sum("bcsgh,sq->bcqgh", log_BCQGH, _upto(chunk, dt_BLGH.dtype))
  first_BCQGH = jnp.exp(jnp.minimum(sum_BCQGH, 0))
  last_BCQGH = jnp.exp(jnp.minimum(sum_BCQGH[:, :, -1:] - sum_BCQGH, 0))
  run_BL = None
  if fresh_BL is not None:
    run_BCQ = jnp.cumsum(fresh_BL.reshape(B, L // chunk, chunk), axis=2, dtype=jnp.int32)
    first_BCQGH = jnp.where((run_BCQ == 0)[..., None, None], first_BCQGH, 0)
    last_BCQGH = jnp.where((run_BCQ == run_BCQ[:, :, -1:])[..., None, None], last_BCQGH, 0)
    run_BL = run_BCQ.reshape(B, L)
  whole = (v_BCQGH.reshape(B, L, G, H) for v_BCQGH in (log_BCQGH, first_BCQGH, last_BCQGH))
  return Decay(dt_BLGH, *whole, run_BL)


def _within(decay, source):
  """Returns the decay from every source to every later position of its run, zero elsewhere.

  `decay` is of chunks in hand. Sources are on axis `source`, -1 or -2, positions on the other.
  """
  log_BCGQH, run_BCQ = decay.log_BLGH, decay.run_BL
  other, Q = -3 - source, log_BCGQH.shape[3]
  sum_BCGHQ = _sum("bcgsh,sq->bcghq", log_BCGQH, _upto(Q, log_BCGQH.dtype))
  seen = jnp.expand_dims(jnp.arange(Q), source) >= jnp.expand_dims(jnp.arange(Q), other)
  if run_BCQ is not None:
    run_BCGHQ = run_BCQ[:, :, None, None]
    seen &= jnp.expand_dims(run_BCGHQ, source) == jnp.expand_dims(run_BCGHQ, other)
  log = jnp.expand_dims(sum_BCGHQ, source) - jnp.expand_dims(sum_BCGHQ, other)
  return jnp.where(seen, jnp.exp(jnp.minimum(log, 0)), 0)


def _pass(state_BGNHP, added_BCGNHP, decay, order: Iterable[int]):
  """Returns the states that meet every chunk in hand, in this order, and the one that is left."""
  whole_BCG1H1 = decay.first_BLGH[:, :, :, -1:, :, None]
  met = {}
  for c in order:
    met[c] = state_BGNHP
    state_BGNHP = state_BGNHP * whole_BCG1H1[:, c] + added_BCGNHP[:, c]
  return jnp.stack([met[c] for c in sorted(met)], axis=1), state_BGNHP


def _upto(Q, dtype):
  """Returns ones where the column is not before the row."""
  return jnp.triu(jnp.ones((Q, Q), dtype))


def _dot(subscripts, left, right, *, operand, dtype):
  """Returns a product of operands of one dtype, summed in another."""
  left, right = left.astype(operand), right.astype(operand)
  return jnp.einsum(subscripts, left, right, preferred_element_type=dtype)


def _sum(subscripts, left, right):
  """Returns a sum of products that is small beside the products with B, C, x and the states."""
  return jnp.einsum(subscripts, left, right, precision="highest")


def _fold(v_HP):
  """Returns heads and channels as one axis."""
  return v_HP.reshape(*v_HP.shape[:-2], -1)


def _unfold(v_I, H):
  return v_I.reshape(*v_I.shape[:-1], H, -1)


def _take(v_BL, *, i, many, chunk):
  """Returns the chunks of turn `i`, v_BCQ, with the group, if any, before the position: v_BCGQ."""
  v_BL = jax.lax.dynamic_slice_in_dim(v_BL, i * many * chunk, many * chunk, axis=1)
  v_BCQ = v_BL.reshape(v_BL.shape[0], many, chunk, *v_BL.shape[2:])
  return v_BCQ if v_BCQ.ndim == 3 else jnp.swapaxes(v_BCQ, 2, 3)


def _put(v_BLG, v_BCGQ, i):
  """Returns `v_BLG` with the chunks of turn `i` replaced."""
  v_BCQG = jnp.swapaxes(v_BCGQ, 2, 3).astype(v_BLG.dtype)
  now_BLG = v_BCQG.reshape(v_BCQG.shape[0], -1, *v_BCQG.shape[3:])
  return jax.lax.dynamic_update_slice_in_dim(v_BLG, now_BLG, i * now_BLG.shape[1], axis=1)


def _put_chunks(v_BC, now_BC, i):
  """Returns `v_BC` with the chunks of turn `i` replaced."""
  return jax.lax.dynamic_update_slice_in_dim(v_BC, now_BC, i * now_BC.shape[1], axis=1)
