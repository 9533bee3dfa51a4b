"""Studies of a teacher's heads: the comparison arms are what they say they are."""

import numpy as np
import pytest

import hybridlm
from cases import models
from experiments import findings, studies


@pytest.fixture(name="teacher", scope="module")
def _teacher():
  cfg = models.make(pattern="M-M", P=3)
  return cfg, models.params(cfg, 8.0)


def test_masked_loss_is_the_loss_of_the_cut_model(teacher):
  cfg, params = teacher
  batches = models.batches(cfg, 2)
  scores = hybridlm.calibrate(cfg, params, batches, axes="H")
  plan = hybridlm.plan(cfg, scores, {"H": 2})
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  found = [hybridlm.language_loss(small_cfg)(small, None, batch) for batch in batches]
  want = sum(s["ce"] for s in found) / sum(s["weight"] for s in found)
  assert studies.masked_loss(cfg, params, plan, batches) == pytest.approx(float(want), rel=1e-5)


def test_packing_whole_groups_in_order_is_the_group_aware_cut(teacher):
  # Where the best heads of a layer are the best of each group, packing moves none across.
  cfg, params = teacher
  batches = models.batches(cfg, 1)
  scores = hybridlm.calibrate(cfg, params, batches, axes="H")
  sums = {path: np.zeros_like(value) for path, value in scores.sums.items()}
  for value in sums.values():
    value[:, [1, 3]] = 1.0
  even = hybridlm.Scores(sums, 1.0, scores.meta)
  moved, naive = studies.packed(cfg, params, even, 2)
  ours = hybridlm.plan(cfg, even, {"H": 2})
  want = studies.masked_loss(cfg, params, ours, batches)
  assert studies.masked_loss(cfg, moved, naive, batches) == pytest.approx(want, rel=1e-5)


def test_packing_that_moves_a_head_to_another_group_is_another_model(teacher):
  cfg, params = teacher
  batches = models.batches(cfg, 1)
  scores = hybridlm.calibrate(cfg, params, batches, axes="H")
  sums = {path: np.zeros_like(value) for path, value in scores.sums.items()}
  for value in sums.values():
    value[1, 1:] = 1.0
    value[0, 2] = 1.0
  uneven = hybridlm.Scores(sums, 1.0, scores.meta)
  moved, naive = studies.packed(cfg, params, uneven, 2)
  small_cfg, small = hybridlm.cut(cfg, moved, naive)
  want = np.concatenate(
    [params["blocks"]["00"]["a_log_GH"][0, 2:3], params["blocks"]["00"]["a_log_GH"][1, 1:]]
  )
  np.testing.assert_array_equal(small["blocks"]["00"]["a_log_GH"].ravel(), want)


def test_keeping_all_heads_costs_nothing_whatever_the_choice(teacher):
  cfg, params = teacher
  batches = models.batches(cfg, 1)
  result = findings.study(cfg, params, [batches, batches], batches, heads=[4, 3, 2])
  for rows in (result["choices"], result["projections"]):
    for row in rows:
      assert len(row["loss"]) == 2
      if row["heads"] == 4:
        assert row["loss"] == pytest.approx([result["full"]] * 2, rel=1e-5)
  text = findings.markdown(result)
  assert text.count("| group-aware |") == 1 and "2 calibration seeds" in text


def test_sentences_follow_the_numbers():
  rows = [
    {"heads": kept, "choice": name, "loss": [loss]}
    for name, losses in {"W_x": (1.1, 2.0), "W_z": (1.2, 1.9), "W_O": (1.3, 3.0)}.items()
    for kept, loss in zip((7, 4), losses, strict=True)
  ]
  result = {"full": 1.0, "groups": 2, "parent": 8, "projections": rows}
  # Sums 3.1, 3.1: the tie goes to the first, W_x; a little more and W_z is best.
  rows[1]["loss"] = [2.2]
  assert "disagrees: W_x is best at 1 of 2 sizes, and over all sizes W_z" in (
    findings.best_projection(result)
  )


@pytest.mark.parametrize("few, half, verdict", [
  (0.1, 1.0, "agrees"),
  (0.24, 1.0, "agrees"),
  (0.3, 1.0, "disagrees"),  # less than half of them cost, head by head, but not nearly free
  (0.1, 0.05, "disagrees"),
  (-0.1, -0.5, "disagrees"),
])
def test_the_price_of_heads_agrees_where_few_are_nearly_free_and_half_are_not(few, half, verdict):
  costs = {6: few, 4: half}
  rows = [{"heads": kept, "choice": "W_x", "loss": [1 + cost]} for kept, cost in costs.items()]
  found = findings.price_of_heads({"full": 1.0, "parent": 8, "projections": rows})
  assert f"This teacher {verdict}: keeping 6" in found
  assert f"costs {few:.3f} nats, keeping 4 costs {half:.3f}" in found


def test_few_heads_are_not_nearly_free_where_each_costs_more_than_at_half():
  rows = [{"heads": 15, "choice": "W_x", "loss": [1.2]}, {"heads": 8, "choice": "W_x",
                                                           "loss": [2.0]}]
  assert "disagrees" in findings.price_of_heads({"full": 1.0, "parent": 16, "projections": rows})


def test_the_price_of_one_size_has_no_verdict():
  rows = [{"heads": 5, "choice": "W_x", "loss": [1.5]}]
  found = findings.price_of_heads({"full": 1.0, "parent": 8, "projections": rows})
  assert "agrees" not in found and "keeping 5 of 8 heads a group costs 0.500 nats" in found
