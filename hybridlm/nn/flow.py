"""What a block reads beside its own tokens: what meta tokens leave behind, and shared keys.

Meta tokens stand before every document and see only themselves. They run once, as a stream of one
row beside the text; what a block of the text continues from is that block's *prefix*. Blocks that
share keys and values read those of an earlier block, its prefix among them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import patterns
from hybridlm.config import Block, attention_of
from hybridlm.ops import attention_blocks

# Keys, turned at positions 0 to M - 1, and values of the meta tokens.
AttentionPrefix = attention_blocks.Prefix


class SsmPrefix(NamedTuple):
  """The last W - 1 inputs of the convolutions and the state after the meta tokens; B = 1.

  `conv_BW` has shape [1, W - 1, channels], as the states of `nn.cache` have it, in the compute
  dtype. `state` is BGHPN of Mamba-2, BGHN of Mamba-1, None of a block without a state.
  """

  conv_BW: Float[Array, "B _ channels"]
  state: Float[Array, "B ..."] | None = None


class ParallelPrefix(NamedTuple):
  """The prefixes of both branches; None of one that is off, or that reads another block's keys."""

  attention: AttentionPrefix | None
  ssm: SsmPrefix | None


Prefix = AttentionPrefix | SsmPrefix | ParallelPrefix


class Keys(NamedTuple):
  """Keys, after their rotation, and values of a block and its prefix, for those that share them."""

  k_BLKE: Float[Array, "B L K E"]
  v_BLKE: Float[Array, "B L K _"]
  prefix: AttentionPrefix | None = None


class Place(NamedTuple):
  """Where the tokens of a mixer stand.

  Attributes:
    position_BL: of each token within its own document, meta tokens not counted; None: one document
      a row, from 0 on.
    meta: meta tokens before every document.
    prefix: what the block continues from at the start of every document; None: from nothing.
    keys: those that a block that shares them reads; None for all others.
    keep: whether to return, beside the taps, `seen["prefix"]`, what later tokens continue from, and
      `seen["keys"]`, what later blocks read.
  """

  position_BL: Int[Array, "B L"] | None = None
  meta: int = 0
  prefix: Any = None
  keys: Keys | None = None
  keep: bool = False


ALONE = Place()


class Segments(NamedTuple):
  """Documents of the text, where its tokens stand in them, and meta tokens: 1 stays, 0 goes."""

  text_BL: Int[Array, "B L"] | None = None
  position_BL: Int[Array, "B L"] | None = None
  meta_BM: Int[Array, "B M"] | None = None


class Streams(NamedTuple):
  """What goes from block to block: the text and, where there are any, the meta tokens."""

  x_BLD: Float[Array, "B L D"]
  meta_BMD: Float[Array, "B M D"] | None = None


class Shared(NamedTuple):
  """Keys and values of both streams, from the block that has them to the last that reads them."""

  text: Keys | None = None
  meta: Keys | None = None


def after(
  inputs: Sequence[Float[Array, "B L ..."]],
  taps: int,
  state: Float[Array, "B ..."] | None,
  segment_BL: Int[Array, "B L"] | None,
) -> SsmPrefix:
  """Returns what the text continues from after an SSM mixer has read the meta tokens.

  Args:
    inputs: of its convolutions; any channel axes follow B L.
    taps: W of the convolutions; where there are fewer tokens than that, zeros stand before them.
    state: after the last token.
    segment_BL: 1 of tokens that stay, 0 of those before them that go; None: all stay.
  """
  conv_BL = jnp.concatenate([v.reshape(*v.shape[:2], -1) for v in inputs], axis=2)
  if segment_BL is not None:
    conv_BL = jnp.where(segment_BL[..., None] == 1, conv_BL, 0)
    last_B = segment_BL[:, -1] == 1
    state = None if state is None else jnp.where(
      last_B.reshape(-1, *[1] * (state.ndim - 1)), state, 0)
  padded_BL = jnp.pad(conv_BL, [(0, 0), (taps - 1, 0), (0, 0)])
  return SsmPrefix(padded_BL[:, padded_BL.shape[1] - taps + 1 :], state)


def everywhere(block: Block) -> Block:
  """Returns a block without its window: meta tokens are seen from anywhere, by each other too."""
  attention = attention_of(block)
  if attention is None or attention.window is None:
    return block
  return patterns.with_attention(block, dataclasses.replace(attention, window=None))


def positions(segment_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
  """Returns the position of every token within its own document."""
  fresh_BL = jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0
  position_L = jnp.arange(segment_BL.shape[1])
  return position_L - jax.lax.cummax(jnp.where(fresh_BL, position_L, 0), axis=1)
