"""Every axis is chosen by its scores, inner choices first; sizes alone say what a plan leaves."""

import dataclasses

import numpy as np
import pytest

from cases import models
from hybridlm.config import Attention, GatedConv, Mamba, Rope, block_name
from hybridlm.prune import select, sizes, stay
from hybridlm.prune.scores import Scores

PATTERN = "M-M*-M-*-"  # 9 blocks: Mamba 0 2 5, attention 3 7, MLP 1 4 6 8
scored = models.scored


def model(rope=None, **changes):
  cfg = models.make(pattern=PATTERN, **changes)
  turned = [dataclasses.replace(b, rope=rope) if isinstance(b, Attention) else b
            for b in cfg.blocks]
  return cfg.replace(blocks=tuple(turned))


def kept(cfg, targets, scores=None, index=None):
  """Returns the index arrays of a plan, those of one block or all."""
  plan = select.plan(cfg, scores or scored(cfg), targets)
  return plan.keep if index is None else {
    name: np.asarray(rows) for name, rows in plan.keep.get(block_name(index), {}).items()}


def test_groups_are_ranked_on_the_heads_and_channels_that_survive():
  cfg = models.make(pattern="M", G=2, H=2, P=2)
  # Channel 0 goes. Group 0 is best by all of it, group 1 on what is left of channel 1 and 1 head.
  score_GHP = np.array([[[9.0, 3.0], [9.0, 3.0]], [[0.0, 4.0], [0.0, 20.0]]])
  found = kept(cfg, {"G": 1, "H": 1, "P": 1}, scored(cfg, **{"00/score_GHP": score_GHP}), 0)
  np.testing.assert_array_equal(found["keep_P"], [1])
  np.testing.assert_array_equal(found["keep_GH"], [[0], [1]])
  np.testing.assert_array_equal(found["keep_G"], [1])
  # Heads are what decides: with both, group 0 has the larger sum of squares.
  score_GHP = np.array([[[5.0], [5.0]], [[6.0], [0.0]]])
  cfg = models.make(pattern="M", G=2, H=2, P=1)
  scores = scored(cfg, **{"00/score_GHP": score_GHP})
  np.testing.assert_array_equal(kept(cfg, {"G": 1}, scores, 0)["keep_G"], [0])
  np.testing.assert_array_equal(kept(cfg, {"G": 1, "H": 1}, scores, 0)["keep_G"], [1])


def test_kv_groups_are_ranked_on_the_queries_that_survive():
  cfg = models.make(pattern="*", K=2, J=2, E=10)
  scores = scored(cfg, **{"00/score_KJ": np.array([[5.0, 5.0], [0.0, 6.0]])})
  np.testing.assert_array_equal(kept(cfg, {"K": 1}, scores, 0)["keep_K"], [0])
  found = kept(cfg, {"K": 1, "J": 1}, scores, 0)
  np.testing.assert_array_equal(found["keep_KJ"], [[0], [1]])
  np.testing.assert_array_equal(found["keep_K"], [1])


def test_every_group_keeps_its_own_best_states_and_as_many_as_the_others():
  cfg = models.make(pattern="M", G=2, N=3)
  scores = scored(cfg, **{"00/score_GN": np.array([[1.0, 3.0, 2.0], [7.0, 6.0, 8.0]])})
  np.testing.assert_array_equal(kept(cfg, {"N": 2}, scores, 0)["keep_GN"], [[1, 2], [0, 2]])


@pytest.mark.parametrize("rope, width, pairs", [
  (Rope(), 6, 3), (Rope(), 2, 1),
  (Rope(rotary=4), 6, 1),  # 2 pairs of 10 channels: 1.2 pairs of 6
  (Rope(rotary=4), 8, 2),  # 1.6 pairs of 8
  (Rope(rotary=2), 2, 1),  # a pair at least
  (Rope(rotary=8), 6, 2),  # 2.4 pairs of 6, and both that do not turn
  (Rope(rotary=8), 4, 2),
])
def test_head_width_goes_by_rotary_pairs_in_the_parents_share(rope, width, pairs):
  cfg = model(rope)
  half = sizes.pairs(cfg.blocks[3])
  score_E = np.array([3.0, 9.0, 1.0, 8.0, 2.0, 3.0, 9.0, 1.0, 8.0, 2.0], np.float32)
  score_E[half : 2 * half] = score_E[:half]
  scores = scored(cfg, **{"03/score_E": score_E})
  keep_E = kept(cfg, {"E": {3: width}}, scores, 3)["keep_E"]
  turned = keep_E[keep_E < half]
  assert len(keep_E) == width and len(turned) == pairs
  np.testing.assert_array_equal(turned, select.top(score_E[:half], pairs))
  np.testing.assert_array_equal(keep_E[(keep_E >= half) & (keep_E < 2 * half)], turned + half)
  np.testing.assert_array_equal(
    keep_E[keep_E >= 2 * half], 2 * half + select.top(score_E[2 * half :], width - 2 * pairs))


