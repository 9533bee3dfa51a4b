"""Plans of parallel blocks, shared keys and meta tokens: which are made, and which are refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from cases import models
from hybridlm import axes, config, lazy
from hybridlm.config import Fusion, ModelConfig, Parallel
from hybridlm.prune import cut as cutting
from hybridlm.prune import meeting, select, stay, stream
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

KINDS = ("mamba2", "mamba1")
ALL = {
  "K": 1, "J": 2, "U": 5, "H": 3, "E": 6, "N": 3, "P": 4, "M": 4, "D": 11, "V": 19, "F": 9, "R": 5,
  0: {"K": 0}, 4: {"G": 0, "J": 3}, "X": (0, 1, 2, 3, 4),
}
SHORT = "==-==-"  # blocks 0 and 4 are global, 3 reads the keys of 1
# One block that owns keys, two that read them; blocks 0 and 9 are global.
LONG = "=-=-=-=--="


def placed(cfg):
  """Returns random leaves; each channel that meets, in either branch, is its place's number."""
  tree = models.numbers(cfg)
  for index, block in enumerate(cfg.blocks):
    if isinstance(block, Parallel):
      folder = tree["blocks"][f"{index:02d}"]
      folder["w_out_YD"][:] = 1 + np.arange(block.Y)[:, None]
      for branch, stem in (("attention", "attention_gain_KJ"), ("ssm", "ssm_gain_GHP")):
        for name in (name for name in folder if name.startswith(stem)):
          places = 1 + np.float32(block.fusion.places(branch))
          folder[name] = places.reshape(folder[name].shape)
  return tree


def met(cfg, tree):
  """Returns for each parallel block the places that its branches write, as w_out has them; all."""
  found = []
  for index, block in enumerate(cfg.blocks):
    if isinstance(block, Parallel):
      folder, read, written = tree["blocks"][f"{index:02d}"], [], []
      for branch, stem in (("attention", "attention_gain_KJ"), ("ssm", "ssm_gain_GHP")):
        for name in (name for name in folder if name.startswith(stem)):
          written += np.asarray(folder[name]).ravel().tolist()
          read += np.asarray(folder["w_out_YD"])[list(block.fusion.places(branch)), 0].tolist()
      found.append((read, written, np.asarray(folder["w_out_YD"])[:, 0].tolist()))
  return found


@pytest.mark.parametrize("ssm", KINDS)
def test_each_branch_finds_its_rows_behind_the_mean_after_a_cut_and_a_cut_of_that(tmp_path, ssm):
  cfg = models.hymba(ssm, SHORT)
  tree = placed(cfg)
  second = {"J": 1, "U": 4, "H": 2, "E": 4, "N": 2, "M": 0, "D": 7, 0: {"P": 3}}
  for number, sizes in enumerate((ALL, second)):
    plan = models.plan(cfg, tree, sizes, seed=number)
    replayed(cfg, tree, plan, tmp_path)
    cfg, tree = cutting.cut(cfg, tree, plan)
    config.check(cfg, tree)
    for read, written, rows in met(cfg, tree):
      assert read == written
      assert rows == sorted(set(written))
  assert cfg.meta == 0 and cfg.pattern == "==-==" and cfg.kv_groups == ((1, 3),)
  assert cfg.blocks[0].attention is None and cfg.blocks[4].ssm is None


def replayed(cfg, tree, plan, folder):
  """Checks that a manifest, and a cut that reads leaf by leaf, give the same bits."""
  plan.save(folder / "plan.json")
  again = Plan.load(folder / "plan.json")
  assert again == plan
  small_cfg, small = cutting.cut(cfg, tree, again)
  assert ModelConfig.from_dict(json.loads(json.dumps(small_cfg.to_dict()))) == small_cfg
  lazily_cfg, lazily = stream.cut(cfg, lazy.of(tree), plan)
  assert lazily_cfg == small_cfg
  for path, leaf in axes.leaves(small):
    np.testing.assert_array_equal(lazily[path].read(), leaf, err_msg=path)


