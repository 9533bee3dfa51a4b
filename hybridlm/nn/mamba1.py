"""The Mamba-1 mixer (arXiv 2312.00752), with norms on dt's rank, B and C (arXiv 2403.19887)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import Mamba1, ModelConfig
from hybridlm.nn import flow, mamba
from hybridlm.nn.cache import Mamba1State
from hybridlm.nn.flow import SsmPrefix
from hybridlm.ops import norm
from hybridlm.ops.conv import causal_conv, causal_conv_step
from hybridlm.ops.project import project
from hybridlm.ops.selective import step as recurrence
from hybridlm.ops.selective.api import selective


def _rates(leaves):
  """Returns A, negative, in float32 or wider: one number a channel and state."""
  a_log_HN = leaves["a_log_GHN"][0]
  return -jnp.exp(a_log_HN.astype(jnp.promote_types(a_log_HN.dtype, jnp.float32)))


def _read(cfg, leaves, raw, in_dt_RGH, dtype, count):
  """Returns what the scan reads beside its input, from what the channels say: the norms and dt.

  `raw` has the R numbers of dt, B and C in float32 or wider, without G. So is what comes back.
  """
  count = count or {}

  def normed(v_BL, gain, letter):
    if gain not in leaves:
      return v_BL
    return norm.rms_norm(
      v_BL, leaves[gain].reshape(-1), eps=cfg.eps, count=count.get(f"count_{letter}"))

  rank_BLR, b_BLN, c_BLN = (
    normed(v_BL, gain, letter) for v_BL, gain, letter in zip(
      raw, ("rank_gain_R", "b_gain_GN", "c_gain_GN"), "RNN", strict=True)
  )
  raw_BLGH = project(rank_BLR.astype(dtype), in_dt_RGH, dtype=rank_BLR.dtype)
  dt_BLGH = mamba.step_size(raw_BLGH, leaves["dt_bias_GH"], (0.0, math.inf))
  return {
    "rank_BLR": rank_BLR, "b_BLGN": b_BLN[:, :, None], "c_BLGN": c_BLN[:, :, None],
    "dt_BLGH": dt_BLGH,
  }


def _scan(cfg, leaves, u_BLGHP, read, **given):
  """Returns the scan's output and the state after the last token."""
  y_BLH, state_BHN = selective(
    u_BLGHP[:, :, 0, :, 0], read["dt_BLGH"][:, :, 0], _rates(leaves), read["b_BLGN"][:, :, 0],
    read["c_BLGN"][:, :, 0], skip_H=leaves["skip_GH"][0], impl=cfg.ssd, chunk=cfg.chunk, **given,
  )
  return y_BLH[:, :, None, :, None], state_BHN[:, None]


