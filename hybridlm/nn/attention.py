"""Causal grouped-query attention, with or without rotary positions and a sliding window."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import layout
from hybridlm.config import Attention, ModelConfig
from hybridlm.nn import cache
from hybridlm.nn.cache import AttentionState
from hybridlm.ops import attention_step
from hybridlm.ops.attention import attend, rotate
from hybridlm.ops.project import project


def _turn(block, heads_BLE, position_L):
  """Returns heads with their rotary channels turned, if the block has any."""
  if block.rope is None:
    return heads_BLE
  dtype = jnp.promote_types(heads_BLE.dtype, jnp.float32)
  frequency = jnp.asarray(block.rope.frequencies(block.E), dtype)
  return rotate(
    heads_BLE,
    position_L,
    base=block.rope.base,
    rotary=2 * len(frequency),
    frequency=frequency,
  )


def _output(cfg, block, leaves, head_BLKJE):
  """Returns the output projection of the heads."""
  w_o_KJED = leaves["w_o_KJED"].astype(head_BLKJE.dtype)
  y_BLD = project(head_BLKJE, w_o_KJED, inputs=3, quantize=cfg.quantize)
  return y_BLD + leaves["b_o_D"].astype(head_BLKJE.dtype) if block.bias else y_BLD


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

  Taps: `q_BLKJE` and `k_BLKE` (turned), `v_BLKE`, and `head_BLKJE`, the heads' outputs before the
  output projection. `count` is not used: there is no norm inside.
  """
  cast = layout.used(cfg.layout, leaves, x_BLD.dtype)

  def read(stem, heads):
    y_BL = project(x_BLD, cast[f"w_{stem}_D{heads}"], quantize=cfg.quantize)
    return layout.constrain(cfg.layout, y_BL, f"BL{heads}")

  q_BLKJE, k_BLKE, v_BLKE = read("q", "KJE"), read("k", "KE"), read("v", "KE")
  if block.bias:
    q_BLKJE = q_BLKJE + cast["b_q_KJE"]
    k_BLKE, v_BLKE = k_BLKE + cast["b_k_KE"], v_BLKE + cast["b_v_KE"]
  position_L = jnp.arange(x_BLD.shape[1])
  q_BLKJE, k_BLKE = (_turn(block, heads, position_L) for heads in (q_BLKJE, k_BLKE))
  head_BLKJE = attend(
    q_BLKJE,
    k_BLKE,
    v_BLKE,
    segment_BL=segment_BL,
    segment_BS=segment_BL,
    window=block.window,
    impl=cfg.attention,
    mesh_axes=layout.LAYOUTS[cfg.layout].activations,
  )
  seen = {"q_BLKJE": q_BLKJE, "k_BLKE": k_BLKE, "v_BLKE": v_BLKE, "head_BLKJE": head_BLKJE}
  return _output(cfg, block, cast, head_BLKJE), seen


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `prefill` and `step` read them: q|k|v joined, without a letter."""
  w_qkv = [leaves[f"w_{stem}"] for stem in ("q_DKJE", "k_DKE", "v_DKE")]
  joined = {
    "w_qkv": jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in w_qkv], axis=1),
    "w_o_KJED": leaves["w_o_KJED"],
  }
  if "b_o_D" in leaves:
    b_qkv = [leaves[f"b_{stem}"] for stem in ("q_KJE", "k_KE", "v_KE")]
    joined |= {"b_qkv": jnp.concatenate([b.ravel() for b in b_qkv]), "b_o_D": leaves["b_o_D"]}
  return {name: leaf.astype(dtype) for name, leaf in joined.items()}


def _project(block, leaves, x_BLD, position_L):
  """Returns q, k and v of a normed input, q and k turned."""
  y_BL = project(x_BLD, leaves["w_qkv"])
  y_BL = y_BL + leaves["b_qkv"] if block.bias else y_BL
  keys = block.K * block.E
  q_BL, k_BL, v_BL = jnp.split(y_BL, [block.J * keys, (block.J + 1) * keys], axis=2)
  lead = x_BLD.shape[:2]
  q_BLKJE = q_BL.reshape(*lead, block.K, block.J, block.E)
  k_BLKE, v_BLKE = (v.reshape(*lead, block.K, block.E) for v in (k_BL, v_BL))
  return _turn(block, q_BLKJE, position_L), _turn(block, k_BLKE, position_L), v_BLKE


def prefill(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  size: int,
) -> tuple[Float[Array, "B L D"], AttentionState]:
  """Returns the mixer's output, and each row's keys and values in their slots.

  `leaves` are `join`ed. Padding stands after all real tokens, so that none of them sees it.
  """
  q_BLKJE, k_BLKE, v_BLKE = _project(block, leaves, x_BLD, jnp.arange(x_BLD.shape[1]))
  head_BLKJE = attend(q_BLKJE, k_BLKE, v_BLKE, window=block.window, impl=cfg.attention)
  held_BS = attention_step.held(length_B - 1, cache.slots(block, size))[..., None, None]

  def fill(v_BLKE):
    v_BSKE = jnp.take_along_axis(v_BLKE, jnp.maximum(held_BS, 0), axis=1)
    return jnp.moveaxis(jnp.where(held_BS >= 0, v_BSKE, 0), 1, 2)

  return _output(cfg, block, leaves, head_BLKJE), AttentionState(fill(k_BLKE), fill(v_BLKE))


def step(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: AttentionState,
  position_B: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 D"], AttentionState]:
  """Returns the mixer's output for one more token a row, at `position_B`, and the state after it.

  `leaves` are `join`ed.
  """
  q_BLKJE, k_BLKE, v_BLKE = _project(block, leaves, x_BLD, position_B[:, None])
  state = AttentionState(
    attention_step.put(state.k_BKSE, k_BLKE[:, 0], position_B),
    attention_step.put(state.v_BKSE, v_BLKE[:, 0], position_B),
  )
  head_BKJE = attention_step.attend(q_BLKJE[:, 0], *state, position_B)
  return _output(cfg, block, leaves, head_BKJE[:, None]), state
