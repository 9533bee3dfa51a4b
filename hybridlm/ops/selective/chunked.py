"""The selective scan chunk by chunk in plain JAX, its way back written out.

Every channel has N decays of its own, so that there are no products of matrices to be had: what is
computed is the recurrence itself, B H N numbers a token. States of all positions exist for one
chunk at a time; the way back makes them again from the state before the chunk, the only one kept.
Positions stand on the left ([Q, B, H, N]). Sums of products are einsums, and there are two chunks
or more, for the reasons that `ops.ssd.chunked` has.
Source: Mamba (arXiv 2312.00752), section 3.3: a scan that is computed again, not kept.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LEAST_CHUNKS = 2


class Inside(NamedTuple):
  """How the states of one chunk are computed.

  `states(keep_QBHN, add_QBHN, state_BHN)` returns the state after every position, where
  state <- keep state + add. `bars(keep_QBHN, bar_QBHN, after_BHN)` returns the cotangent of each
  of them and of the state before, from those that come from elsewhere and of the state after.
  """

  states: Callable
  bars: Callable


def selective(
  x_BLH: Float[Array, "B L H"],
  dt_BLH: Float[Array, "B L H"],
  a_HN: Float[Array, "H N"],
  b_BLN: Float[Array, "B L N"],
  c_BLN: Float[Array, "B L N"],
  *,
  skip_H: Float[Array, "H"] | None = None,
  segment_BL: Int[Array, "B L"] | None = None,
  before_B: Int[Array, "B"] | None = None,
  state_BHN: Float[Array, "B H N"] | None = None,
  restart_HN: Float[Array, "H N"] | None = None,
  chunk: int,
  inside: str,
) -> tuple[Float[Array, "B L H"], Float[Array, "B H N"]]:
  """Returns y_BLH in x's dtype and the float32 state after the last token.

  Same contract as `reference.selective`; reverse-mode differentiable only. `before_B` is the
  segment of the token before position 0, by default its own. `inside` is a name of `INSIDE`. L is
  padded to whole chunks, two or more, with dt = 0, which leaves the state as it is.
  """
  B, L, H = x_BLH.shape
  dtype = jnp.promote_types(x_BLH.dtype, jnp.float32)
  if state_BHN is None:
    start_HN = jnp.zeros((H, b_BLN.shape[2]), dtype) if restart_HN is None else restart_HN
    state_BHN = jnp.broadcast_to(start_HN, (B, *start_HN.shape))
  fresh_BL = None
  if segment_BL is not None:
    before_B = segment_BL[:, 0] if before_B is None else before_B
    fresh_BL = jnp.diff(segment_BL, axis=1, prepend=before_B[:, None]) != 0
  chunk = min(chunk, -(-L // LEAST_CHUNKS))
  chunks = max(LEAST_CHUNKS, -(-L // chunk))
  fold = functools.partial(_folded, chunks=chunks, chunk=chunk)
  restart_HN = None if restart_HN is None or fresh_BL is None else restart_HN.astype(dtype)
  y_CQBH, state_BHN = _scan(
    inside, fold(x_BLH), fold(dt_BLH.astype(dtype)), a_HN.astype(dtype), fold(b_BLN), fold(c_BLN),
    fold(fresh_BL), state_BHN.astype(dtype), restart_HN,
  )
  y_BLH = jnp.moveaxis(y_CQBH, 2, 0).reshape(B, -1, H)[:, :L]
  if skip_H is not None:
    y_BLH += skip_H.astype(dtype) * x_BLH.astype(dtype)
  return y_BLH.astype(x_BLH.dtype), state_BHN


def _folded(v_BL, chunks, chunk):
  """Returns an array as v_CQB, padded with zeros; None as it is."""
  if v_BL is None:
    return None
  B, L, *rest = v_BL.shape
  v_BL = jnp.pad(v_BL, [(0, 0), (0, chunks * chunk - L)] + [(0, 0)] * len(rest))
  return jnp.moveaxis(v_BL.reshape(B, chunks, chunk, *rest), 0, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(inside, *arrays):
  """Returns y_CQBH without a skip, and the last state."""
  y_CQBH, _, state_BHN = _forward(inside, *arrays)
  return y_CQBH, state_BHN


def _scan_forward(inside, *arrays):
  """Returns the outputs, and the arguments with the states before every chunk."""
  y_CQBH, state_CBHN, state_BHN = _forward(inside, *arrays)
  return (y_CQBH, state_BHN), (*arrays, state_CBHN)


def _forward(inside, x_CQBH, dt_CQBH, a_HN, b_CQBN, c_CQBN, fresh_CQB, state_BHN, restart_HN):
  """Returns y_CQBH, the states before every chunk, and the last one."""

  def turn(state_BHN, arrays):
    x_QBH, dt_QBH, b_QBN, c_QBN, fresh_QB = arrays
    _, keep_QBHN, add_QBHN = _terms(x_QBH, dt_QBH, a_HN, b_QBN, fresh_QB, restart_HN)
    state_QBHN = INSIDE[inside].states(keep_QBHN, add_QBHN, state_BHN)
    y_QBH = _sum("qbhn,qbn->qbh", state_QBHN, c_QBN)
    return state_QBHN[-1], (y_QBH, state_BHN)

  arrays = (x_CQBH, dt_CQBH, b_CQBN, c_CQBN, fresh_CQB)
  state_BHN, (y_CQBH, state_CBHN) = jax.lax.scan(turn, state_BHN, arrays)
  return y_CQBH, state_CBHN, state_BHN


def _scan_backward(inside, kept, bars):
  """Returns one cotangent an argument, in its dtype; none for the resets.

  That of dt a is what a decay multiplies, times the cotangent of the state that it makes.
  """
  x_CQBH, dt_CQBH, a_HN, b_CQBN, c_CQBN, fresh_CQB, _, restart_HN, state_CBHN = kept
  y_bar_CQBH, last_bar_BHN = bars
  ones_N = jnp.ones(a_HN.shape[1], a_HN.dtype)

  def turn(carry, arrays):
    after_BHN, a_bar_HN, restart_bar_HN = carry
    x_QBH, dt_QBH, b_QBN, c_QBN, fresh_QB, state_BHN, y_bar_QBH = arrays
    decay_QBHN, keep_QBHN, add_QBHN = _terms(x_QBH, dt_QBH, a_HN, b_QBN, fresh_QB, restart_HN)
    state_QBHN = INSIDE[inside].states(keep_QBHN, add_QBHN, state_BHN)
    read_QBHN = y_bar_QBH[..., None] * _wide(c_QBN, a_HN)[:, :, None]
    bar_QBHN, before_BHN = INSIDE[inside].bars(keep_QBHN, read_QBHN, after_BHN)
    pull_QBHN = decay_QBHN * bar_QBHN
    cross_QBHN = pull_QBHN * _earlier(state_BHN, state_QBHN, fresh_QB, restart_HN)
    share_QBH = _sum("qbhn,qbn->qbh", bar_QBHN, b_QBN)
    x_QBH = _wide(x_QBH, a_HN)
    dt_bar_QBH = x_QBH * share_QBH + _sum("qbhn,n->qbh", cross_QBHN * a_HN, ones_N)
    b_bar_QBN = _sum("qbhn,qbh->qbn", bar_QBHN, dt_QBH * x_QBH)
    c_bar_QBN = _sum("qbhn,qbh->qbn", state_QBHN, y_bar_QBH)
    a_bar_HN += _over_rows(jnp.ones_like(x_QBH[..., 0]), cross_QBHN * dt_QBH[..., None])
    if restart_HN is not None:
      restart_bar_HN += _over_rows(_wide(fresh_QB, a_HN), pull_QBHN)
    narrow = (v.astype(old.dtype) for v, old in (
      (dt_QBH * share_QBH, x_CQBH), (dt_bar_QBH, dt_CQBH), (b_bar_QBN, b_CQBN), (c_bar_QBN, c_CQBN)
    ))
    return (before_BHN, a_bar_HN, restart_bar_HN), tuple(narrow)

  carry = (last_bar_BHN, jnp.zeros_like(a_HN), jax.tree.map(jnp.zeros_like, restart_HN))
  arrays = (x_CQBH, dt_CQBH, b_CQBN, c_CQBN, fresh_CQB, state_CBHN, y_bar_CQBH)
  carry, (x_bar, dt_bar, b_bar, c_bar) = jax.lax.scan(turn, carry, arrays, reverse=True)
  state_bar_BHN, a_bar_HN, restart_bar_HN = carry
  return x_bar, dt_bar, a_bar_HN, b_bar, c_bar, None, state_bar_BHN, restart_bar_HN


_scan.defvjp(_scan_forward, _scan_backward)


def _terms(x_QBH, dt_QBH, a_HN, b_QBN, fresh_QB, restart_HN):
  """Returns decay, keep and add: a state becomes decay state + input, or keep state + add.

  Where the state is dropped, `keep` is zero, and `add` has what is left of the restart.
  """
  decay_QBHN = jnp.exp(dt_QBH[..., None] * a_HN)
  add_QBHN = (dt_QBH * _wide(x_QBH, a_HN))[..., None] * _wide(b_QBN, a_HN)[:, :, None]
  if fresh_QB is None:
    return decay_QBHN, decay_QBHN, add_QBHN
  fresh_QB11 = fresh_QB[..., None, None]
  if restart_HN is not None:
    add_QBHN += jnp.where(fresh_QB11, decay_QBHN * restart_HN, 0)
  return decay_QBHN, jnp.where(fresh_QB11, 0, decay_QBHN), add_QBHN


def _earlier(state_BHN, state_QBHN, fresh_QB, restart_HN):
  """Returns the state that every position starts from."""
  earlier_QBHN = jnp.concatenate([state_BHN[None], state_QBHN[:-1]])
  if fresh_QB is None:
    return earlier_QBHN
  return jnp.where(fresh_QB[..., None, None], 0 if restart_HN is None else restart_HN, earlier_QBHN)


def _steps(keep_QBHN, add_QBHN, state_BHN):
  def step(state_BHN, terms):
    keep_BHN, add_BHN = terms
    state_BHN = keep_BHN * state_BHN + add_BHN
    return state_BHN, state_BHN

  return jax.lax.scan(step, state_BHN, (keep_QBHN, add_QBHN))[1]


def _steps_back(keep_QBHN, bar_QBHN, after_BHN):
  def step(after_BHN, terms):
    keep_BHN, bar_BHN = terms
    bar_BHN = bar_BHN + after_BHN
    return keep_BHN * bar_BHN, bar_BHN

  before_BHN, bar_QBHN = jax.lax.scan(step, after_BHN, (keep_QBHN, bar_QBHN), reverse=True)
  return bar_QBHN, before_BHN


def _compose(early, late):
  """Returns what two parts, each a map keep s + add of a state s, do one after the other."""
  return early[0] * late[0], early[1] * late[0] + late[1]


def _tree(keep_QBHN, add_QBHN, state_BHN):
  keep_QBHN, add_QBHN = jax.lax.associative_scan(_compose, (keep_QBHN, add_QBHN))
  return keep_QBHN * state_BHN + add_QBHN


def _tree_back(keep_QBHN, bar_QBHN, after_BHN):
  later_QBHN = jnp.concatenate([keep_QBHN[1:], jnp.ones_like(keep_QBHN[:1])])
  whole_QBHN, bar_QBHN = jax.lax.associative_scan(_compose, (later_QBHN, bar_QBHN), reverse=True)
  bar_QBHN += whole_QBHN * after_BHN
  return bar_QBHN, keep_QBHN[0] * bar_QBHN[0]


# One position after the other: no work is done twice, but a device waits for every step. Halves
# within halves: log2(Q) rounds, for a device with more arithmetic than patience.
INSIDE: Mapping[str, Inside] = {
  "steps": Inside(_steps, _steps_back), "tree": Inside(_tree, _tree_back),
}


def _wide(v, like):
  return v.astype(like.dtype)


def _over_rows(weight_QB, v_QBHN):
  """Returns the weighted sum over positions and rows.

  With the weights on the left; on the right, XLA on CPU turns the large array first.
  """
  rows = ((0, 1), (0, 1))
  return jax.lax.dot_general(weight_QB, v_QBHN, (rows, ((), ())), precision="highest")


def _sum(subscripts, left, right):
  """Returns a sum of products in the first operand's dtype."""
  return jnp.einsum(subscripts, left, _wide(right, left), precision="highest")