def mix(
  cfg: ModelConfig,
  block: Mamba1,
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
  block: Mamba1,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> dict[str, Any]:
  """Returns the input of the output projection, `y_BLGHP`, and what can be tapped on the way.

  Taps: `x_BLGHP` and `z_BLGHP` (projections, before the convolution), `u_BLGHP` (after convolution
  and SiLU), `rank_BLR`, `b_BLGN` and `c_BLGN` (after their norms), `dt_BLGH` (after softplus),
  `y_BLGHP` (gated), `state_BGHN` (after the last position). `count["count_R"]` and
  `count["count_N"]` are the numbers of surviving entries in those norms. `place` is of
  `flow.Place`; `place.keep` adds the prefix.
  """
  own = {name: leaf for name, leaf in leaves.items() if name != "w_out_GHPD"}
  cast, prefix = layout.used(cfg.layout, own, x_BLD.dtype), place.prefix
  mesh_axes = layout.LAYOUTS[cfg.layout].activations
  wide = jnp.promote_types(x_BLD.dtype, jnp.float32)
  z_BLGHP, x_BLGHP = (
    layout.constrain(cfg.layout, project(x_BLD, cast[name], quantize=cfg.quantize), "BLGHP")
    for name in ("w_z_DGHP", "w_x_DGHP")
  )
  restart_W = None if prefix is None else prefix.conv_BW.reshape(
    block.W - 1, block.G, block.H, block.P)
  u_BLGHP = jax.nn.silu(causal_conv(
    x_BLGHP, cast["conv_x_WGHP"], cast.get("conv_bias_x_GHP"), segment_BL=segment_BL,
    restart_W=restart_W, channels="GHP", mesh_axes=mesh_axes,
  ))
  raw = (project(u_BLGHP, cast[name], inputs=3, dtype=wide)
         for name in ("in_rank_GHPR", "in_b_GHPN", "in_c_GHPN"))
  read = _read(cfg, leaves, raw, cast["in_dt_RGH"], x_BLD.dtype, count)
  read["dt_BLGH"] = layout.constrain(cfg.layout, read["dt_BLGH"], "BLGH")
  y_BLGHP, state_BGHN = _scan(
    cfg, leaves, u_BLGHP, read, segment_BL=segment_BL, mesh_axes=mesh_axes,
    restart_HN=None if prefix is None else prefix.state[0, 0],
  )
  seen = {"x_BLGHP": x_BLGHP, "z_BLGHP": z_BLGHP, "u_BLGHP": u_BLGHP, **read,
          "y_BLGHP": norm.gate(y_BLGHP, z_BLGHP), "state_BGHN": state_BGHN}
  if place.keep:
    seen["prefix"] = flow.after((x_BLGHP,), block.W, state_BGHN, segment_BL)
  return seen


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `prefill` and `step` read them: z|x joined, and what reads R, B and C.

  Joined channels have no letter: `w_in` has shape [D, channels], `taps` [W, channels], `in_all`
  [channels, R + 2 N].
  """
  taps_WGHP = leaves["conv_x_WGHP"]
  ins = [leaves[f"w_{stem}_DGHP"] for stem in "zx"]
  reads = [leaves[name] for name in ("in_rank_GHPR", "in_b_GHPN", "in_c_GHPN")]
  joined = {
    "w_in": jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in ins], axis=1),
    "taps": taps_WGHP.reshape(taps_WGHP.shape[0], -1),
    "in_all": jnp.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in reads], axis=1),
    "in_dt_RGH": leaves["in_dt_RGH"],
    **{name: leaves[name] for name in ("w_out_GHPD",) if name in leaves},
  }
  if "conv_bias_x_GHP" in leaves:
    joined["conv_bias"] = leaves["conv_bias_x_GHP"].ravel()
  kept = ("dt_bias_GH", "a_log_GHN", "skip_GH", "rank_gain_R", "b_gain_GN", "c_gain_GN")
  cast = {name: leaf.astype(dtype) for name, leaf in joined.items()}
  return cast | {name: leaves[name] for name in kept if name in leaves}


def _project(block, leaves, x_BLD):
  """Returns z, and the input of the convolution with its channels flat."""
  z_BL, conv_BL = jnp.split(project(x_BLD, leaves["w_in"]), 2, axis=2)
  return z_BL.reshape(*z_BL.shape[:2], block.G, block.H, block.P), conv_BL


def _read_joined(cfg, block, leaves, u_BL):
  """Returns what `_read` does, from the convolved channels, flat, and joined leaves."""
  wide = jnp.promote_types(u_BL.dtype, jnp.float32)
  raw_BL = project(u_BL, leaves["in_all"], dtype=wide)
  raw = jnp.split(raw_BL, [block.R, block.R + block.N], axis=2)
  return _read(cfg, leaves, raw, leaves["in_dt_RGH"], u_BL.dtype, None)


def prefill_heads(
  cfg: ModelConfig,
  block: Mamba1,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  prefix: SsmPrefix | None = None,
) -> tuple[Float[Array, "B L G H P"], Mamba1State]:
  """Returns the input of the output projection, and the state after each row's `length_B` tokens.

  `leaves` are `join`ed. Steps after a row's end have dt = 0, which leaves its state as it is. Rows
  continue from `prefix`.
  """
  z_BLGHP, conv_BL = _project(block, leaves, x_BLD)
  before_BW, state_BGHN = mamba.started(prefix, x_BLD.shape[0])
  u_BL = jax.nn.silu(
    causal_conv(conv_BL, leaves["taps"], leaves.get("conv_bias"), state=before_BW))
  read = _read_joined(cfg, block, leaves, u_BL)
  real_BL = jnp.arange(x_BLD.shape[1]) < length_B[:, None]
  read["dt_BLGH"] = jnp.where(real_BL[..., None, None], read["dt_BLGH"], 0)
  y_BLGHP, ssm_BGHN = _scan(
    cfg, leaves, u_BL.reshape(z_BLGHP.shape), read,
    state_BHN=None if state_BGHN is None else state_BGHN[:, 0],
  )
  conv_BW = mamba.last_inputs(conv_BL, length_B, block.W, before_BW)
  return norm.gate(y_BLGHP, z_BLGHP), Mamba1State(conv_BW, ssm_BGHN)



def step_heads(
  cfg: ModelConfig,
  block: Mamba1,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: Mamba1State,
) -> tuple[Float[Array, "B 1 G H P"], Mamba1State]:
  """Returns the input of the output projection for one more token a row, and the state after it.

  `leaves` are `join`ed.
  """
  z_BLGHP, conv_BL = _project(block, leaves, x_BLD)
  u_B, conv_BW = causal_conv_step(
    conv_BL[:, 0], leaves["taps"], leaves.get("conv_bias"), state.conv_BW
  )
  u_BH = jax.nn.silu(u_B)
  read = _read_joined(cfg, block, leaves, u_BH[:, None])
  y_BH, ssm_BHN = recurrence.step(
    u_BH, read["dt_BLGH"][:, 0, 0], _rates(leaves), read["b_BLGN"][:, 0, 0],
    read["c_BLGN"][:, 0, 0], state.ssm_BGHN[:, 0],
  )
  y_BH = (y_BH + leaves["skip_GH"][0] * u_BH.astype(y_BH.dtype)).astype(u_BH.dtype)
  y_BLGHP = norm.gate(y_BH[:, None, None, :, None], z_BLGHP)
  return y_BLGHP, Mamba1State(conv_BW, ssm_BHN[:, None])
