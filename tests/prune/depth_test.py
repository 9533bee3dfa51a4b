"""Depth scores: what one block less does, or several, or a block without its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api, bind
from hybridlm.prune import depth, store

CFG = models.make(pattern="M-*")
BLOCKS = len(CFG.blocks)


def params():
  """Parameters large enough that every block and every state matters."""
  return models.params(CFG, 6.0)


@functools.cache
def batches():
  return models.batches(CFG, 2, (3, 19))


@functools.cache
def scored(name):
  window = 2 if name == "window" else None
  return hybridlm.calibrate(
    CFG, params(), batches(), axes="F", depth=name, window=window, noop="kl")


def logits(gone=(), silent=(), tree=None):
  """Returns the logits of each batch of the model with blocks damped, in float64."""
  tree = depth.damped(CFG, tree or params(), depth.without(CFG, gone), depth.without(CFG, silent))
  return [np.asarray(hybridlm.forward(CFG, tree, b["token_BL"], b["segment_BL"]), np.float64)
          for b in batches()]


def divergence(small):
  """Returns the mean over real tokens of KL(full || small), from dense logits."""
  total = 0.0
  for full_BLV, small_BLV, batch in zip(logits(), small, batches(), strict=True):
    p, q = (v - np.logaddexp.reduce(v, -1, keepdims=True) for v in (full_BLV, small_BLV))
    total += ((np.exp(p) * (p - q)).sum(-1) * batch["weight_BL"]).sum()
  return total / sum(b["weight_BL"].sum() for b in batches())


def test_leave_one_out_is_the_divergence_from_the_model_without_the_block():
  scores = scored("kl")
  for index in range(BLOCKS):
    keep = tuple(i for i in range(BLOCKS) if i != index)
    small_cfg, small = hybridlm.cut(
      CFG, params(), hybridlm.plan(CFG, scores, {"blocks": keep}))
    found = [np.asarray(hybridlm.forward(small_cfg, small, b["token_BL"], b["segment_BL"]),
                        np.float64) for b in batches()]
    assert scores.get("score_X")[index] == pytest.approx(divergence(found), rel=1e-4)


def test_a_divergence_near_nothing_is_right_to_its_last_digits():
  rng = np.random.default_rng(0)
  full = rng.normal(0, 1, (1, 5, CFG.D)).astype(np.float32)
  head = rng.normal(0, 1, (CFG.D, CFG.V)).astype(np.float32)
  for size in (1e-5, 1e-3, 0.1, 3.0):
    small = full + (size * rng.normal(0, 1, full.shape)).astype(np.float32)
    got = depth._kl(CFG, (full, head), (small, head), {"weight_BL": np.ones((1, 5), np.float32)})
    p, q = (h.astype(np.float64) @ head.astype(np.float64) for h in (full, small))
    p, q = (v - np.logaddexp.reduce(v, -1, keepdims=True) for v in (p, q))
    assert float(got[0]) == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-4)


def test_mse_is_that_of_the_last_hidden_state():
  score_X = scored("mse").get("score_X")
  for index in range(BLOCKS):
    tree = depth.damped(CFG, params(), depth.without(CFG, [index]), depth.without(CFG, []))
    total = 0.0
    for batch in batches():
      full, small = (np.asarray(bind.apply_hidden(CFG, t, batch)[0], np.float64)
                     for t in (params(), tree))
      total += (np.square(full - small).mean(-1) * batch["weight_BL"]).sum()
    want = total / sum(b["weight_BL"].sum() for b in batches())
    assert score_X[index] == pytest.approx(want, rel=1e-4)


def test_a_window_is_scored_by_what_is_lost_without_all_of_it():
  scores = scored("window")
  found = scores.get("score_window_X")
  assert scores.meta["depth"] == "window" and scores.meta["window"] == 2
  for first in range(BLOCKS - 1):
    want = divergence(logits(gone=(first, first + 1)))
    assert found[first] == pytest.approx(want, rel=1e-4)
  assert found[BLOCKS - 1] == np.inf


def test_greedy_removes_what_hurts_least_given_what_is_gone():
  gone = []
  while len(gone) < BLOCKS - 1:
    left = [i for i in range(BLOCKS) if i not in gone]
    gone.append(min(left, key=lambda i: divergence(logits(gone=(*gone, i)))))
  last = set(range(BLOCKS)) - set(gone)
  want = np.argsort([*gone, *last])
  np.testing.assert_array_equal(scored("greedy").get("score_X"), want)


def test_a_state_less_block_is_scored_as_the_block_that_has_none():
  score_X = scored("kl").get("score_ssm_X")
  assert score_X[0] == pytest.approx(divergence(logits(silent=(0,))), rel=1e-4)
  np.testing.assert_array_equal(score_X[1:], 0.0)
  plan = hybridlm.plan(CFG, scored("kl"), {"noop": [0]})
  small_cfg, small = hybridlm.cut(CFG, params(), plan)
  found = [np.asarray(hybridlm.forward(small_cfg, small, b["token_BL"], b["segment_BL"]),
                      np.float64) for b in batches()]
  assert score_X[0] == pytest.approx(divergence(found), rel=1e-4)


def test_one_program_serves_every_block_and_batch():
  traced = []

  def hidden(tree, batch):
    traced.append(None)
    return bind.apply_hidden(CFG, tree, batch)

  model = store.Model(CFG, params(), functools.partial(bind.apply_taps, CFG), hidden)
  spec = store.Spec(estimator="magnitude", axes="F", depth="kl", noop="kl")
  store.calibrate(model, batches(), spec)
  assert len(traced) == 2  # the whole model, and the damped one


def test_influence_is_one_minus_the_cosine_of_input_and_output():
  score_X = scored("influence").get("score_X")
  total, tokens = 0.0, 0.0
  for batch in batches():
    taps = api.apply(
      CFG, params(), batch["token_BL"], batch["segment_BL"], taps=("in_BLD", "out_BLD"))[1]["01"]
    one, two = (np.asarray(taps[name], np.float64) for name in ("in_BLD", "out_BLD"))
    cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
    total += ((1 - cosine) * batch["weight_BL"]).sum()
    tokens += batch["weight_BL"].sum()
  assert score_X[1] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("name", ["kl", "mse", "influence"])
def test_a_block_that_adds_nothing_scores_zero(name):
  tree = depth.damped(CFG, params(), depth.without(CFG, [2]), depth.without(CFG, []))
  score_X = hybridlm.calibrate(
    CFG, tree, batches(), axes="F", depth=name, noop="kl").get("score_X")
  assert abs(score_X[2]) < 1e-6 < np.delete(score_X, 2).min()


def test_depth_scores_stand_beside_estimators_that_read_no_data():
  got = hybridlm.calibrate(
    CFG, params(), batches(), estimator="magnitude", depth="influence", noop="kl")
  np.testing.assert_allclose(got.get("score_X"), scored("influence").get("score_X"), rtol=1e-5)
  alone = hybridlm.calibrate(CFG, params(), [], estimator="magnitude")
  np.testing.assert_array_equal(got.get("01/score_F"), alone.get("01/score_F"))


def test_a_depth_score_that_is_not_finite_names_the_block():
  broken = {**params()["blocks"]["01"]}
  broken["w_down_FD"] = broken["w_down_FD"].at[0].set(jnp.inf)
  tree = {**params(), "blocks": {**params()["blocks"], "01": broken}}
  with pytest.raises(ValueError, match="batch 0: depth score of block [0-9] is not finite"):
    hybridlm.calibrate(CFG, tree, batches(), estimator="magnitude", depth="influence", noop="kl")


@pytest.mark.parametrize("arguments, message", [
  ({"depth": "perplexity"}, "depth estimator 'perplexity' is not one of"),
  ({"depth": "window"}, "window=None: 'window', and no other"),
  ({"depth": "kl", "window": 2}, "'kl' with window=2"),
  ({"depth": "window", "window": BLOCKS}, "of 3 blocks 1 to 2 can go"),
  ({"noop": "mse"}, "no-op estimator 'mse' is not one of kl"),
])
def test_depth_estimators_that_say_nothing_sensible_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    hybridlm.calibrate(CFG, params(), batches(), **arguments)


def test_the_excess_is_its_formula_on_both_sides_of_nothing():
  g = jnp.linspace(-0.5, 0.5, 41)
  exact = np.exp(-np.asarray(g, np.float64)) - 1 + np.asarray(g, np.float64)
  np.testing.assert_allclose(jax.jit(depth._excess)(g), exact, rtol=3e-6, atol=1e-12)
