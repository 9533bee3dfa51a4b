"""Block by block: costs add up to the model's, the programme keeps budgets, refusals are clear."""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from cases import models
from experiments.candidates import Judge, by_rule
from experiments.hunting import Blocks, first, largest, nothing, spread
from experiments.limits import Limits, rule, samples
from hybridlm.prune import devices, select, space
from hybridlm.prune.constraints import Budget, Rules
from hybridlm.prune.search import milp

CFG = models.make()  # M-M*-
FEW = models.make(pattern="M-*")  # few enough blocks to try everything
CHOICES = {"D": (12, 16), "F": (8, 16, 24), "H": (2, 4), "J": (2, 3), "blocks": (3, 5),
           "noop": (0, 1)}
PLACE = {"context": 64, "batch": 3}
ALL = dict(parameters=10**9, memory_bytes=10**9, prefill_seconds=1.0, tokens_per_second=1.0)


def judge(rules=None, cfg=CFG, **bounds):
  source = devices.device("h100")
  return Judge(cfg, Limits(rules or Rules(), Budget(**PLACE, **bounds), source))


def sizes(choices=CHOICES, cfg=CFG):
  return space.blockwise(cfg, space.check(cfg, choices))


def run(**values):
  base = {"method": "milp", "space": CHOICES, "solutions": 3, "diversity": 1, "candidates": 4}
  return ConfigDict(base | values)


def losses(blocks, seed=0):
  rng = np.random.default_rng(seed)
  return {key: float(rng.random()) for key in blocks.options()}


def test_shares_of_blocks_and_of_the_rest_add_up_to_the_whole_model():
  each, options, limits = judge(), sizes(), judge(**ALL).limits
  rng = np.random.default_rng(0)
  for _ in range(20):
    genes = tuple(int(rng.integers(count)) for count in options.counts)
    small = each.small(options.targets(genes))
    shares = [limits.block(small, index) for index in range(len(small.blocks))]
    shares.append(limits.outside(small))
    found = {name: sum(share[name] for share in shares) for name in limits.bounds}
    want = limits.costs(small)
    for name in ("parameters", "memory_bytes"):
      assert found[name] == want[name]
    for name in ("prefill_seconds", "decode_seconds"):
      assert found[name] == pytest.approx(want[name], rel=1e-12)


def test_throughput_is_a_bound_on_the_seconds_of_a_step():
  assert judge(tokens_per_second=30.0).limits.bounds == {"decode_seconds": 0.1}
  both = judge(tokens_per_second=30.0, decode_seconds=0.05).limits
  assert both.bounds == {"decode_seconds": 0.05}


def everything(each, options, values):
  """Returns the least sum of losses over all candidates of each width that fit."""
  best = {}
  for genes in space.grid(options):
    if options.allowed(genes) and not each.reasons(options.targets(genes)):
      loss = sum(values[index, gene] for index, gene in enumerate(genes[1:]))
      best[genes[0]] = min(best.get(genes[0], np.inf), loss)
  return best


def test_the_programme_finds_what_trying_every_model_finds_and_breaks_no_budget():
  floors = Rules(floors={"*": 1})
  parent = judge(cfg=FEW, **ALL).costs({})
  share = {"parameters": 0.8, "memory_bytes": 0.8, "decode_seconds": 0.9}
  tight = {name: type(parent[name])(parent[name] * part) for name, part in share.items()}
  choices = CHOICES | {"blocks": (2, 3)}
  for bounds in ({"parameters": tight["parameters"]}, tight):
    each, options = judge(floors, FEW, **bounds), sizes(choices, FEW)
    blocks = Blocks(each, options)
    values = losses(blocks)

    def fits(genes, each=each, options=options):
      return not each.reasons(options.targets(genes))

    found = blocks.solutions(values, run(), fits)
    sums = {}
    for genes in found:
      small = each.small(options.targets(genes))
      for name, bound in bounds.items():
        assert each.limits.costs(small)[name] <= bound
      loss = sum(values[index, gene] for index, gene in enumerate(genes[1:]))
      sums.setdefault(genes[0], []).append(loss)
    want = everything(each, options, values)
    assert {width: found[0] for width, found in sums.items()} == pytest.approx(want)
    assert all(each == sorted(each) and len(each) == 3 for each in sums.values())


def test_a_choice_that_a_rule_about_several_blocks_refuses_is_passed_over():
  each, options = judge(parameters=10**9), sizes(CHOICES | {"D": ()})
  blocks = Blocks(each, options)
  values = losses(blocks)
  one = blocks.solutions(values, run(solutions=1), lambda genes: True)
  other = blocks.solutions(values, run(solutions=1), lambda genes: genes != one[0])
  assert len(one) == len(other) == 1 and one != other


def test_options_that_break_a_rule_are_left_out():
  blocks = Blocks(judge(Rules(divisors={"F": 16}), parameters=10**9), sizes())
  kept = {blocks.sizes.options[index][gene] for index, gene in blocks.options() if index == 1}
  assert {option.sizes for option in kept} == {(), (("F", 16),)}
  with pytest.raises(ValueError, match="block 1 has no option that a rule allows: divisor: F=16"):
    Blocks(judge(Rules(divisors={"F": 7}), parameters=10**9), sizes({"F": (8, 16)}))


