"""Metrics of a language model equal what one computes by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from cases import tiny
from hybridlm.eval import lm

BYTES_V = jnp.asarray(np.arange(tiny.V) % 4)  # tokens 0, 4, 8, .. stand for no text


def table(params, batch):
  """A model whose logits are rows of a table: the head is the identity."""
  return params[batch["token_BL"]], jnp.eye(3)


def log_table(rows):
  return jnp.log(jnp.asarray(rows, jnp.float32))


def test_metrics_of_a_model_of_three_tokens_are_those_worked_out_by_hand():
  student = log_table([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5]])
  teacher = log_table([[0.25, 0.5, 0.25], [0.125, 0.75, 0.125], [0.125, 0.125, 0.75]])
  batch = {
    "token_BL": jnp.array([[0, 1, 2, 1]]),
    "target_BL": jnp.array([[0, 0, 2, 1]]),
    "weight_BL": jnp.array([[1.0, 1.0, 1.0, 0.0]]),
  }
  bytes_V = jnp.array([2, 9, 3])
  found = lm.make(table, bytes_V=bytes_V, teacher=table)(student, teacher, [batch])
  nats = math.log(2) + math.log(8) + math.log(2)
  # Row 0: 0.25·ln ½ + 0.5·ln 2 + 0; row 1: 0; row 2: 2·0.125·ln ½ + 0.75·ln 1.5.
  kl = 0.25 * math.log(2) - 0.25 * math.log(2) + 0.75 * math.log(1.5)
  assert found == pytest.approx(
    {
      "cross_entropy": nats / 3,
      "perplexity": 32 ** (1 / 3),
      "bits_per_byte": 5 / 7,
      "accuracy": 2 / 3,
      "agreement": 2 / 3,
      "kl": kl / 3,
      "tokens": 3,
      "bytes": 7,
    },
    rel=1e-6,
  )


def test_metrics_over_batches_are_those_of_one_large_batch():
  params, teacher = tiny.init(), tiny.init(1, width=20)
  batches = [tiny.batch(number) for number in range(3)]
  joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
  evaluate = lm.make(tiny.hidden, bytes_V=BYTES_V, teacher=tiny.hidden)
  apart = evaluate(params, teacher, iter(batches))
  assert apart == pytest.approx(evaluate(params, teacher, [joined]), rel=1e-5)
  counted = np.where(joined["weight_BL"] > 0, np.asarray(BYTES_V)[joined["target_BL"]], 0)
  assert apart["bytes"] == counted.sum() and apart["tokens"] == joined["weight_BL"].sum()


def test_a_model_agrees_with_itself_and_diverges_by_nothing():
  params = tiny.init()
  found = lm.make(tiny.hidden, bytes_V=BYTES_V, teacher=tiny.hidden)(
    params, params, [tiny.batch(0)]
  )
  assert found["agreement"] == 1.0 and abs(found["kl"]) < 1e-6


def test_without_a_teacher_its_metrics_are_left_out():
  found = lm.make(tiny.hidden, bytes_V=BYTES_V)(tiny.init(), None, [tiny.batch(0)])
  assert sorted(found) == sorted(
    ["cross_entropy", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes"]
  )


def test_a_weight_above_zero_counts_a_token_once():
  batch = tiny.batch(0)
  halved = batch | {"weight_BL": batch["weight_BL"] / 2}
  evaluate = lm.make(tiny.hidden, bytes_V=BYTES_V)
  assert evaluate(tiny.init(), None, [halved]) == evaluate(tiny.init(), None, [batch])


def test_padded_rows_of_the_head_are_never_predicted():
  params, batch = tiny.init(rows=tiny.V), tiny.batch(0)
  head = params["head"]["w_head_DV"]
  padded = params | {"head": {"w_head_DV": jnp.concatenate([head, 50 * head[:, :9]], 1)}}
  plain = lm.make(tiny.hidden, bytes_V=BYTES_V)(params, None, [batch])
  found = lm.make(tiny.hidden, bytes_V=BYTES_V, vocabulary=tiny.V)(padded, None, [batch])
  assert found == pytest.approx(plain, rel=1e-6)


def test_a_perplexity_beyond_floats_is_infinite():
  found = lm.report({"ce": 2000.0, "weight": 2.0, "correct": 0.0}, nbytes=4)
  assert found["perplexity"] == math.inf and found["cross_entropy"] == 1000.0


@pytest.mark.parametrize("weight,nbytes", [(0.0, 5), (3.0, 0)])
def test_an_evaluation_of_no_token_or_no_byte_is_refused(weight, nbytes):
  with pytest.raises(ValueError, match=f"over {weight} tokens and {nbytes} bytes"):
    lm.report({"ce": 1.0, "weight": weight, "correct": 0.0}, nbytes=nbytes)


def test_an_evaluation_without_batches_is_refused():
  with pytest.raises(ValueError, match="no batch to evaluate on"):
    lm.make(tiny.hidden, bytes_V=BYTES_V)(tiny.init(), None, [])
