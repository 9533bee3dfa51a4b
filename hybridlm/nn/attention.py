"""Causal grouped-query attention, with or without rotary positions and a sliding window."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import axes, layout
from hybridlm.config import Attention, ModelConfig
from hybridlm.nn import cache, flow
from hybridlm.nn.cache import AttentionState
from hybridlm.ops import attention_step
from hybridlm.ops.attention import attend, rotate
from hybridlm.ops.project import project

# Leaves after the heads: the output projection's.
ENDS = ("w_o_", "b_o_")


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


def output(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  head_BLKJE: Float[Array, "B L K J width"],
) -> Float[Array, "B L D"]:
  """Returns the output projection of the heads."""
  w_o_KJED = leaves[f"w_o_KJ{block.value}D"].astype(head_BLKJE.dtype)
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
  place: flow.Place = flow.ALONE,
) -> tuple[Float[Array, "B L D"], dict[str, Any]]:
  """Returns the mixer's output for a normed input, and what `inner` returns."""
  seen = inner(cfg, block, leaves, x_BLD, segment_BL=segment_BL, count=count, place=place)
  ends = {name: leaf for name, leaf in leaves.items() if name.startswith(ENDS)}
  cast = layout.used(cfg.layout, ends, x_BLD.dtype)
  return output(cfg, block, cast, seen[f"head_BLKJ{block.value}"]), seen


def inner(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  count: Mapping[str, jax.Array] | None = None,
  place: flow.Place = flow.ALONE,
) -> dict[str, Any]:
  """Returns the heads' outputs, before the output projection, and what can be tapped on the way.

  Taps: `q_BLKJE` and `k_BLKE` (turned), `v_BLKE` and `head_BLKJE`, or where values have a width of
  their own `v_BLKU` and `head_BLKJU`; keys and values of a block that shares them are those it
  reads. `count` is not used: there is no norm inside. `place.keep` adds keys and the prefix.
  """
  if block.shared and place.keys is None:
    raise ValueError("attention that shares keys and values was given none: it does not run alone")
  own = {name: leaf for name, leaf in leaves.items() if not name.startswith(ENDS)}
  cast, wide = layout.used(cfg.layout, own, x_BLD.dtype), block.value

  def read(stem, heads):
    y_BL = project(x_BLD, cast[f"w_{stem}_D{heads}"], quantize=cfg.quantize)
    y_BL = layout.constrain(cfg.layout, y_BL, f"BL{heads}")
    return y_BL + cast[f"b_{stem}_{heads}"] if block.bias else y_BL

  position_BL = jnp.arange(x_BLD.shape[1]) if place.position_BL is None else place.position_BL
  position_BL = position_BL + place.meta if place.meta else position_BL
  q_BLKJE = _turn(block, read("q", "KJE"), position_BL)
  keys = place.keys if block.shared else flow.Keys(
    _turn(block, read("k", "KE"), position_BL), read("v", f"K{wide}"), place.prefix)
  head_BLKJE = attend(
    q_BLKJE,
    keys.k_BLKE,
    keys.v_BLKE,
    segment_BL=segment_BL,
    segment_BS=segment_BL,
    prefix=keys.prefix,
    window=block.window,
    impl=cfg.attention,
    mesh_axes=layout.LAYOUTS[cfg.layout].activations,
  )
  seen = {"q_BLKJE": q_BLKJE, "k_BLKE": keys.k_BLKE, f"v_BLK{wide}": keys.v_BLKE}
  if place.keep:
    stay_BM = None if segment_BL is None else segment_BL == 1
    own = flow.AttentionPrefix(keys.k_BLKE, keys.v_BLKE, stay_BM)
    seen |= {"keys": keys, "prefix": None if block.shared else own}
  return seen | {f"head_BLKJ{wide}": head_BLKJE}


