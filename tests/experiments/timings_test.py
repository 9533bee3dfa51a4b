"""Timings are kept, resumed and compared; budgets, rules and sources follow a config's numbers."""

import jax
import pytest

from cases import models
from configs import base
from experiments import budgets, console, timings
from hybridlm.prune import constraints, latency
from hybridlm.prune.devices import DEVICES
from hybridlm.prune.latency import Table

PLACE = {"contexts": (8,), "batches": (1,)}


def fake(monkeypatch, calls):
  """Measures by a law of FLOPs and bytes: nothing is compiled."""
  def measure(case, found, turns):
    calls.append(case)
    work = latency.work(*case)
    kind = latency.HEAD if case.block is None else case.block.symbol
    seconds = 1e-5 + 1e-10 * work.flops + 1e-10 * work.bytes
    return latency.Entry(kind, latency.sizes(case.cfg, case.block), *case[2:], seconds, *work)

  monkeypatch.setattr(timings, "measure", measure)


def test_every_distinct_block_and_the_head_are_timed_once_and_kept(tmp_path, monkeypatch):
  calls = []
  fake(monkeypatch, calls)
  cfg, other = models.make(pattern="M-M*-"), models.make(pattern="M-M*-", F=8)
  found = timings.table(tmp_path, [cfg], turns=1, **PLACE)
  assert len(calls) == 2 * 4 == len(found.entries)  # M, -, *, head in two phases
  assert timings.table(tmp_path, [cfg], turns=1, **PLACE) == found and len(calls) == 8
  timings.table(tmp_path, [cfg, other], turns=1, **PLACE)
  assert [(case.block.symbol, case.block.F) for case in calls[8:]] == [("-", 8), ("-", 8)]


def test_timings_before_a_kill_are_not_lost(tmp_path, monkeypatch):
  calls = []
  fake(monkeypatch, calls)
  real = timings.measure

  def killed(case, found, turns):
    if len(calls) == 5:
      raise KeyboardInterrupt
    return real(case, found, turns)

  monkeypatch.setattr(timings, "measure", killed)
  with pytest.raises(KeyboardInterrupt):
    timings.table(tmp_path, [models.make()], turns=1, **PLACE)
  monkeypatch.setattr(timings, "measure", real)
  timings.table(tmp_path, [models.make()], turns=1, **PLACE)
  assert len(calls) == len(set(calls)) == 8


def test_timings_of_another_dtype_have_a_table_of_their_own(tmp_path, monkeypatch):
  calls = []
  fake(monkeypatch, calls)
  for dtype in ("float32", "bfloat16"):
    timings.table(tmp_path, [models.make(dtype=dtype)], turns=1, **PLACE)
  assert len(calls) == 16 and len(list(tmp_path.rglob("*.json"))) == 2


def test_real_blocks_are_measured_and_add_up_to_a_model(tmp_path, monkeypatch):
  monkeypatch.setattr(timings, "COPIES", 1)
  cfg = models.make(pattern="M")
  found = timings.table(tmp_path, [cfg], turns=1, **PLACE)
  assert [entry[:1] + entry[2:5] for entry in found.entries] == [
    (kind, phase, 8, 1) for kind in ("M", latency.HEAD) for phase in sorted(latency.PHASES)]
  assert all(entry.seconds > 0 for entry in found.entries)
  for phase in latency.PHASES:
    both = sum(entry.seconds for entry in found.entries if entry.phase == phase)
    assert latency.estimate(cfg, found, phase=phase, context=8, batch=1) == pytest.approx(both)


@pytest.mark.parametrize("pattern", ["-", "M"])
def test_a_timed_step_computes_its_blocks_even_without_a_state(pattern):
  cfg = models.make(pattern=pattern)
  weights, token_B = timings.constants(cfg), jax.numpy.zeros(2, jax.numpy.int32)
  cache = timings.caches.empty(cfg, 2, 16)
  program = timings._steps.lower(cfg, weights, cache, token_B).compile()
  least = timings.latency.work(cfg, cfg.blocks[0], "decode", 8, 2).flops
  assert program.cost_analysis()["flops"] > least  # a loop's body counts once


