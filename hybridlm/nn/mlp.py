"""The feed-forward layer: squared ReLU (Nemotron) or SwiGLU (Llama)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import Mlp, ModelConfig
from hybridlm.nn import flow
from hybridlm.ops.project import project


def mix(
  cfg: ModelConfig,
  block: Mlp,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> tuple[Float[Array, "B L D"], dict[str, jax.Array]]:
  """Returns the layer's output for a normed input, and what can be tapped on the way.

  Taps: `up_BLF` (the first projection) and `act_BLF` (the input of the last). Positions do not
  see each other, so `segment_BL` and `place` are not used; nor is `count`, for there is no norm.
  """
  cast = layout.used(cfg.layout, leaves, x_BLD.dtype)

  def read(stem):
    y_BLF = project(x_BLD, cast[f"w_{stem}_DF"], quantize=cfg.quantize)
    return layout.constrain(cfg.layout, y_BLF, "BLF")

  up_BLF = read("up")
  if block.bias:
    up_BLF = up_BLF + cast["b_up_F"]
  if block.activation == "relu2":
    act_BLF = jnp.square(jax.nn.relu(up_BLF))
  else:
    gate_BLF = read("gate")
    act_BLF = jax.nn.silu(gate_BLF + cast["b_gate_F"] if block.bias else gate_BLF) * up_BLF
  y_BLD = project(act_BLF, cast["w_down_FD"], quantize=cfg.quantize)
  if block.bias:
    y_BLD = y_BLD + cast["b_down_D"]
  return y_BLD, {"up_BLF": up_BLF, "act_BLF": act_BLF}


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `serve` reads them: the projections of gate and up joined.

  `w_in` has shape [D, channels]: the gate's F, if there is one, then up's F.
  """
  stems = [stem for stem in ("gate", "up") if f"w_{stem}_DF" in leaves]
  joined = {
    "w_in": jnp.concatenate([leaves[f"w_{stem}_DF"] for stem in stems], axis=1),
    "w_down_FD": leaves["w_down_FD"],
  }
  if "b_down_D" in leaves:
    joined["b_in"] = jnp.concatenate([leaves[f"b_{stem}_F"] for stem in stems])
    joined["b_down_D"] = leaves["b_down_D"]
  return {name: leaf.astype(dtype) for name, leaf in joined.items()}


def serve(
  block: Mlp, leaves: Mapping[str, jax.Array], x_BLD: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
  """Returns the layer's output for a normed input; `leaves` are `join`ed."""
  y_BL = project(x_BLD, leaves["w_in"])
  y_BL = y_BL + leaves["b_in"] if block.bias else y_BL
  if block.activation == "relu2":
    act_BLF = jnp.square(jax.nn.relu(y_BL))
  else:
    gate_BLF, up_BLF = jnp.split(y_BL, 2, axis=2)
    act_BLF = jax.nn.silu(gate_BLF) * up_BLF
  y_BLD = project(act_BLF, leaves["w_down_FD"])
  return y_BLD + leaves["b_down_D"] if block.bias else y_BLD
