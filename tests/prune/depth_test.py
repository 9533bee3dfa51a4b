"""Depth scores: what one block less does, by divergence and by direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api
from hybridlm.prune import depth


def test_leave_one_out_is_the_divergence_from_the_model_without_the_block():
  cfg = models.make()
  params, batch = models.params(cfg, 4.0), models.batches(cfg, 1)[0]
  scores = hybridlm.calibrate(cfg, params, [batch], depth="kl")
  log_full = jax.nn.log_softmax(
    hybridlm.forward(cfg, params, batch["token_BL"], batch["segment_BL"])
  )
  for index in range(5):
    keep = tuple(i for i in range(5) if i != index)
    plan = hybridlm.plan(cfg, scores, {"blocks": keep})
    small_cfg, small = hybridlm.cut(cfg, params, plan)
    log_small = jax.nn.log_softmax(
      hybridlm.forward(small_cfg, small, batch["token_BL"], batch["segment_BL"])
    )
    kl_BL = jnp.sum(jnp.exp(log_full) * (log_full - log_small), -1)
    want = jnp.sum(kl_BL * batch["weight_BL"]) / batch["weight_BL"].sum()
    assert scores.get("score_X")[index] == pytest.approx(float(want), rel=1e-4, abs=1e-7)


def test_batches_of_one_shape_share_one_program():
  cfg = models.make(D=12)
  before = depth._divergence._cache_size()
  hybridlm.calibrate(cfg, models.params(cfg), models.batches(cfg, 3), axes="F", depth="kl")
  assert depth._divergence._cache_size() == before + 1


def test_influence_is_one_minus_the_cosine_of_input_and_output():
  cfg = models.make()
  params, batch = models.params(cfg, 4.0), models.batches(cfg, 1)[0]
  score_X = hybridlm.calibrate(cfg, params, [batch], depth="influence").get("score_X")
  taps = api.apply(cfg, params, batch["token_BL"], batch["segment_BL"], taps=("in_BLD", "out_BLD"))[
    1
  ]["02"]
  one, two = (np.asarray(taps[name], np.float64) for name in ("in_BLD", "out_BLD"))
  cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
  want = np.average(1 - cosine, weights=batch["weight_BL"])
  assert score_X[2] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", depth.ESTIMATORS)
def test_a_block_that_adds_nothing_scores_zero(name):
  cfg = models.make()
  params = depth.without(models.params(cfg, 4.0), 3)
  score_X = hybridlm.calibrate(cfg, params, models.batches(cfg, 1), depth=name).get("score_X")
  assert abs(score_X[3]) < 1e-6 < np.delete(score_X, 3).min()


def test_depth_scores_stand_beside_estimators_that_read_no_data():
  cfg = models.make()
  params, batches = models.params(cfg, 4.0), models.batches(cfg, 2)
  want = hybridlm.calibrate(cfg, params, batches, depth="influence").get("score_X")
  got = hybridlm.calibrate(cfg, params, batches, estimator="magnitude", depth="influence")
  np.testing.assert_allclose(got.get("score_X"), want, rtol=1e-5)


def test_a_depth_score_that_is_not_finite_names_the_block():
  cfg = models.make()
  params = models.params(cfg)
  broken = {**params["blocks"]["02"]}
  broken["w_out_GHPD"] = broken["w_out_GHPD"].at[0].set(jnp.inf)
  params = {**params, "blocks": {**params["blocks"], "02": broken}}
  with pytest.raises(ValueError, match="depth score of block [0-9] is not finite"):
    depth.calibrate(
      cfg,
      lambda p, b, taps: api.apply_taps(cfg, p, b, taps),
      lambda p, b: api.apply_hidden(cfg, p, b),
      params,
      models.batches(cfg, 1),
      estimator="influence",
    )