def test_channels_that_a_branch_keeps_are_runs_of_those_that_meet():
  attention = config.Attention(K=2, J=1, E=3)
  block = Parallel(attention, config.Mamba(G=1, H=3, P=2, N=5), Fusion("mean", 6))
  keep = {"keep_K": (1,), "keep_E": (0, 2), "keep_GH": ((0, 2),), "keep_P": (1,)}
  assert meeting.places(block, keep, "attention").tolist() == [3, 5]
  assert meeting.places(block, keep, "ssm").tolist() == [1, 5]
  assert meeting.keep_Y(block, keep).tolist() == [1, 3, 5]
  assert meeting.fusion(block, keep) == Fusion("mean", 3, ((1, 3),), ((0, 1), (2, 3)))
  assert meeting.fusion(block, {"keep_K": ()}) == Fusion("mean", 6)
  assert meeting.fusion(block, {"keep_K": (), "keep_P": (0,)}) == Fusion("mean", 3)
  assert meeting.fusion(block, {"keep_GN": ((0,),)}) is block.fusion
  assert meeting.keep_Y(attention, keep) is None


def test_masks_of_any_plan_have_one_structure_and_zero_all_that_goes():
  cfg = models.hymba("mamba1", SHORT)
  params = placed(cfg)
  plans = [models.plan(cfg, params, sizes) for sizes in ({}, ALL, {1: {"K": 0}})]
  trees = [cutting.stays(plan) for plan in plans]
  assert len({jax.tree.structure(tree) for tree in trees}) == 1
  masked, kept = cutting.mask(cfg, params, plans[1])
  small = cutting.cut(cfg, params, plans[1])[1]
  assert kept["stay_M"].sum() == 4
  for index, old in enumerate(plans[1].blocks):
    folder, left = masked["blocks"][f"{old:02d}"], small["blocks"][f"{index:02d}"]
    for name, leaf in folder.items():
      # The rank's gain has neither heads nor groups that a branch that is off would lose.
      want = np.count_nonzero(left[name]) if name in left else 0
      assert np.count_nonzero(leaf) == want or name == "rank_gain_R", (old, name)
  own = kept["blocks"]["00"]
  assert float(own["count_attention"]) == 1.0 and not np.any(own["stay_KJ"])


@functools.cache
def manifest(ssm="mamba2", **changes):
  return models.hymba(ssm, LONG, **{"kv_groups": ((1, 2, 3),), **changes})


@pytest.mark.parametrize("ssm, keep, message", [
  ("mamba2", {"00": {"keep_Y": [0, 1]}}, "block 00 \\(=\\) has no axis for 'keep_Y'"),
  ("mamba2", {"00": {"keep_R": [0, 1]}}, "block 00 \\(=\\) has no axis for 'keep_R'"),
  ("mamba2", {"00": {"keep_K": [], "keep_G": []}}, "block 00: both branches off; drop the block"),
  ("mamba2", {"00": {"keep_GN": [[], [1]]}}, "block 00: keep_GN row 0 keeps nothing"),
  ("mamba2", {"00": {"keep_U": []}}, "block 00: keep_U keeps nothing"),
  ("mamba2", {"00": {"keep_U": [8]}}, "block 00: keep_U keeps index 8 of 8"),
  ("mamba2", {"00": {"keep_E": [0, 1]}}, "block 00: keep_E keeps channel 0 without 5"),
  ("mamba2", {"02": {"keep_K": [0]}}, "block 04: keep_K is not that of block 02, whose keys"),
  ("mamba2", {"04": {"keep_U": [0]}}, "block 04: keep_U is not that of block 02, whose keys"),
  ("mamba2", {"02": {"keep_K": []}}, "block 4 reads the keys and values of block 2, whose atten"),
  ("mamba2", {"keep_X": [0, 1, 6]}, "block 6 reads the keys and values of block 2, whose atten"),
  ("mamba2", {"keep_M": [9]}, "keep_M keeps index 9 of 9"),
  ("mamba1", {"00": {"keep_P": [0]}}, "block 00 \\(=\\) has no axis for 'keep_P'"),
  ("mamba1", {"00": {"keep_G": [0]}}, "block 00 \\(=\\) has no axis for 'keep_G'"),
  ("mamba1", {"00": {"keep_GN": [[]]}}, "block 00: keep_GN row 0 keeps nothing"),
  ("mamba1", {"00": {"keep_R": [7]}}, "block 00: keep_R keeps index 7 of 7"),
])
def test_a_plan_that_parallel_blocks_cannot_follow_is_refused(ssm, keep, message):
  with pytest.raises(ValueError, match=message):
    Plan(manifest(ssm), "abc", keep)


