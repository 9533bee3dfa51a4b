"""Evolution of tuples of genes: the best of each round have children, and the fit ones are scored.

What a round does follows from the seed, its number and the scores before it, so that a search whose
scores are kept repeats itself up to where it was stopped.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Genes = tuple[int, ...]
TRIES = 64  # children drawn for one that is new and fits


def mutate(rng: np.random.Generator, genes: Genes, counts: Sequence[int]) -> Genes:
  """Returns a copy with one or two genes changed, mostly to a neighbouring choice."""
  free = [at for at, count in enumerate(counts) if count > 1]
  if not free:
    return genes
  changed = list(genes)
  for at in rng.choice(free, size=min(len(free), int(rng.integers(1, 3))), replace=False):
    if counts[at] > 2 and rng.random() < 0.75:
      step = changed[at] + (1 if rng.random() < 0.5 else -1)
      changed[at] = step if 0 <= step < counts[at] else 2 * changed[at] - step
    else:
      changed[at] = int((changed[at] + rng.integers(1, counts[at])) % counts[at])
  return tuple(changed)


def cross(rng: np.random.Generator, one: Genes, other: Genes) -> Genes:
  """Returns a child that has each gene of one parent or the other."""
  picks = rng.random(len(one)) < 0.5
  return tuple(a if pick else b for a, b, pick in zip(one, other, picks, strict=True))


def children(
  rng: np.random.Generator,
  parents: Sequence[Genes],
  counts: Sequence[int],
  *,
  fits: Callable[[Genes], bool],
  known: Mapping[Genes, float],
  wanted: int,
) -> list[Genes]:
  """Returns up to `wanted` new candidates that fit, from parents that are crossed and mutated."""
  made: list[Genes] = []
  for _ in range(wanted * TRIES):
    if len(made) == wanted:
      break
    one, other = (parents[int(rng.integers(len(parents)))] for _ in range(2))
    child = cross(rng, one, other) if rng.random() < 0.5 else one
    child = mutate(rng, child, counts)
    if child not in known and child not in made and fits(child):
      made.append(child)
  return made


def run(
  start: Mapping[Genes, float],
  counts: Sequence[int],
  *,
  fits: Callable[[Genes], bool],
  score: Callable[[Genes], float],
  rounds: int,
  population: int,
  seed: int,
) -> dict[Genes, float]:
  """Returns every candidate and its score, less is better: those of the start and what they led to.

  Args:
    start: scored candidates.
    counts: choices a gene.
    fits: whether a candidate may be scored: constraints and budget.
    score: of a candidate that fits.
    rounds: how often the best have children.
    population: parents, and children, a round.
    seed: decides what is drawn.
  """
  known = dict(start)
  for number in range(rounds):
    rng = np.random.default_rng([seed, number])
    parents = sorted(known, key=lambda genes: (known[genes], genes))[:population]
    if not parents:
      break
    for child in children(rng, parents, counts, fits=fits, known=known, wanted=population):
      known[child] = score(child)
  return known
