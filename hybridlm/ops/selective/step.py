"""The selective scan's recurrence for one token: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def step(
  x_BH: Float[Array, "B H"],
  dt_BH: Float[Array, "B H"],
  a_HN: Float[Array, "H N"],
  b_BN: Float[Array, "B N"],
  c_BN: Float[Array, "B N"],
  state_BHN: Float[Array, "B H N"],
) -> tuple[Float[Array, "B H"], Float[Array, "B H N"]]:
  """Returns y_BH without a skip and the state after the token, both in the state's dtype.

  `api.selective` with L = 1 and an initial state.
  Source: Mamba (arXiv 2312.00752), equation 2 and algorithm 2.
  """
  dtype = state_BHN.dtype
  x_BH, dt_BH, b_BN, c_BN = (v.astype(dtype) for v in (x_BH, dt_BH, b_BN, c_BN))
  decay_BHN = jnp.exp(dt_BH[..., None] * a_HN.astype(dtype))
  state_BHN = decay_BHN * state_BHN + (dt_BH * x_BH)[..., None] * b_BN[:, None]
  y_BH = jnp.einsum("BHN,BN->BH", state_BHN, c_BN, preferred_element_type=dtype)
  return y_BH, state_BHN