def test_what_a_group_may_keep_apart_and_what_a_lone_mixer_may_not():
  cfg = manifest()
  Plan(cfg, "abc", {"04": {"keep_K": []}})  # a reader alone
  Plan(cfg, "abc", {f"{i:02d}": {"keep_K": []} for i in (2, 4, 6)})
  Plan(cfg, "abc", {"keep_X": [0, 2, 6], "04": {"keep_K": [0]}})  # what goes may say anything
  whole = {"02": {"keep_U": list(range(8))}}  # all of it, said or not
  assert Plan(cfg, "abc", whole).small_config() == cfg
  for pattern, keep, message in (
    ("*", {"keep_K": []}, "keep_K keeps nothing"), ("M", {"keep_G": []}, "keep_G keeps nothing"),
    ("S", {"keep_G": []}, "no axis for 'keep_G'"), ("*", {"keep_U": [0]}, "no axis for 'keep_U'"),
  ):
    sizes = {"R": 7} if pattern == "S" else {}
    with pytest.raises(ValueError, match=message):
      Plan(models.make(pattern=pattern, **sizes), "abc", {"00": keep})
  with pytest.raises(ValueError, match="keep_M, but the parent has no meta tokens"):
    Plan(models.make(), "abc", {"keep_M": [0]})


def test_keys_values_and_widths_of_a_group_are_chosen_by_the_sum_of_its_blocks_scores():
  cfg = manifest()
  sums = {
    "02/score_KJ": np.array([[9.0, 0, 0], [1, 1, 1]]), "02/score_U": np.arange(8.0),
    "04/score_KJ": np.array([[0.0, 0, 0], [5, 5, 5]]), "04/score_U": 3 * np.arange(8.0)[::-1],
    "06/score_KJ": np.array([[0.0, 1, 0], [1, 0, 0]]), "06/score_U": np.zeros(8),
  }
  # Scores are roots of the sums they are read off.
  scores = models.scored(cfg, **{name: np.square(score) for name, score in sums.items()})
  plan = select.plan(cfg, scores, {"K": {2: 1}, "U": {2: 3}, "J": {4: 1, 6: 2}})
  for index in (2, 4, 6):
    # What is left of block 4, by its J of 1, are 5 of the 8.7 of its group 1.
    np.testing.assert_array_equal(plan.array("keep_K", index), [0])
    np.testing.assert_array_equal(plan.array("keep_U", index), [0, 1, 2])
  assert [plan.small_config().blocks[i].J for i in (2, 4, 6)] == [3, 1, 2]
  both = select.plan(cfg, scores, {"K": {2: 1}})
  np.testing.assert_array_equal(both.array("keep_K", 2), [1])  # with all queries it is group 1
  # A block that goes, or whose attention does, has no say.
  for targets in ({"blocks": [0, 2, 6]}, {"attention_off": [4]}):
    alone = select.plan(cfg, scores, {"K": {2: 1}, "U": {2: 3}, **targets})
    np.testing.assert_array_equal(alone.array("keep_K", 2), [0])
    np.testing.assert_array_equal(alone.array("keep_U", 2), [5, 6, 7])
  with pytest.raises(ValueError, match="target K=1 of block 4: it reads the keys and values of"):
    select.plan(cfg, scores, {"K": {4: 1}})


