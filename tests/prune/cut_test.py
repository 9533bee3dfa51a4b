"""The laws of cutting: mask = cut, a tree that fits its config, nothing touched or shared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api, axes, config
from hybridlm.prune import cut as cutting
from hybridlm.prune.trees import shared_buffers, tree_hash

TARGETS = {
  "H": {"H": 3},
  "P": {"P": 4},
  "F": {"F": 11},
  "D": {"D": 9},
  "J": {"J": 2},
  "blocks": {"blocks": (0, 1, 3)},
  "mixed": {"F": {1: 5, 4: 13}},
  "all": {"H": 3, "P": 5, "F": 13, "D": 11, "J": 2, "blocks": (0, 2, 3, 4)},
}


def planned(cfg, params, targets, seed=0):
  scores = hybridlm.calibrate(cfg, params, [], estimator="random", seed=seed)
  return hybridlm.plan(cfg, scores, targets)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("variant", models.VARIANTS)
@pytest.mark.parametrize("axis", TARGETS)
def test_masked_parent_and_cut_child_give_the_same_logits(axis, variant, scale):
  cfg = models.make(variant)
  params = models.params(cfg, scale)
  plan = planned(cfg, params, TARGETS[axis])
  token_BL = models.tokens(cfg)
  small_cfg, small = cutting.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)
  want = hybridlm.forward(small_cfg, small, token_BL)
  assert models.error(hybridlm.forward(cfg, masked, token_BL, kept=kept), want) < 1e-5
  assert models.error(hybridlm.forward(cfg, params, token_BL), want) > 1e-3


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_mask_equals_cut_with_segments_padded_vocabulary_and_rematerialised_blocks(variant):
  cfg = models.make(variant, vocabulary=29, remat="block", dt_limits=(0.01, 0.05))
  params = models.params(cfg, 10.0)
  plan = planned(cfg, params, TARGETS["all"])
  batch = models.batches(cfg, 1)[0]
  small_cfg, small = cutting.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)
  arrays = (batch["token_BL"], batch["segment_BL"])
  want = hybridlm.forward(small_cfg, small, *arrays)[..., :29]
  got = hybridlm.forward(cfg, masked, *arrays, kept=kept)[..., :29]
  assert models.error(got, want) < 1e-5


def test_masks_of_any_plan_run_in_one_compiled_program():
  cfg = models.make(D=14)
  params = models.params(cfg)
  before = api.apply._cache_size()
  for targets in TARGETS.values():
    sizes = {**targets, **({"D": 9} if "D" in targets else {})}
    masked, kept = hybridlm.mask(cfg, params, planned(cfg, params, sizes))
    hybridlm.forward(cfg, masked, models.tokens(cfg), kept=kept)
  assert api.apply._cache_size() == before + 1


def test_counts_that_mask_did_not_return_are_refused():
  cfg = models.make()
  with pytest.raises(ValueError, match=r"kept has the keys \['counts'\]"):
    hybridlm.forward(cfg, models.params(cfg), models.tokens(cfg), kept={"counts": {}})


@pytest.mark.parametrize("axis", ["H", "P", "D"])
def test_without_the_kept_counts_the_masked_model_is_another_one(axis):
  cfg = models.make()
  params = models.params(cfg, 10.0)
  plan = planned(cfg, params, TARGETS[axis])
  masked, kept = hybridlm.mask(cfg, params, plan)
  token_BL = models.tokens(cfg)
  with_kept = hybridlm.forward(cfg, masked, token_BL, kept=kept)
  assert models.error(hybridlm.forward(cfg, masked, token_BL), with_kept) > 1e-3


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_in_bfloat16_compute_mask_and_cut_agree_within_its_rounding(variant):
  # At 5 times the default initialisation; larger weights round more.
  cfg = models.make(variant, dtype="bfloat16")
  params = models.params(cfg, 5.0)
  plan = planned(cfg, params, TARGETS["all"])
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)
  token_BL = models.tokens(cfg)
  want = hybridlm.forward(small_cfg, small, token_BL)
  assert models.error(hybridlm.forward(cfg, masked, token_BL, kept=kept), want) < 0.03


@pytest.mark.parametrize("variant", ["untied", "layernorm"])
def test_gradients_of_the_masked_model_are_those_of_the_cut_one(variant):
  cfg = models.make(variant)
  params, batch = models.params(cfg, 5.0), models.batches(cfg, 1)[0]
  plan = planned(cfg, params, TARGETS["all"])
  small_cfg, small = cutting.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)

  def total(cfg, params, kept=None):
    logits_BLV = api.apply(cfg, params, batch["token_BL"], batch["segment_BL"], kept)[0]
    return jnp.sum(jnp.sin(logits_BLV) * batch["weight_BL"][..., None])

  want = jax.grad(lambda p: total(small_cfg, p))(small)
  got = jax.grad(lambda p: total(cfg, p, kept))(masked)
  kept_got = cutting.cut(cfg, got, dataclasses.replace(plan, source=tree_hash(got)))[1]
  for (path, one), (_, two) in zip(axes.leaves(kept_got), axes.leaves(want), strict=True):
    scale = float(jnp.abs(two).max())
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * scale, err_msg=path)


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_the_cut_tree_is_the_small_configs_tree(variant):
  cfg = models.make(variant)
  params = models.params(cfg)
  small_cfg, small = hybridlm.cut(cfg, params, planned(cfg, params, TARGETS["all"]))
  config.check(small_cfg, small)
  assert jax.tree.structure(small) == jax.tree.structure(hybridlm.init(small_cfg))
  assert (small_cfg.D, small_cfg.H, small_cfg.P, small_cfg.J) == (11, 3, 5, 2)
  assert small_cfg.pattern == "MM*-"
  assert hybridlm.cost(small_cfg).parameters == sum(x.size for x in jax.tree.leaves(small))


def test_cut_touches_neither_its_input_nor_its_buffers():
  cfg = models.make()
  params = hybridlm.init(cfg, seed=5)
  before = jax.tree.map(np.array, params)
  small = hybridlm.cut(cfg, params, planned(cfg, params, {"F": 11}))[1]
  assert shared_buffers(small, params) == []
  jax.tree.map(lambda leaf: leaf.delete(), small)
  jax.tree.map(np.testing.assert_array_equal, params, before)
  assert shared_buffers(params, params) == [path for path, _ in axes.leaves(params)]


def test_keeping_everything_is_the_same_model_in_other_buffers():
  cfg = models.make()
  params = models.params(cfg)
  same_cfg, same = hybridlm.cut(cfg, params, planned(cfg, params, {}))
  assert same_cfg == cfg and shared_buffers(same, params) == []
  jax.tree.map(np.testing.assert_array_equal, params, same)


def test_replaying_a_manifest_is_bit_identical(tmp_path):
  cfg = models.make()
  params = models.params(cfg)
  plan = planned(cfg, params, TARGETS["all"])
  plan.save(tmp_path / "plan.json")
  one = hybridlm.cut(cfg, params, plan)[1]
  two = hybridlm.cut(cfg, params, hybridlm.Plan.load(tmp_path / "plan.json"))[1]
  assert hybridlm.Plan.load(tmp_path / "plan.json") == plan
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_keep_axis_follows_letters_not_sizes():
  w_DGHP = np.arange(2 * 2 * 2 * 2).reshape(2, 2, 2, 2)
  got = cutting.keep_axis(w_DGHP, "DGHP", np.array([[1], [0]]), "GH")
  np.testing.assert_array_equal(got, np.stack([w_DGHP[:, 0, 1:], w_DGHP[:, 1, :1]], 1))
  w_HPDG = np.transpose(w_DGHP, (2, 3, 0, 1))
  moved = cutting.keep_axis(w_HPDG, "HPDG", np.array([[1], [0]]), "GH")
  np.testing.assert_array_equal(np.transpose(moved, (2, 3, 0, 1)), got)
  zeroed = cutting.zero_axis(w_DGHP + 1, "DGHP", np.array([[1], [0]]), "GH")
  np.testing.assert_array_equal(np.count_nonzero(np.asarray(zeroed), axis=(0, 3)), [[0, 4], [4, 0]])


def test_a_plan_of_another_model_is_refused():
  cfg = models.make()
  params = models.params(cfg)
  plan = planned(cfg, params, {"F": 11})
  other = models.params(cfg, seed=1)
  with pytest.raises(ValueError, match=f"made for parameters {plan.source[:12]}"):
    hybridlm.cut(cfg, other, plan)
  with pytest.raises(ValueError, match="made for parameters"):
    hybridlm.mask(cfg, other, plan)
  wide = models.make(F=25)
  with pytest.raises(ValueError, match="model of other sizes"):
    hybridlm.cut(wide, models.params(wide), plan)


def test_verification_catches_a_wrong_cut():
  cfg = models.make()
  params = models.params(cfg)
  plan = planned(cfg, params, TARGETS["all"])
  small_cfg, small = cutting.cut(cfg, params, plan)
  assert api.verify(cfg, params, plan, small_cfg, small) < 1e-5

  def broken(change):
    folder = {**small["blocks"]["00"], **change}
    return {**small, "blocks": {**small["blocks"], "00": folder}}

  swapped = {"w_x_DGHP": small["blocks"]["00"]["w_x_DGHP"][:, ::-1]}
  with pytest.raises(RuntimeError, match="logits differ"):
    api.verify(cfg, params, plan, small_cfg, broken(swapped))
  poisoned = {"w_x_DGHP": small["blocks"]["00"]["w_x_DGHP"].at[0].set(jnp.nan)}
  with pytest.raises(RuntimeError, match="not finite"):
    api.verify(cfg, params, plan, small_cfg, broken(poisoned))
  longer = {"a_log_GH": jnp.ones((2, 4))}
  with pytest.raises(RuntimeError, match="elements, the config says"):
    api.verify(cfg, params, plan, small_cfg, broken(longer))
  lent = {"dt_bias_GH": params["blocks"]["00"]["dt_bias_GH"]}
  same = dataclasses.replace(plan, keep={})
  with pytest.raises(RuntimeError, match="blocks/00/dt_bias_GH"):
    full = cutting.cut(cfg, params, same)[1]
    full["blocks"]["00"] |= lent
    api.verify(cfg, params, same, cfg, full)
