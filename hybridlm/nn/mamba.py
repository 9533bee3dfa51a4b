"""The Mamba-2 mixer (arXiv 2405.21060; layer as in arXiv 2504.11409, section 2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import GatedConv, Mamba, ModelConfig
from hybridlm.nn import flow
from hybridlm.nn.cache import MambaState
from hybridlm.ops import norm
from hybridlm.ops.conv import causal_conv, causal_conv_step
from hybridlm.ops.project import project
from hybridlm.ops.ssd import step as recurrence
from hybridlm.ops.ssd.api import ssd


def step_size(
  raw_BLGH: Float[Array, "B L G H"],
  dt_bias_GH: Float[Array, "G H"],
  limits: tuple[float, float],
) -> Float[Array, "B L G H"]:
  """Returns dt = clip(softplus(raw + bias), limits) in float32 or wider, in prefill and decode."""
  wide_BLGH = raw_BLGH.astype(jnp.promote_types(raw_BLGH.dtype, jnp.float32))
  dt_BLGH = jax.nn.softplus(wide_BLGH + dt_bias_GH)
  return jnp.clip(dt_BLGH, *limits)


def rates(leaves: Mapping[str, jax.Array]) -> Float[Array, "G H"]:
  """Returns A, negative, in float32 or wider."""
  a_log_GH = leaves["a_log_GH"]
  return -jnp.exp(a_log_GH.astype(jnp.promote_types(a_log_GH.dtype, jnp.float32)))


def gated(
  cfg: ModelConfig,
  block: Mamba | GatedConv,
  leaves: Mapping[str, jax.Array],
  y_BLGHP: Float[Array, "B L G H P"],
  z_BLGHP: Float[Array, "B L G H P"],
  *,
  count_G: Float[Array, "G"] | None = None,
) -> Float[Array, "B L G H P"]:
  """Returns the input of the output projection: the scan's output, gated and normed by `block`.

  "none" takes no `count_G`: there is no norm.
  """
  if block.gate == "none":
    return norm.gate(y_BLGHP, z_BLGHP)
  run = norm.gated_rms_norm if block.gate == "gated" else norm.rms_norm_then_gate
  return run(y_BLGHP, z_BLGHP, leaves["gate_gain_GHP"], eps=cfg.eps, count_G=count_G)


def write(
  cfg: ModelConfig, leaves: Mapping[str, jax.Array], y_BLGHP: Float[Array, "B L G H P"]
) -> Float[Array, "B L D"]:
  """Returns the output projection of all heads' channels, of leaves as they are used."""
  w_out_GHPD = leaves["w_out_GHPD"].astype(y_BLGHP.dtype)
  return project(y_BLGHP, w_out_GHPD, inputs=3, quantize=cfg.quantize)


def output(
  cfg: ModelConfig, leaves: Mapping[str, jax.Array], y_BLGHP: Float[Array, "B L G H P"]
) -> Float[Array, "B L D"]:
  """Returns the output projection, where models are trained, of what `inner` made."""
  cast = layout.used(cfg.layout, {"w_out_GHPD": leaves["w_out_GHPD"]}, y_BLGHP.dtype)
  return write(cfg, cast, y_BLGHP)


