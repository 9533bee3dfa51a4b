"""Seconds, rules and spaces of models with parallel blocks, shared keys and meta tokens."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from experiments import leftover
from experiments.candidates import Judge
from experiments.hunting import Blocks
from experiments.limits import Limits, samples
from hybridlm import axes, config, lazy
from hybridlm.prune import align, constraints, cost, devices, latency, select, space, store, stream
from hybridlm.prune import cut as cutting
from hybridlm.prune.constraints import Budget, Rules
from hybridlm.prune.search import milp

HASH = "6f356023b6365d6ff295561af442b858f5aecea2cd18403bf23054979592e1d6"
CFG = models.hymba()  # =-=-=-=-: blocks 2 and 4 share keys, 0 and 6 are global
PLACE = {"context": 64, "batch": 3}
ALL = dict(parameters=10**9, memory_bytes=10**9, prefill_seconds=1.0, tokens_per_second=1.0)


def judge(cfg=CFG, rules=None, **bounds):
  return Judge(cfg, Limits(rules or Rules(), Budget(**PLACE, **bounds), devices.device("h100")))


def sizes(cfg=CFG, **choices):
  return space.blockwise(cfg, space.check(cfg, choices))


def test_a_step_reads_the_keys_that_another_block_has_and_those_of_meta_tokens():
  owner, reader = CFG.blocks[2], CFG.blocks[4]
  parts = [cost.part(CFG, block, context=64) for block in (owner, reader)]
  works = [latency.work(CFG, block, "decode", 64, 3) for block in (owner, reader)]
  assert parts[0].kv and parts[0].meta and not parts[1].kv and not parts[1].meta
  moved = [work.bytes - 4 * part.parameters for work, part in zip(works, parts, strict=True)]
  assert moved[0] == moved[1]
  stream_bytes, state = 2 * 3 * CFG.D * 4, 2 * 3 * 4 * (parts[0].conv + parts[0].ssm)
  assert moved[0] == stream_bytes + state + 4 * (3 * parts[0].kv + parts[0].meta)
  assert latency.owning(reader) == owner and latency.owning(owner) == owner


def test_timings_tell_branches_kinds_and_sharing_apart_and_plain_blocks_as_before():
  cfgs = (CFG, models.hymba("mamba1"), models.hymba(fusion="sum", U=None), models.hymba(meta=0))
  said = [latency.sizes(cfg, cfg.blocks[index]) for cfg in cfgs for index in (0, 2, 4)]
  assert len(set(said)) == len(said)
  plain = models.make(pattern="M*")
  assert json.loads(latency.sizes(plain, plain.blocks[0])) == {
    "D": 16, "norm": "rmsnorm", "G": 2, "H": 4, "P": 6, "N": 5, "W": 4, "conv_bias": True,
    "ssd": None, "chunk": None}
  assert json.loads(latency.sizes(plain, plain.blocks[1])) == {
    "D": 16, "norm": "rmsnorm", "K": 2, "J": 3, "E": 10, "bias": False, "window": None,
    "rope": False, "attention": None}


def test_rules_look_into_both_branches():
  assert constraints.unsplit(CFG.blocks[0], 2) is None
  assert constraints.unsplit(CFG.blocks[0], 4) == "G=2 SSM groups"
  assert constraints.unsplit(models.hymba("mamba1").blocks[0], 4) == "6 query heads"
  small = select.sized(CFG, {"H": 3, "U": 5, "M": 7, "ssm_off": [6]})
  rules = Rules(divisors={"heads": 4, "U": 4, "M": 4}, conv_multiple=16, inner_share=0.8)
  lines = constraints.reasons(CFG, small, rules, Budget(), kept=list(range(8)))
  assert lines == [
    "divisor: heads=6 is not a multiple of 4 (block 00, 02, 04)",
    "divisor: U=5 is not a multiple of 4 (block 00, 02, 04, 06)",
    "divisor: M=7 is not a multiple of 4",
    "conv_multiple: 56 channels of the convolution are not a multiple of 16 (block 00, 02, 04)",
    "inner_share: heads x channels 36, fewer than 0.8 of the parent's 48 (block 00, 02, 04)",
  ]


def test_block_by_block_a_branch_may_go_but_no_keys_that_others_read():
  found = sizes(F=(12, 24), H=(2, 4), K=(1, 2), attention_off=(0, 2), ssm_off=(0, 1),
                noop=(0, 1), blocks=(6, 8))
  fates = [[option.fate for option in options] for options in found.options]
  ends = ["noop", "attention_off", "ssm_off", "gone"]
  assert fates[0] == fates[6] == ["stays"] * 4 + ends  # H and K
  assert fates[2] == ["stays"] * 2 + ["noop", "ssm_off"]  # others read its keys: K is not its own
  assert fates[4] == ["stays"] * 2 + ends and fates[1] == ["stays"] * 2 + ["gone"]
  off = fates[4].index("attention_off")
  genes = [0] * 9
  genes[5], genes[1] = off, fates[0].index("ssm_off")
  assert found.targets(tuple(genes)) == {"attention_off": [4], "ssm_off": [0]}
  small = select.sized(CFG, found.targets(tuple(genes)))
  assert small.blocks[4].attention is None and small.blocks[0].ssm is None
  assert found.allowed(tuple(genes))
  genes[7] = fates[6].index("ssm_off")
  assert not found.allowed(tuple(genes))


@pytest.mark.parametrize("choices, message", [
  ({"M": (3, 9)}, "M=.*meta tokens are the whole model's; take method 'grid'"),
  ({"E": (6, 10)}, "E=.*blocks that share keys and values would differ"),
])
def test_what_ties_blocks_together_is_no_choice_of_one(choices, message):
  cfg = models.hymba(pattern="=-=-", global_layers=(), kv_groups=((0, 1),))
  with pytest.raises(ValueError, match=message):
    sizes(cfg, **choices)


def test_of_the_whole_model_meta_tokens_branches_and_shared_widths_are_choices():
  found = space.Uniform(space.check(CFG, {"M": (3, 9), "E": (6, 10), "attention_off": (0, 1)}))
  small = [select.sized(CFG, found.targets(genes)) for genes in space.grid(found)]
  assert {cfg.meta for cfg in small} == {3, 9} and len(small) == 8
  assert all(cfg.blocks[2].E == cfg.blocks[4].E for cfg in small if cfg.blocks[2].attention
             and cfg.blocks[4].attention)
  with pytest.raises(ValueError, match="search space attention_off=.*9"):
    space.check(CFG, {"attention_off": (9,)})


@pytest.mark.parametrize("ssm", models.SIDES)
def test_shares_of_blocks_and_of_the_rest_add_up_to_the_whole_model(ssm):
  cfg = models.hymba(ssm)
  limits = judge(cfg, **ALL).limits
  for targets in ({}, {"attention_off": [0, 4], "ssm_off": [2], "F": 11, "M": 4}):
    small = select.sized(cfg, targets)
    shares = [limits.block(small, index) for index in range(len(small.blocks))]
    shares.append(limits.outside(small))
    want = limits.costs(small)
    for name in limits.bounds:
      total = sum(share[name] for share in shares)
      assert total == (want[name] if "seconds" not in name else pytest.approx(want[name], rel=1e-9))


def test_the_programme_takes_branches_off_within_its_bounds():
  parent = judge(**ALL).costs({})["parameters"]
  found = sizes(F=(12, 24), attention_off=(0, 2), ssm_off=(0, 1))
  each = judge(parameters=int(0.86 * parent))
  blocks = Blocks(each, found)
  # Nothing but a branch is cheap to lose.
  losses = {(i, gene): 0.1 * (found.options[i][gene].fate != "stays")
            + 9.0 * bool(found.options[i][gene].sizes) for i, gene in blocks.options()}
  values = [[losses[i, gene] for gene in legal] for i, legal in enumerate(blocks._legal)]
  choice = milp.solve(milp.Problem(values, blocks._rows[0]))
  targets = found.targets(blocks._genes(0, choice))
  assert "F" not in targets and not each.reasons(targets)
  assert len(targets.get("attention_off", [])) <= 2 and len(targets.get("ssm_off", [])) <= 1
  assert "attention_off" in targets


def test_a_candidate_fits_by_the_channels_that_its_plan_lets_meet_not_by_the_most_there_can_be():
  cfg = models.make(pattern="=", K=1, J=4, U=6, G=1, H=4, P=6)
  rising = np.arange(1.0, 5.0)  # the same places of both branches are needed least
  scores = models.scored(cfg, **{
    "00/score_KJ": rising[None], "00/score_GHP": np.repeat(rising[None, :, None], 6, axis=2)})
  targets = {"J": 2, "H": 2}
  small = select.plan(cfg, scores, targets).small_config()
  assert (small.blocks[0].Y, select.sized(cfg, targets).blocks[0].Y) == (12, 24)
  exact = config.parameters(small)
  for bound, fits in ((exact, True), (exact - 1, False)):
    limits = judge(cfg, parameters=bound).limits
    assert (not Judge(cfg, limits, scores).reasons(targets)) == fits
    assert Judge(cfg, limits).reasons(targets)  # nothing is known of where they meet
  # A rule that is broken is no matter of where they meet.
  ruled = judge(cfg, Rules(divisors={"heads": 3}), parameters=exact).limits
  assert {line.partition(":")[0] for line in Judge(cfg, ruled, scores).reasons(targets)} == {
    "divisor", "budget"}


def test_branches_that_may_go_are_among_the_models_that_are_timed():
  found = samples(CFG, {"F": (12, 24), "attention_off": (0, 2)})
  assert any(all(block.attention is None for block in cfg.blocks[::2]) for cfg in found)


def test_states_of_mamba_1_are_aligned_by_channels_and_states():
  cfg = models.hymba("mamba1")
  params = models.params(cfg)
  plan = models.plan(cfg, params, {"D": 11, "H": 30, "N": 3, "M": 4, 4: {"G": 0}})
  small, rng = plan.small_config(), np.random.default_rng(0)
  pairs = align.pairs(small, cfg, plan, ("state", "out"))
  states = [pair for pair in pairs if pair.kind == "state"]
  assert [pair.student for pair in states] == ["00", "02", "06"]  # block 4 has no SSM any more
  for pair in states:
    assert (pair.tap, pair.vector) == ("state_BGHN", "N")
    array = jnp.asarray(rng.normal(size=(2, 1, 48, 5)))
    inside = plan.inside(int(pair.teacher))
    keep_H, keep_N = inside["keep_GH"][0], inside["keep_GN"][0]
    want = np.asarray(array)[:, :, keep_H][..., keep_N]
    np.testing.assert_array_equal(pair.of_teacher(array), want)


@pytest.mark.parametrize("ssm", models.SIDES)
def test_leaves_cut_as_they_are_read_are_the_cut_tree_bit_for_bit(ssm):
  cfg = models.hymba(ssm)
  params = models.params(cfg)
  sizes = {"H": 3, "U": 5, "J": 2, "E": 6, "N": 3, "M": 4, "D": 11, "F": 13, 0: {"K": 0},
           6: {"G": 0}}
  plan = models.plan(cfg, params, sizes | ({"R": 4} if ssm == "mamba1" else {}))
  want_cfg, want = cutting.cut(cfg, params, plan)
  leaves = {path: lazy.Leaf(leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: np.asarray(leaf))
            for path, leaf in axes.leaves(params)}
  small_cfg, made = stream.cut(cfg, leaves, plan)
  assert small_cfg == want_cfg and list(made) == [path for path, _ in axes.leaves(want)]
  for path, leaf in axes.leaves(want):
    got = made[path].read()
    assert got.shape == made[path].shape == leaf.shape, path
    assert got.tobytes() == np.asarray(leaf).tobytes(), path


def test_a_plan_replays_where_targets_say_its_sizes_but_not_where_branches_meet(tmp_path):
  cfg = models.make(pattern="==", U=8, global_layers=(), kv_groups=((0, 1),), meta=3)
  targets = {"H": 3, "U": 5, "M": 2}
  plan = select.plan(cfg, models.scored(cfg), targets)
  plan.save(tmp_path / "plan.json")
  expected = select.sized(cfg, targets)
  assert plan.small_config().blocks != expected.blocks
  assert leftover.replayed(cfg, tmp_path / "plan.json", expected) == plan.small_config()
  for other in ({"H": 3, "U": 5}, {"H": 3, "U": 4, "M": 2}):
    with pytest.raises(ValueError, match="leaves other sizes than the targets"):
      leftover.replayed(cfg, tmp_path / "plan.json", select.sized(cfg, other))
  with pytest.raises(ValueError, match="made for another model: '==', V=31, D=16, M=3"):
    leftover.replayed(cfg.replace(meta=4), tmp_path / "plan.json", None)


@pytest.mark.parametrize("pattern", ["*", "="])
def test_a_plan_replays_whichever_rotary_pairs_scores_have_chosen(tmp_path, pattern):
  cfg = models.make(pattern=pattern, rope=config.Rope(), **({"U": 8} if pattern == "=" else {}))
  score_E = np.tile(np.float32([1, 2, 3, 4, 5]), 2)  # the last pairs are best, not the first
  plan = select.plan(cfg, models.scored(cfg, **{"00/score_E": score_E}), {"E": 4})
  plan.save(tmp_path / "plan.json")
  path, left = tmp_path / "plan.json", plan.small_config()
  assert left != select.sized(cfg, {"E": 4})
  assert leftover.replayed(cfg, path, select.sized(cfg, {"E": 4})) == left
  with pytest.raises(ValueError, match="leaves other sizes than the targets"):
    leftover.replayed(cfg, path, select.sized(cfg, {"E": 6}))


def test_a_store_from_before_is_still_of_the_same_calibration():
  cfg = models.make(pattern="M-*C")
  assert store.config_hash(cfg) == HASH
  changes = ({"meta": 3}, {"blocks": (dataclasses.replace(cfg.blocks[0], gate="none"),)},
             {"blocks": (dataclasses.replace(cfg.blocks[2], U=10),)})
  assert len({store.config_hash(cfg.replace(**each)) for each in changes} - {HASH}) == 3