def test_head_width_without_positions_keeps_the_best_channels_whatever_their_number():
  cfg = model()
  score_E = np.arange(10.0)[::-1]
  keep = kept(cfg, {"E": 3}, scored(cfg, **{"03/score_E": score_E}), 3)
  np.testing.assert_array_equal(keep["keep_E"], [0, 1, 2])
  assert select.sized(cfg, {"E": 1}).blocks[3].E == 1


def test_a_no_op_is_named_counted_or_a_state_of_zero():
  cfg = model()
  named = select.plan(cfg, scored(cfg), {"noop": [0, 5]}).small_config()
  assert named.pattern == "C-M*-C-*-" and isinstance(named.blocks[0], GatedConv)
  assert select.plan(cfg, scored(cfg), {"N": {0: 0, 5: 0}}).small_config() == named
  need = np.array([5, 0, 1, 0, 0, 9, 0, 0, 0], float)
  scores = scored(cfg, score_ssm_X=need)
  assert select.plan(cfg, scores, {"noop": 1}).small_config().pattern == "M-C*-M-*-"
  # Only among the blocks that stay.
  left = select.plan(cfg, scores, {"noop": 1, "blocks": [0, 1, 5, 6]})
  assert left.small_config().pattern == "C-M-"
  mixed = select.plan(cfg, scores, {"noop": [0], "N": 3}).small_config()
  assert [getattr(b, "N", None) for b in mixed.blocks if b.symbol in "MC"] == [None, 3, 3]


def test_floors_keep_the_best_of_a_kind_and_the_rest_goes_by_score():
  cfg = model()
  score_X = np.array([9, 8, 7, 1, 6, 5, 4, 2, 3], float)  # attention, 3 and 7, is worst
  scores = scored(cfg, score_X=score_X)
  assert select.plan(cfg, scores, {"blocks": 4}).blocks == (0, 1, 2, 4)
  assert select.plan(cfg, scores, {"blocks": 4, "floors": {"*": 1}}).blocks == (0, 1, 2, 7)
  assert select.plan(cfg, scores, {"blocks": 4, "floors": {"*": 2, "M": 1}}).blocks == (0, 1, 3, 7)


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_under_floors_has_a_larger_sum(seed):
  rng = np.random.default_rng(seed)
  kinds = "".join(rng.choice(list("M-*"), 7))
  score, count = rng.uniform(size=7), int(rng.integers(1, 7))
  floors = {}
  for kind in set(kinds):
    left = count - sum(floors.values())
    floors[kind] = int(rng.integers(0, min(left, kinds.count(kind)) + 1))
  found = stay.best(np.argsort(-score), kinds, count, floors)
  every = [
    chosen for bits in range(2**7)
    if len(chosen := [i for i in range(7) if bits >> i & 1]) == count
    and all("".join(kinds[i] for i in chosen).count(k) >= n for k, n in floors.items())
  ]
  assert found in every
  assert score[found].sum() == pytest.approx(max(score[chosen].sum() for chosen in every))


def test_layers_respect_floors_of_their_mixers():
  cfg = models.make(pattern="M-*-M-*-")
  scores = scored(cfg, score_X=np.array([9, 9, 1, 1, 8, 8, 2, 2], float))
  assert select.plan(cfg, scores, {"layers": 2}).blocks == (0, 1, 4, 5)
  assert select.plan(cfg, scores, {"layers": 2, "floors": {"*": 1}}).blocks == (0, 1, 6, 7)
  # Every layer has an MLP: a floor of MLPs takes no layer from a floor of mixers.
  both = {"layers": 2, "floors": {"*": 1, "-": 2}}
  assert select.plan(cfg, scores, both).blocks == (0, 1, 6, 7)
  with pytest.raises(ValueError, match="3 MLPs are more than the 2 layers that stay"):
    select.plan(cfg, scores, {"layers": 2, "floors": {"-": 3}})


def windows(cfg, score, length, **sums):
  """Returns scores of windows of so many blocks."""
  found = scored(cfg)
  depth = {} if "score_X" in sums else {"score_X"}
  held = {path: value for path, value in found.sums.items() if path not in depth}
  return Scores(held | {"score_window_X": np.asarray(score, np.float32)}, 1.0,
                {"parameters": "x", "window": length, "readings": {"score_window_X": "mean"}})


