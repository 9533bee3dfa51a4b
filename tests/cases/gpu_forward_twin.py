"""The Hopper forward kernel's arithmetic in plain JAX, function by function, for any sizes.

Same tiles, same order, the same values in bfloat16: what differs is that heads are mapped over
and that nothing runs at the same time as something else.
"""

import functools

import jax
import jax.numpy as jnp

from hybridlm.ops.ssd.pallas_gpu import table
from hybridlm.ops.ssd.pallas_gpu.forward import lines


def forward(
  x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN, skip_GH, fresh_BL, state_BGHPN, *, chunk, keep=True
):
  """Returns what the kernel returns; L is a multiple of `chunk`, whatever that is."""
  line_BGHCRQ = lines(dt_BLGH, a_GH, fresh_BL, chunk)
  first_BGHPN = state_BGHPN
  if not table.upright(x_BLGHP.shape[-1]):
    first_BGHPN = jnp.swapaxes(state_BGHPN, 3, 4)
  walk = functools.partial(_walk, chunk=chunk)
  walk = jax.vmap(walk, in_axes=(1, None, None, 0, 0, 0))  # heads
  walk = jax.vmap(walk, in_axes=(1, 1, 1, 0, 0, 0))  # groups
  walk = jax.vmap(walk, in_axes=(0, 0, 0, 0, None, 0))  # rows
  y_BGHLP, last_BGHPN, kept_BGHCPN = walk(
    x_BLGHP, b_BLGN, c_BLGN, line_BGHCRQ, skip_GH, first_BGHPN
  )
  kept_CBGHPN = jnp.moveaxis(kept_BGHCPN, 3, 0)
  if not table.upright(x_BLGHP.shape[-1]):
    last_BGHPN, kept_CBGHPN = (jnp.swapaxes(v, -1, -2) for v in (last_BGHPN, kept_CBGHPN))
  return jnp.moveaxis(y_BGHLP, 3, 1), last_BGHPN, (kept_CBGHPN,) if keep else ()


def _walk(x_LP, b_LN, c_LN, line_CRQ, skip, state_PN, *, chunk):
  """Returns y of one head, the state after the last token and the states before every chunk."""
  upright = table.upright(x_LP.shape[1])

  def step(state_PN, given):
    x_QP, b_QN, c_QN, line = given
    state = state_PN.astype(jnp.bfloat16)
    y_QP = _read(x_QP, b_QN, c_QN, line, state.T if upright else state, skip)
    return _carry(x_QP, b_QN, line, state_PN, upright), (y_QP, state)

  chunks = (v.reshape(-1, chunk, v.shape[1]) for v in (x_LP, b_LN, c_LN))
  last_PN, (y_CQP, kept_CPN) = jax.lax.scan(step, state_PN, (*chunks, line_CRQ))
  return y_CQP.reshape(x_LP.shape), last_PN, kept_CPN


def _carry(x_QP, b_QN, line, state_PN, upright):
  """Returns whole state + (last dt x)^T B, which lies as [N, P] unless upright."""
  last_Q, whole = _ends(line)
  input_QP = (x_QP.astype(jnp.float32) * last_Q[:, None]).astype(jnp.bfloat16)
  left, right = (input_QP, b_QN) if upright else (b_QN, input_QP)
  return state_PN * whole + _product(left.T, right)


def _ends(line):
  sum_Q, dt_Q, end = line[0], line[1], line[0, -1]
  last_Q, whole = jnp.exp2(jnp.minimum(end - sum_Q, 0.0)), jnp.exp2(end)
  if line.shape[0] == 3:
    run = line[2, -1]
    last_Q = jnp.where(line[2] == run, last_Q, 0.0)
    whole = jnp.where(run == 0.0, whole, 0.0)
  return last_Q * dt_Q, whole


def _read(x_QP, b_QN, c_QN, line, state_NP, skip):
  """Returns mix x + first (C state) + skip x."""
  mix_QS = _mix(_product(c_QN, b_QN.T), line)
  y_QP = _product(c_QN, state_NP)
  first_Q = jnp.exp2(line[0])
  if line.shape[0] == 3:
    first_Q = jnp.where(line[2] == 0.0, first_Q, 0.0)
  y_QP = y_QP * first_Q[:, None] + x_QP.astype(jnp.float32) * skip
  return (y_QP + _product(mix_QS, x_QP)).astype(jnp.bfloat16)


def _mix(score_QS, line):
  later_QS = line[0][:, None] - line[0][None, :]
  seen_QS = jnp.tril(jnp.ones(score_QS.shape, bool))
  if line.shape[0] == 3:
    seen_QS &= line[2][:, None] == line[2][None, :]
  decay_QS = jnp.exp2(jnp.minimum(later_QS, 0.0)) * line[1][None, :]
  return jnp.where(seen_QS, score_QS * decay_QS, 0.0).astype(jnp.bfloat16)


def _product(left, right):
  """Returns a product of bfloat16 matrices, summed in float32 as the tensor cores do."""
  wide = (v.astype(jnp.float32) for v in (left, right))  # exact: XLA on CPU lacks the mixed product
  return jnp.dot(*wide, precision="highest")
