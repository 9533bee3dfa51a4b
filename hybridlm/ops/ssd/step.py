"""The scan's recurrence for one token: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def step(
  x_BGHP: Float[Array, "B G H P"],
  dt_BGH: Float[Array, "B G H"],
  a_GH: Float[Array, "G H"],
  b_BGN: Float[Array, "B G N"],
  c_BGN: Float[Array, "B G N"],
  state_BGHPN: Float[Array, "B G H P N"],
) -> tuple[Float[Array, "B G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BGHP and the state after the token, both in the state's dtype.

  state <- exp(dt a) state + dt x B^T, y = state C: `api.ssd` with L = 1 and an initial state.
  Source: Mamba-2 (arXiv 2405.21060), equation 1 with the scalar A of section 5.
  """
  dtype = state_BGHPN.dtype
  x_BGHP, dt_BGH, b_BGN, c_BGN = (v.astype(dtype) for v in (x_BGHP, dt_BGH, b_BGN, c_BGN))
  decay_BGH = jnp.exp(dt_BGH * a_GH.astype(dtype))
  added_BGHP = dt_BGH[..., None] * x_BGHP
  state_BGHPN = decay_BGH[..., None, None] * state_BGHPN
  state_BGHPN += added_BGHP[..., None] * b_BGN[:, :, None, None]
  y_BGHP = jnp.einsum("BGHPN,BGN->BGHP", state_BGHPN, c_BGN, preferred_element_type=dtype)
  return y_BGHP, state_BGHPN