def test_a_window_goes_whole_where_the_model_loses_least():
  cfg = model()
  scores = windows(cfg, [5, 4, 1, 3, 9, 9, 9], 3)
  assert select.plan(cfg, scores, {"blocks": 6}).blocks == (0, 1, 5, 6, 7, 8)
  # Blocks 2, 3, 4 hold an attention block: the next best window that does not is 4, 5, 6.
  targets = {"blocks": 6, "floors": {"*": 2}}
  found = select.plan(cfg, windows(cfg, [5, 4, 1, 3, 4, 9, 9], 3), targets)
  assert found.blocks == (0, 1, 2, 3, 7, 8)
  with pytest.raises(ValueError, match="windows of 3 blocks, so 6 of 9 can stay"):
    select.plan(cfg, scores, {"blocks": 5})
  with pytest.raises(ValueError, match="every window of 7 blocks breaks the floors"):
    select.plan(cfg, windows(cfg, [1, 2, 3], 7), {"blocks": 2, "floors": {"M": 2}})
  small = select.sized(cfg, {"blocks": 6}, **select.orders(cfg, scores, {"blocks": 6}))
  assert small.pattern == "M-M-*-"


def drawn(cfg, rng):
  """Returns random targets that a plan can meet, and what axes they touch."""
  def size(low, high):
    return int(rng.integers(low, high + 1))

  targets, mixers = {}, [i for i, b in enumerate(cfg.blocks) if isinstance(b, Mamba)]
  ranges = {"D": (1, 16), "P": (1, 6), "N": (1, 5), "J": (1, 3), "K": (1, 2), "G": (1, 2)}
  for name, (low, high) in ranges.items():
    if rng.random() < 0.5:
      targets[name] = size(low, high)
  if rng.random() < 0.5:
    targets["F"] = {i: size(1, 24) for i, b in enumerate(cfg.blocks)
                    if b.symbol == "-" and rng.random() < 0.5}
  if rng.random() < 0.5:
    targets["E"] = {"3": 2 * size(1, 5)}
  if rng.random() < 0.6:
    groups = targets.get("G", 2)
    targets |= {"heads": groups * size(1, 4)} if rng.random() < 0.5 else {"H": size(1, 4)}
  if rng.random() < 0.6:
    count = size(4, 9)
    listed = sorted(rng.choice(9, count, replace=False).tolist())
    targets |= {"blocks": listed} if rng.random() < 0.5 else {"blocks": count, "floors": {"*": 1}}
  if rng.random() < 0.4 and not isinstance(targets.get("blocks"), list):
    targets["noop"] = mixers[: size(0, 2)] if rng.random() < 0.5 else 0
  return targets


def unturned(cfg):
  """Returns a config without the frequencies of its rotary pairs, which sizes cannot tell."""
  def change(block):
    if getattr(block, "rope", None) is None:
      return block
    return dataclasses.replace(block, rope=Rope(rotary=block.rope.rotary))
  return cfg.replace(blocks=tuple(change(block) for block in cfg.blocks))


@pytest.mark.parametrize("rope", [None, Rope(), Rope(rotary=4)])
def test_sizes_alone_give_the_config_that_a_plan_leaves(rope):
  cfg, rng = model(rope), np.random.default_rng(3)
  scores, seen = scored(cfg), set()
  for _ in range(60):
    targets = drawn(cfg, rng)
    seen |= set(targets)
    small = select.sized(cfg, targets, **select.orders(cfg, scores, targets))
    planned = select.plan(cfg, scores, targets).small_config()
    assert unturned(small) == unturned(planned), targets
    assert not rope or [sizes.pairs(b) for b in small.blocks if b.symbol == "*"] == [
      sizes.pairs(b) for b in planned.blocks if b.symbol == "*"]
  assert seen >= set(sizes.KNOWN) - {"layers", *sizes.OFF, *"MUR"}


def test_sizes_alone_follow_the_ranking_of_no_ops_and_layers():
  cfg = models.make(pattern="M-*-M-M-")
  scores = scored(cfg, 5)
  for targets in ({"noop": 2}, {"layers": 3}, {"layers": 2, "floors": {"*": 1}}, {"blocks": 5},
                  {"blocks": 6, "noop": 1}):
    small = select.sized(cfg, targets, **select.orders(cfg, scores, targets))
    assert small == select.plan(cfg, scores, targets).small_config(), targets


