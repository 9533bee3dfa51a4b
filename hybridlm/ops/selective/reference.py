"""The selective scan as the paper writes it, one step a token: the ground truth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
) -> tuple[Float[Array, "B L H"], Float[Array, "B H N"]]:
  """Returns y_BLH in x's dtype and the float32 state after the last token.

  state_hn <- exp(dt_h a_hn) state_hn + dt_h b_n x_h, y_h = sum over n of c_n state_hn + skip_h x_h,
  in float32 (float64 when x is float64). `dt_BLH` is after softplus, `a_HN` negative. The state
  becomes `restart_HN` (zeros by default) before every token whose segment differs from the one
  before it, and starts from `state_BHN`, by default from `restart_HN` too.
  Source: Mamba (arXiv 2312.00752), equation 2 and algorithm 2, with b discretised as dt b.
  """
  B, L, H = x_BLH.shape
  dtype = jnp.promote_types(x_BLH.dtype, jnp.float32)
  if restart_HN is None:
    restart_HN = jnp.zeros((H, b_BLN.shape[2]), dtype)
  restart_HN = restart_HN.astype(dtype)
  if state_BHN is None:
    state_BHN = jnp.broadcast_to(restart_HN, (B, *restart_HN.shape))
  segment_BL = jnp.zeros((B, L), jnp.int32) if segment_BL is None else segment_BL
  fresh_BL = segment_BL != jnp.concatenate([segment_BL[:, :1], segment_BL[:, :-1]], axis=1)

  def step(state_BHN, token):
    x_BH, dt_BH, b_BN, c_BN, fresh_B = token
    state_BHN = jnp.where(fresh_B[:, None, None], restart_HN, state_BHN)
    decay_BHN = jnp.exp(dt_BH[..., None] * a_HN.astype(dtype))
    state_BHN = decay_BHN * state_BHN + (dt_BH * x_BH)[..., None] * b_BN[:, None]
    return state_BHN, jnp.einsum("bhn,bn->bh", state_BHN, c_BN, precision="highest")

  arrays = [jnp.moveaxis(v.astype(dtype), 1, 0) for v in (x_BLH, dt_BLH, b_BLN, c_BLN)]
  state_BHN, y_LBH = jax.lax.scan(step, state_BHN.astype(dtype), (*arrays, fresh_BL.T))
  y_BLH = jnp.moveaxis(y_LBH, 0, 1)
  if skip_H is not None:
    y_BLH += skip_H.astype(dtype) * x_BLH.astype(dtype)
  return y_BLH.astype(x_BLH.dtype), state_BHN
