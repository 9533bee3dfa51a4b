"""What entries contribute to the output projection they are an input of: FLAP, Wanda, KV energy."""

import jax
import jax.numpy as jnp

from hybridlm import axes
from hybridlm.prune.estimators.base import Estimator, Moments, Seen, Statistic, energy, total

# Score -> the input of the output projection, and that projection.
INPUT = {
  "score_GHP": ("y_BLGHP", "w_out_GHPD"),
  "score_F": ("act_BLF", "w_down_FD"),
  "score_KJ": ("head_BLKJE", "w_o_KJED"),
  "score_E": ("head_BLKJE", "w_o_KJED"),
}


def _norms(seen: Seen, leaf: str) -> jax.Array:
  """Returns the squared norm of what each input of a projection writes: over D."""
  letters = axes.of(leaf)
  return total(jnp.square(seen.leaves[leaf].astype(jnp.float32)), letters, letters[:-1])


def _wanda(score: str) -> Statistic:
  tap, leaf = INPUT[score]
  letters = axes.of(leaf)[:-1]

  def fold(seen: Seen) -> jax.Array:
    written_B = energy(seen.taps[tap], seen.weight_BL) * _norms(seen, leaf)
    return total(written_B, f"B{letters}", f"B{axes.of(score)}")

  return Statistic(fold, (tap,))


def _flap(score: str) -> Statistic:
  tap, leaf = INPUT[score]
  letters = axes.of(leaf)[:-1]

  def fold(seen: Seen) -> Moments:
    a = seen.taps[tap].astype(jnp.float32)
    real_B = jnp.maximum(seen.weight_BL.sum(1), 1.0)
    exact = {"precision": "highest"}
    mean_B = jnp.einsum("bl...,bl,b->b...", a, seen.weight_BL, 1.0 / real_B, **exact)
    spread_BL = jnp.square(a - mean_B[:, None])
    m2_B = jnp.einsum("bl...,bl->b...", spread_BL, seen.weight_BL, **exact)
    norms = _norms(seen, leaf)
    m2_B = total(m2_B * norms, f"B{letters}", f"B{axes.of(score)}")
    return Moments(mean_B * jnp.sqrt(norms), m2_B, letters)

  return Statistic(fold, (tap,))


def _groups(seen: Seen) -> jax.Array:
  """The energy a KV group writes, shared among its queries as the energies each writes alone.

  Second moments of the heads meet the Gram matrix of the output projection, so that what each head
  writes is never held.
  """
  head_BLKJE = seen.taps["head_BLKJE"].astype(jnp.float32)
  w_o_KJED = seen.leaves["w_o_KJED"].astype(jnp.float32)
  exact = {"precision": "highest"}
  gram = jnp.einsum("kjed,kifd->kjeif", w_o_KJED, w_o_KJED, **exact)
  moment = jnp.einsum("blkje,blkif,bl->bkjeif", head_BLKJE, head_BLKJE, seen.weight_BL, **exact)
  group_BK = jnp.maximum(jnp.einsum("bkjeif,kjeif->bk", moment, gram, **exact), 0.0)
  alone_BKJ = jnp.maximum(jnp.einsum("bkjejf,kjejf->bkj", moment, gram, **exact), 0.0)
  share_BKJ = alone_BKJ / jnp.maximum(alone_BKJ.sum(-1, keepdims=True), 1e-30)
  return group_BK[..., None] * share_BKJ / seen.weight_BL.shape[1]


FLAP = Estimator(
  "taps", "variance", {score: _flap(score) for score in INPUT},
  "deviation over tokens of the output projection's input, times the norm it is written with",
)
WANDA = Estimator(
  "taps", "root", {score: _wanda(score) for score in INPUT},
  "root mean square of the output projection's input, times the norm it is written with",
)
ENERGY = Estimator(
  "taps", "root", {"score_KJ": Statistic(_groups, ("head_BLKJE",))},
  "energy each key-value group writes to the residual stream",
)
