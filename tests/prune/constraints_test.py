"""A candidate that may not be says which rule it breaks, with value and limit."""

import dataclasses

import numpy as np
import pytest

from cases import models
from hybridlm.config import PRESETS
from hybridlm.prune import constraints, cost, devices, latency, select
from hybridlm.prune.constraints import Budget, Rules

PARENT = models.make(pattern="M-M*-M-", P=8, N=4)  # 64 + 16 conv channels
SHARE = Rules(inner_share=0.5)


def small(targets, parent=PARENT):
  return select.sized(parent, targets)


def reasons(targets, *, rules=None, budget=None, parent=PARENT, **options):
  found = constraints.reasons(
    parent, small(targets, parent), rules or Rules(), budget or Budget(), **options)
  return "\n".join(found)


@pytest.mark.parametrize("rules, good, bad, reason", [
  (Rules(divisors={"D": 4}), {"D": 12}, {"D": 10}, "divisor: D=10 is not a multiple of 4"),
  (Rules(divisors={"F": 5}), {"F": 20}, {"F": 12},
   "divisor: F=12 is not a multiple of 5 (block 01, 04, 06)"),
  (Rules(divisors={"F": 5}), {"F": {1: 20}}, {"F": {1: 20, 4: 7}},
   "divisor: F=7 is not a multiple of 5 (block 04)"),
  (Rules(divisors={"heads": 4}), {"heads": 4}, {"heads": 6},
   "divisor: heads=6 is not a multiple of 4 (block 00, 02, 05)"),
  (Rules(divisors={"blocks": 2}), {"blocks": 6}, {"blocks": 5},
   "divisor: blocks=5 is not a multiple of 2"),
  (Rules(floors={"M": 2, "*": 1}), {"blocks": [0, 2, 3]}, {"blocks": [0, 1, 3]},
   "floor: 1 blocks of kind M, fewer than 2"),
  (Rules(conv_multiple=8), {"P": 6}, {"P": 7, "H": 3},
   "conv_multiple: 58 channels of the convolution are not a multiple of 8"),
  (Rules(conv_multiple=8), {"noop": [0], "H": 1}, {"noop": [0], "P": 7, "H": 2},
   "conv_multiple: 28 channels of the convolution are not a multiple of 8 (block 00)"),
  (SHARE, {"H": 2}, {"H": 3, "P": 5}, "inner_share: heads x channels 30, fewer than 0.5 of the "
   "parent's 64 (block 00, 02, 05)"),
  (SHARE, {"noop": [0], "H": 2}, {"noop": [2], "H": {2: 1}},
   "inner_share: heads x channels 16, fewer than 0.5 of the parent's 64 (block 02)"),
])
def test_each_rule_passes_what_keeps_it_and_names_what_does_not(rules, good, bad, reason):
  assert reasons(good, rules=rules) == ""
  assert reason in reasons(bad, rules=rules) and reasons(bad, rules=rules).count("\n") < 2


def test_of_many_blocks_that_break_a_rule_four_are_named():
  parent = models.make(pattern="------")
  assert reasons({"F": 7}, rules=Rules(divisors={"F": 5}), parent=parent) == (
    "divisor: F=7 is not a multiple of 5 (block 00, 01, 02, 03 and 2 more)")


def test_a_size_that_the_parent_has_is_no_ones_fault():
  rules = Rules(divisors={"D": 7, "F": 7, "P": 7, "heads": 7, "blocks": 5, "N": 3})
  assert reasons({}, rules=rules) == ""
  assert reasons({"F": 21}, rules=rules) == ""


@pytest.mark.parametrize("shards, targets, reason", [
  (2, {}, None), (1, {"G": 1, "H": 3, "F": 7}, None),
  (2, {"F": 7}, "F=7 do not split over 2 devices (block 01, 04, 06)"),
  (2, {"G": 1, "H": 3}, "3 SSM heads do not split over 2 devices"),
  (2, {"G": 1}, None),  # one group is copied to every device
  (2, {"K": 1, "J": 3}, "3 query heads do not split over 2 devices (block 03)"),
  (2, {"K": 1, "J": 2}, None),  # so is one KV head
  (4, {"J": 2, "G": 1}, None),  # two devices to a KV head
  (4, {"J": 2}, "G=2 SSM groups do not split over 4 devices (block 00, 02, 05)"),
])
def test_a_server_must_be_able_to_split_the_model(shards, targets, reason):
  found = reasons(targets, rules=Rules(shards=(shards,)))
  assert found == "" if reason is None else f"shards: {reason}" in found


