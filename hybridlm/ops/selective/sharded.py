"""A sequence longer than one device holds: each scans its own part, and states are passed on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops.mesh import from_before


def selective(
  x_BLH: Float[Array, "B L H"],
  dt_BLH: Float[Array, "B L H"],
  a_HN: Float[Array, "H N"],
  b_BLN: Float[Array, "B L N"],
  c_BLN: Float[Array, "B L N"],
  *,
  skip_H: Float[Array, "H"] | None = None,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BHN: Float[Array, "B H N"] | None = None,
  restart_HN: Float[Array, "H N"] | None = None,
  axis: str,
  scan: Callable,
) -> tuple[Float[Array, "B L H"], Float[Array, "B H N"]]:
  """Returns y of this device's positions, and on all devices the state after the last of all.

  Runs inside `jax.shard_map`: mesh axis `axis` divides the positions, in order; L is what one
  device holds. `state_BHN` is the one before the first position of all; the other arguments and
  the contract are `api.selective`'s, and `scan` is `chunked.selective` but for them.
  Each device scans twice: from zero, to know what it adds to a state, then from the state that
  comes out of those before it, composed in log2(devices) steps. What a state from before adds to y
  has N decays a channel, and so costs as much as the scan.
  """
  before_B = None
  if segment_BL is not None:
    before_B = from_before(segment_BL[:, -1], 1, axis, segment_BL[:, 0])

  def run(**given):
    return scan(
      x_BLH, dt_BLH, a_HN, b_BLN, c_BLN, segment_BL=segment_BL, before_B=before_B,
      restart_HN=restart_HN, **given,
    )

  dtype = jnp.promote_types(x_BLH.dtype, jnp.float32)
  zeros_BHN = jnp.zeros((x_BLH.shape[0], *a_HN.shape), dtype)
  if state_BHN is None:
    state_BHN = zeros_BHN if restart_HN is None else zeros_BHN + restart_HN
  added_BHN = run(state_BHN=zeros_BHN)[1]
  whole_BHN = jnp.exp(jnp.sum(dt_BLH, axis=1)[..., None] * a_HN).astype(dtype)
  if segment_BL is not None:
    fresh_BL = jnp.diff(segment_BL, axis=1, prepend=before_B[:, None]) != 0
    whole_BHN = jnp.where(jnp.any(fresh_BL, axis=1)[:, None, None], 0, whole_BHN)
  state_BHN = _before(whole_BHN, added_BHN, state_BHN.astype(dtype), axis)
  y_BLH, after_BHN = run(skip_H=skip_H, state_BHN=state_BHN)
  is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
  return y_BLH, jax.lax.psum(jnp.where(is_last, after_BHN, 0), axis)


def _before(whole_BHN, added_BHN, state_BHN, axis):
  """Returns the state before each device's positions; one maps a state s to whole s + added.

  After the step of length 2^k a device has composed its part with the 2^(k+1) - 1 before it.
  """
  distance = 1
  while distance < jax.lax.axis_size(axis):
    earlier_whole = from_before(whole_BHN, distance, axis, jnp.ones_like(whole_BHN))
    earlier_added = from_before(added_BHN, distance, axis, jnp.zeros_like(added_BHN))
    added_BHN = whole_BHN * earlier_added + added_BHN
    whole_BHN = whole_BHN * earlier_whole
    distance *= 2
  return from_before(whole_BHN * state_BHN + added_BHN, 1, axis, state_BHN)
