"""The laws of cutting: mask = cut, a tree that fits its config, nothing touched or shared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api, axes, bind, config
from hybridlm.config import GatedConv, Rope
from hybridlm.distill import loss
from hybridlm.prune import cut as cutting
from hybridlm.prune.trees import shared_buffers, tree_hash

ALL = {
  "H": 3, "G": 1, "P": 5, "N": 3, "F": 13, "D": 11, "J": 2, "K": 1, "E": 6, "V": 19,
  "X": (0, 2, 3, 4),
}
UNEQUAL = {
  0: {"H": 3, "N": 2}, 1: {"F": 5}, 2: {"G": 1, "P": 4, "N": 0}, 3: {"K": 1, "E": 8}, 4: {"F": 13},
}
# What a law is tried on: sizes, and the variants of `models` that make a difference to them.
CUTS = {
  "H": ({"H": 3}, ("untied",)),
  "P": ({"P": 4}, ("layernorm",)),
  "F": ({"F": 11}, ("layernorm", "swiglu")),
  "D": ({"D": 9}, ("tied", "layernorm")),
  "J": ({"J": 2}, ("untied",)),
  "K": ({"K": 1}, ("layernorm",)),
  "E": ({"E": 6}, ("untied", "layernorm", "rotary")),
  "N": ({"N": 3}, ("layernorm", "swiglu")),
  "G": ({"G": 1}, ("swiglu",)),
  "V": ({"V": 19}, ("tied", "padded")),
  "no state": ({"N": 0}, ("layernorm", "swiglu")),
  "blocks": ({"X": (0, 1, 3)}, ("untied",)),
  "unequal": (UNEQUAL, ("layernorm", "rotary")),
  "all": (ALL, tuple(models.VARIANTS)),
}
PAIRS = [(axis, variant) for axis, (_, variants) in CUTS.items() for variant in variants]
MORE = {"rotary": {"rope": Rope(base=50.0)}, "padded": {"vocabulary": 29, "rope": Rope(base=50.0)}}
# States of the default initialisation say little beside the skip.
LEAST = {"N": 1e-5, "no state": 1e-5}


def made(variant, **changes):
  """Returns a config of a variant, "rotary" and "padded" among them."""
  if variant in MORE:
    return models.make("untied", **{**MORE[variant], **changes})
  return models.make(variant, **changes)


@pytest.mark.parametrize("axis, variant", PAIRS)
def test_masked_parent_and_cut_child_give_the_same_logits(axis, variant):
  cfg = made(variant)
  for scale in (1.0, 10.0):
    params = models.params(cfg, scale)
    plan = models.plan(cfg, params, CUTS[axis][0])
    got, want = models.both(cfg, params, plan)
    assert models.error(got, want) < 1e-5
    if axis != "V":
      token_V = models.parent_ids(cfg, plan)
      token_BL = token_V[np.random.default_rng(1).integers(0, len(token_V), (2, 37))]
      whole = hybridlm.forward(cfg, params, token_BL)[..., token_V]
      assert models.error(whole, want) > LEAST.get(axis, 1e-3)


@pytest.mark.parametrize("variant", ["layernorm"])
def test_mask_equals_cut_with_segments_padded_vocabulary_and_rematerialised_blocks(variant):
  cfg = made(variant, vocabulary=29, remat="block", dt_limits=(0.01, 0.05))
  params = models.params(cfg, 10.0)
  segment_BL = models.batches(cfg, 1)[0]["segment_BL"]
  plan = models.plan(cfg, params, ALL)
  got, want = models.both(cfg, params, plan, segment_BL=segment_BL, shape=segment_BL.shape)
  assert models.error(got, want) < 1e-5


@functools.partial(jax.jit, static_argnums=0)
def masked_logits(cfg, params, stays, token_BL):
  masked, kept = cutting.mask_by(cfg, params, stays)
  return api.apply(cfg, masked, token_BL, kept=kept)[0]


def test_one_compiled_program_masks_and_runs_any_plan():
  cfg = made("layernorm")
  params, token_BL = models.params(cfg), models.tokens(cfg)
  plans = [models.plan(cfg, params, sizes) for sizes, _ in CUTS.values()]
  before = api.apply._cache_size()
  for plan in plans:
    masked, kept = hybridlm.mask(cfg, params, plan)
    want = hybridlm.forward(cfg, masked, token_BL, kept=kept)
    got = masked_logits(cfg, params, cutting.stays(plan), token_BL)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    real = np.isfinite(want)
    assert models.error(jnp.where(real, got, 0), jnp.where(real, want, 0)) < 1e-5
  assert api.apply._cache_size() <= before + 2  # from outside of a program, and from within one
  assert masked_logits._cache_size() == 1


def test_many_plans_are_masked_and_run_at_once():
  cfg = made("layernorm")
  params, token_BL = models.params(cfg), models.tokens(cfg)
  plans = [models.plan(cfg, params, CUTS[axis][0]) for axis in ("G", "no state", "blocks", "all")]
  stays = [cutting.stays(plan) for plan in plans]
  stacked = jax.tree.map(lambda *each: np.stack(each), *stays)
  got = jax.jit(jax.vmap(lambda one: masked_logits(cfg, params, one, token_BL)))(stacked)
  want = jnp.stack([masked_logits(cfg, params, one, token_BL) for one in stays])
  np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
  assert not np.isnan(got).any()
  assert models.error(*(jnp.where(jnp.isfinite(want), each, 0) for each in (got, want))) < 1e-5


def test_what_mask_did_not_return_is_refused():
  cfg = models.make()
  with pytest.raises(ValueError, match=r"kept has the keys \['counts'\]"):
    hybridlm.forward(cfg, models.params(cfg), models.tokens(cfg), kept={"counts": {}})


@pytest.mark.parametrize("axis", ["H", "P", "D", "no state"])
def test_without_the_kept_counts_the_masked_model_is_another_one(axis):
  cfg = models.make()
  params = models.params(cfg, 10.0)
  # Without a state no channel is missing: one that is dropped too makes the difference.
  plan = models.plan(cfg, params, {**CUTS[axis][0], **({"P": 4} if axis == "no state" else {})})
  masked, kept = hybridlm.mask(cfg, params, plan)
  token_BL = models.tokens(cfg)
  with_kept = hybridlm.forward(cfg, masked, token_BL, kept=kept)
  assert models.error(hybridlm.forward(cfg, masked, token_BL), with_kept) > 1e-3


@pytest.mark.parametrize("variant, sizes", [("layernorm", ALL), ("rotary", UNEQUAL)])
def test_in_bfloat16_compute_mask_and_cut_agree_within_its_rounding(variant, sizes):
  # At 5 times the default initialisation; larger weights round more.
  cfg = made(variant, dtype="bfloat16")
  params = models.params(cfg, 5.0)
  got, want = models.both(cfg, params, models.plan(cfg, params, sizes))
  assert models.error(got, want) < 0.03


@pytest.mark.parametrize("variant, pattern, sizes", [
  ("layernorm", "M*--", {**ALL, "X": (0, 1, 3)}),
  ("rotary", "MM*", {0: {"H": 3, "N": 2}, 1: {"G": 1, "P": 4, "N": 0}, 2: {"K": 1, "E": 8}}),
])
def test_gradients_of_the_masked_model_are_those_of_the_cut_one(variant, pattern, sizes):
  cfg = made(variant, pattern=pattern)
  params = models.params(cfg, 5.0)
  plan = models.plan(cfg, params, sizes)
  small_cfg, small = cutting.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)
  token_V, rng = models.parent_ids(cfg, plan), np.random.default_rng(2)
  token_BL, target_BL = (rng.integers(0, len(token_V), (2, 23)) for _ in range(2))

  def total(cfg, params, batch, kept=None):
    hidden_BLD, head_DV = bind.apply_hidden(cfg, params, {"token_BL": batch[0]}, kept)
    weight_BL = jnp.ones(token_BL.shape)
    stay_V = None if kept is None else kept["stay_V"]
    factors = {"kl": 0.0, "ce": 1.0, "stay_V": stay_V}
    return loss.sums(hidden_BLD, head_DV, batch[1], weight_BL, **factors)["loss"]

  ids = [jnp.asarray(each, jnp.int32) for each in (token_BL, target_BL)]
  theirs = [jnp.asarray(token_V[each], jnp.int32) for each in (token_BL, target_BL)]
  want = jax.grad(lambda p: total(small_cfg, p, ids))(small)
  got = jax.grad(lambda p: total(cfg, p, theirs, kept))(masked)
  cut_got = cutting.cut(cfg, got, dataclasses.replace(plan, source=tree_hash(got)))[1]
  for (path, one), (_, two) in zip(axes.leaves(cut_got), axes.leaves(want), strict=True):
    # Cut queries are s times the parent's: so is the parent's gradient, which cutting scales too.
    folder, name = path.split("/")[-2:]
    if name in cutting.QUERIES:
      new = int(folder)
      old = cfg.blocks[plan.blocks[new]]
      one = one / cutting.query_scale(name, old, small_cfg.blocks[new]) ** 2
    limit = 1e-4 * float(jnp.abs(two).max())
    np.testing.assert_allclose(one, two, rtol=0, atol=limit, err_msg=path)


@pytest.mark.parametrize("variant", ["swiglu", "layernorm"])
def test_the_cut_tree_is_the_small_configs_tree(variant):
  cfg = models.make(variant)
  params = models.params(cfg)
  small_cfg, small = cutting.cut(cfg, params, models.plan(cfg, params, {**ALL, 2: {"N": 0}}))
  config.check(small_cfg, small)
  fresh = jax.eval_shape(lambda: hybridlm.init(small_cfg))
  assert jax.tree.structure(small) == jax.tree.structure(fresh)
  assert (small_cfg.D, small_cfg.V, small_cfg.P, small_cfg.N, small_cfg.K) == (11, 19, 5, 3, 1)
  assert small_cfg.pattern == "MC*-"


def test_a_verified_cut_of_every_axis_says_how_close_it_is_and_misses_no_scale():
  cfg = made("rotary", vocabulary=29)
  params = models.params(cfg, 10.0)
  plan = models.plan(cfg, params, {**ALL, 2: {"N": 0}})
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  assert api.verify(cfg, params, plan, small_cfg, small) < 1e-5
  assert small_cfg.real_vocabulary == len(models.parent_ids(cfg, plan))
  folder = small["blocks"]["02"]
  unscaled = {**folder, "w_q_DKJE": folder["w_q_DKJE"] * np.sqrt(10 / 6).astype(np.float32)}
  wrong = {**small, "blocks": {**small["blocks"], "02": unscaled}}
  with pytest.raises(RuntimeError, match="logits differ"):
    api.verify(cfg, params, plan, small_cfg, wrong)


def test_heads_of_bfloat16_parameters_are_narrowed_and_verified_as_those_of_float32_are():
  cfg = models.make("layernorm", pattern="*-")
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models.params(cfg, 10.0))
  plan = models.plan(cfg, params, {"E": 6})
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  folder = {**small["blocks"]["00"]}
  assert folder["w_q_DKJE"].dtype == jnp.bfloat16
  folder["w_q_DKJE"] = folder["w_q_DKJE"] * jnp.bfloat16(1.01)
  wrong = {**small, "blocks": {**small["blocks"], "00": folder}}
  with pytest.raises(RuntimeError, match="logits differ"):
    api.verify(cfg, params, plan, small_cfg, wrong)


def test_a_block_without_a_state_is_cut_again_as_one_with_a_state_is():
  cfg = models.make("tied", pattern="C-")
  params = models.params(cfg, 10.0)
  plan = models.plan(cfg, params, {"G": 1, "H": 3, "P": 4, "D": 9})
  small_cfg, small = cutting.cut(cfg, params, plan)
  assert api.verify(cfg, params, plan, small_cfg, small) < 1e-5
  assert small_cfg.blocks[0] == GatedConv(G=1, H=3, P=4, W=4)


def test_cut_touches_neither_its_input_nor_its_buffers():
  cfg = models.make()
  params = jax.tree.map(jnp.copy, models.params(cfg))
  before = jax.tree.map(np.array, params)
  small = hybridlm.cut(cfg, params, models.plan(cfg, params, {"F": 11}))[1]
  assert shared_buffers(small, params) == []
  jax.tree.map(lambda leaf: leaf.delete(), small)
  jax.tree.map(np.testing.assert_array_equal, params, before)
  assert shared_buffers(params, params) == [path for path, _ in axes.leaves(params)]


def test_keeping_everything_is_the_same_model_in_other_buffers():
  cfg = made("rotary")
  params = models.params(cfg)
  for sizes in ({}, {"E": 10, "V": 31, "K": 2, "G": 2, "N": 5}):
    same_cfg, same = hybridlm.cut(cfg, params, models.plan(cfg, params, sizes))
    assert same_cfg == cfg and shared_buffers(same, params) == []
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_replaying_a_manifest_is_bit_identical(tmp_path):
  cfg = made("rotary")
  params = models.params(cfg)
  plan = models.plan(cfg, params, {**ALL, 2: {"N": 0}})
  plan.save(tmp_path / "plan.json")
  assert hybridlm.Plan.load(tmp_path / "plan.json") == plan
  one_cfg, one = hybridlm.cut(cfg, params, plan)
  two_cfg, two = hybridlm.cut(cfg, params, hybridlm.Plan.load(tmp_path / "plan.json"))
  assert one_cfg == two_cfg
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_keep_axis_follows_letters_not_sizes():
  w_DGHP = np.arange(2 * 2 * 2 * 2).reshape(2, 2, 2, 2)
  got = cutting.keep_axis(w_DGHP, "DGHP", np.array([[1], [0]]), "GH")
  np.testing.assert_array_equal(got, np.stack([w_DGHP[:, 0, 1:], w_DGHP[:, 1, :1]], 1))
  w_HPDG = np.transpose(w_DGHP, (2, 3, 0, 1))
  moved = cutting.keep_axis(w_HPDG, "HPDG", np.array([[1], [0]]), "GH")
  np.testing.assert_array_equal(np.transpose(moved, (2, 3, 0, 1)), got)
  stay_GH = np.array([[0, 1], [1, 0]])
  zeroed = cutting.zero_folder({"w_x_DGHP": w_DGHP + 1}, {"stay_GH": stay_GH})["w_x_DGHP"]
  np.testing.assert_array_equal(np.count_nonzero(zeroed, axis=(0, 3)), 4 * stay_GH)


@pytest.mark.parametrize("stem", "bc")
def test_a_state_whose_b_or_c_is_zero_can_be_dropped_and_nothing_changes(stem):
  cfg = models.make("layernorm", pattern="M-*M")
  tree = models.params(cfg, 5.0)
  folder = dict(tree["blocks"]["03"])
  gone_GN = np.array([[0, 0, 1, 0, 1], [1, 1, 0, 0, 0]], bool)
  for name in (f"w_{stem}_DGN", f"conv_{stem}_WGN", f"conv_bias_{stem}_GN"):
    folder[name] = jnp.where(gone_GN, 0, folder[name])
  params = {**tree, "blocks": {**tree["blocks"], "03": folder}}
  keep = {"03": {"keep_GN": [np.flatnonzero(~row) for row in gone_GN]}}
  small_cfg, small = cutting.cut(cfg, params, hybridlm.Plan(cfg, tree_hash(params), keep))
  assert [block.N for block in (small_cfg.blocks[0], small_cfg.blocks[3])] == [5, 3]
  token_BL = models.tokens(cfg)
  want = hybridlm.forward(cfg, params, token_BL)
  assert models.error(hybridlm.forward(small_cfg, small, token_BL), want) < 1e-6
  # A bias alone keeps a state alive.
  alive = {**folder, f"conv_bias_{stem}_GN": tree["blocks"]["03"][f"conv_bias_{stem}_GN"]}
  other = {**params, "blocks": {**params["blocks"], "03": alive}}
  assert models.error(hybridlm.forward(cfg, other, token_BL), want) > 1e-5


def test_a_plan_of_another_model_is_refused():
  cfg = models.make()
  params = models.params(cfg)
  plan = models.plan(cfg, params, {"F": 11})
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
  plan = models.plan(cfg, params, {"H": 3, "P": 5})
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
