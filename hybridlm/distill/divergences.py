"""Divergences of a student's distribution q from a teacher's p, each with its gradient.

A divergence is a function of two softmaxes, of `total`, which sums [.., V] to [.., 1], and of
`skew`. It returns its value [.., 1], in nats, and a function from nothing to the gradient with
respect to the student's logits / temperature, so that where no gradient is asked for none is
computed. Written in d = log q − log p: nothing is divided by a probability.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from hybridlm.distill.vocabulary import OUT, Soft, Vocabulary, softmax

Total = Callable[[jax.Array], jax.Array]
Found = tuple[jax.Array, Callable[[], jax.Array]]


def forward_kl(p: Soft, q: Soft, *, total: Total, skew: float) -> Found:
  """Returns Σ p log(p / q). Source: Hinton et al., arXiv 1503.02531."""
  gap_BQV = (p.logits - q.logits) / p.temperature
  value_BQ1 = total(p.part * gap_BQV) / p.total - p.log + q.log
  return value_BQ1, lambda: q.probabilities() - p.probabilities()


def reverse_kl(p: Soft, q: Soft, *, total: Total, skew: float) -> Found:
  """Returns Σ q log(q / p). Source: MiniLLM, arXiv 2306.08543, over the vocabulary."""
  gap_BQV = (q.logits - p.logits) / p.temperature - q.log + p.log
  value_BQ1 = total(q.part * gap_BQV) / q.total
  return value_BQ1, lambda: q.probabilities() * (gap_BQV - value_BQ1)


def jensen_shannon(p: Soft, q: Soft, *, total: Total, skew: float) -> Found:
  """Returns the mean of the KL of p and of q to their mean, log 2 at most. Symmetric.

  Source: the generalised JSD of arXiv 2306.13649 at its middle.
  """
  gap_BQV = (q.logits - p.logits) / p.temperature - q.log + p.log
  theirs_BQV, own_BQV = p.probabilities(), q.probabilities()
  pull_BQV = own_BQV * (math.log(2) - jax.nn.softplus(-gap_BQV)) / 2
  push_BQV = theirs_BQV * (math.log(2) - jax.nn.softplus(gap_BQV)) / 2
  pull_BQ1 = total(pull_BQV)
  return pull_BQ1 + total(push_BQV), lambda: pull_BQV - own_BQV * pull_BQ1


def skewed_kl(p: Soft, q: Soft, *, total: Total, skew: float) -> Found:
  """Returns Σ p log(p / (skew·p + (1 − skew)·q)). Source: DistiLLM, arXiv 2402.03898, eq. 4."""
  gap_BQV = (q.logits - p.logits) / p.temperature - q.log + p.log
  theirs_BQV = p.probabilities()
  odds = math.log1p(-skew) - math.log(skew)
  mixed_BQV = math.log(skew) + jax.nn.softplus(gap_BQV + odds)

  def gradient():
    pull_BQV = theirs_BQV * jax.nn.sigmoid(gap_BQV + odds)
    return q.probabilities() * total(pull_BQV) - pull_BQV

  return -total(theirs_BQV * mixed_BQV), gradient


TABLE: Mapping[str, Callable[..., Found]] = {
  "forward_kl": forward_kl,
  "reverse_kl": reverse_kl,
  "jensen_shannon": jensen_shannon,
  "skewed_kl": skewed_kl,
}


def of_top(name: str, teacher: tuple, q: Soft, *, vocabulary: Vocabulary, skew: float) -> Found:
  """Returns a divergence between distributions over a teacher's top tokens and one bucket.

  The bucket holds all others, exactly: its masses are sums over its own tokens, and not what is
  missing to 1, which rounding would eat. Inside the bucket the student is free.

  Args:
    name: of the divergence.
    teacher: `id_BQT`, `log_BQT` and `tail_log_BQ`, at the student's temperature.
    q: the student's softmax.
    vocabulary: its columns.
    skew: of the divergence.
  """
  id_BQT, log_BQT, tail_log_BQ = teacher
  own_BQT = vocabulary.take(q.logits, id_BQT) / q.temperature - q.log
  rest = _rest(q, id_BQT, vocabulary)
  p, own = _buckets(log_BQT, tail_log_BQ), _buckets(own_BQT, (rest.log - q.log)[..., 0])
  value_BQ1, slope = TABLE[name](p, own, total=lambda v: v.sum(-1, keepdims=True), skew=skew)

  def gradient():
    slope_BQT, slope_BQ1 = jnp.split(slope(), [id_BQT.shape[2]], axis=2)
    # What the bucket gets is spread in proportion to its tokens' shares of it.
    return vocabulary.put(rest.probabilities() * slope_BQ1, id_BQT, slope_BQT)

  return value_BQ1, gradient


def _rest(soft: Soft, id_BQT: jax.Array, vocabulary: Vocabulary) -> Soft:
  """Returns the softmax of all tokens but some; where none is left, its log is about `OUT`."""
  rest_BQV = vocabulary.put(soft.logits, id_BQT, OUT)
  return softmax(rest_BQV, vocabulary.max(rest_BQV), soft.temperature, vocabulary)


def _buckets(log_BQT: jax.Array, tail_log_BQ: jax.Array) -> Soft:
  """Returns a distribution over top tokens and the bucket, given as logarithms."""
  log_BQT = jnp.maximum(jnp.concatenate([log_BQT, tail_log_BQ[..., None]], axis=2), OUT)
  zero = jnp.zeros((), log_BQT.dtype)
  return Soft(log_BQT, jnp.exp(log_BQT), zero + 1, zero, 1.0)


def top_of(p: Soft, count: int, vocabulary: Vocabulary) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns ids [B, Q, T] and log-probabilities of a teacher's top tokens, and the others' log."""
  top_BQT, id_BQT = vocabulary.top(p.logits, count)
  rest = _rest(p, id_BQT, vocabulary)
  return id_BQT, top_BQT / p.temperature - p.log, (rest.log - p.log)[..., 0]
