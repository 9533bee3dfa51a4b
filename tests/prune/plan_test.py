"""Targets become plans, channels before heads; plans are data and refuse what cannot be."""

import json

import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm.config import Attention, GatedConv, Llama3Scaling, Mamba, Rope
from hybridlm.prune import select
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores


@pytest.fixture(name="made")
def _made():
  cfg = models.make()
  params = models.params(cfg)
  scores = hybridlm.calibrate(cfg, params, models.batches(cfg), depth="influence")
  return cfg, scores


def test_channels_are_ranked_first_and_heads_on_what_survives():
  # Channel 1 is the best overall; head 0 lives in channel 0 alone, so it must not survive.
  score_GHP = np.array([[[9.0, 1.0], [0.0, 8.0]], [[0.0, 7.0], [0.5, 1.0]]])
  keep_P, keep_GH = select.rank_heads(score_GHP, 1, 1)
  np.testing.assert_array_equal(keep_P, [1])
  np.testing.assert_array_equal(keep_GH, [[1], [0]])
  whole_P, whole_GH = select.rank_heads(score_GHP, 2, 1)
  np.testing.assert_array_equal(whole_P, [0, 1])
  np.testing.assert_array_equal(whole_GH, [[0], [0]])


def test_heads_are_chosen_within_their_group_even_where_one_group_scores_higher():
  score_GHP = np.ones((2, 4, 3)) * np.array([100.0, 1.0])[:, None, None]
  score_GHP[1, 2] = 50.0
  _, keep_GH = select.rank_heads(score_GHP, 3, 2)
  np.testing.assert_array_equal(keep_GH, [[0, 1], [0, 2]])


def test_the_best_entries_stay_in_their_order_and_ties_go_to_the_lower_index():
  np.testing.assert_array_equal(select.top(np.array([3.0, 9.0, 3.0, 5.0, 3.0]), 3), [0, 1, 3])


def test_a_plan_keeps_what_scores_best(made):
  cfg, scores = made
  plan = hybridlm.plan(cfg, scores, {"F": 7, "D": 5, "J": 2, "blocks": 3})
  best = np.sort(np.argsort(-scores.get("01/score_F"))[:7])
  np.testing.assert_array_equal(plan.array("keep_F", 1), best)
  np.testing.assert_array_equal(plan.array("keep_D"), np.sort(np.argsort(-scores.width())[:5]))
  np.testing.assert_array_equal(plan.blocks, np.sort(np.argsort(-scores.get("score_X"))[:3]))
  score_KJ = scores.get("03/score_KJ")
  for k, row in enumerate(plan.array("keep_KJ", 3)):
    np.testing.assert_array_equal(row, np.sort(np.argsort(-score_KJ[k])[:2]))


def test_sizes_may_differ_by_block_and_heads_count_all_groups(made):
  cfg, scores = made
  plan = hybridlm.plan(cfg, scores, {"F": {1: 3, 4: 9}, "heads": {"0": 6, "2": 4}})
  small = plan.small_config()
  assert [block.F for block in small.blocks if block.symbol == "-"] == [3, 9]
  assert [block.H for block in small.blocks if block.symbol == "M"] == [3, 2]


def test_what_is_not_named_stays_whole(made):
  cfg, scores = made
  assert hybridlm.plan(cfg, scores, {}).keep == {}
  assert hybridlm.plan(cfg, scores, {}).small_config() == cfg
  assert hybridlm.plan(cfg, scores, {"F": 24, "D": 16}).keep == {}


@pytest.mark.parametrize(
  "targets, message",
  [
    ({"F": 25}, "target F=25 of block 1: larger than the parent's 24"),
    ({"D": 17}, "target D=17 .* larger than the parent's 16"),
    ({"H": 0}, "target H=0 of block 0: not a whole number of at least 1"),
    ({"F": 2.5}, "target F=2.5"),
    ({"P": True}, "target P=True"),
    ({"heads": 5}, "target heads=5 of block 0: not a multiple of its 2 groups"),
    ({"heads": 6, "H": 3}, "H and heads both given: they are one size in two units"),
    ({"blocks": 3, "layers": 1}, "blocks and layers both given: they are one size in two units"),
    ({"layers": 1}, "target layers=1: 'M-M\\*-' is not made of layers"),
    ({"Z": 3}, "target 'Z' is not one of"),
    ({"F": {0: 3}}, "target F: block 0 of 'M-M\\*-' has no such axis"),
    ({"D": {3: 9}}, "one size for the whole model"),
    ({"blocks": (0.6, 1)}, "not distinct indices"),
    ({"blocks": 6}, "target blocks=6: the parent has 5"),
    ({"blocks": 0}, "target blocks=0"),
    ({"blocks": (0, 5)}, "not distinct indices"),
    ({"blocks": (1, 1)}, "not distinct indices"),
  ],
)
def test_targets_that_cannot_be_met_are_refused(made, targets, message):
  with pytest.raises(ValueError, match=message):
    hybridlm.plan(*made, targets)


