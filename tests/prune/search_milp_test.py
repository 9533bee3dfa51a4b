"""The mixed-integer programme finds what trying everything finds, and breaks no demand."""

import itertools

import numpy as np
import pytest

from hybridlm.prune.search import milp


def brute(problem):
  """Returns the least loss of all choices that fit; None where none does."""
  every = itertools.product(*(range(len(each)) for each in problem.losses))
  losses = [problem.loss(choice) for choice in every if problem.fits(choice)]
  return min(losses, default=None)


def instance(seed):
  """Returns a random problem: ties, whole and broken costs, bounds below and above."""
  rng = np.random.default_rng(seed)
  shape = rng.integers(1, 5, size=int(rng.integers(1, 6)))
  draw = (lambda n: rng.integers(0, 4, n).astype(float)) if seed % 3 == 0 else rng.random
  losses = [draw(int(n)).tolist() for n in shape]
  sizes = [rng.integers(1, 10**9, n).tolist() for n in shape]
  seconds = [rng.random(n).tolist() for n in shape]
  stays = [rng.integers(0, 2, n).tolist() for n in shape]
  total = sum(max(each) for each in sizes)
  rows = [
    milp.Row("parameters", sizes, high=int(total * rng.uniform(0.1, 1.0))),
    milp.Row("seconds", seconds, high=float(len(shape) * rng.uniform(0.2, 0.9))),
    milp.Row("floor", stays, low=int(rng.integers(0, 3))),
  ]
  return milp.Problem(losses, rows)


def test_the_programme_equals_brute_force():
  fitting = 0
  for seed in range(120):
    problem = instance(seed)
    found, want = milp.solve(problem), brute(problem)
    assert (found is None) == (want is None), seed
    if found is not None:
      fitting += 1
      assert problem.fits(found), seed
      assert problem.loss(found) == pytest.approx(want, abs=1e-9), seed
  assert 30 < fitting < 110  # some fit and some do not


def test_a_budget_is_not_exceeded_by_one_parameter():
  # The solver's tolerance lets one of 10^12 parameters pass; exact arithmetic does not.
  losses = [[0.0, 1.0], [0.0, 1.0]]
  sizes = [[10**12, 10**12 - 1], [10**12, 10**12 - 2]]
  row = milp.Row("parameters", sizes, high=2 * 10**12 - 1)
  found = milp.solve(milp.Problem(losses, [row]))
  assert row.total(found) <= row.high and sum(found) == 1


def test_solutions_get_worse_and_differ_in_as_many_blocks_as_asked():
  for seed in (1, 2, 4):
    rng = np.random.default_rng(seed)
    problem = milp.Problem([rng.random(3).tolist() for _ in range(4)])
    found = milp.solutions(problem, 4, 2)
    assert len(found) == 4
    losses = [problem.loss(choice) for choice in found]
    assert losses == sorted(losses)
    for one, other in itertools.combinations(found, 2):
      assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2
    # The second is the best of all that are far enough from the first.
    far = [c for c in itertools.product(range(3), repeat=4)
           if sum(a != b for a, b in zip(c, found[0], strict=True)) >= 2]
    assert losses[1] == pytest.approx(min(map(problem.loss, far)))


def test_solutions_end_where_nothing_is_left():
  assert len(milp.solutions(milp.Problem([[0.0, 1.0]]), 5, 1)) == 2


def test_the_nearest_choice_exceeds_the_budgets_by_the_least_share():
  rng = np.random.default_rng(5)
  sizes = [rng.integers(10, 100, 3).tolist() for _ in range(4)]
  seconds = [rng.random(3).tolist() for _ in range(4)]
  rows = [milp.Row("parameters", sizes, high=20), milp.Row("seconds", seconds, high=0.1)]
  problem = milp.Problem([[0.0] * 3] * 4, rows)
  assert milp.solve(problem) is None
  found = milp.nearest(problem, ("parameters", "seconds"))

  def excess(choice):
    return max(row.total(choice) / row.high for row in rows)

  assert excess(found) == pytest.approx(min(map(excess, itertools.product(range(3), repeat=4))))
  # An excess can be a share of something else than what the blocks may have: a whole budget.
  scaled = [rows[0]._replace(scale=1000.0), rows[1]._replace(high=-0.5, scale=0.01)]
  found = milp.nearest(milp.Problem(problem.losses, scaled), ("parameters", "seconds"))
  assert scaled[1].total(found) == pytest.approx(sum(map(min, seconds)))
  floor = milp.Row("floor", [[0] * 3] * 4, low=1)
  assert milp.nearest(milp.Problem(problem.losses, [*rows, floor]), ("parameters",)) is None


@pytest.mark.parametrize("losses, message", [
  ([], "every block needs one"), ([[1.0], []], "every block needs one"),
  ([[1.0, float("nan")]], "not finite"),
])
def test_a_programme_without_options_or_losses_is_refused(losses, message):
  with pytest.raises(ValueError, match=message):
    milp.Problem(losses)


def test_a_row_of_another_shape_is_refused():
  with pytest.raises(ValueError, match="row 'x' does not have one weight an option"):
    milp.Problem([[1.0, 2.0]], [milp.Row("x", [[1]])])
