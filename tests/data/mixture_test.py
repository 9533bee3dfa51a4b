"""Mixtures keep their proportions at every point and change when their phase begins."""

import hypothesis
import pytest
from hypothesis import strategies as st

from hybridlm.data import mixture

NAMES = ("a", "b", "c")
WEIGHTS = st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0.05, 9)), min_size=1, max_size=3,
                   unique_by=lambda pair: pair[0])


@hypothesis.settings(deadline=None)
@hypothesis.given(first=WEIGHTS, second=WEIGHTS, step=st.integers(1, 40), batch=st.integers(1, 7))
def test_each_source_gives_its_rows_in_order_without_gaps_across_phases(first, second, step, batch):
  phases = mixture.phases([(0, first), (step, second)], NAMES)
  selection = mixture.Selection(phases, names=NAMES, batch=batch)
  next_row = [0, 0, 0]
  for index in range(2 * step * batch):
    source, row = selection[index]
    assert row == next_row[source]
    next_row[source] += 1
    weights = dict(second if index >= step * batch else first)
    assert NAMES[source] in weights


@hypothesis.settings(deadline=None)
@hypothesis.given(weights=WEIGHTS)
def test_every_prefix_holds_the_proportions_to_within_a_row_a_source(weights):
  selection = mixture.Selection(mixture.phases([(0, weights)], NAMES), names=NAMES, batch=5)
  given_rows, total = dict.fromkeys(NAMES, 0), sum(weight for _, weight in weights)
  for index in range(300):
    given_rows[NAMES[selection[index][0]]] += 1
    for name, weight in weights:
      # grain rounds weights to a hundredth of the smallest one.
      slack = len(weights) + 0.02 * (index + 1)
      assert abs(given_rows[name] - (index + 1) * weight / total) < slack


def test_the_order_in_which_weights_are_written_does_not_matter():
  one = mixture.phases([(0, {"b": 1, "a": 2.0}), (5, (("c", 1),))], NAMES)
  assert one == mixture.phases(((0, (("a", 2), ("b", 1.0))), (5, {"c": 1})), NAMES)
  assert one == ((0, (("a", 2.0), ("b", 1.0))), (5, (("c", 1.0),)))


def test_one_source_needs_no_phases():
  assert mixture.phases((), ("a",)) == ((0, (("a", 1.0),)),)


def test_far_positions_are_reached_without_walking_there():
  phases = mixture.phases([(0, {"a": 1}), (10**12, {"a": 1, "b": 3})], NAMES)
  selection = mixture.Selection(phases, names=NAMES, batch=8)
  assert selection[8 * 10**12 - 1] == (0, 8 * 10**12 - 1)
  assert sorted(selection[8 * 10**12 + i] for i in range(4)) == [
    (0, 8 * 10**12), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(
  "phases, message",
  [
    ((), "has 3 sources and no phases"),
    (((3, {"a": 1}),), r"start at steps \[3\]; they must start at 0"),
    (((0, {"a": 1}), (5, {"b": 1}), (5, {"c": 1})), r"\[0, 5, 5\]; they must start at 0 and rise"),
    (((0, {"a": 1, "d": 1}),), "step 0 mixes source 'd'; the data spec has a, b, c"),
    (((0, {"a": 1}), (7, {"b": 0})), "step 7 gives source 'b' the weight 0.0"),
    (((0, {"a": -1}),), "source 'a' the weight -1.0"),
    (((0, {"a": float("nan")}),), "source 'a' the weight nan"),
    (((0, {"a": float("inf")}),), "source 'a' the weight inf"),
    (((0, {}),), "step 0 must name sources"),
    (((0, (("a", 1), ("a", 2))),), r"each once; it names \['a', 'a'\]"),
    (((0.5, {"a": 1}),), r"phase \(0.5, .* is not \(step"),
    (((0, "ab"),), r"phase \(0, 'ab'\) is not"),
    ((0, {"a": 1}), "phase 0 is not"),
    (((0, {"a": "much"}),), "phase .* is not"),
  ],
)
def test_phases_that_make_no_mixture_are_refused(phases, message):
  with pytest.raises(ValueError, match=message) as caught:
    mixture.phases(phases, NAMES)
  assert "\n" not in str(caught.value)