def layered(pattern):
  """Returns a model and depth scores whose sums by layer order layers as no single block does."""
  cfg = models.make(pattern=pattern)
  score_X = np.array([5, 5, 0, 8, 6, 1, 1, 1], np.float32)[: len(pattern)]
  return cfg, Scores({"score_X": score_X}, 1.0, {"parameters": "x"})


def test_layers_stay_whole_and_the_best_sums_of_two_blocks_win():
  cfg, scores = layered("M-*-*-M-")  # sums 10, 8, 7, 2
  assert hybridlm.plan(cfg, scores, {"layers": 1}).blocks == (0, 1)
  plan = hybridlm.plan(cfg, scores, {"layers": 2})
  assert plan.blocks == (0, 1, 2, 3) and plan.small_config().pattern == "M-*-"
  assert hybridlm.plan(cfg, scores, {"layers": 3}).blocks == (0, 1, 2, 3, 4, 5)
  # By blocks the same scores would tear layers apart.
  assert hybridlm.plan(cfg, scores, {"blocks": 4}).blocks == (0, 1, 3, 4)


@pytest.mark.parametrize("pattern, layers, message", [
  ("*-*", 1, "not made of layers"), ("-*-*", 1, "not made of layers"),
  ("**--", 1, "not made of layers"), ("--", 1, "not made of layers"),
  ("*-*-", 0, "the parent has 2, keep 1 to 2"), ("*-*-", 3, "the parent has 2"),
  ("*-*-", True, "the parent has 2"), ("*-*-", 1.0, "the parent has 2"),
])
def test_layers_that_cannot_be_kept_are_refused(pattern, layers, message):
  with pytest.raises(ValueError, match=message):
    hybridlm.plan(*layered(pattern), {"layers": layers})


def test_a_target_without_a_block_of_its_kind_is_refused():
  cfg = models.make(pattern="M")
  scores = hybridlm.calibrate(cfg, models.params(cfg), [], estimator="magnitude")
  with pytest.raises(ValueError, match="no block of 'M' has this axis"):
    hybridlm.plan(cfg, scores, {"J": 1})


@pytest.mark.parametrize(
  "letters, targets, missing", [("F", {"D": 5}, "score_D"), ("D", {"H": 2}, "00/score_GHP")]
)
def test_scores_that_miss_an_axis_are_named(letters, targets, missing):
  cfg = models.make()
  scores = hybridlm.calibrate(cfg, models.params(cfg), models.batches(cfg), axes=letters)
  with pytest.raises(ValueError, match=f"scores miss '{missing}'"):
    hybridlm.plan(cfg, scores, targets)
  with pytest.raises(ValueError, match="scores miss 'score_X'"):
    hybridlm.plan(cfg, scores, {"blocks": 3})


@pytest.mark.parametrize(
  "keep, message",
  [
    ({"keep_D": [0, 16]}, "keep_D keeps index 16 of 16"),
    ({"keep_D": [-1, 2]}, "keep_D keeps index -1"),
    ({"keep_D": [3, 2]}, "keep_D is not strictly ascending"),
    ({"keep_D": [2, 2]}, "keep_D is not strictly ascending"),
    ({"keep_D": []}, "keep_D keeps nothing"),
    ({"00": {"keep_GH": [[0, 1], [2]]}}, "every group keeps as many"),
    ({"00": {"keep_GH": [[0, 1]]}}, "needs one row for each of 2"),
    ({"00": {"keep_F": [0]}}, "block 00 \\(M\\) has no axis for 'keep_F'"),
    ({"05": {"keep_F": [0]}}, "'05' is neither a block"),
    ({"01": {"keep_F": 3}}, "block 01: keep_F is not a list"),
    ({"keep_D": None}, "keep_D is not a list"),
    ({"keep_D": [True, 2]}, "keep_D is not a list"),
    ({"00": {"keep_GH": [[0, None], [1, 2]]}}, "keep_GH row 0 is not a list"),
    ({"00": {"keep_GN": [[0, 1], []]}}, "block 00: keep_GN row 1 keeps nothing"),
    ({"00": {"keep_GH": [[], []]}}, "block 00: keep_GH row 0 keeps nothing"),
    ({"00": {"keep_GN": [[0], [1], [2]]}}, "needs one row for each of 2"),
    ({"00": {"keep_G": [2]}}, "keep_G keeps index 2 of 2"),
    ({"00": {"keep_G": [1], "keep_GH": [[0, 1]]}}, "keep_GH needs one row for each of 2"),
    ({"01": {"keep_GN": [[], []]}}, "block 01 \\(-\\) has no axis for 'keep_GN'"),
    ({"03": {"keep_K": []}}, "block 03: keep_K keeps nothing"),
    ({"03": {"keep_E": [0, 10]}}, "keep_E keeps index 10 of 10"),
    ({"03": {"keep_KE": [[0], [1]]}}, "has no axis for 'keep_KE'"),
    ({"keep_V": [3, 31]}, "keep_V keeps index 31 of 31"),
    ({"keep_V": [30]}, "keep_V keeps padding alone, rows from 30 on"),
    ([1], "keep must be a table, not"),
    (5, "keep must be a table, not"),
  ],
)
def test_a_manifest_that_does_not_fit_its_parent_is_refused(tmp_path, keep, message):
  good = Plan(models.make(vocabulary=30), "abc", {})
  good.save(tmp_path / "plan.json")
  plain = json.loads((tmp_path / "plan.json").read_text())
  (tmp_path / "plan.json").write_text(json.dumps({**plain, "keep": keep}))
  with pytest.raises(ValueError, match=message):
    Plan.load(tmp_path / "plan.json")


