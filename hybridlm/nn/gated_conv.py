"""A Mamba-2 mixer without its state: convolution, skip, gate, norm and projections."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import GatedConv, ModelConfig
from hybridlm.nn import flow, mamba
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
  place: flow.Place = flow.ALONE,
) -> tuple[Float[Array, "B L D"], dict[str, Any]]:
  """Returns the mixer's output for a normed input, and what `inner` returns."""
  seen = inner(cfg, block, leaves, x_BLD, segment_BL=segment_BL, count=count, place=place)
  return mamba.output(cfg, leaves, seen["y_BLGHP"]), seen


def inner(
  cfg: ModelConfig,
  block: GatedConv,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> dict[str, Any]:
  """Returns the input of the output projection, `y_BLGHP`, and what can be tapped on the way.

  Taps, `count` and `place` are those of `mamba.inner`, without what belongs to the state.
  """
  own = {name: leaf for name, leaf in leaves.items() if name != "w_out_GHPD"}
  cast = layout.used(cfg.layout, own, x_BLD.dtype)
  restart_W = None if place.prefix is None else place.prefix.conv_BW.reshape(
    block.W - 1, block.G, block.H, block.P)
  z_BLGHP, x_BLGHP = (
    layout.constrain(cfg.layout, project(x_BLD, cast[name], quantize=cfg.quantize), "BLGHP")
    for name in ("w_z_DGHP", "w_x_DGHP")
  )
  u_BLGHP = jax.nn.silu(causal_conv(
    x_BLGHP, cast["conv_x_WGHP"], cast.get("conv_bias_x_GHP"), segment_BL=segment_BL,
    restart_W=restart_W, channels="GHP", mesh_axes=layout.LAYOUTS[cfg.layout].activations,
  ))
  count_G = (count or {}).get("count_G")
  y_BLGHP = mamba.gated(cfg, block, leaves, _skip(leaves, u_BLGHP), z_BLGHP, count_G=count_G)
  seen = {"x_BLGHP": x_BLGHP, "z_BLGHP": z_BLGHP, "u_BLGHP": u_BLGHP, "y_BLGHP": y_BLGHP}
  if place.keep:
    seen["prefix"] = flow.after((x_BLGHP,), block.W, None, segment_BL)
  return seen


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `prefill` and `step` read them: z|x joined, channels of the conv flat.

  Joined channels have no letter: `w_in` has shape [D, channels], `taps` [W, channels].
  """
  ins = [leaves[f"w_{stem}_DGHP"] for stem in "zx"]
  taps_WGHP = leaves["conv_x_WGHP"]
  joined = {
    "w_in": jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in ins], axis=1),
    "taps": taps_WGHP.reshape(taps_WGHP.shape[0], -1),
    **{name: leaves[name] for name in ("w_out_GHPD",) if name in leaves},
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


def _heads(cfg, block, leaves, u_BL, z_BLGHP):
  """Returns the input of the output projection from what the convolution made, before its SiLU."""
  u_BLGHP = jax.nn.silu(u_BL).reshape(z_BLGHP.shape)
  return mamba.gated(cfg, block, leaves, _skip(leaves, u_BLGHP), z_BLGHP)


def prefill_heads(
  cfg: ModelConfig,
  block: GatedConv,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  prefix: flow.SsmPrefix | None = None,
) -> tuple[Float[Array, "B L G H P"], ConvState]:
  """Returns the input of the output projection, and the state after each row's `length_B` tokens.

  `leaves` are `join`ed. Rows continue from `prefix`.
  """
  z_BLGHP, conv_BL = _project(block, leaves, x_BLD)
  before_BW, _ = mamba.started(prefix, x_BLD.shape[0])
  u_BL = causal_conv(conv_BL, leaves["taps"], leaves.get("conv_bias"), state=before_BW)
  conv_BW = mamba.last_inputs(conv_BL, length_B, block.W, before_BW)
  return _heads(cfg, block, leaves, u_BL, z_BLGHP), ConvState(conv_BW)



def step_heads(
  cfg: ModelConfig,
  block: GatedConv,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: ConvState,
) -> tuple[Float[Array, "B 1 G H P"], ConvState]:
  """Returns the input of the output projection for one more token a row, and the state after it.

  `leaves` are `join`ed.
  """
  z_BLGHP, conv_BL = _project(block, leaves, x_BLD)
  u_B, conv_BW = causal_conv_step(
    conv_BL[:, 0], leaves["taps"], leaves.get("conv_bias"), state.conv_BW
  )
  return _heads(cfg, block, leaves, u_B[:, None], z_BLGHP), ConvState(conv_BW)