def test_without_a_ranking_blocks_go_from_the_middle_an_equal_share_of_each_kind():
  cfg = models.make(pattern="M-M-M-M-*-*-")
  left = select.sized(cfg, {"blocks": 6}).pattern
  assert (left.count("M"), left.count("-"), left.count("*")) == (2, 3, 1)
  assert left.startswith("M-") and left.endswith("*-")
  assert select.sized(cfg, {"blocks": 6, "floors": {"*": 2}}).pattern.count("*") == 2
  kinds = "M" * 10 + "*" * 5
  for count in range(1, 16):
    chosen = stay.best(stay.from_middle(kinds), kinds, count, {})
    assert abs(sum(i < 10 for i in chosen) - 2 * count / 3) < 1.01
  assert stay.best(stay.from_middle("MMMMM"), "MMMMM", 2, {}) == [0, 4]


def test_a_ranking_names_every_block_once():
  with pytest.raises(ValueError, match="order of 9 blocks: not each of them once"):
    select.sized(model(), {"blocks": 2}, order_X=[0, 0, *range(2, 9)])


def test_without_a_ranking_the_middle_loses_its_state():
  cfg = models.make(pattern="MMMMM")
  assert select.sized(cfg, {"noop": 2}).pattern == "MMCCM"


def test_equal_blocks_of_a_candidate_are_one_object():
  small = select.sized(model(), {"F": 7, "H": 2, "D": 8})
  assert len({id(block) for block in small.blocks}) == 3


@pytest.mark.parametrize("targets, message", [
  ({"K": 3}, "target K=3 of block 3: larger than the parent's 2"),
  ({"N": -1}, "target N=-1 of block 0: not a whole number of at least 0"),
  ({"E": 5}, "target E=5 of block 3: not a multiple of 2: under rotary positions"),
  ({"E": 0}, "target E=0 of block 3: not a whole number of at least 2"),
  ({"G": 1, "heads": 6}, "heads=6 of block 0: larger than what the parent's 1 groups .* have: 4"),
  ({"G": 2, "heads": 5}, "heads=5 of block 0: not a multiple of its 2 groups"),
  ({"noop": 4}, "target noop=4: 'M-M\\*-M-\\*-' has 3 Mamba blocks"),
  ({"noop": [1]}, "target noop=\\[1\\]: 1 is no Mamba block"),
  ({"noop": [0, 0]}, "a block is named twice"),
  ({"noop": "all"}, "target noop='all'"),
  ({"noop": [0], "N": {0: 3}}, "target noop: block 0 keeps N=3 too"),
  ({"noop": 1, "N": {0: 0}}, "noop=1 and N=0 both given"),
  ({"noop": 2, "blocks": [0, 1, 3]}, "target noop=2: only 1 Mamba blocks stay"),
  ({"floors": {"*": 3}}, "target floors: \\*=3, the parent has 2 such blocks"),
  ({"floors": {"x": 1}}, "target floors: 'x' is not one of"),
  ({"floors": 2}, "target floors=2: not a table"),
  ({"blocks": 3, "floors": {"*": 2, "M": 2}}, "2 of kind \\* \\+ 2 of kind M are more than the 3"),
  ({"blocks": [0, 1], "floors": {"*": 1}}, "floors: 0 blocks of kind \\* stay, fewer than 1"),
  ({"F": {"1": 3, 1: 4}}, "target F: block 1 is named twice"),
  ({"F": {1: True}}, "target F=True of block 1"),
  ({"H": 2, "heads": 4}, "targets H and heads both given"),
  ({"blocks": [-1, 0]}, "not distinct indices of the 9 blocks"),
  ({"blocks": 10}, "target blocks=10: the parent has 9, keep 1 to 9"),
])
def test_targets_that_cannot_be_met_name_target_value_block_and_rule(targets, message):
  cfg = model(Rope())
  with pytest.raises(ValueError, match=message):
    select.plan(cfg, scored(cfg), targets)
  with pytest.raises(ValueError, match=message):
    select.sized(cfg, targets)


@pytest.mark.parametrize("targets, missing", [
  ({"N": 2}, "00/score_GN"), ({"G": 1}, "00/score_GHP"), ({"K": 1}, "03/score_KJ"),
  ({"E": 4}, "03/score_E"), ({"noop": 1}, "score_ssm_X"), ({"blocks": 4}, "score_X"),
])
def test_scores_that_miss_an_axis_are_named(targets, missing):
  cfg = model()
  with pytest.raises(ValueError, match=f"scores miss '{missing}'"):
    select.plan(cfg, Scores({}, 1.0, {"parameters": "x"}), targets)
