"""What estimators are made of: statistics of one block, row by row, in float32."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridlm import axes
from hybridlm.config import Block, Parallel, attention_of


class Seen(NamedTuple):
  """What a statistic may read of one block and the rows of one batch.

  block: the block; None: what stands before the blocks.  leaves: its parameters; for gradients,
  weight times gradient of one row.  taps: its activations.  weight_BL: 1 for real tokens.
  segment_BL: documents of packed rows.
  """

  block: Block | None
  leaves: Mapping[str, jax.Array]
  taps: Mapping[str, jax.Array] = {}
  weight_BL: jax.Array | None = None
  segment_BL: jax.Array | None = None


class Moments(NamedTuple):
  """Mean and sum of squared deviations over the real tokens of each row, by `letters`."""

  mean_B: jax.Array
  m2_B: jax.Array
  letters: str


@dataclasses.dataclass(frozen=True)
class Statistic:
  """One score of one kind of block.

  Attributes:
    fold: `Seen` -> [B, *letters of the score] (taps), its moments, or [*letters] (weights,
      gradients of one row).
    taps: activations it reads; a function of the block where that decides their names.
    bars: of a block that has the axis, why it cannot be scored like this; None: it can.
  """

  fold: Callable[[Seen], Any]
  taps: tuple[str, ...] | Callable[[Block], tuple[str, ...]] = ()
  bars: Callable[[Block], str | None] = lambda block: None

  def reads(self, block: Block) -> tuple[str, ...]:
    """Returns the activations it reads of a block."""
    return self.taps(block) if callable(self.taps) else self.taps


@dataclasses.dataclass(frozen=True)
class Estimator:
  """How a family of scores is measured.

  Attributes:
    reads: "taps", "weights", "gradients" or "draw".
    reading: how a score is read off its sums, see `prune.scores.Scores`.
    statistics: score -> statistic; what is not there it cannot score.
    about: one line for a list of estimators.
  """

  reads: str
  reading: str
  statistics: Mapping[str, Statistic]
  about: str


def row_statistic(
  a: Float[Array, "B L ..."], weight_BL: Float[Array, "B L"]
) -> Float[Array, "B ..."]:
  """Returns w * (mean over real tokens of |a|)^2 for each row, w = real tokens / L, in float32."""
  real_B = weight_BL.sum(1)
  # Chips that round the factors of a product in float32 would lose half the digits here.
  summed = jnp.einsum(
    "bl...,bl->b...", jnp.abs(a.astype(jnp.float32)), weight_BL, precision="highest")
  scale_B = 1.0 / (jnp.maximum(real_B, 1.0) * weight_BL.shape[1])
  return jnp.einsum("b...,b->b...", jnp.square(summed), scale_B, precision="highest")


def energy(a: Float[Array, "B L ..."], weight_BL: Float[Array, "B L"]) -> Float[Array, "B ..."]:
  """Returns the sum over real tokens of a^2, over L, for each row in float32."""
  squared = jnp.square(a.astype(jnp.float32))
  summed = jnp.einsum("bl...,bl->b...", squared, weight_BL, precision="highest")
  return summed / weight_BL.shape[1]


def total(w: Any, letters: str, keep: str) -> jax.Array:
  """Returns an array summed over the letters that `keep` has not, in float32."""
  return jnp.einsum(f"{letters}->{keep}", jnp.asarray(w, jnp.float32))


# Leaves that an entry of an axis may own a part of; the others are gains, biases and rates.
OWNED = ("w_", "in_", "meta_")
FUSED = "w_out_YD"


def heads(block: Block) -> str:
  """Returns the tap of the outputs of a block's attention heads, whose values may be U wide."""
  return f"head_BLKJ{attention_of(block).value}"


def branch(block: Block | None, score: str) -> str | None:
  """Returns the branch whose channels a score of a block with one projection for both is of."""
  if not isinstance(block, Parallel) or block.fusion.kind != "mean":
    return None
  if score == "score_GHP":
    return "ssm"
  wide = block.attention is not None and block.attention.value
  return "attention" if score in ("score_KJ", f"score_{wide}") else None


def channels(block: Block, name: str, w_YD: Any) -> tuple[str, jax.Array]:
  """Returns the rows of the fusion's projection that a branch writes through, and their letters.

  Args:
    block: a parallel block whose branches meet in a mean.
    name: "attention" or "ssm".
    w_YD: the projection, or what is laid out as it is.
  """
  letters = "GHP" if name == "ssm" else f"KJ{block.attention.value}"
  rows = jnp.take(jnp.asarray(w_YD), np.asarray(block.fusion.places(name)), axis=0)
  return f"{letters}D", rows.reshape(*(getattr(block, letter) for letter in letters), -1)


def owned(block: Block | None, leaves: Mapping[str, Any], score: str) -> list[str]:
  """Returns the projections that an entry of a score owns a part of: those with its letters.

  Where two branches meet, a channel of one owns the row of the common projection behind it too.
  """
  letters = set(axes.of(score))
  mine = [name for name in sorted(leaves)
          if name.startswith(OWNED) and letters <= set(axes.of(name))]
  return mine + ([FUSED] if branch(block, score) else [])


def shares(seen: Seen, score: str) -> list[tuple[str, Any]]:
  """Returns `(letters, array)` of what `owned` names, in letters among which are the score's."""
  found = []
  for name in owned(seen.block, seen.leaves, score):
    mine = branch(seen.block, score) if name == FUSED else None
    found.append(channels(seen.block, mine, seen.leaves[name]) if mine else (
      axes.of(name), seen.leaves[name]))
  return found


def rotary(block: Block | None) -> int:
  """Returns how many channels of a block's heads are turned in pairs by their position."""
  attention = attention_of(block)
  rope = None if attention is None else attention.rope
  return 0 if rope is None else rope.rotary or attention.E


def tie(score_E: Any, turned: int) -> Any:
  """Returns channel scores (last axis E) with the mean of a pair in both its channels.

  Channel i of the first `turned` is one of a pair with i + turned / 2; neither can stay alone.
  """
  half = turned // 2
  if not half:
    return score_E
  mean = (score_E[..., :half] + score_E[..., half:turned]) / 2
  joined = np if isinstance(score_E, np.ndarray) else jnp
  return joined.concatenate([mean, mean, score_E[..., turned:]], axis=-1)
