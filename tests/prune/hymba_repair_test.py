"""Repair of parallel blocks: both branches' channels together, in a mean or in a sum."""

import functools

import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import bind
from hybridlm.prune import cut as cutting
from hybridlm.prune import repair as repairing
from hybridlm.prune.search import masked

KINDS = {
  "mean": models.hymba("mamba1", "=", global_layers=(), window=5, meta=3),
  "sum": models.hymba(
    "mamba2", "=", global_layers=(), window=5, meta=0, fusion="sum", bias=True, U=None),
}
SIZES = {"D": 11, "H": 3, "J": 2, "E": 6}


def side(cfg, params):
  """Returns a model as repair reads it."""
  apply, hidden = (functools.partial(f, cfg) for f in (bind.apply_taps, bind.apply_hidden))
  return repairing.Side(apply, hidden, params)


def lacking(plan, parent, small, params, batches):
  """Returns the squared distance to the parent's output on kept channels, and its own square."""
  keep_D, apart, whole = plan.array("keep_D"), 0.0, 0.0
  for batch in batches:
    mine = small.apply(params, batch, ("mix_BLD",))["00"]["mix_BLD"]
    want = np.asarray(
      parent.apply(parent.params, batch, ("mix_BLD",))["00"]["mix_BLD"], np.float64)[..., keep_D]
    real = np.asarray(batch["weight_BL"], np.float64)[..., None]
    apart += float((real * np.square(want - np.asarray(mine, np.float64))).sum())
    whole += float((real * np.square(want)).sum())
  return apart / whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_both_branches_lack_shrinks_to_what_one_fit_of_both_says(kind):
  cfg = KINDS[kind]
  params, batches = models.numbers(cfg), models.batches(cfg, 2, (3, 19))
  plan = models.plan(cfg, params, SIZES | ({"H": 30, "U": 5} if kind == "mean" else {}))
  small_cfg, cut = cutting.cut(cfg, params, plan)
  parent, small = side(cfg, params), side(small_cfg, cut)
  repaired, fits = repairing.repair(plan, parent, small, batches, ridge=1e-4)
  assert lacking(plan, parent, small, cut, batches) == pytest.approx(fits["00"].before, rel=1e-3)
  left = lacking(plan, parent, small, repaired, batches)
  assert fits["00"].after < fits["00"].before and left == pytest.approx(
    fits["00"].after, rel=1e-3, abs=1e-6)
  changed = {name for name, leaf in repaired["blocks"]["00"].items()
             if not np.array_equal(leaf, cut["blocks"]["00"][name])}
  assert changed == ({"w_out_YD"} if kind == "mean" else {"w_o_KJED", "w_out_GHPD", "b_o_D"})


@pytest.mark.slow
def test_candidates_without_branches_and_meta_tokens_have_the_losses_of_cut_models():
  cfg = models.hymba("mamba2", "==", global_layers=(), kv_groups=((0, 1),), window=5, meta=3)
  params, batches = models.numbers(cfg), models.batches(cfg, 1, (2, 13))
  scores = models.scored(cfg)
  targets = {"attention_off": [1], "M": 2, "D": 11, "H": {"0": 3}, "U": 5}
  before = masked.programs()
  scorer = masked.Scorer(cfg, bind.apply_hidden, params, batches)
  plans = [hybridlm.plan(cfg, scores, each) for each in ({}, {"ssm_off": [0]}, targets)]
  found = [scorer(plan) for plan in plans]
  assert masked.programs() - before == 1
  assert found[0]["kl"] == pytest.approx(0.0, abs=1e-5)
  assert found[1]["kl"] > 1e-3
  small_cfg, small = _cut(cfg, params, plans[-1])
  sums = hybridlm.distillation_loss(small_cfg, cfg, ce=1.0)(small, params, batches[0])
  for name in ("kl", "ce"):
    want = float(sums[name]) / float(sums["weight"])
    assert found[-1][name] == pytest.approx(want, rel=1e-5)


def _cut(cfg, params, plan):
  """Returns the cut of parameters that random scores have no hash of."""
  named = type(plan)(cfg, hybridlm.prune.trees.tree_hash(params), plan.keep)
  return cutting.cut(cfg, params, named)
