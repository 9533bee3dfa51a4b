"""What decoding remembers: constant-size states of SSM blocks, key-value slots of attention.

Position p of a row lies in slot p mod S, so that a cache of all positions and one of the last
`window` positions are one formula. Attention that shares another block's keys has no slots. What
meta tokens leave behind is the same for all rows, and held once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.config import (
  Attention,
  Block,
  GatedConv,
  Mamba,
  Mamba1,
  ModelConfig,
  Parallel,
  block_name,
)
from hybridlm.nn import flow


class MambaState(NamedTuple):
  """The last W - 1 inputs of the convolutions, channels of x, b and c joined, and the SSM state.

  `conv_BW` has shape [B, W - 1, G H P + 2 G N] in the compute dtype.
  """

  conv_BW: Float[Array, "B _ channels"]
  ssm_BGHPN: Float[Array, "B G H P N"]


class Mamba1State(NamedTuple):
  """The last W - 1 inputs of the convolution, in the compute dtype, and the SSM state."""

  conv_BW: Float[Array, "B _ channels"]
  ssm_BGHN: Float[Array, "B G H N"]


class ConvState(NamedTuple):
  """The last W - 1 inputs of the convolution of a block without a state, in the compute dtype."""

  conv_BW: Float[Array, "B _ channels"]


class AttentionState(NamedTuple):
  """Keys, after their rotation, and values of the last S positions, in the compute dtype.

  Values are U wide where attention has such a width.
  """

  k_BKSE: Float[Array, "B K S E"]
  v_BKSE: Float[Array, "B K S width"]


class Slots(NamedTuple):
  """Keys and values of a block, and of the meta tokens before them, for blocks that share them."""

  state: AttentionState
  prefix: flow.AttentionPrefix | None


SsmState = MambaState | Mamba1State | ConvState


class ParallelState(NamedTuple):
  """The states of both branches; None: the branch is off, or reads another block's keys."""

  attention: AttentionState | None
  ssm: SsmState | None


State = SsmState | AttentionState | ParallelState | None


class Cache(NamedTuple):
  """The state of every block, in order (None: it has none), and the tokens each row has seen."""

  blocks: tuple[State, ...]
  length_B: Int[Array, "B"]


def slots(block: Attention, size: int) -> int:
  """Returns how many positions a block keeps where `size` of them will ever be looked at."""
  return size if block.window is None else min(block.window, size)


def empty(cfg: ModelConfig, batch: int, size: int) -> Cache:
  """Returns the cache of `batch` rows that have seen nothing, with room for `size` tokens each.

  Raises:
    ValueError: `batch` or `size` below 1.
  """
  if batch < 1 or size < 1:
    raise ValueError(f"cache: batch={batch} and size={size} must be at least 1")
  blocks = tuple(_state(cfg, block, batch, size) for block in cfg.blocks)
  return Cache(blocks, jnp.zeros(batch, jnp.int32))


def _state(cfg: ModelConfig, block: Block, batch: int, size: int) -> State:
  if isinstance(block, Parallel):
    parts = (block.attention, block.ssm)
    return ParallelState(*(_state(cfg, part, batch, size) if part else None for part in parts))
  if isinstance(block, Attention):
    if block.shared:
      return None
    lead = (batch, block.K, slots(block, size))
    return AttentionState(
      jnp.zeros((*lead, block.E), cfg.dtype), jnp.zeros((*lead, block.U or block.E), cfg.dtype))
  if isinstance(block, (Mamba, Mamba1, GatedConv)):
    return _ssm(cfg, block, batch)
  return None


def _ssm(cfg: ModelConfig, block: Mamba | Mamba1 | GatedConv, batch: int) -> SsmState:
  inner = block.G * block.H * block.P
  channels = inner + 2 * block.G * block.N if isinstance(block, Mamba) else inner
  conv_BW = jnp.zeros((batch, block.W - 1, channels), cfg.dtype)
  if isinstance(block, Mamba):
    shape = (batch, block.G, block.H, block.P, block.N)
    return MambaState(conv_BW, jnp.zeros(shape, jnp.float32))
  if isinstance(block, Mamba1):
    return Mamba1State(conv_BW, jnp.zeros((batch, block.G, block.H, block.N), jnp.float32))
  return ConvState(conv_BW)


def before(cfg: ModelConfig) -> dict[str, flow.Prefix]:
  """Returns room for what meta tokens leave behind, by block, as `lm.prefixes` fills it."""
  made = {block_name(index): _prefix(cfg, block) for index, block in enumerate(cfg.blocks)}
  return {name: prefix for name, prefix in made.items() if cfg.meta and prefix is not None}


def _prefix(cfg: ModelConfig, block: Block) -> flow.Prefix | None:
  if isinstance(block, Parallel):
    parts = (block.attention, block.ssm)
    return flow.ParallelPrefix(*(_prefix(cfg, part) if part else None for part in parts))
  if isinstance(block, Attention):
    if block.shared:
      return None
    widths = (block.E, block.U or block.E)
    return flow.AttentionPrefix(
      *(jnp.zeros((1, cfg.meta, block.K, width), cfg.dtype) for width in widths))
  if isinstance(block, (Mamba, Mamba1, GatedConv)):
    return flow.SsmPrefix(*_ssm(cfg, block, 1))
  return None


def nbytes(cfg: ModelConfig, batch: int, size: int) -> int:
  """Returns the bytes of all blocks' states and of what meta tokens leave, without making them."""
  made = jax.eval_shape(lambda: (empty(cfg, batch, size).blocks, before(cfg)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
