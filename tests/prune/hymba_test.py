"""Mask = cut on every axis of parallel blocks, Mamba-1, shared keys and meta tokens."""

import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

SIZES = {
  "K": 1, "J": 2, "U": 5, "H": 3, "E": 6, "N": 3, "P": 4, "M": 4, "D": 11, "V": 19, "F": 9, "R": 5,
}
LONE = {"kv_groups": (), "global_layers": ()}
# Keys of the second block are the first's. A sum as of Falcon-H1, with biases, and keys as wide
# as values; its second block loses the attention that has them.
MIXED = {
  "mean of Mamba-2 heads": (
    "mamba2", {"pattern": "==-", **LONE, "kv_groups": ((0, 1),)}, {**SIZES, 1: {"G": 1, "N": 0}}),
  "mean of Mamba-1 channels": ("mamba1", {"pattern": "=S-", **LONE}, {**SIZES, "H": 29}),
  "sum": (
    "mamba2", {"pattern": "==", **LONE, "fusion": "sum", "gate": "before", "bias": True, "U": None,
               "meta": 0},
    {"J": 2, "E": 6, "H": 3, "P": 4, "G": 1, "D": 11, 1: {"K": 0}}),
}
ONE = {"pattern": "=", **LONE, "meta": 0}
PAIR = {"pattern": "==", **LONE, "kv_groups": ((0, 1),)}
# What is cut alone, in which model.
ALONE = {
  ("mamba2", letter): (ONE, {letter: size}) for letter, size in SIZES.items() if letter in "JUEHNPK"
} | {
  ("mamba2", "G"): (ONE, {"G": 1}),
  ("mamba2", "no state"): (ONE, {"N": 0}),
  ("mamba2", "attention off"): (ONE, {0: {"K": 0}}),
  ("mamba2", "SSM off"): (ONE, {0: {"G": 0}}),
  ("mamba2", "shared K"): (PAIR, {"K": 1}),
  ("mamba2", "reader off"): (PAIR, {1: {"K": 0}}),
  ("mamba2", "reader gone"): (PAIR, {"X": (0,)}),
  ("mamba2", "M"): (PAIR, {"M": 4}),
  ("mamba1", "no meta tokens"): (PAIR, {"M": 0}),
  **{("mamba1", letter): (ONE, {letter: size}) for letter, size in (("H", 29), ("N", 3), ("R", 4))},
  ("mamba1", "SSM off"): (ONE, {0: {"G": 0}}),
}


def errors(cfg, sizes):
  """Returns how far apart masked and cut logits of packed rows are, and cut and the parent's."""
  params = models.numbers(cfg)
  plan, whole = models.plan(cfg, params, sizes), Plan(cfg, tree_hash(params), {})
  segment_BL = models.batches(cfg, 1)[0]["segment_BL"]
  got, want = models.both(cfg, params, plan, segment_BL=segment_BL, shape=segment_BL.shape)
  token_V = models.parent_ids(cfg, plan)
  token_BL = token_V[np.random.default_rng(1).integers(0, len(token_V), segment_BL.shape)]
  same, kept = hybridlm.mask(cfg, params, whole)
  parent = hybridlm.forward(cfg, same, token_BL, segment_BL, kept=kept)[..., token_V]
  return models.error(got, want), models.error(parent, want)


@pytest.mark.parametrize("name", MIXED)
def test_masked_parent_and_cut_child_give_the_same_logits_with_every_axis_cut(name):
  ssm, changes, sizes = MIXED[name]
  near, far = errors(models.hymba(ssm, **changes), sizes)
  assert near < 1e-5 < 1e-2 < far


@pytest.mark.slow
@pytest.mark.parametrize("ssm, axis", ALONE)
def test_masked_parent_and_cut_child_give_the_same_logits_with_one_axis_cut(ssm, axis):
  changes, sizes = ALONE[ssm, axis]
  near, far = errors(models.hymba(ssm, **changes), sizes)
  assert near < 1e-5 < 1e-3 < far


@pytest.mark.slow
def test_a_verified_cut_of_a_parallel_block_notices_rows_that_another_branch_wrote():
  cfg = models.hymba("mamba1", **{**PAIR, "pattern": "=", "kv_groups": (), "meta": 3})
  params = models.numbers(cfg)
  plan = models.plan(cfg, params, {"J": 2, "H": 29, "M": 2})
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  folder = small["blocks"]["00"]
  moved = {**folder, "w_out_YD": folder["w_out_YD"][::-1]}
  with pytest.raises(RuntimeError, match="logits differ"):
    api.verify(cfg, params, plan, small_cfg, {**small, "blocks": {"00": moved}})
