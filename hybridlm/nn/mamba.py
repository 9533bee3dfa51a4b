"""The Mamba-2 mixer (arXiv 2405.21060; layer as in arXiv 2504.11409, section 2)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.config import Mamba, ModelConfig
from hybridlm.ops import norm
from hybridlm.ops.conv import causal_conv
from hybridlm.ops.ssd.api import ssd


def step_size(
  raw_BLGH: Float[Array, "B L G H"],
  dt_bias_GH: Float[Array, "G H"],
  limits: tuple[float, float],
) -> Float[Array, "B L G H"]:
  """Returns dt = clip(softplus(raw + bias), limits) in float32, in prefill and decode alike."""
  dt_BLGH = jax.nn.softplus(raw_BLGH.astype(jnp.float32) + dt_bias_GH)
  return jnp.clip(dt_BLGH, *limits)


def mix(
  cfg: ModelConfig,
  block: Mamba,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
) -> tuple[Float[Array, "B L D"], dict[str, jax.Array]]:
  """Returns the mixer's output for a normed input, and what can be tapped on the way.

  Taps: `x_BLGHP` and `z_BLGHP` (projections, before the convolution), `y_BLGHP` (gated and
  normed, the input of the output projection). `count["count_G"]` is the number of surviving
  channels in each group's gated norm.
  """
  cast = {name: leaf.astype(x_BLD.dtype) for name, leaf in leaves.items()}
  z_BLGHP = jnp.einsum("BLD,DGHP->BLGHP", x_BLD, cast["w_z_DGHP"])
  x_BLGHP = jnp.einsum("BLD,DGHP->BLGHP", x_BLD, cast["w_x_DGHP"])
  b_BLGN = jnp.einsum("BLD,DGN->BLGN", x_BLD, cast["w_b_DGN"])
  c_BLGN = jnp.einsum("BLD,DGN->BLGN", x_BLD, cast["w_c_DGN"])
  dt_BLGH = jnp.einsum(
    "BLD,DGH->BLGH", x_BLD, cast["w_dt_DGH"], preferred_element_type=jnp.float32
  )
  seen = {"x_BLGHP": x_BLGHP, "z_BLGHP": z_BLGHP}

  def conv(array, stem, letters):
    bias = cast.get(f"conv_bias_{stem}_{letters}")
    return jax.nn.silu(
      causal_conv(array, cast[f"conv_{stem}_W{letters}"], bias, segment_BL=segment_BL)
    )

  u_BLGHP = conv(x_BLGHP, "x", "GHP")
  y_BLGHP, _ = ssd(
    u_BLGHP,
    step_size(dt_BLGH, leaves["dt_bias_GH"], block.dt_limits),
    -jnp.exp(leaves["a_log_GH"].astype(jnp.float32)),
    conv(b_BLGN, "b", "GN"),
    conv(c_BLGN, "c", "GN"),
    segment_BL=segment_BL,
    impl=cfg.ssd,
    chunk=cfg.chunk,
  )
  skipped_BLGHP = leaves["skip_GH"][..., None] * u_BLGHP.astype(jnp.float32)
  y_BLGHP = (y_BLGHP.astype(jnp.float32) + skipped_BLGHP).astype(x_BLD.dtype)
  y_BLGHP = norm.gated_rms_norm(
    y_BLGHP, z_BLGHP, leaves["gate_gain_GHP"], eps=cfg.eps, count_G=(count or {}).get("count_G")
  )
  return jnp.einsum("BLGHP,GHPD->BLD", y_BLGHP, cast["w_out_GHPD"]), seen | {"y_BLGHP": y_BLGHP}
