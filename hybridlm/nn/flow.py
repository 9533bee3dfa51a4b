"""What a block reads beside its own tokens: what meta tokens leave behind, and shared keys.

Meta tokens stand before every document and see only themselves. They run once, as a stream of one
row beside the text; what a block of the text continues from is that block's *prefix*. Blocks that
share keys and values read those of an earlier block, its prefix among them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class AttentionPrefix(NamedTuple):
  """Keys, turned at positions 0 to M - 1, and values of the meta tokens; B = 1.

  `v_BMKE` is U wide where values have a width of their own. `stay_BM`: which of them are seen;
  None: all.
  """

  k_BMKE: Float[Array, "B M K E"]
  v_BMKE: Float[Array, "B M K _"]
  stay_BM: Bool[Array, "B M"] | None = None


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


class Stream(NamedTuple):
  """What goes from block to block: the text, and where there are any, meta tokens and shared keys.

  `keys` and `meta_keys` are those of the latest block whose readers are still to come.
  """

  x_BLD: Float[Array, "B L D"]
  meta_BMD: Float[Array, "B M D"] | None = None
  keys: Keys | None = None
  meta_keys: Keys | None = None


def positions(segment_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
  """Returns the position of every token within its own document."""
  fresh_BL = jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0
  position_L = jnp.arange(segment_BL.shape[1])
  return position_L - jax.lax.cummax(jnp.where(fresh_BL, position_L, 0), axis=1)