def test_branches_go_where_the_model_loses_least_and_keys_never_before_their_readers():
  cfg = manifest()
  need = np.array([9.0, 0, 1, 0, 8, 0, 7, 0, 0, 5])  # the owner, block 2, is needed least
  scores = models.scored(cfg, score_attention_X=need, score_ssm_branch_X=need[::-1])

  def off(targets):
    blocks = select.plan(cfg, scores, targets).small_config().blocks
    sides = [block for block in blocks if block.symbol == "="]
    return ["attention" * (b.attention is None) + "ssm" * (b.ssm is None) for b in sides]

  assert off({"attention_off": 1}) == ["", "", "", "", "attention"]
  assert off({"attention_off": 2}) == ["", "", "", "attention", "attention"]
  assert off({"attention_off": 4}) == ["", *["attention"] * 4]
  # The branch that goes with the other's choice is another block's.
  assert off({"attention_off": 1, "ssm_off": 1}) == ["", "", "", "ssm", "attention"]
  assert off({"attention_off": 1, "ssm_off": [9]}) == ["", "", "", "attention", "ssm"]
  assert off({"attention_off": [6], "ssm_off": [0, 2]}) == ["ssm", "ssm", "", "attention", ""]
  silent = select.plan(cfg, scores, {"noop": [2, 4], "ssm_off": [0]}).small_config()
  assert [b.ssm and b.ssm.symbol for b in silent.blocks if b.symbol == "="] == [
    None, "C", "C", "M", "M"]
  # A block that is to be a no-op is one: another loses its SSM.
  assert off({"ssm_off": 1}) == ["", "", "", "ssm", ""]
  assert off({"noop": [6], "ssm_off": 1}) == ["", "", "ssm", "", ""]
  # What is said of the other branch of a block stands.
  assert off({"J": {0: 2}, "ssm_off": [0]}) == ["ssm", "", "", "", ""]


@pytest.mark.parametrize("targets, message", [
  ({"attention_off": 6}, "target attention_off=6: .* has 5 blocks with two branches"),
  ({"attention_off": True}, "target attention_off=True: None is no block"),
  ({"ssm_off": [1]}, "target ssm_off=\\[1\\]: 1 is no block of .* with two branches"),
  ({"ssm_off": [0, 0]}, "target ssm_off=\\[0, 0\\]: block 0 is named twice"),
  ({"ssm_off": [0], "attention_off": [0]}, "block 0 would lose both branches"),
  ({"ssm_off": [0], "noop": [0]}, "noop and ssm_off: block 0 has no SSM left"),
  ({"ssm_off": 5, "noop": [2]}, "ssm_off=5: only 4 blocks that stay can lose that branch"),
  ({"ssm_off": [0], "H": {0: 2}}, "H and ssm_off: block 0 has no branch left that could keep H=2"),
  ({"attention_off": [9], "J": {"9": 1}}, "J and attention_off: block 9 has no branch left"),
  ({"attention_off": [2]}, "block 4 reads the keys and values of block 2; its attention goes too"),
  ({"attention_off": 3, "ssm_off": 3}, "ssm_off=3: only 2 blocks that stay can lose that branch"),
  ({"blocks": [0, 4]}, "target blocks=\\[0, 4\\]: block 4 reads the keys and values of block 2"),
  ({"M": -1}, "target M=-1 of the model: not a whole number of at least 0"),
  ({"M": {0: 2}}, "target M={0: 2}: one size for the whole model"),
  ({"U": 9}, "target U=9 of block 0: larger than the parent's 8"),
  ({"R": 3}, "target R=3: no block of .* has this axis"),
])
def test_targets_that_parallel_blocks_cannot_meet_are_refused(targets, message):
  cfg = manifest()
  with pytest.raises(ValueError, match=message):
    select.plan(cfg, models.scored(cfg), targets)
  with pytest.raises(ValueError, match=message):
    select.sized(cfg, targets)


