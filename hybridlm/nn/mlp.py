"""The feed-forward layer: squared ReLU (Nemotron) or SwiGLU (Llama)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.config import Mlp, ModelConfig


def mix(
  cfg: ModelConfig,
  block: Mlp,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
) -> tuple[Float[Array, "B L D"], dict[str, jax.Array]]:
  """Returns the layer's output for a normed input, and what can be tapped on the way.

  Taps: `up_BLF` (the first projection) and `act_BLF` (the input of the last). Positions do not
  see each other, so `segment_BL` is not used; nor is `count`, for there is no norm inside.
  """
  cast = {name: leaf.astype(x_BLD.dtype) for name, leaf in leaves.items()}
  up_BLF = jnp.einsum("BLD,DF->BLF", x_BLD, cast["w_up_DF"])
  if block.bias:
    up_BLF = up_BLF + cast["b_up_F"]
  if block.activation == "relu2":
    act_BLF = jnp.square(jax.nn.relu(up_BLF))
  else:
    gate_BLF = jnp.einsum("BLD,DF->BLF", x_BLD, cast["w_gate_DF"])
    act_BLF = jax.nn.silu(gate_BLF + cast["b_gate_F"] if block.bias else gate_BLF) * up_BLF
  y_BLD = jnp.einsum("BLF,FD->BLD", act_BLF, cast["w_down_FD"])
  if block.bias:
    y_BLD = y_BLD + cast["b_down_D"]
  return y_BLD, {"up_BLF": up_BLF, "act_BLF": act_BLF}