def mix(
  cfg: ModelConfig,
  block: Mamba,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> tuple[Float[Array, "B L D"], dict[str, Any]]:
  """Returns the mixer's output for a normed input, and what `inner` returns."""
  seen = inner(cfg, block, leaves, x_BLD, segment_BL=segment_BL, count=count, place=place)
  return output(cfg, leaves, seen["y_BLGHP"]), seen


def inner(
  cfg: ModelConfig,
  block: Mamba,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> dict[str, Any]:
  """Returns the input of the output projection, `y_BLGHP`, and what can be tapped on the way.

  Taps: `x_BLGHP` and `z_BLGHP` (projections, before the convolution), `u_BLGHP`, `b_BLGN` and
  `c_BLGN` (after convolution and SiLU), `dt_BLGH` (after softplus and limits), `y_BLGHP` (gated,
  and normed where `block.gate` has a norm: the input of the output projection), `state_BGHPN` (the
  SSM's, after the last position). `count["count_G"]` is the number of surviving channels in each
  group's norm. `place` is of `flow.Place`; `place.keep` adds the prefix.
  """
  own = {name: leaf for name, leaf in leaves.items() if name != "w_out_GHPD"}
  cast, restart = layout.used(cfg.layout, own, x_BLD.dtype), _restart(block, place.prefix)
  mesh_axes = layout.LAYOUTS[cfg.layout].activations
  wide = jnp.promote_types(x_BLD.dtype, jnp.float32)

  def read(stem, letters, dtype=None):
    y_BL = project(x_BLD, cast[f"w_{stem}_D{letters}"], quantize=cfg.quantize, dtype=dtype)
    return layout.constrain(cfg.layout, y_BL, f"BL{letters}")

  z_BLGHP, x_BLGHP = read("z", "GHP"), read("x", "GHP")
  b_BLGN, c_BLGN, dt_BLGH = read("b", "GN"), read("c", "GN"), read("dt", "GH", wide)

  def conv(array, stem, letters):
    taps, bias = cast[f"conv_{stem}_W{letters}"], cast.get(f"conv_bias_{stem}_{letters}")
    return jax.nn.silu(causal_conv(
      array, taps, bias, segment_BL=segment_BL, restart_W=restart.get(stem), channels=letters,
      mesh_axes=mesh_axes,
    ))

  seen = {
    "x_BLGHP": x_BLGHP,
    "z_BLGHP": z_BLGHP,
    "u_BLGHP": conv(x_BLGHP, "x", "GHP"),
    "b_BLGN": conv(b_BLGN, "b", "GN"),
    "c_BLGN": conv(c_BLGN, "c", "GN"),
    "dt_BLGH": step_size(dt_BLGH, leaves["dt_bias_GH"], block.dt_limits),
  }
  y_BLGHP, state_BGHPN = ssd(
    seen["u_BLGHP"],
    seen["dt_BLGH"],
    rates(leaves),
    seen["b_BLGN"],
    seen["c_BLGN"],
    skip_GH=leaves["skip_GH"],
    segment_BL=segment_BL,
    restart_GHPN=restart.get("state"),
    impl=cfg.ssd,
    chunk=cfg.chunk,
    mesh_axes=mesh_axes,
  )
  count_G = (count or {}).get("count_G")
  y_BLGHP = gated(cfg, block, leaves, y_BLGHP, z_BLGHP, count_G=count_G)
  if place.keep:
    read = (x_BLGHP, b_BLGN, c_BLGN)
    seen["prefix"] = flow.after(read, block.W, state_BGHPN, segment_BL)
  return seen | {"y_BLGHP": y_BLGHP, "state_BGHPN": state_BGHPN}


def _restart(block, prefix) -> dict[str, jax.Array]:
  """Returns what stands before every document: inputs of x, b and c, and the state."""
  if prefix is None:
    return {}
  parts = zip("xbc", _split(block, prefix.conv_BW), strict=True)
  return {name: v_BW[0] for name, v_BW in parts} | {"state": prefix.state[0]}


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `prefill` and `step` read them: z|x|b|c|dt joined, and x|b|c of the conv.

  Joined channels have no letter: `w_in` has shape [D, channels], `taps` [W, channels].
  """
  ins = [leaves[f"w_{stem}"] for stem in ("z_DGHP", "x_DGHP", "b_DGN", "c_DGN", "dt_DGH")]
  taps = [leaves[f"conv_{stem}"] for stem in ("x_WGHP", "b_WGN", "c_WGN")]
  biases = [leaves.get(f"conv_bias_{stem}") for stem in ("x_GHP", "b_GN", "c_GN")]
  joined = {
    "w_in": jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in ins], axis=1),
    "taps": jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in taps], axis=1),
    **{name: leaves[name] for name in ("w_out_GHPD",) if name in leaves},
  }
  if biases[0] is not None:
    joined["conv_bias"] = jnp.concatenate([leaf.ravel() for leaf in biases])
  kept = ("dt_bias_GH", "a_log_GH", "skip_GH", "gate_gain_GHP")
  cast = {name: leaf.astype(dtype) for name, leaf in joined.items()}
  return cast | {name: leaves[name] for name in kept if name in leaves}


def _project(block, leaves, x_BLD):
  """Returns z, the joined inputs of the convolutions, and dt before its bias in float32."""
  y_BL = project(x_BLD, leaves["w_in"], dtype=jnp.float32)
  inner, state = block.G * block.H * block.P, block.G * block.N
  z_BL, conv_BL, dt_BL = jnp.split(y_BL, [inner, 2 * (inner + state)], axis=2)
  z_BLGHP = z_BL.reshape(*z_BL.shape[:2], block.G, block.H, block.P).astype(x_BLD.dtype)
  dt_BLGH = dt_BL.reshape(*dt_BL.shape[:2], block.G, block.H)
  dt_BLGH = step_size(dt_BLGH, leaves["dt_bias_GH"], block.dt_limits)
  return z_BLGHP, conv_BL.astype(x_BLD.dtype), dt_BLGH


def _split(block, conv_BL):
  """Returns x, b and c of joined channels."""
  inner, state = block.G * block.H * block.P, block.G * block.N
  u_BL, b_BL, c_BL = jnp.split(conv_BL, [inner, inner + state], axis=2)
  lead = conv_BL.shape[:2]
  return (
    u_BL.reshape(*lead, block.G, block.H, block.P),
    b_BL.reshape(*lead, block.G, block.N),
    c_BL.reshape(*lead, block.G, block.N),
  )


def prefill_heads(
  cfg: ModelConfig,
  block: Mamba,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  prefix: flow.SsmPrefix | None = None,
) -> tuple[Float[Array, "B L G H P"], MambaState]:
  """Returns the input of the output projection, and the state after each row's `length_B` tokens.

  `leaves` are `join`ed. Steps after a row's end have dt = 0, which leaves its state as it is. Rows
  continue from `prefix`.
  """
  z_BLGHP, conv_BL, dt_BLGH = _project(block, leaves, x_BLD)
  before_BW, state_BGHPN = started(prefix, x_BLD.shape[0])
  u_BL = causal_conv(conv_BL, leaves["taps"], leaves.get("conv_bias"), state=before_BW)
  u_BLGHP, b_BLGN, c_BLGN = _split(block, jax.nn.silu(u_BL))
  real_BL = jnp.arange(x_BLD.shape[1]) < length_B[:, None]
  dt_BLGH = jnp.where(real_BL[..., None, None], dt_BLGH, 0)
  y_BLGHP, ssm_BGHPN = ssd(
    u_BLGHP, dt_BLGH, rates(leaves), b_BLGN, c_BLGN, skip_GH=leaves["skip_GH"],
    state_BGHPN=state_BGHPN, impl=cfg.ssd, chunk=cfg.chunk,
  )
  conv_BW = last_inputs(conv_BL, length_B, block.W, before_BW)
  return gated(cfg, block, leaves, y_BLGHP, z_BLGHP), MambaState(conv_BW, ssm_BGHPN)



def started(
  prefix: flow.SsmPrefix | None, batch: int
) -> tuple[Float[Array, "B _ channels"] | None, Float[Array, "B ..."] | None]:
  """Returns the inputs of the convolution and the state before a row's first token, of each row."""
  if prefix is None:
    return None, None
  return tuple(
    None if each is None else jnp.broadcast_to(each, (batch, *each.shape[1:])) for each in prefix)


def last_inputs(
  conv_BL: Float[Array, "B L channels"], length_B: Int[Array, "B"], W: int,
  before_BW: Float[Array, "B _ channels"] | None = None,
) -> Float[Array, "B _ channels"]:
  """Returns the last W - 1 inputs of a convolution within each row's length.

  Before the first stand `before_BW`, or zeros.
  """
  if before_BW is not None:
    # Behind the W - 1 inputs before it, position p stands at p + W - 1.
    conv_BS = jnp.concatenate([before_BW.astype(conv_BL.dtype), conv_BL], axis=1)
    last_BW = length_B[:, None] + jnp.arange(W - 1)
    return jnp.take_along_axis(conv_BS, last_BW[..., None], axis=1)
  last_BW = length_B[:, None] + jnp.arange(1 - W, 0)
  conv_BW = jnp.take_along_axis(conv_BL, jnp.maximum(last_BW, 0)[..., None], axis=1)
  return jnp.where(last_BW[..., None] >= 0, conv_BW, 0)


def step_heads(
  cfg: ModelConfig,
  block: Mamba,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: MambaState,
) -> tuple[Float[Array, "B 1 G H P"], MambaState]:
  """Returns the input of the output projection for one more token a row, and the state after it.

  `leaves` are `join`ed.
  """
  z_BLGHP, conv_BL, dt_BLGH = _project(block, leaves, x_BLD)
  u_B, conv_BW = causal_conv_step(
    conv_BL[:, 0], leaves["taps"], leaves.get("conv_bias"), state.conv_BW
  )
  u_BLGHP, b_BLGN, c_BLGN = _split(block, jax.nn.silu(u_B)[:, None])
  now = (v[:, 0] for v in (b_BLGN, c_BLGN))
  y_BGHP, ssm_BGHPN = recurrence.step(
    u_BLGHP[:, 0], dt_BLGH[:, 0], rates(leaves), *now, state.ssm_BGHPN
  )
  skipped_BLGHP = leaves["skip_GH"][..., None] * u_BLGHP.astype(jnp.float32)
  y_BLGHP = (y_BGHP[:, None] + skipped_BLGHP).astype(u_BLGHP.dtype)
  return gated(cfg, block, leaves, y_BLGHP, z_BLGHP), MambaState(conv_BW, ssm_BGHPN)