def test_kv_heads_that_neither_divide_nor_are_divided_do_not_split():
  cfg = models.make(pattern="*-", K=4, J=3, F=24)
  found = constraints.reasons(cfg, cfg, Rules(shards=(6,)), Budget())
  assert found == ["shards: K=4 KV heads do not split over 6 devices (block 00)"]


def test_shares_compare_with_the_block_it_was_where_that_is_known():
  parent = small({"H": {0: 1}})  # 16 wide where the others have 64
  targets = {"blocks": [0, 1, 2], "H": {2: 1}}
  assert reasons(targets, rules=SHARE, parent=parent) == ""  # the narrowest has 16
  found = reasons(targets, rules=SHARE, parent=parent, kept=[0, 1, 2])
  assert "16, fewer than 0.5 of the parent's 64 (block 02)" in found
  assert reasons({"H": {2: 1}}, rules=SHARE, parent=parent) == found  # none goes: each is known


def test_what_an_export_refuses_is_a_reason_and_a_bug_is_not():
  def check(cfg):
    if cfg.D % 8:
      raise ValueError(f"family llama cannot express D={cfg.D}")

  assert reasons({"D": 8}, rules=Rules(check=check)) == ""
  found = reasons({"D": 9}, rules=Rules(check=check))
  assert found == "export: family llama cannot express D=9"
  with pytest.raises(ZeroDivisionError):
    reasons({}, rules=Rules(check=lambda cfg: 1 // 0))


def test_several_bounds_hold_at_once_and_each_says_by_how_much():
  whole = cost.cost(PARENT, context=64, batch=2)
  device = devices.Device({"float32": 1e9}, 1e9, 1e9)
  place = {"context": 64, "batch": 2}
  step = latency.estimate(PARENT, device, phase="decode", **place)
  fits = Budget(parameters=whole.parameters, memory_bytes=whole.total_bytes, decode_seconds=step,
                tokens_per_second=2 / step, prefill_seconds=1e3, **place)
  assert reasons({}, budget=fits, source=device) == ""
  tight = dataclasses.replace(
    fits, parameters=whole.parameters - 1, memory_bytes=whole.total_bytes - 1,
    decode_seconds=step * 0.999, tokens_per_second=2.01 / step)
  lines = reasons({}, budget=tight, source=device).split("\n")
  assert [line.split(" ")[1] for line in lines] == ["parameters", "memory", "decode", "tokens"]
  assert lines[0] == (f"budget: parameters {whole.parameters:,}, more than parameters "
                      f"{whole.parameters - 1:,}")
  assert "fewer than tokens per second" in lines[3]
  with pytest.raises(ValueError, match="decode_seconds needs timings or a device"):
    reasons({}, budget=Budget(decode_seconds=1.0))


def test_the_published_4b_passes_the_papers_rules_and_budget():
  parent = PRESETS["nemotron_h_8b"]
  targets = {"D": 3072, "F": 12288, "heads": 112, "P": 64}
  rules = Rules(divisors={"D": 256, "F": 256, "P": 2, "heads": 8, "blocks": 2}, floors={"*": 2},
                conv_multiple=8, shards=(1, 2, 4, 8), inner_share=0.5)
  budget = Budget(parameters=4_500_000_000)
  assert cost.cost(small(targets, parent)).parameters == 4_489_223_040
  assert reasons(targets, rules=rules, budget=budget, parent=parent) == ""
  over = reasons(targets | {"D": 3328}, rules=rules, budget=budget, parent=parent)
  assert over.startswith("budget: parameters 4,") and over.endswith("parameters 4,500,000,000")


def test_an_impossible_budget_says_the_nearest_possible_one():
  every = [small({"D": d, "F": f}) for d in (4, 8, 12) for f in (4, 12)]
  rules = Rules(divisors={"D": 8})  # D = 4 and 12 may not be
  counts = {(cfg.D, cfg.F): cost.cost(cfg).parameters for cfg in every}
  wanted = counts[8, 4] - 10
  found = constraints.nearest(PARENT, every, rules, Budget(parameters=wanted))
  assert (found.cfg.D, found.cfg.F) == (8, 4)
  assert found.budget == Budget(parameters=counts[8, 4])
  assert constraints.reasons(PARENT, found.cfg, rules, found.budget) == []
  said = constraints.refusal(Budget(parameters=wanted), found)
  assert f"parameters {wanted:,} " in said and said.endswith(f"is parameters {counts[8, 4]:,}")
  fits = Budget(parameters=counts[8, 12])
  assert constraints.nearest(PARENT, every, rules, fits).budget == fits
  assert constraints.nearest(PARENT, every, Rules(divisors={"D": 32}), fits) is None


def test_the_nearest_budget_is_that_of_the_least_worst_bound():
  rng = np.random.default_rng(0)
  every = [small({"D": int(rng.integers(1, 17)), "F": int(rng.integers(1, 25)),
                  "N": int(rng.integers(1, 5))}) for _ in range(30)]
  budget = Budget(parameters=300, memory_bytes=4_000, context=16, batch=3)
  found = constraints.nearest(PARENT, every, Rules(), budget)
  bounds = np.array([300, 4_000])
  worst = [max(np.array(list(constraints.measures(cfg, budget).values())) / bounds)
           for cfg in every]
  assert found.cfg == every[int(np.argmin(worst))]
  assert not constraints.reasons(PARENT, found.cfg, Rules(), found.budget)


@pytest.mark.parametrize("name, value, said, bound", [
  ("memory_bytes", 9_202_000_000, "memory 8.571 GiB", int(8.571 * 2**30)),
  ("memory_bytes", 4_100_001, "memory 0.003819 GiB", int(0.003819 * 2**30)),
  ("decode_seconds", 0.0123412, "decode 0.01235 s", 0.01235),
  ("tokens_per_second", 12_345.6, "tokens per second 12,345 tokens/s", 12_345),
])
def test_the_nearest_budget_can_be_asked_for_as_it_is_said(name, value, said, bound):
  assert constraints.say(name, value, met=True) == said
  assert constraints.excess(name, value, bound) <= 1


def test_a_bound_that_is_hardly_broken_differs_from_the_value_as_they_are_said():
  whole = cost.cost(PARENT).total_bytes
  line = reasons({}, budget=Budget(memory_bytes=whole - 1))
  have, may = line.removeprefix("budget: memory ").split(", more than memory ")
  assert have != may and float(have.split()[0]) * 2**30 == pytest.approx(whole, abs=0.5)


def test_where_every_candidate_breaks_a_rule_no_budget_is_near():
  said = constraints.refusal(Budget(parameters=10), None)
  assert said == ("budget parameters 10 at context=8192, batch=1: every candidate breaks a rule, "
                  "so no budget is possible")


def test_a_budget_is_measured_in_its_dtypes_and_each_phase_at_its_place():
  place, dtypes = {"context": 64, "batch": 2}, {
    "weight_dtype": "int4", "kv_dtype": "int8", "conv_dtype": "bfloat16", "ssm_dtype": "float16"}
  device = devices.Device({"float32": 1e9}, 1e9, 1e9)
  budget = Budget(memory_bytes=1, prefill_seconds=1.0, decode_seconds=1.0, **place, **dtypes)
  assert constraints.measures(PARENT, budget, device) == {
    "memory_bytes": cost.cost(PARENT, **place, **dtypes).total_bytes,
    "prefill_seconds": latency.estimate(PARENT, device, phase="prefill", **place),
    "decode_seconds": latency.estimate(PARENT, device, phase="decode", **place),
  }
  for name in dtypes:
    other = dataclasses.replace(budget, **{name: "float32"})
    assert constraints.measures(PARENT, other, device) != constraints.measures(
      PARENT, budget, device), name


@pytest.mark.parametrize("make, message", [
  (lambda: Budget(parameters=0), "parameters=0 must be a positive number"),
  (lambda: Budget(parameters=True), "parameters=True must be a positive number"),
  (lambda: Rules(conv_multiple=True), "conv_multiple=True must be a whole number"),
  (lambda: Budget(decode_seconds=float("nan")), "decode_seconds=nan must be"),
  (lambda: Budget(context=0), "context=0 must be at least 1"),
  (lambda: Budget(kv_dtype="x"), "dtype 'x' is not one of"),
  (lambda: Rules(divisors={"Q": 2}), "divisors names 'Q', which is no size"),
  (lambda: Rules(divisors={"D": 0}), "divisors.D=0 must be a whole number of at least 1"),
  (lambda: Rules(floors={"*": -1}), "floors\\['\\*'\\]=-1 must be"),
  (lambda: Rules(shards=(0,)), "shards=0 must be"),
  (lambda: Rules(conv_multiple=0), "conv_multiple=0 must be"),
  (lambda: Rules(inner_share=1.5), "inner_share=1.5 must lie in 0..1"),
])
def test_a_bound_or_a_rule_that_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
