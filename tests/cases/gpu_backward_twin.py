"""The Hopper backward kernels' arithmetic in plain JAX, side by side, for any sizes.

Same tiles, same order, the same values in x's dtype on their way to the tensor cores: what differs
is that nothing runs at the same time as something else. Tokens come from the kernels' own rows,
and their sums go to the kernels' own end.
"""

import jax
import jax.numpy as jnp

from hybridlm.ops.ssd.pallas_gpu import backward_tiles as chunks
from hybridlm.ops.ssd.pallas_gpu.backward import gather, make_rows

# Rows of a tile of the state: 64 there, and few enough here that tiles overlap.
TILE = 4


def backward(
  x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN, skip_GH, fresh_BL, kept, y_bar_BLGHP, state_bar_BGHPN,
  *, chunk,
):
  """Returns what the kernels return; L is a multiple of `chunk`, whatever even number that is."""
  rows_BGHCRQ, run_BCQ = make_rows(dt_BLGH, a_GH, skip_GH, fresh_BL, chunk=chunk)
  B, L, G, H, P = x_BLGHP.shape
  C = L // chunk
  state_BGCHPN = jnp.moveaxis(kept[0].astype(x_BLGHP.dtype), 0, 3).swapaxes(2, 3)
  x_BGCHQP, y_bar_BGCHQP = (
    v.reshape(B, C, chunk, G, H, P).transpose(0, 3, 1, 4, 2, 5) for v in (x_BLGHP, y_bar_BLGHP)
  )
  b_BGCQN, c_BGCQN = (
    v.reshape(B, C, chunk, G, -1).transpose(0, 3, 1, 2, 4) for v in (b_BLGN, c_BLGN)
  )
  rows_BGCHRQ = jnp.moveaxis(rows_BGHCRQ, 3, 2)
  walk = jax.vmap(_walk, in_axes=(1, None, 1, 0), out_axes=(1, 0))  # heads
  walk = jax.vmap(jax.vmap(walk))  # groups and rows
  bar_BGCHPN, first_bar_BGHPN = walk(rows_BGCHRQ, c_BGCQN, y_bar_BGCHQP, state_bar_BGHPN)
  block = jax.vmap(_block)  # chunks
  block = jax.vmap(block, in_axes=(0, 0, 0, 0, 0, 0, 0, None))  # groups
  x_bar, b_bar, c_bar, sums_BGCHRQ = jax.vmap(block)(
    x_BGCHQP, y_bar_BGCHQP, rows_BGCHRQ, state_BGCHPN, bar_BGCHPN, b_BGCQN, c_BGCQN, run_BCQ
  )
  x_bar_BLGHP = x_bar.transpose(0, 2, 4, 1, 3, 5).reshape(x_BLGHP.shape)
  b_bar_BLGN, c_bar_BLGN = (
    v.transpose(0, 2, 3, 1, 4).reshape(b_BLGN.shape) for v in (b_bar, c_bar)
  )
  sums_BGHCRQ = jnp.moveaxis(sums_BGCHRQ, 3, 2)
  dt_bar_BLGH, a_bar_GH, skip_bar_GH = gather(sums_BGHCRQ, rows_BGHCRQ, dt_BLGH, a_GH)
  return (
    x_bar_BLGHP, dt_bar_BLGH, a_bar_GH, b_bar_BLGN, c_bar_BLGN, skip_bar_GH, first_bar_BGHPN
  )


def _walk(rows_CRQ, c_CQN, y_bar_CQP, last_PN):
  """Returns one head's state_bar_CPN after every chunk, and the first state's."""
  dtype = y_bar_CQP.dtype
  tiles = chunks.row_tiles(last_PN.shape[0], TILE)
  carry = [last_PN[start : start + TILE] for start, _ in tiles]
  written = []
  for rows_RQ, c_QN, y_bar_QP in reversed(list(zip(rows_CRQ, c_CQN, y_bar_CQP, strict=True))):
    written.append(_join(tiles, carry, last_PN).astype(dtype))
    first_Q = rows_RQ[chunks.ROWS.index("first")]
    scaled_QP = (_wide(y_bar_QP, first_Q) * first_Q[:, None]).astype(dtype)
    whole = first_Q[-1]
    carry = [
      _product(scaled_QP[:, start : start + TILE].T, c_QN, acc=state_bar_PN * whole)
      for (start, _), state_bar_PN in zip(tiles, carry, strict=True)
    ]
  return jnp.stack(written[::-1]), _join(tiles, carry, last_PN)


def _join(tiles, carry, like_PN):
  for (start, _), tile in zip(tiles, carry, strict=True):
    like_PN = like_PN.at[start : start + TILE].set(tile)
  return like_PN


def _block(x_HQP, y_bar_HQP, rows_HRQ, state_HPN, bar_HPN, b_QN, c_QN, run_Q):
  """Returns x_bar_HQP, b_bar_QN, c_bar_QN and sums_HRQ of one chunk of a group."""
  dtype, heads = x_HQP.dtype, range(len(x_HQP))
  rows = [dict(zip(chunks.ROWS, rows_RQ, strict=True)) for rows_RQ in rows_HRQ]
  c_bar_QN, first_HQ = _query_side(heads, y_bar_HQP, rows, state_HPN, c_QN)
  b_bar_SN, whole_HQ = _source_side(heads, x_HQP, rows, state_HPN, bar_HPN, b_QN)
  cb_bar_SQ, x_bar_HQP, pair_HRQ = _pair_side(
    heads, x_HQP, y_bar_HQP, rows, bar_HPN, b_QN, c_QN, run_Q
  )
  c_bar_QN = _product(cb_bar_SQ.T, b_QN, acc=c_bar_QN).astype(dtype)
  b_bar_SN = _product(cb_bar_SQ, c_QN, acc=b_bar_SN).astype(dtype)
  sums_HRQ = [jnp.stack([*pair_HRQ[h], first_HQ[h], whole_HQ[h]]) for h in heads]
  return jnp.stack(x_bar_HQP), b_bar_SN, c_bar_QN, jnp.stack(sums_HRQ)


