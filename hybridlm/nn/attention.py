"""Causal grouped-query attention, with or without rotary positions and a sliding window."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.config import Attention, ModelConfig
from hybridlm.ops.attention import attend, rotate


def mix(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
) -> tuple[Float[Array, "B L D"], dict[str, jax.Array]]:
  """Returns the mixer's output for a normed input, and what can be tapped on the way.

  Taps: `head_BLKJE`, the heads' outputs before the output projection. `count` is not used: there
  is no norm inside.
  """
  cast = {name: leaf.astype(x_BLD.dtype) for name, leaf in leaves.items()}
  q_BLKJE = jnp.einsum("BLD,DKJE->BLKJE", x_BLD, cast["w_q_DKJE"])
  k_BLKE = jnp.einsum("BLD,DKE->BLKE", x_BLD, cast["w_k_DKE"])
  v_BLKE = jnp.einsum("BLD,DKE->BLKE", x_BLD, cast["w_v_DKE"])
  if block.bias:
    q_BLKJE = q_BLKJE + cast["b_q_KJE"]
    k_BLKE, v_BLKE = k_BLKE + cast["b_k_KE"], v_BLKE + cast["b_v_KE"]
  if block.rope is not None:
    position_L = jnp.arange(x_BLD.shape[1])
    frequency = jnp.asarray(block.rope.frequencies(block.E), jnp.float32)
    rope = {"base": block.rope.base, "rotary": 2 * len(frequency), "frequency": frequency}
    q_BLKJE = rotate(q_BLKJE, position_L, **rope)
    k_BLKE = rotate(k_BLKE, position_L, **rope)
  head_BLKJE = attend(
    q_BLKJE,
    k_BLKE,
    v_BLKE,
    segment_BL=segment_BL,
    segment_BS=segment_BL,
    window=block.window,
    impl=cfg.attention,
  )
  y_BLD = jnp.einsum("BLKJE,KJED->BLD", head_BLKJE, cast["w_o_KJED"])
  if block.bias:
    y_BLD = y_BLD + cast["b_o_D"]
  return y_BLD, {"head_BLKJE": head_BLKJE}