def test_a_budget_that_no_choice_of_blocks_fits_names_the_nearest():
  free, options = judge(cfg=FEW), sizes(CHOICES | {"blocks": (2, 3)}, FEW)
  smallest = min(
    free.costs(options.targets(genes))["parameters"]
    for genes in space.grid(options) if options.allowed(genes)
  )
  with pytest.raises(ValueError) as error:
    Blocks(judge(cfg=FEW, parameters=100), options)
  assert f"the nearest possible needs parameters {smallest:,} of 100" in str(error.value)
  with pytest.raises(ValueError, match="meets the floors and the numbers of blocks"):
    floors = Rules(floors={"M": 2, "-": 2, "*": 1})
    Blocks(judge(floors, parameters=10**9), sizes(CHOICES | {"blocks": (3, 4)}))


def test_a_divisor_of_the_number_of_blocks_is_refused_where_blocks_may_go():
  with pytest.raises(ValueError, match="rules.divisors.blocks is not linear"):
    Blocks(judge(Rules(divisors={"blocks": 2}), parameters=10**9), sizes())


def test_without_a_bound_there_is_nothing_to_choose():
  with pytest.raises(ValueError, match="the budget has no bound"):
    Blocks(judge(), sizes())


def test_a_uniform_search_that_nothing_fits_says_the_rules_and_the_nearest_budget():
  choices = space.check(CFG, {"D": (12, 16), "F": (8, 24)})
  each = judge(Rules(divisors={"D": 8}), parameters=5)
  least = each.costs({"D": 16, "F": 8})["parameters"]
  with pytest.raises(ValueError) as error:
    first(each, space.Uniform(choices), run(method="grid"), 0)
  said = str(error.value)
  assert "none of 4 candidates fits; rejected by rule: budget: parameters 4, divisor 2" in said
  assert f"nearest possible is parameters {least:,}" in said
  assert said == nothing(each, [{"D": d, "F": f} for d in (12, 16) for f in (8, 24)])


def test_a_random_search_draws_until_as_many_as_asked_fit():
  choices = space.check(CFG, CHOICES | {"noop": ()})
  each = judge(parameters=judge().costs({"D": 12})["parameters"])
  found = first(each, space.Uniform(choices), run(method="random"), 0)
  good = [targets for targets in found if not each.reasons(targets)]
  assert len(good) == 4 and found[-1] == good[-1]
  assert found == first(each, space.Uniform(choices), run(method="random"), 0)


def test_the_largest_that_fits_is_the_one_with_the_most_parameters():
  choices = space.check(CFG, {"D": (12, 16), "F": (8, 16, 24), "H": (2, 4)})
  bound = judge().costs({"D": 12})["parameters"]
  each, every = judge(parameters=bound), space.Uniform(choices)
  counts = [judge().costs(every.targets(genes))["parameters"] for genes in space.grid(every)]
  found = largest(each, every)
  assert each.costs(found)["parameters"] == max(count for count in counts if count <= bound)
  assert largest(judge(parameters=5), every) is None


@pytest.mark.parametrize("values, message", [
  ({"method": "greedy"}, "search.method='greedy' is not one of grid, random, milp"),
  ({"method": "grid"}, "search.space holds 96 combinations, more than search.candidates=4"),
  ({"space": {"D": ()}}, "search space: empty"),
])
def test_a_search_of_nothing_or_of_too_much_is_refused(values, message):
  with pytest.raises(ValueError, match=message):
    spread(CFG, run(**values))


def test_refusals_are_counted_by_rule_and_by_bound():
  assert rule("budget: parameters 10,668, more than parameters 9,000") == "budget: parameters"
  assert rule("divisor: D=3 is not a multiple of 2") == "divisor"
  lists = [["divisor: a", "divisor: b"], ["divisor: a", "budget: memory 1 GiB, more"], []]
  assert by_rule(lists) == {"divisor": 2, "budget: memory": 1}


def test_timed_models_have_every_kind_and_the_ends_of_every_size():
  found = samples(CFG, {"F": (8, 16, 24), "D": (12, 16), "blocks": (3,), "noop": (0, 1)})
  assert found[0] == CFG and {small.D for small in found} == {12, 16}
  assert {small.blocks[1].F for small in found} == {8, 16, 24}
  assert "C" in set(itertools.chain(*(small.pattern for small in found)))
  assert all(len(small.blocks) == 5 for small in found)
  assert select.sized(CFG, {"D": 12, "F": 8}) in found


def test_programmes_take_rows_of_real_models():
  blocks = Blocks(judge(**ALL), sizes())
  problem = milp.Problem([[0.0] * len(options) for options in blocks._legal], blocks._rows[0])
  assert {row.name for row in problem.rows} >= {"blocks", "noop", "parameters", "memory_bytes"}