def _query_side(heads, y_bar_HQP, rows, state_HPN, c_QN):
  c_bar_QN, firsts = 0.0, []
  for h in heads:
    first_Q = rows[h]["first"]
    c_bar_QN = _product(_scaled(y_bar_HQP[h], first_Q), state_HPN[h], acc=c_bar_QN)
    outer_QP = _product(c_QN, state_HPN[h].T, like=first_Q)
    firsts.append(first_Q * jnp.sum(_wide(y_bar_HQP[h], first_Q) * outer_QP, axis=1))
  return c_bar_QN, firsts


def _source_side(heads, x_HQP, rows, state_HPN, bar_HPN, b_QN):
  b_bar_SN, wholes = 0.0, []
  for h in heads:
    dt_S, last_S = rows[h]["dt"], rows[h]["last"]
    b_bar_SN = _product(_scaled(x_HQP[h], dt_S * last_S), bar_HPN[h], acc=b_bar_SN)
    # In one place instead of a tile's: only their sum is wanted.
    wholes.append(jnp.zeros_like(dt_S).at[0].set(_inner(state_HPN[h], bar_HPN[h], dt_S).sum()))
  return b_bar_SN, wholes


def _inner(state_PN, bar_PN, like):
  whole_P = 0.0
  for start, seen in chunks.row_tiles(state_PN.shape[0], TILE):
    at = slice(start, start + TILE)
    part_P = jnp.sum(_wide(state_PN[at], like) * _wide(bar_PN[at], like), axis=1)
    whole_P += jnp.where(jnp.arange(TILE) < seen, 0.0, part_P)
  return whole_P


def _pair_side(heads, x_HQP, y_bar_HQP, rows, bar_HPN, b_QN, c_QN, run_Q):
  dtype, (Q,) = x_HQP.dtype, run_Q.shape
  halves = slice(0, Q // 2), slice(Q // 2, Q)
  like = rows[0]["dt"]
  cb_halves = [
    jnp.where(_seen(run_Q, half), _product(b_QN, c_QN[half].T, like=like), 0.0) for half in halves
  ]
  cb_bar_halves, x_bars, sums = [0.0, 0.0], [], []
  for h in heads:
    row, x_SP, y_bar_SP = rows[h], _wide(x_HQP[h], like), _wide(y_bar_HQP[h], like)
    mixes, froms, into_S = [], [], 0.0
    for i, half in enumerate(halves):
      log_SQ = row["sum"][half] - row["sum"][:, None]
      decay_SQ = jnp.exp2(jnp.minimum(log_SQ, 0.0))
      mixes.append((cb_halves[i] * decay_SQ).astype(dtype))
      dot_SQ = _product(x_HQP[h], y_bar_HQP[h][half].T, like=like)
      part_SQ = dot_SQ * row["dt"][:, None] * decay_SQ
      cb_bar_halves[i] += part_SQ
      both_SQ = cb_halves[i] * part_SQ
      froms.append(jnp.sum(both_SQ, axis=0))
      into_S += jnp.sum(both_SQ, axis=1)
    skip_S = jnp.sum(y_bar_SP * x_SP, axis=1)
    outer_SP = _product(b_QN, bar_HPN[h].T, like=like) * row["last"][:, None]
    last_S = row["dt"] * jnp.sum(x_SP * outer_SP, axis=1)
    u_bar_SP = outer_SP
    for half, mix_SQ in zip(halves, mixes, strict=True):
      u_bar_SP = _product(mix_SQ, y_bar_HQP[h][half], acc=u_bar_SP)
    share_S = jnp.sum(x_SP * u_bar_SP, axis=1)
    x_bar_SP = u_bar_SP * row["dt"][:, None] + y_bar_SP * row["skip"][:, None]
    x_bars.append(x_bar_SP.astype(dtype))
    sums.append([jnp.concatenate(froms), into_S, share_S, skip_S, last_S])
  cb_bar_SQ = [
    jnp.where(_seen(run_Q, half), cb_bar_SQ, 0.0).astype(dtype)
    for half, cb_bar_SQ in zip(halves, cb_bar_halves, strict=True)
  ]
  return jnp.concatenate(cb_bar_SQ, axis=1), x_bars, sums


def _seen(run_Q, half):
  source_S, target_Q = jnp.arange(len(run_Q)), jnp.arange(len(run_Q))[half]
  return (source_S[:, None] <= target_Q) & (run_Q[:, None] == run_Q[half])


def _scaled(v_QP, scale_Q):
  return (_wide(v_QP, scale_Q) * scale_Q[:, None]).astype(v_QP.dtype)


def _wide(v, like):
  return v.astype(like.dtype)


def _product(left, right, *, acc=None, like=None):
  """Returns left @ right (+ acc), in float32 (float64 for such) as the tensor cores do."""
  dtype = jnp.promote_types(left.dtype, jnp.float32) if like is None else like.dtype
  product = jnp.dot(left.astype(dtype), right.astype(dtype), precision="highest")
  return product if acc is None else acc + product
