"""What decoding remembers: constant-size states of Mamba blocks, key-value slots of attention.

Position p of a row lies in slot p mod S, so that a cache of all positions and one of the last
`window` positions are one formula.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.config import Attention, Block, GatedConv, Mamba, ModelConfig


class MambaState(NamedTuple):
  """The last W - 1 inputs of the convolutions, channels of x, b and c joined, and the SSM state.

  `conv_BW` has shape [B, W - 1, G H P + 2 G N] in the compute dtype.
  """

  conv_BW: Float[Array, "B _ channels"]
  ssm_BGHPN: Float[Array, "B G H P N"]


class ConvState(NamedTuple):
  """The last W - 1 inputs of the convolution of a block without a state, in the compute dtype."""

  conv_BW: Float[Array, "B _ channels"]


class AttentionState(NamedTuple):
  """Keys, after their rotation, and values of the last S positions, in the compute dtype."""

  k_BKSE: Float[Array, "B K S E"]
  v_BKSE: Float[Array, "B K S E"]


State = MambaState | ConvState | AttentionState | None


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
  if isinstance(block, Mamba):
    channels = block.G * (block.H * block.P + 2 * block.N)
    return MambaState(
      jnp.zeros((batch, block.W - 1, channels), cfg.dtype),
      jnp.zeros((batch, block.G, block.H, block.P, block.N), jnp.float32),
    )
  if isinstance(block, GatedConv):
    channels = block.G * block.H * block.P
    return ConvState(jnp.zeros((batch, block.W - 1, channels), cfg.dtype))
  if isinstance(block, Attention):
    shape = (batch, block.K, slots(block, size), block.E)
    return AttentionState(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
  return None


def nbytes(cfg: ModelConfig, batch: int, size: int) -> int:
  """Returns the bytes of all blocks' states, without making them."""
  blocks = jax.eval_shape(lambda: empty(cfg, batch, size)).blocks
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(blocks))