def join(leaves: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
  """Returns the leaves as `prefill` and `step` read them: q|k|v joined, without a letter.

  Of a block that shares another's keys and values that is q alone.
  """
  stems = {axes.stem(name): leaf for name, leaf in leaves.items()}

  def joined(kind):
    found = [stems[f"{kind}_{stem}"] for stem in "qkv" if f"{kind}_{stem}" in stems]
    lead = found[0].shape[:1] if kind == "w" else ()
    return jnp.concatenate([leaf.reshape(*lead, -1) for leaf in found], axis=-1)

  made = {f"{kind}_qkv": joined(kind) for kind in "wb" if f"{kind}_q" in stems}
  made |= {name: leaf for name, leaf in leaves.items() if name.startswith(ENDS)}
  return {name: leaf.astype(dtype) for name, leaf in made.items()}


def _project(cfg, block, leaves, x_BLD, position_L):
  """Returns q, k and v of a normed input, q and k turned; no k and v of a block that shares them.

  Positions are those of the text, which meta tokens stand before.
  """
  y_BL = project(x_BLD, leaves["w_qkv"])
  y_BL = y_BL + leaves["b_qkv"] if block.bias else y_BL
  keys, lead = block.K * block.E, x_BLD.shape[:2]
  ends = [] if block.shared else [block.J * keys, (block.J + 1) * keys]
  q_BL, *rest = jnp.split(y_BL, ends, axis=2)
  position_L = position_L + cfg.meta if cfg.meta else position_L
  q_BLKJE = _turn(block, q_BL.reshape(*lead, block.K, block.J, block.E), position_L)
  if block.shared:
    return q_BLKJE, None, None
  k_BLKE, v_BLKE = (v.reshape(*lead, block.K, -1) for v in rest)
  return q_BLKJE, _turn(block, k_BLKE, position_L), v_BLKE


def prefill_heads(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  size: int,
  prefix: flow.AttentionPrefix | None = None,
  keys: flow.Keys | None = None,
) -> tuple[Float[Array, "B L K J width"], AttentionState | None, flow.Keys]:
  """Returns the heads' outputs, each row's keys and values in their slots, and those it has read.

  `leaves` are `join`ed. Padding stands after all real tokens, so that none of them sees it. A block
  that shares `keys` with the one before it that made them has no slots.
  """
  q_BLKJE, k_BLKE, v_BLKE = _project(cfg, block, leaves, x_BLD, jnp.arange(x_BLD.shape[1]))
  keys = keys if block.shared else flow.Keys(k_BLKE, v_BLKE, prefix)
  head_BLKJE = attend(
    q_BLKJE, keys.k_BLKE, keys.v_BLKE, window=block.window, impl=cfg.attention,
    prefix=keys.prefix,
  )
  if block.shared:
    return head_BLKJE, None, keys
  held_BS = attention_step.held(length_B - 1, cache.slots(block, size))[..., None, None]

  def fill(v_BLKE):
    v_BSKE = jnp.take_along_axis(v_BLKE, jnp.maximum(held_BS, 0), axis=1)
    return jnp.moveaxis(jnp.where(held_BS >= 0, v_BSKE, 0), 1, 2)

  return head_BLKJE, AttentionState(fill(k_BLKE), fill(v_BLKE)), keys


def prefill(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B L D"],
  length_B: Int[Array, "B"],
  *,
  size: int,
  prefix: flow.AttentionPrefix | None = None,
  keys: flow.Keys | None = None,
) -> tuple[Float[Array, "B L D"], AttentionState | None, flow.Keys]:
  """Returns the mixer's output, and what `prefill_heads` does beside the heads'."""
  head_BLKJE, state, keys = prefill_heads(
    cfg, block, leaves, x_BLD, length_B, size=size, prefix=prefix, keys=keys)
  return output(cfg, block, leaves, head_BLKJE), state, keys


def step_heads(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: AttentionState | None,
  position_B: Int[Array, "B"],
  *,
  prefix: flow.AttentionPrefix | None = None,
  slots: cache.Slots | None = None,
) -> tuple[Float[Array, "B 1 K J width"], AttentionState | None, cache.Slots]:
  """Returns the heads' outputs for one more token a row, the state after it, and the slots read.

  `leaves` are `join`ed; the token stands at `position_B`. A block that shares keys has no state: it
  reads `slots` of the block before it that has, where this token's are by now.
  """
  q_BLKJE, k_BLKE, v_BLKE = _project(cfg, block, leaves, x_BLD, position_B[:, None])
  if not block.shared:
    state = AttentionState(
      attention_step.put(state.k_BKSE, k_BLKE[:, 0], position_B),
      attention_step.put(state.v_BKSE, v_BLKE[:, 0], position_B),
    )
    slots = cache.Slots(state, prefix)
  before = None if slots.prefix is None else (slots.prefix.k_BMKE[0], slots.prefix.v_BMKE[0])
  head_BKJE = attention_step.attend(q_BLKJE[:, 0], *slots.state, position_B, before)
  return head_BKJE[:, None], state, slots


def step(
  cfg: ModelConfig,
  block: Attention,
  leaves: Mapping[str, jax.Array],
  x_BLD: Float[Array, "B 1 D"],
  state: AttentionState | None,
  position_B: Int[Array, "B"],
  *,
  prefix: flow.AttentionPrefix | None = None,
  slots: cache.Slots | None = None,
) -> tuple[Float[Array, "B 1 D"], AttentionState | None, cache.Slots]:
  """Returns the mixer's output for one more token a row, and what `step_heads` does beside."""
  head_BLKJE, state, slots = step_heads(
    cfg, block, leaves, x_BLD, state, position_B, prefix=prefix, slots=slots)
  return output(cfg, block, leaves, head_BLKJE), state, slots
