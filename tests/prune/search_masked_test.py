"""One program scores every candidate, and gives each the losses of the model really cut."""

import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import bind
from hybridlm.prune import cut
from hybridlm.prune.search import masked

CANDIDATES = (
  {}, {"F": 9, "E": 6},
  {"D": 11, "F": {"1": 7, "4": 20}, "H": 2, "P": 3, "J": 2, "N": {"0": 3}, "noop": [2],
   "blocks": [0, 2, 3, 4]},
)


@pytest.fixture(name="teacher", scope="module")
def _teacher():
  cfg = models.make()
  params, batches = models.params(cfg, 8.0), models.batches(cfg, 2)
  scores = hybridlm.calibrate(cfg, params, batches[:1], estimator="random", axes="HPFDJKEN")
  return cfg, params, batches, scores


def test_masked_losses_are_those_of_cut_models_and_need_one_program(teacher):
  cfg, params, batches, scores = teacher
  plans = [hybridlm.plan(cfg, scores, targets) for targets in CANDIDATES]
  before = masked.programs()
  scorer = masked.Scorer(cfg, bind.apply_hidden, params, batches)
  found = [scorer(plan) for plan in plans]
  assert masked.programs() - before == 1
  assert found[0]["kl"] == pytest.approx(0.0, abs=1e-5) and found[0]["agree"] == 1.0
  assert len({round(each["ce"], 4) for each in found}) == len(CANDIDATES)
  small_cfg, small = cut.cut(cfg, params, plans[-1])
  loss = hybridlm.distillation_loss(small_cfg, cfg, ce=1.0)
  sums = [loss(small, params, batch) for batch in batches]
  weight = sum(float(s["weight"]) for s in sums)
  for name in ("kl", "ce"):
    want = sum(float(s[name]) for s in sums) / weight
    assert found[-1][name] == pytest.approx(want, rel=1e-5)


def test_a_candidate_whose_loss_is_not_finite_is_named(teacher):
  cfg, params, batches, scores = teacher
  broken = {**params, "final": {"norm_gain_D": params["final"]["norm_gain_D"] * np.nan}}
  scorer = masked.Scorer(cfg, bind.apply_hidden, broken, batches[:1])
  with pytest.raises(masked.NotFinite, match="search: kl of a candidate is nan"):
    scorer(hybridlm.plan(cfg, scores, {}))


def test_without_a_batch_nothing_is_scored(teacher):
  cfg, params, _, _ = teacher
  with pytest.raises(ValueError, match="no batch to score"):
    masked.Scorer(cfg, bind.apply_hidden, params, [])
