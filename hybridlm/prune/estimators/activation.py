"""How strongly entries are active: the mean over a row of |a|, its root mean square over rows.

arXiv 2407.14679, section 2.2 (mean over the sequence, L2 over the batch) and arXiv 2504.11409,
section 3 (the Mamba heads and channels, scored on the projection to x).
"""

import functools

import jax
import jax.numpy as jnp

from hybridlm.config import Block, attention_of
from hybridlm.prune.estimators.base import Estimator, Seen, Statistic, heads, row_statistic

TINY = 1e-30


def _plain(tap: str) -> Statistic:
  return Statistic(lambda seen: row_statistic(seen.taps[tap], seen.weight_BL), (tap,))


def _heads(seen: Seen) -> jax.Array:
  """A query head: the L2 norm of its output over its channels."""
  norm_BLKJ = jnp.linalg.norm(seen.taps[heads(seen.block)].astype(jnp.float32), axis=-1)
  return row_statistic(norm_BLKJ, seen.weight_BL)


def _states(seen: Seen) -> jax.Array:
  """A state: how strongly it is written, mean |b|, times how strongly it is read, mean |c|."""
  b_BGN, c_BGN = (row_statistic(seen.taps[tap], seen.weight_BL) for tap in ("b_BLGN", "c_BLGN"))
  share_B11 = jnp.maximum(seen.weight_BL.mean(1), TINY)[:, None, None]
  return b_BGN * c_BGN / share_B11


def _share(value_BE: jax.Array) -> jax.Array:
  return value_BE / jnp.maximum(value_BE.sum(1, keepdims=True), TINY)


def _channels(seen: Seen) -> jax.Array:
  """A channel: half its share of the attention logits (q·k), half its share of the heads' output.

  Both in squares, so that they are shares of an energy, and summed over the heads. Where values
  have channels of their own, the logits alone.
  """
  statistic = functools.partial(row_statistic, weight_BL=seen.weight_BL)
  q_BKJE, k_BKE = (statistic(seen.taps[tap]) for tap in ("q_BLKJE", "k_BLKE"))
  share_B = seen.weight_BL.mean(1)[:, None]
  logits_BE = jnp.einsum("BKJE,BKE->BE", q_BKJE, k_BKE, precision="highest")
  if attention_of(seen.block).value != "E":
    return share_B * _share(logits_BE)
  head_BKJE = statistic(seen.taps["head_BLKJE"])
  return share_B * (_share(logits_BE) + _share(head_BKJE.sum((1, 2)))) / 2


def _turned(block: Block) -> tuple[str, ...]:
  own = ("head_BLKJE",) if attention_of(block).value == "E" else ()
  return ("q_BLKJE", "k_BLKE", *own)


def _values(seen: Seen) -> jax.Array:
  """A channel of values: its share of the heads' output, in squares, summed over the heads."""
  head_BKJU = row_statistic(seen.taps["head_BLKJU"], seen.weight_BL)
  return seen.weight_BL.mean(1)[:, None] * _share(head_BKJU.sum((1, 2)))


ALL = {
  "score_GHP": _plain("x_BLGHP"),
  "score_F": _plain("up_BLF"),
  "score_D": _plain("norm_BLD"),
  "score_KJ": Statistic(_heads, lambda block: (heads(block),)),
  "score_GN": Statistic(_states, ("b_BLGN", "c_BLGN")),
  "score_E": Statistic(_channels, _turned),
  "score_U": Statistic(_values, ("head_BLKJU",)),
  "score_R": _plain("rank_BLR"),
  # What each row loses without each meta token (`prune.depth.tokens`): it has no tap of its own.
  "score_M": Statistic(lambda seen: seen.taps["lost_BM"], ("lost_BM",)),
}


def _estimator(about: str, **changes: Statistic) -> Estimator:
  return Estimator("taps", "root", ALL | changes, about)


ACTIVATION = _estimator("L2 over rows of mean |activation|; heads on x")
ON_GATE = _estimator("the same, heads on the gate z", score_GHP=_plain("z_BLGHP"))
ON_OUTPUT = _estimator(
  "the same, heads on the input of the output projection", score_GHP=_plain("y_BLGHP")
)
AFTER = _estimator("the same, MLP after its activation", score_F=_plain("act_BLF"))
