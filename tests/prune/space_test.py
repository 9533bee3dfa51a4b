"""A space holds what its choices say, once each, and nothing that the model has not."""

import itertools

import pytest

from cases import models
from hybridlm.prune import select, space

CFG = models.make()  # M-M*-: D=16, F=24, J=3, H=4, P=6
CHOICES = {"D": (16, 12), "F": (8, 24, 16), "heads": (8, 4, 6), "blocks": (4, 5)}


def uniform():
  return space.Uniform(space.check(CFG, CHOICES))


def test_the_size_is_counted_and_every_candidate_comes_once():
  sizes = uniform()
  every = list(space.grid(sizes))
  assert sizes.size == len(every) == len(set(every)) == 2 * 3 * 3 * 2
  targets = [sizes.targets(genes) for genes in every]
  assert targets[0] == {"D": 12, "F": 8, "heads": 4, "blocks": 4}
  assert [sizes.genes(each) for each in targets] == every
  assert sizes.genes(targets[0] | {"F": 9}) is None and sizes.genes({"F": 8}) is None


def test_counting_lists_nothing():
  huge = space.Uniform({name: tuple(range(1, 10**6)) for name in ("D", "F", "P", "E")})
  assert huge.size == (10**6 - 1) ** 4
  first = list(itertools.islice(space.draws(huge, 3), 50))
  assert len(set(first)) == 50 and all(0 <= gene < 10**6 - 1 for each in first for gene in each)
  assert first == list(itertools.islice(space.draws(huge, 3), 50))


@pytest.mark.parametrize("permuted", [0, space.PERMUTED])
def test_draws_are_the_grid_in_an_order_of_the_seed(permuted, monkeypatch):
  monkeypatch.setattr(space, "PERMUTED", permuted)
  one, again, other = (list(space.draws(uniform(), seed)) for seed in (0, 0, 1))
  assert one == again and one != other
  assert sorted(one) == sorted(other) == sorted(space.grid(uniform()))


@pytest.mark.parametrize("choices, message", [
  ({}, "empty, no target has a choice"),
  ({"D": (), "F": ()}, "empty, no target has a choice"),
  ({"D": (12, 12)}, "a choice is listed twice"),
  ({"D": (12, 17)}, "target D=17 .*larger than the parent's 16"),
  ({"width": (3,)}, "target 'width' is not one of"),
  ({"F": (0,)}, "not a whole number of at least 1"),
  ({"heads": (7,)}, "not a multiple of its 2 groups"),
  ({"H": (2,), "heads": (4,)}, "H and heads are one size in two units"),
])
def test_a_space_of_what_the_model_has_not_is_refused(choices, message):
  with pytest.raises(ValueError, match=message):
    space.check(CFG, choices)


def test_an_axis_that_no_block_has_is_refused():
  with pytest.raises(ValueError, match="search space J=.*: .*no block of 'M-' has this axis"):
    space.check(models.make(pattern="M-"), {"J": (2,)})


def test_block_by_block_every_block_has_the_options_of_its_kind():
  choices = space.check(CFG, {"D": (12, 16), "F": (16, 24), "H": (2, 4), "P": (3, 6),
                              "blocks": (4, 5), "noop": (0, 1)})
  sizes = space.blockwise(CFG, choices)
  fates = [[option.fate for option in options] for options in sizes.options]
  assert fates[0] == ["stays"] * 4 + ["noop", "gone"]
  assert fates[1] == ["stays"] * 2 + ["gone"] and fates[3] == ["stays", "gone"]
  # The first option is the parent's own block, and the targets name only what changes.
  assert sizes.options[0][0].sizes == ()
  assert sizes.targets((1, 0, 0, 0, 0, 0)) == {}
  assert sizes.alone(1, 1) == {"F": {"1": 16}}
  assert sizes.alone(2, 4, 0) == {"D": 12, "noop": [2]}
  genes = (0, 3, 1, 4, 1, 0)
  assert sizes.targets(genes) == {
    "D": 12, "H": {"0": 2}, "P": {"0": 3}, "F": {"1": 16}, "blocks": [0, 1, 2, 4], "noop": [2],
  }
  small = select.sized(CFG, sizes.targets(genes))
  assert small.pattern == "M-C-" and small.blocks[0].H == 2 and small.blocks[1].F == 16


def test_numbers_of_blocks_and_of_no_ops_are_bounded():
  choices = space.check(CFG, {"F": (16, 24), "blocks": (4, 5), "noop": (0, 1)})
  sizes = space.blockwise(CFG, choices)
  gone, noop = len(sizes.options[1]) - 1, 1
  assert sizes.allowed((0, 0, 0, 0, 0, 0)) and sizes.allowed((0, noop, gone, 0, 0, 0))
  assert not sizes.allowed((0, 0, gone, 0, 0, gone))
  assert not sizes.allowed((0, noop, 0, noop, 0, 0))


def test_layers_tie_blocks_together_and_cannot_be_chosen_one_by_one():
  cfg = models.make(pattern="M-M-")
  with pytest.raises(ValueError, match="layers.*name blocks"):
    space.blockwise(cfg, space.check(cfg, {"layers": (1, 2)}))
