"""Evolution, halving and fronts: deterministic, inside their limits, better than their start."""

import itertools

import numpy as np
import pytest

from hybridlm.prune.search import evolve, halving, pareto

COUNTS = (5, 7, 3, 1, 2)
BEST = (3, 5, 1, 0, 1)


def distance(genes):
  """Returns how far a candidate is from the best one."""
  return float(sum(abs(a - b) for a, b in zip(genes, BEST, strict=True)))


def evolved(score=distance, fits=lambda genes: True, seed=0, rounds=12):
  start = {(0, 0, 0, 0, 0): distance((0, 0, 0, 0, 0))}
  return evolve.run(
    start, COUNTS, fits=fits, score=score, rounds=rounds, population=6, seed=seed
  )


def test_evolution_finds_the_best_and_repeats_itself():
  one, again, other = evolved(), evolved(), evolved(seed=1)
  assert min(one, key=one.get) == BEST
  assert list(one) == list(again) and list(one) != list(other)


def test_evolution_scores_each_candidate_once_and_only_those_that_fit():
  asked = []

  def score(genes):
    asked.append(genes)
    return distance(genes)

  known = evolved(score, fits=lambda genes: sum(genes) <= 6)
  assert len(asked) == len(set(asked)) == len(known) - 1
  assert all(sum(genes) <= 6 for genes in asked)
  assert all(0 <= gene < count for genes in asked
             for gene, count in zip(genes, COUNTS, strict=True))


def test_a_mutation_changes_one_gene_or_two_and_reaches_every_choice():
  rng, seen = np.random.default_rng(0), set()
  for _ in range(500):
    child = evolve.mutate(rng, BEST, COUNTS)
    assert 1 <= sum(a != b for a, b in zip(child, BEST, strict=True)) <= 2
    seen |= set(enumerate(child))
  assert seen == {(at, gene) for at, count in enumerate(COUNTS) for gene in range(count)}


def test_where_nothing_can_change_evolution_ends():
  known = evolve.run({(0, 0): 1.0}, (1, 1), fits=lambda genes: True, score=distance, rounds=3,
                     population=2, seed=0)
  assert known == {(0, 0): 1.0}


def test_the_front_is_what_nothing_beats():
  rng = np.random.default_rng(0)
  cost_CR = rng.integers(0, 5, (40, 3)).astype(float)

  def beats(one, other):
    return all(one <= other) and any(one < other)

  want = [i for i, row in enumerate(cost_CR) if not any(beats(r, row) for r in cost_CR)]
  assert pareto.front(cost_CR) == want and 0 < len(want) < 40


def test_a_front_of_something_unmeasured_is_refused():
  with pytest.raises(ValueError, match="candidate 1 has a cost that is not a number"):
    pareto.front(np.array([[1.0, 2.0], [np.nan, 0.0]]))


def test_half_go_on_at_each_rung_and_the_last_rung_decides():
  # Curves that cross: the one that is best in the end is third at first.
  curves = {"a": (1.0, 0.9, 0.80), "b": (1.1, 1.0, 0.7), "c": (1.2, 0.8, 0.5), "d": (2.0, 0.1, 0.1),
            "e": (3.0, 3.0, 3.0)}
  rungs, asked = (5, 10, 20), []

  def train(name, steps):
    asked.append((name, steps))
    return curves[name][rungs.index(steps)]

  found = halving.run(list(curves), rungs, train)
  assert [[name for name, _ in rung.places] for rung in found] == [list("abcde"), list("cab"),
                                                                  list("ca")]
  assert len(asked) == 5 + 3 + 2 and found[-1].places[0] == ("c", 0.5)


def test_of_equal_losses_the_better_ranked_wins():
  found = halving.run(["z", "a"], (1,), lambda name, steps: 1.0)
  assert found[-1].places[0][0] == "z"


@pytest.mark.parametrize("names, rungs", list(itertools.product([[], ["a"]], [(), (2, 1), (0,)])))
def test_halving_without_candidates_or_rising_rungs_is_refused(names, rungs):
  with pytest.raises(ValueError, match="halving"):
    halving.run(names, rungs, lambda name, steps: 1.0)