def test_targets_of_what_a_model_has_not_are_refused():
  cfg = models.hymba("mamba1", "=-", meta=0)
  for targets, message in (
    ({"M": 2}, "target M=2: the parent has no meta tokens"),
    ({"G": 1}, "no block of '=-' has this axis"), ({"P": 1}, "no block of '=-' has this axis"),
    ({"N": 0}, "target N=0 of block 0: not a whole number of at least 1"),
    ({"noop": 1}, "has 0 Mamba blocks"),
  ):
    with pytest.raises(ValueError, match=message):
      select.plan(cfg, models.scored(cfg), targets)


def drawn(cfg, rng):
  """Returns random targets that a plan of a Hymba can meet."""
  most = {"D": 16, "M": 9, "F": 24, "H": cfg.H, "N": 5, "K": 2, "J": 3, "U": 8}
  most |= {"R": 7} if "R" in cfg.blocks[0].axes else {"P": 6, "G": 2}
  targets = {name: int(rng.integers(1, size + 1)) for name, size in most.items()
             if rng.random() < 0.4}
  more = {"E": 2 * int(rng.integers(1, 6)), "blocks": int(rng.integers(7, 11)),
          "attention_off": int(rng.integers(0, 2)), "ssm_off": int(rng.integers(0, 2))}
  return targets | {name: size for name, size in more.items() if rng.random() < 0.5}


@pytest.mark.parametrize("ssm", KINDS)
def test_sizes_alone_give_the_config_that_a_plan_leaves_but_for_where_branches_meet(ssm):
  cfg, rng, fewer = manifest(ssm, rope=None), np.random.default_rng(3), 0
  scores = models.scored(cfg)
  for _ in range(25):
    targets = drawn(cfg, rng)
    small = select.sized(cfg, targets, **select.orders(cfg, scores, targets))
    planned = select.plan(cfg, scores, targets).small_config()
    blocks = []
    for mine, theirs in zip(small.blocks, planned.blocks, strict=True):
      if isinstance(mine, Parallel):
        assert mine.Y >= theirs.Y
        fewer += mine.Y > theirs.Y
        mine = dataclasses.replace(mine, fusion=theirs.fusion)
      blocks.append(mine)
    assert small.replace(blocks=tuple(blocks)) == planned, targets
  assert fewer


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_of_blocks_leaves_one_without_the_keys_it_reads(seed):
  rng, cfg = np.random.default_rng(seed), manifest()
  order = rng.permutation(10)
  for count in range(1, 11):
    floors = {"-": int(rng.integers(0, min(count, 3)))}
    left = stay.best(order, cfg.pattern, count, floors, stay.readers(cfg))
    assert len(left) == count and stay.torn(cfg, left) is None
    assert sum(cfg.pattern[i] == "-" for i in left) >= floors["-"]
  assert stay.led([4, 1, 6, 2], {4: 2, 6: 2}) == [2, 4, 1, 6]


def test_a_floor_of_readers_takes_what_they_read_too_and_a_window_goes_around_them():
  cfg = models.make(pattern="*=-", **models.SIDES["mamba2"], kv_groups=((0, 1),))
  scores = models.scored(cfg, score_X=np.array([1.0, 2, 9]))
  assert select.plan(cfg, scores, {"blocks": 2}).blocks == (0, 2)
  assert select.plan(cfg, scores, {"blocks": 2, "floors": {"=": 1}}).blocks == (0, 1)
  with pytest.raises(ValueError, match="1 of kind =, with blocks whose keys they read, are more"):
    select.plan(cfg, scores, {"blocks": 1, "floors": {"=": 1}})
  sums = {name: value for name, value in scores.sums.items() if name != "score_X"}
  windows = dataclasses.replace(scores, meta={**scores.meta, "window": 1}, sums={
    **sums, "score_window_X": np.float32([1, 2, 3])})
  assert select.plan(cfg, windows, {"blocks": 2}).blocks == (0, 2)


def test_a_plan_of_a_model_with_other_meta_tokens_is_refused():
  cfg, other = models.hymba(pattern="=-"), models.hymba(pattern="=-", meta=8)
  params = models.numbers(cfg)
  plan = Plan(other, tree_hash(params), {})
  with pytest.raises(ValueError, match="model of other sizes"):
    cutting.cut(cfg, params, plan)
