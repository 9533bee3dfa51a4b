"""Scores that read no activation: magnitude, and gradients of the language loss."""

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes
from hybridlm.prune.estimators.base import Estimator, Seen, Statistic, shares, total

SCORES = (
  "score_GHP", "score_F", "score_D", "score_KJ", "score_GN", "score_E", "score_U", "score_R",
  "score_M",
)


def _squares(score: str) -> Statistic:
  """The squares of what a unit owns, summed."""

  def fold(seen: Seen) -> jax.Array:
    found = [total(jnp.square(jnp.asarray(leaf, jnp.float32)), letters, axes.of(score))
             for letters, leaf in shares(seen, score)]
    return sum(found[1:], found[0])

  return Statistic(fold)


def _signed(score: str) -> Statistic:
  """The square of the sum of what a unit owns: of w g, what the loss loses without it."""

  def fold(seen: Seen) -> jax.Array:
    found = [total(leaf, letters, axes.of(score)) for letters, leaf in shares(seen, score)]
    return jnp.square(sum(found[1:], found[0]))

  return Statistic(fold)


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return rng.uniform(size=shape)


MAGNITUDE = Estimator(
  "weights", "weights", {score: _squares(score) for score in SCORES},
  "norm of the projections' weights an entry owns",
)
TAYLOR = Estimator(
  "gradients", "root", {score: _signed(score) for score in SCORES},
  "root mean square over rows of the sum of weight times gradient",
)
FISHER = Estimator(
  "gradients", "root", {score: _squares(score) for score in SCORES},
  "diagonal Fisher: root of the mean over rows of the sum of (weight times gradient)^2",
)
RANDOM = Estimator(
  "draw", "weights", {score: Statistic(_draw) for score in SCORES}, "a draw from a seed"
)
