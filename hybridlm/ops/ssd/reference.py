"""The scan as the paper writes it, one step a token: the ground truth, never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BLGHP in x's dtype and the float32 state after the last token.

  state <- exp(dt a) state + dt x B^T, y = state C + skip x, in float32 (float64 when x is float64).
  `dt_BLGH` is after softplus, `a_GH` negative. The state starts from `state_BGHPN` (zeros by
  default) and is dropped before every token whose segment differs from the one before it.
  Source: Mamba-2 (arXiv 2405.21060), equation 1 with the scalar-identity A of section 5.
  """
  B, _, G, H, P = x_BLGHP.shape
  dtype = jnp.promote_types(x_BLGHP.dtype, jnp.float32)
  if state_BGHPN is None:
    state_BGHPN = jnp.zeros((B, G, H, P, b_BLGN.shape[-1]), dtype)
  if segment_BL is None:
    segment_BL = jnp.zeros(x_BLGHP.shape[:2], jnp.int32)
  fresh_BL = segment_BL != jnp.concatenate([segment_BL[:, :1], segment_BL[:, :-1]], axis=1)

  def step(state_BGHPN, token):
    x_BGHP, dt_BGH, b_BGN, c_BGN, fresh_B = token
    state_BGHPN = jnp.where(fresh_B[:, None, None, None, None], 0, state_BGHPN)
    decay_BGH = jnp.exp(dt_BGH * a_GH.astype(dtype))
    input_BGHPN = jnp.einsum("bgh,bghp,bgn->bghpn", dt_BGH, x_BGHP, b_BGN, precision="highest")
    state_BGHPN = decay_BGH[..., None, None] * state_BGHPN + input_BGHPN
    return state_BGHPN, jnp.einsum("bghpn,bgn->bghp", state_BGHPN, c_BGN, precision="highest")

  arrays = [jnp.moveaxis(v.astype(dtype), 1, 0) for v in (x_BLGHP, dt_BLGH, b_BLGN, c_BLGN)]
  tokens = (*arrays, fresh_BL.T)
  state_BGHPN, y_LBGHP = jax.lax.scan(step, state_BGHPN.astype(dtype), tokens)
  y_BLGHP = jnp.moveaxis(y_LBGHP, 0, 1)
  if skip_GH is not None:
    y_BLGHP += skip_GH.astype(dtype)[..., None] * x_BLGHP.astype(dtype)
  return y_BLGHP.astype(x_BLGHP.dtype), state_BGHPN