def test_a_file_that_is_no_plan_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    Plan.load(tmp_path / "missing.json")
  for text, message in [("{", "not JSON"), ("{}", "format"), ("[]", "format")]:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      Plan.load(tmp_path / "plan.json")


def test_rows_are_the_parents_groups_and_sizes_what_is_left_of_them():
  cfg = models.make()
  keep = {
    "keep_V": [4, 5, 30], "00": {"keep_GH": [[0, 1, 3], [1, 2, 3]], "keep_G": [1]},
    "02": {"keep_GN": [[], []], "keep_P": [0, 5]},
    "03": {"keep_KJ": [[0], [2]], "keep_K": [0], "keep_E": [1, 2, 7]},
  }
  small = Plan(cfg, "abc", keep).small_config()
  assert small.blocks[0] == Mamba(G=1, H=3, P=6, N=5, W=4)
  assert small.blocks[2] == GatedConv(G=2, H=4, P=2, W=4)
  assert small.blocks[3] == Attention(K=1, J=1, E=3)
  assert (small.V, small.vocabulary, small.pattern) == (3, None, "M-C*-")
  padded = Plan(cfg.replace(vocabulary=29), "abc", {"keep_V": [4, 5, 30]}).small_config()
  assert (padded.V, padded.vocabulary) == (3, 2)
  unbiased = Plan(models.make(conv_bias=False), "abc", {"00": {"keep_GN": [[], []]}})
  assert unbiased.small_config().blocks[0].conv_bias is False


def test_pairs_of_rotary_channels_stay_together_with_their_frequencies():
  cfg = models.make(rope=Rope(base=100.0, rotary=6))

  def left(*keep_E):
    return Plan(cfg, "abc", {"03": {"keep_E": keep_E}}).small_config().blocks[3]

  half = left(0, 2, 3, 5, 9)
  assert (half.E, half.rope.rotary) == (5, 4)
  assert half.rope.frequencies(5) == tuple(np.array(cfg.blocks[3].rope.frequencies(10))[[0, 2]])
  assert left(0, 1, 2, 3, 4, 5, 7).rope == Rope(base=100.0, rotary=6)  # no pair is gone
  assert left(7, 8).rope is None
  # A second cut starts from what the first kept.
  again = Plan(cfg.replace(blocks=(half,)), "abc", {"00": {"keep_E": [1, 3]}}).small_config()
  assert again.blocks[0].rope.frequency == half.rope.frequency[1:]
  with pytest.raises(ValueError, match="block 03: keep_E keeps channel 4 without 1: under rotary"):
    left(0, 3, 4, 6)


def test_kept_frequencies_that_are_none_are_refused():
  for fields, message in (
    ({"rotary": 4, "frequency": (1.0,)}, "1 pairs, rotary=4 is not twice as many"),
    ({"frequency": (1.0,)}, "1 pairs, rotary=None"),
    ({"rotary": 2, "frequency": (0.0,)}, "must be a tuple of positive numbers"),
    ({"rotary": 2, "frequency": (1.0,), "scaling": Llama3Scaling(8.0, 1.0, 4.0, 64)}, "are final"),
  ):
    with pytest.raises(ValueError, match=message):
      Rope(**fields)


def test_a_manifest_written_before_there_were_more_axes_is_read(tmp_path):
  cfg = models.make(rope=Rope(base=100.0, rotary=4))
  plan = Plan(cfg, "abc", {"keep_D": [0, 3], "00": {"keep_GH": [[0], [1]], "keep_P": [2]}})
  plan.save(tmp_path / "plan.json")
  plain = json.loads((tmp_path / "plan.json").read_text())
  assert plain["format"] == "hybridlm-plan-1"
  assert plain["config"]["blocks"][3]["rope"].pop("frequency") is None
  (tmp_path / "old.json").write_text(json.dumps(plain))
  assert Plan.load(tmp_path / "old.json") == plan
