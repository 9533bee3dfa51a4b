"""A Mamba-2 mixer without its state: convolution, skip, gate, norm and projections."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import GatedConv, ModelConfig
from hybridlm.nn import mamba
from hybridlm.nn.cache import ConvState
from hybridlm.ops.conv import causal_conv, causal_conv_step
from hybridlm.ops.project import project


def _skip(leaves, u_BLGHP):
  """Returns skip times u in u's dtype: all that the scan gives without a state."""
  wide_BLGHP = u_BLGHP.astype(jnp.promote_types(u_BLGHP.dtype, jnp.float32))
  skipped_BLGHP = leaves["skip_GH"][..., None] * wide_BLGHP
  return skipped_BLGHP.astype(u_BLGHP.dtype)


def mix(
  cfg: ModelConfig,
  block: GatedConv,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
) -> tuple[Float[Array, "B L D"], dict[str, jax.Array]]:
  """Returns the mixer's output for a normed input, and what can be tapped on the way.

  Taps and `count` are those of `mamba.mix`, without what belongs to the state.
  """
  cast = layout.used(cfg.layout, leaves, x_BLD.dtype)
  z_BLGHP, x_BLGHP = (
    layout.constrain(cfg.layout, project(x_BLD, cast[name], quantize=cfg.quantize), "BLGHP")
    for name in ("w_z_DGHP", "w_x_DGHP")
  )
  u_BLGHP = jax.nn.silu(causal_conv(
    x_BLGHP, cast["conv_x_WGHP"], cast.get("conv_bias_x_GHP"), segment_BL=segment_BL,
    channels="GHP", mesh_axes=layout.LAYOUTS[cfg.layout].activations,
  ))
  count_G = (count or {}).get("count_G")
  leaves = {**leaves, "w_out_GHPD": cast["w_out_GHPD"]}
  y_BLD, y_BLGHP = mamba.finish(
    cfg, block, leaves, _skip(leaves, u_BLGHP), z_BLGHP, count_G=count_G
  )
  return y_BLD, {"x_BLGHP": x_BLGHP, "z_BLGHP": z_BLGHP, "u_BLGHP": u_BLGHP, "y_BLGHP": y_BLGHP}


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `prefill` and `step` read them: z|x joined, channels of the conv flat.

  Joined channels have no letter: `w_in` has shape [D, channels], `taps` [W, channels].
  """
  ins = [leaves[f"w_{stem}_DGHP"] for stem in "zx"]
  taps_WGHP = leaves["conv_x_WGHP"]
  joined = {
    "w_in": jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in ins], axis=1),
    "taps": taps_WGHP.reshape(taps_WGHP.shape[0], -1),
    "w_out_GHPD": leaves["w_out_GHPD"],
  }
  if "conv_bias_x_GHP" in leaves:
    joined["conv_bias"] = leaves["conv_bias_x_GHP"].ravel()
  cast = {name: leaf.astype(dtype) for name, leaf in joined.items()}
  return cast | {name: leaves[name] for name in ("skip_GH", "gate_gain_GHP") if name in leaves}


def _project(block, leaves, x_BLD):
  """Returns z, and the input of the convolution with its channels flat."""
  y_BL = project(x_BLD, leaves["w_in"])
  z_BL, conv_BL = jnp.split(y_BL, 2, axis=2)
  return z_BL.reshape(*z_BL.shape[:2], block.G, block.H, block.P), conv_BL


def _finish(cfg, block, leaves, u_BL, z_BLGHP):
  """Returns the mixer's output from what the convolution made, before its SiLU."""
  u_BLGHP = jax.nn.silu(u_BL).reshape(z_BLGHP.shape)
  return mamba.finish(cfg, block, leaves, _skip(leaves, u_BLGHP), z_BLGHP)[0]


def prefill(
  cfg: ModelConfig,
  block: GatedConv,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  size: int,
) -> tuple[Float[Array, "B L D"], ConvState]:
  """Returns the mixer's output and the state after each row's `length_B` tokens.

  `leaves` are `join`ed. `size` is not used: the state has a size of its own.
  """
  z_BLGHP, conv_BL = _project(block, leaves, x_BLD)
  u_BL = causal_conv(conv_BL, leaves["taps"], leaves.get("conv_bias"))
  y_BLD = _finish(cfg, block, leaves, u_BL, z_BLGHP)
  return y_BLD, ConvState(mamba.last_inputs(conv_BL, length_B, block.W))


def step(
  cfg: ModelConfig,
  block: GatedConv,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: ConvState,
  position_B: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 D"], ConvState]:
  """Returns the mixer's output for one more token a row, and the state after it.

  `leaves` are `join`ed. `position_B` is not used: a convolution does not count.
  """
  z_BLGHP, conv_BL = _project(block, leaves, x_BLD)
  u_B, conv_BW = causal_conv_step(
    conv_BL[:, 0], leaves["taps"], leaves.get("conv_bias"), state.conv_BW
  )
  return _finish(cfg, block, leaves, u_B[:, None], z_BLGHP), ConvState(conv_BW)
