"""A sequence longer than one device holds: each scans its own part, and states are passed on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops.mesh import from_before


def ssd(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  *,
  skip_GH: Float[Array, "G H"] | None = None,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BGHPN: Float[Array, "B G H P N"] | None = None,
  axis: str,
  scan: Callable,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y of this device's positions, and on all devices the state after the last of all.

  Runs inside `jax.shard_map`: mesh axis `axis` divides the positions, in order; L is what one
  device holds. `state_BGHPN` is the one before the first position of all; the other arguments
  and the contract are `api.ssd`'s, and `scan` is one of its implementations.
  Each device scans from zero. Then states are composed over the devices in log2(devices) steps,
  one state sent a step, and what the state from before adds to y is one product for all positions.
  Source: Mamba-2 (arXiv 2405.21060), section 8.2.
  """
  dtype = jnp.promote_types(x_BLGHP.dtype, jnp.float32)
  y_BLGHP, added_BGHPN = scan(
    x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN, skip_GH=skip_GH, segment_BL=segment_BL
  )
  if state_BGHPN is None:
    state_BGHPN = jnp.zeros_like(added_BGHPN)
  first_BLGH = _survives(dt_BLGH.astype(dtype), a_GH.astype(dtype), segment_BL, axis)
  whole_BGH = first_BLGH[:, -1]
  before_BGHPN, after_BGHPN = _compose(whole_BGH, added_BGHPN, state_BGHPN.astype(dtype), axis)
  outer_BLGHP = jnp.einsum(
    "BLGN,BGHPN->BLGHP", c_BLGN.astype(dtype), before_BGHPN, precision="highest"
  )
  y_BLGHP = y_BLGHP.astype(dtype) + outer_BLGHP * first_BLGH[..., None]
  is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
  last_BGHPN = jax.lax.psum(jnp.where(is_last, after_BGHPN, 0), axis)
  return y_BLGHP.astype(x_BLGHP.dtype), last_BGHPN


def _survives(dt_BLGH, a_GH, segment_BL, axis):
  """Returns how much of the state before this device's positions is left at each of them."""
  log_BLGH = jnp.cumsum(dt_BLGH * a_GH, axis=1)
  if segment_BL is None:
    return jnp.exp(log_BLGH)
  # The first device has nobody before it: its state continues at position 0.
  last_B = from_before(segment_BL[:, -1], 1, axis, segment_BL[:, 0])
  fresh_BL = jnp.diff(segment_BL, axis=1, prepend=last_B[:, None]) != 0
  run_BL = jnp.cumsum(fresh_BL, axis=1, dtype=jnp.int32)
  return jnp.where((run_BL == 0)[..., None, None], jnp.exp(log_BLGH), 0)


def _compose(whole_BGH, added_BGHPN, state_BGHPN, axis):
  """Returns the states before and after each device's positions.

  A part maps a state s to whole s + added; after the step of length 2^k a device has composed
  its part with the 2^(k+1) - 1 before it (the prefix sum of Hillis and Steele).
  """
  whole_BGHPN = whole_BGH[..., None, None]
  distance = 1
  while distance < jax.lax.axis_size(axis):
    earlier_whole = from_before(whole_BGHPN, distance, axis, jnp.ones_like(whole_BGHPN))
    earlier_added = from_before(added_BGHPN, distance, axis, jnp.zeros_like(added_BGHPN))
    added_BGHPN = whole_BGHPN * earlier_added + added_BGHPN
    whole_BGHPN = whole_BGHPN * earlier_whole
    distance *= 2
  after_BGHPN = whole_BGHPN * state_BGHPN + added_BGHPN
  return from_before(after_BGHPN, 1, axis, state_BGHPN), after_BGHPN
