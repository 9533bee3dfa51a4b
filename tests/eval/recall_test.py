"""Recall and needle batches: exact lengths, answers that the context alone decides, fair scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.eval import recall, targets

V = 61
IDS = np.arange(3, 53)
SHAPE = {"rows": 5, "pairs": 7, "queries": 4, "distance": 6}


def lookup(params, batch):
  """An oracle: after an id that stood in the row before, it repeats what followed it there."""
  token_BL = np.asarray(batch["token_BL"])
  logits_BLV = np.zeros((*token_BL.shape, V), np.float32)
  for token_L, logits_LV in zip(token_BL, logits_BLV, strict=True):
    follower = {}
    for place, token in enumerate(token_L):
      logits_LV[place, follower.get(token, 0)] = 20.0
      if place:
        follower.setdefault(token_L[place - 1], token)
  return jnp.asarray(logits_BLV), jnp.eye(V)


def scored(hidden):
  """A score of a model in NumPy: compiled once its hidden states are at hand."""
  compiled = targets.make(lambda made, batch: made)
  return lambda params, batch: compiled(hidden(params, batch), batch)


def noise(params, batch):
  """A model that guesses uniformly among all ids."""
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(*batch["token_BL"].shape, V)), jnp.float32), jnp.eye(V)


def flat(params, batch):
  return jnp.zeros((*batch["token_BL"].shape, V)), jnp.eye(V)


def rows(batch):
  """Each row's ids, the last target included, and the positions whose next id is an answer."""
  for token_L, target_L, weight_L in zip(*(batch[name] for name in (
      "token_BL", "target_BL", "weight_BL")), strict=True):
    np.testing.assert_array_equal(token_L[1:], target_L[:-1])
    yield [*token_L.tolist(), int(target_L[-1])], np.flatnonzero(weight_L).tolist()


def test_rows_of_recall_are_pairs_filler_and_queries_of_exact_length():
  batch = recall.associative(IDS, seed=0, **SHAPE)
  assert batch["token_BL"].shape == (5, 2 * 7 + 6 + 2 * 4 - 1)
  for ids, answers in rows(batch):
    keys, values, filler, asked = ids[:14:2], ids[1:14:2], ids[14:20], ids[20::2]
    assert len({*keys, *values}) == 14 and not {*keys, *values} & set(filler)
    assert set(ids) <= set(IDS.tolist()) and len(set(asked)) == 4
    assert answers == [20, 22, 24, 26]
    assert [ids[i] for i in answers] == asked
    assert [ids[i + 1] for i in answers] == [values[keys.index(key)] for key in asked]


@pytest.mark.parametrize("depth,place", [(0.0, 0), (0.5, 9), (1.0, 18)])
def test_a_needle_lies_at_its_depth_in_text_and_the_row_ends_in_its_question(depth, place):
  text = np.tile(np.arange(20, 30), 5)
  batch = recall.needle(text, IDS, rows=4, length=27, depth=depth, key=3, value=2, seed=1)
  assert batch["token_BL"].shape == (4, 27)
  for ids, answers in rows(batch):
    new = ids[-5:]
    assert ids[place : place + 5] == new and answers == [25, 26]
    rest = ids[:place] + ids[place + 5 : -5]
    assert not set(rest) & set(new) and len(set(new)) == 5
    assert f" {' '.join(map(str, rest))} " in f" {' '.join(map(str, text))} "


def test_rows_of_a_batch_differ_and_a_seed_reproduces_them():
  text = np.arange(20, 50)
  for make in (
    lambda seed: recall.associative(IDS, seed=seed, **SHAPE),
    lambda seed: recall.needle(text, IDS, rows=5, length=22, depth=0.5, seed=seed),
  ):
    one, same, other = (make(seed)["token_BL"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and len({tuple(row) for row in one}) == 5


@pytest.mark.parametrize("by,count", [("answer", 20), ("row", 5)])
def test_a_model_that_looks_up_answers_everything(by, count):
  batch = recall.associative(IDS, seed=0, **SHAPE)
  found = recall.measure(scored(lookup), None, [batch], by=by)
  assert (found["accuracy"], found["count"], found["high"]) == (1.0, count, 1.0)
  assert found["logprob"] > -1e-6


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_model_that_looks_up_finds_needles_at_every_depth(depth):
  text = np.arange(20, 50)
  batches = [recall.needle(text, IDS, rows=3, length=35, depth=depth, seed=s) for s in (0, 1)]
  found = recall.measure(scored(lookup), None, batches, by="row")
  assert (found["accuracy"], found["count"]) == (1.0, 6)


def test_a_model_that_guesses_is_at_chance():
  batches = [recall.associative(IDS, rows=40, pairs=9, queries=9, distance=0, seed=seed)
             for seed in range(5)]
  found = recall.measure(scored(noise), None, batches, by="answer")
  assert found["low"] < 1 / V < found["high"] and found["count"] == 1800
  even = recall.measure(scored(flat), None, batches, by="answer")
  assert even["accuracy"] == 0.0  # the first of all equals is id 0, which is never an answer
  assert even["logprob"] == pytest.approx(-np.log(V), rel=1e-6)


def test_a_row_counts_only_with_all_of_its_answers():
  batch = recall.associative(IDS, seed=0, **SHAPE)
  batch["target_BL"][2, 24] = 1  # no answer that the context holds
  assert recall.measure(scored(lookup), None, [batch], by="answer")["accuracy"] == 19 / 20
  assert recall.measure(scored(lookup), None, [batch], by="row")["accuracy"] == 4 / 5


@pytest.mark.parametrize("change,words", [
  ({"queries": 8}, "8 queries, 7 pairs"), ({"queries": 0}, "0 queries"),
  ({"distance": -1}, "distance -1"), ({"pairs": 25}, "25 pairs need 51 different ids"),
])
def test_recall_that_cannot_be_laid_out_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    recall.associative(IDS, seed=0, **{**SHAPE, **change})


@pytest.mark.parametrize("change,words", [
  ({"depth": 1.5}, "depth 1.5 must lie in 0..1"), ({"length": 14}, "take -1 ids"),
  ({"length": 60}, "take 45 ids of filler"), ({"key": 0}, "key 0"),
  ({"key": 40, "length": 99}, "40 ids of the vocabulary are not in 12 ids of filler"),
])
def test_a_needle_without_room_is_refused(change, words):
  shape = {"rows": 2, "length": 30, "depth": 0.5, "key": 4, "value": 4}
  with pytest.raises(ValueError, match=words):
    recall.needle(np.tile(np.arange(20, 30), 3), IDS, seed=0, **{**shape, **change})


def test_an_unknown_way_to_count_is_refused():
  with pytest.raises(ValueError, match="'token'; ways are answer, row"):
    recall.measure(scored(flat), None, [], by="token")
