"""What entries contribute to the output projection they are an input of: FLAP, Wanda, KV energy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import axes
from hybridlm.config import Block, attention_of
from hybridlm.prune.estimators.base import (
  FUSED,
  Estimator,
  Moments,
  Seen,
  Statistic,
  branch,
  channels,
  energy,
  heads,
  total,
)

SCORES = ("score_GHP", "score_F", "score_KJ", "score_E", "score_U", "score_R")


def _read(block: Block, score: str) -> tuple[str, str]:
  """Returns the tap with the inputs of a projection that a score is of, and that projection."""
  if score == "score_GHP":
    return "y_BLGHP", "w_out_GHPD"
  if score == "score_F":
    return "act_BLF", "w_down_FD"
  if score == "score_R":
    return "rank_BLR", "in_dt_RGH"
  tap = heads(block)
  return tap, f"w_o_{axes.of(tap)[2:]}D"


def _behind(seen: Seen, score: str) -> tuple[str, jax.Array]:
  """Returns the weights behind each input, and their letters; halved where two branches meet."""
  mine = branch(seen.block, score)
  if mine:
    letters, w = channels(seen.block, mine, seen.leaves[FUSED])
    return letters, w.astype(jnp.float32) / 2
  leaf = _read(seen.block, score)[1]
  return axes.of(leaf), seen.leaves[leaf].astype(jnp.float32)


def _norms(seen: Seen, score: str) -> tuple[str, jax.Array]:
  """Returns the squared norm of what each input of a projection writes, and the inputs' letters."""
  letters, w = _behind(seen, score)
  inputs = axes.of(_read(seen.block, score)[0])[2:]
  return inputs, total(jnp.square(w), letters, inputs)


def _bars(score: str) -> Callable[[Block], str | None]:
  """Returns what says why the channels of a block's queries cannot be scored by what they write."""
  def why(block: Block) -> str | None:
    apart = score == "score_E" and attention_of(block).value != "E"
    return "its values have a width of their own, U" if apart else None

  return why


def _statistic(score: str, fold: Callable[[Seen, str], Any]) -> Statistic:
  return Statistic(functools.partial(fold, score=score), lambda block: _read(block, score)[:1],
                   _bars(score))


def _wanda(seen: Seen, score: str) -> jax.Array:
  letters, norms = _norms(seen, score)
  written_B = energy(seen.taps[_read(seen.block, score)[0]], seen.weight_BL) * norms
  return total(written_B, f"B{letters}", f"B{axes.of(score)}")


def _flap(seen: Seen, score: str) -> Moments:
  a = seen.taps[_read(seen.block, score)[0]].astype(jnp.float32)
  real_B = jnp.maximum(seen.weight_BL.sum(1), 1.0)
  exact = {"precision": "highest"}
  mean_B = jnp.einsum("bl...,bl,b->b...", a, seen.weight_BL, 1.0 / real_B, **exact)
  spread_BL = jnp.square(a - mean_B[:, None])
  m2_B = jnp.einsum("bl...,bl->b...", spread_BL, seen.weight_BL, **exact)
  letters, norms = _norms(seen, score)
  m2_B = total(m2_B * norms, f"B{letters}", f"B{axes.of(score)}")
  return Moments(mean_B * jnp.sqrt(norms), m2_B, letters)


def _groups(seen: Seen) -> jax.Array:
  """The energy a KV group writes, shared among its queries as the energies each writes alone.

  Second moments of the heads meet the Gram matrix of the output projection, so that what each head
  writes is never held.
  """
  head_BLKJE = seen.taps[heads(seen.block)].astype(jnp.float32)
  _, w_o_KJED = _behind(seen, "score_KJ")
  exact = {"precision": "highest"}
  gram = jnp.einsum("kjed,kifd->kjeif", w_o_KJED, w_o_KJED, **exact)
  moment = jnp.einsum("blkje,blkif,bl->bkjeif", head_BLKJE, head_BLKJE, seen.weight_BL, **exact)
  group_BK = jnp.maximum(jnp.einsum("bkjeif,kjeif->bk", moment, gram, **exact), 0.0)
  alone_BKJ = jnp.maximum(jnp.einsum("bkjejf,kjejf->bkj", moment, gram, **exact), 0.0)
  share_BKJ = alone_BKJ / jnp.maximum(alone_BKJ.sum(-1, keepdims=True), 1e-30)
  return group_BK[..., None] * share_BKJ / seen.weight_BL.shape[1]


FLAP = Estimator(
  "taps", "variance", {score: _statistic(score, _flap) for score in SCORES},
  "deviation over tokens of the output projection's input, times the norm it is written with",
)
WANDA = Estimator(
  "taps", "root", {score: _statistic(score, _wanda) for score in SCORES},
  "root mean square of the output projection's input, times the norm it is written with",
)
ENERGY = Estimator(
  "taps", "root", {"score_KJ": Statistic(_groups, lambda block: (heads(block),))},
  "energy each key-value group writes to the residual stream",
)
