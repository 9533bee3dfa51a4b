"""Scores of chosen tokens are rows of a dense log-softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import tiny
from hybridlm.eval import targets


def dense(params, batch):
  """Log-probabilities [B, L, V] of the toy model, all at once."""
  hidden_BLD, head_DV = tiny.hidden(params, batch)
  return np.asarray(jax.nn.log_softmax(hidden_BLD @ head_DV[:, : tiny.V], -1))


@pytest.mark.parametrize("chunk", [None, 1, 8, 37, 50])
def test_scores_are_the_entries_of_a_dense_softmax_where_there_is_a_weight(chunk):
  params, batch = tiny.init(rows=tiny.V + 9), tiny.batch(0)
  batch["weight_BL"][:, 11:30] = 0  # whole chunks of 8 without a weight
  want_BLV = dense(params, batch)
  # Some targets are greedy: what the model itself would take.
  batch["target_BL"] = np.where(batch["target_BL"] % 2, want_BLV.argmax(-1), batch["target_BL"])
  logprob_BL, greedy_BL = targets.make(tiny.hidden, vocabulary=tiny.V, chunk=chunk)(params, batch)
  real_BL = batch["weight_BL"] > 0
  want_BL = np.take_along_axis(want_BLV, batch["target_BL"][..., None], -1)[..., 0]
  np.testing.assert_allclose(logprob_BL, np.where(real_BL, want_BL, 0), atol=2e-5)
  np.testing.assert_array_equal(greedy_BL, real_BL & (want_BLV.argmax(-1) == batch["target_BL"]))
  assert 0.3 < np.asarray(greedy_BL)[real_BL].mean() < 0.8


def test_of_equal_logits_the_first_is_greedy():
  def flat(params, batch):
    return jnp.zeros((2, 3, 5)), jnp.ones((5, 7))

  target_BL = np.array([[0, 1, 6], [0, 2, 0]])
  batch = {"target_BL": target_BL, "weight_BL": np.ones((2, 3))}
  logprob_BL, greedy_BL = targets.make(flat)(None, batch)
  np.testing.assert_array_equal(greedy_BL, target_BL == 0)
  np.testing.assert_allclose(logprob_BL, -np.log(7) * np.ones((2, 3)), rtol=1e-6)


def test_a_target_outside_the_vocabulary_has_no_probability():
  batch = tiny.batch(0)
  batch["target_BL"][1, 3], batch["weight_BL"][1, 3] = tiny.V - 1, 1
  logprob_BL, _ = targets.make(tiny.hidden, vocabulary=tiny.V - 1)(tiny.init(), batch)
  other = (batch["target_BL"] < tiny.V - 1) | (batch["weight_BL"] == 0)
  np.testing.assert_array_equal(np.isfinite(logprob_BL), other)


@pytest.mark.parametrize("hits,count,low,high", [
  (5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (60, 100, 0.5020, 0.6906),
])
def test_the_interval_is_wilsons(hits, count, low, high):
  found = targets.rate(hits, count)
  assert found == pytest.approx(
    {"accuracy": hits / count, "low": low, "high": high, "count": count}, abs=1e-4
  )


def test_a_share_of_nothing_is_refused():
  with pytest.raises(ValueError, match="0 hits of 0"):
    targets.rate(0, 0)
