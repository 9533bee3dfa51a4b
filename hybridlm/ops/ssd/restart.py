"""Documents that all begin with the same state: what it adds to a scan that drops it at each."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def starts(segment_BL: Int[Array, "B L"]) -> Bool[Array, "B L"]:
  """Returns where the segment differs from the position before; position 0 counts as such."""
  return jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1] - 1) != 0


def decay(
  rate_BLGH: Float[Array, "B L *heads"], fresh_BL: Bool[Array, "B L"]
) -> Float[Array, "B L *heads"]:
  """Returns exp of the sum of rates since the last fresh position, its own included.

  A sum of its own for each segment: the difference of two sums over a long row has few digits left.
  """
  return jnp.exp(_sums(False, rate_BLGH, fresh_BL))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(reverse, rate_BL, fresh_BL):
  """Returns sums from the last fresh position on, or with `reverse` from the end of the segment."""
  fresh = fresh_BL.reshape(*fresh_BL.shape, *[1] * (rate_BL.ndim - 2))

  def join(before, now):
    (fresh_before, sum_before), (fresh_now, sum_now) = before, now
    return fresh_before | fresh_now, jnp.where(fresh_now, sum_now, sum_before + sum_now)

  return jax.lax.associative_scan(join, (fresh, rate_BL), axis=1, reverse=reverse)[1]


def _sums_forward(reverse, rate_BL, fresh_BL):
  return _sums(reverse, rate_BL, fresh_BL), fresh_BL


def _sums_backward(reverse, fresh_BL, bar_BL):
  """Returns the cotangent of the rates: each is in all sums from there on within its segment."""
  shift = jnp.roll(fresh_BL, 1 if reverse else -1, axis=1)
  ends_BL = shift.at[:, 0 if reverse else -1].set(True)
  return _sums(not reverse, bar_BL, ends_BL), None


_sums.defvjp(_sums_forward, _sums_backward)


def add(
  y_BLGHP: Float[Array, "B L G H P"],
  state_BGHPN: Float[Array, "B G H P N"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  c_BLGN: Float[Array, "B L G N"],
  segment_BL: Int[Array, "B L"],
  restart_GHPN: Float[Array, "G H P N"],
  *,
  continues: bool,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y and the last state of a scan whose documents begin with `restart_GHPN`.

  `y_BLGHP` and `state_BGHPN` are the scan's whose documents begin with zeros. `continues`: the one
  at position 0 has begun before, and is as it was.
  """
  dtype = state_BGHPN.dtype
  fresh_BL, rate_BLGH = starts(segment_BL), dt_BLGH.astype(dtype) * a_GH.astype(dtype)
  decay_BLGH = decay(rate_BLGH, fresh_BL)
  if continues:
    decay_BLGH = jnp.where(jnp.cumsum(fresh_BL, axis=1)[..., None, None] > 1, decay_BLGH, 0)
  restart_GHPN = restart_GHPN.astype(dtype)
  added_BLGHP = decay_BLGH[..., None] * jnp.einsum(
    "BLGN,GHPN->BLGHP", c_BLGN.astype(dtype), restart_GHPN, precision="highest")
  y_BLGHP = (y_BLGHP.astype(dtype) + added_BLGHP).astype(y_BLGHP.dtype)
  return y_BLGHP, state_BGHPN + decay_BLGH[:, -1, ..., None, None] * restart_GHPN