def test_the_page_compares_with_blocks_of_other_sizes(monkeypatch):
  calls = []
  fake(monkeypatch, calls)
  cfgs = {"teacher": models.make(), "cut": models.make(D=8, F=10, H=2)}
  entries = [timings.measure(case, None, 1) for case in timings.cases(cfgs.values(), (8,), (1,))]
  timed = Table({"dtype": "float32"}).add(entries)
  assert {e.sizes for e in timings.without(timed, cfgs["cut"]).entries} == {
    e.sizes for e in timed.entries} - {latency.sizes(cfgs["cut"], b)
                                       for b in (*cfgs["cut"].blocks, None)}
  monkeypatch.setattr(timings, "whole", lambda cfgs, *a, turns, **k: [2e-4] * len(cfgs))
  monkeypatch.setattr(timings, "this_device", lambda dtype, turns: DEVICES["a10g"])
  rows = timings.compare(cfgs, timed, turns=1, **PLACE)
  assert [row[0] for row in rows] == ["teacher", "cut"] * 2
  page = timings.page(rows, cfgs, "python -m experiments.timings")
  assert "| teacher | prefill | 1 × 8 | 0.20 |" in page and "% in the median" in page
  guess = latency.estimate(cfgs["cut"], timed, phase="decode", context=8, batch=1)
  assert f"{1e3 * guess:.2f} ({guess / 2e-4 - 1:+.0%})" == rows[3][4]


@pytest.mark.parametrize("arguments, message", [
  (["--cuts=D"], "--cuts='D': not entries like D=160"),
  (["--contexts=0"], "--contexts=0: not whole numbers"),
  (["--batches="], "--batches="),
  (["--turns=0"], "--turns=0 must be at least 1"),
  (["--cuts=D=100000"], "target D=100000"),
])
def test_a_wrong_flag_is_one_line(arguments, message, capsys):
  argv = ["timings", "--config=configs/quickstart_toy.py", *arguments]
  assert console.call(timings.main, argv) == 2
  assert message in capsys.readouterr().err


def test_budget_and_rules_follow_the_configs_units():
  c = base.get_config()
  assert budgets.budget(c) == constraints.Budget() and budgets.rules(c) == constraints.Rules()
  c.budget.update(parameters=7, memory_gib=1.5, prefill_ms=20.0, decode_ms=3.0, batch=2,
                  tokens_per_second=9.0, kv_dtype="int8")
  assert budgets.budget(c) == constraints.Budget(
    parameters=7, memory_bytes=3 * 2**29, prefill_seconds=0.02, decode_seconds=0.003,
    tokens_per_second=9.0, batch=2, kv_dtype="int8")
  c.rules.divisors.D = 8
  c.rules.update(floors=(("*", 1),), shards=(2,), conv_multiple=8, inner_share=0.5)
  assert budgets.rules(c) == constraints.Rules(
    divisors={"D": 8}, floors={"*": 1}, shards=(2,), conv_multiple=8, inner_share=0.5)


def test_a_family_that_cannot_express_a_candidate_is_a_reason():
  c = base.get_config()
  c.rules.family = "llama"
  cfg = models.make()
  (reason,) = constraints.reasons(cfg, cfg, budgets.rules(c), budgets.budget(c))
  assert reason.startswith("export: family llama cannot express this model")
  c.rules.family = "any"
  assert constraints.reasons(cfg, cfg, budgets.rules(c), budgets.budget(c)) == []


@pytest.mark.parametrize("part, key, value, message", [
  ("budget", "device", "abacus", "budget: device 'abacus' is not one of"),
  ("budget", "memory_gib", 0.0, "budget: memory_bytes=0"),
  ("rules", "floors", ("*", 2), "rules: floors=.* not pairs"),
  ("rules", "conv_multiple", 0, "rules: conv_multiple=0"),
])
def test_a_wrong_bound_or_rule_names_its_key(part, key, value, message):
  c = base.get_config()
  c[part][key] = value
  with pytest.raises(ValueError, match=message):
    getattr(budgets, part)(c)


def test_seconds_come_from_a_named_device_or_are_measured_only_where_a_bound_needs_them(
    tmp_path, monkeypatch):
  calls = []
  fake(monkeypatch, calls)
  c, cfg = base.get_config(), models.make()
  assert budgets.source(c, [cfg], cache=tmp_path) is None
  c.budget.update(decode_ms=1.0, context=8)
  assert isinstance(budgets.source(c, [cfg], cache=tmp_path), Table) and len(calls) == 8
  c.budget.device = "h100"
  assert budgets.source(c, [cfg], cache=tmp_path) == DEVICES["h100"] and len(calls) == 8
