"""Requests to score: how texts become pairs of ids, pairs batches, and batches results."""

import jax
import numpy as np
import pytest

from cases import tiny
from hybridlm.eval import requests, targets
from hybridlm.eval.requests import Pair

PREFIX = 30
WORDS = {"the": 1, " cat": 2, " sat": 3, " ": 4, "t": 5, "he": 6, "!": 7, "x": 8, "  ": 9}


def encode(text, special):
  """Greedy longest words of a tiny vocabulary; special tokens start with the prefix."""
  ids = [PREFIX] if special or special is None else []
  while text:
    word = max((w for w in WORDS if text.startswith(w)), key=len)
    ids.append(WORDS[word])
    text = text[len(word):]
  return ids


def bare(text, special):
  """The same without special tokens."""
  return encode(text, False)


def test_the_border_lies_where_the_ids_of_the_context_end():
  assert requests.pair(encode, "the cat", " sat", prefix=0) == Pair((PREFIX, 1, 2), (3,))
  # "t" and "he" are one id together: the border falls inside it, and the target loses its start.
  assert requests.pair(bare, "t", "he sat", prefix=0) == Pair((5,), (3,))


def test_white_space_at_the_end_of_a_context_belongs_to_the_target():
  assert requests.pair(bare, "the ", "x", prefix=0) == Pair((1,), (4, 8))
  assert requests.pair(bare, "the", " cat", prefix=0) == Pair((1,), (2,))


def test_an_empty_context_is_the_prefix_token_once():
  assert requests.pair(encode, "", "the cat", prefix=PREFIX) == Pair((PREFIX,), (1, 2))
  assert requests.pair(encode, "", "the cat", prefix=1) == Pair((1,), (2,))
  assert requests.pair(bare, " ", "x", prefix=PREFIX) == Pair((PREFIX,), (4, 8))


@pytest.mark.parametrize("count,length", [(0, 4), (1, 4), (4, 4), (5, 4), (10, 4), (12, 4), (7, 1)])
def test_windows_score_every_id_once_after_as_many_ids_as_fit(count, length):
  ids = list(range(100, 100 + count))
  found = requests.windows(ids, prefix=7, length=length)
  assert [i for window in found for i in window.target] == ids
  whole = [7, *ids]
  for window in found:
    joined = [*window.context, *window.target]
    assert len(joined) <= length + 1 and window.context
    start = whole.index(joined[0])
    assert whole[start : start + len(joined)] == joined
  if count > length:
    assert {len(w.context) + len(w.target) for w in found} == {length + 1}


def test_windows_of_ten_ids_are_those_of_the_published_example():
  assert requests.windows(range(10), prefix=99, length=4) == [
    Pair((99,), (0, 1, 2, 3)), Pair((3,), (4, 5, 6, 7)), Pair((5, 6, 7), (8, 9)),
  ]


def test_what_does_not_fit_loses_its_left_end():
  long = Pair((1, 2, 3, 4), (5, 6))
  assert requests.fitted(long, 5) == long  # the last id is only a target
  assert requests.fitted(long, 4) == Pair((2, 3, 4), (5, 6))
  assert requests.fitted(long, 2) == Pair((4,), (5, 6))


@pytest.mark.parametrize("pair,words", [
  (Pair((), (1,)), "empty context"), (Pair((1,), ()), "empty target"),
  (Pair((1,), (2, 3, 4)), "target of 3 tokens is longer than the length 2"),
])
def test_a_request_that_cannot_be_scored_is_refused(pair, words):
  with pytest.raises(ValueError, match=words):
    requests.fitted(pair, 2)


def test_buckets_hold_what_they_are_for_and_are_few():
  sizes = [requests.bucket(size, 2000) for size in range(1, 2001)]
  assert all(size <= bucket for size, bucket in enumerate(sizes, 1))
  assert sorted(set(sizes)) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2000]


def random_pairs(count=11):
  rng = np.random.default_rng(3)
  sizes = rng.integers(1, 30, (count, 2))
  return [
    Pair(*(tuple(rng.integers(0, tiny.V, size).tolist()) for size in both)) for both in sizes
  ]


def by_hand(params, pair):
  """Sum of log-probabilities and greediness of one pair, with a dense softmax."""
  ids = np.array([pair.context + pair.target])
  hidden_BLD, head_DV = tiny.hidden(params, {"token_BL": ids[:, :-1]})
  logprob_LV = np.asarray(jax.nn.log_softmax(hidden_BLD @ head_DV, -1))[0][-len(pair.target):]
  picked = logprob_LV[np.arange(len(pair.target)), pair.target]
  return picked.sum(), bool((logprob_LV.argmax(-1) == pair.target).all())


def greedy_pair(params):
  """A pair whose targets are what the toy model takes, each after the other."""
  ids = [5]
  for _ in range(4):
    hidden_BLD, head_DV = tiny.hidden(params, {"token_BL": np.array([ids])})
    ids.append(int((hidden_BLD[0, -1] @ head_DV).argmax()))
  return Pair((5,), tuple(ids[1:]))


def test_results_come_in_the_order_asked_and_do_not_depend_on_batches():
  params = tiny.init()
  best = greedy_pair(params)
  wrong = Pair(best.context, (*best.target[:-1], (best.target[-1] + 1) % tiny.V))
  asked = [*random_pairs(), best, wrong]
  score = targets.make(tiny.hidden)
  counted = []
  sizes = {"vocabulary": tiny.V, "length": 60}
  found = requests.run(score, params, asked, batch=4, **sizes, done=counted.append)
  for one, pair in zip(found, asked, strict=True):
    logprob, greedy = by_hand(params, pair)
    assert (one.logprob, one.greedy) == (pytest.approx(logprob, abs=1e-4), greedy)
  assert (found[-2].greedy, found[-1].greedy) == (True, False)
  assert sum(counted) == len(asked)
  alone = requests.run(score, params, asked, batch=1, **sizes)
  assert [one.greedy for one in alone] == [one.greedy for one in found]
  np.testing.assert_allclose(*([o.logprob for o in each] for each in (alone, found)), atol=1e-4)


def test_batches_are_padded_to_few_shapes_and_never_score_padding():
  pairs = random_pairs(10)
  shapes, seen = set(), []
  for chosen, batch in requests.batches(pairs, batch=4, length=60):
    shapes.add(batch["token_BL"].shape)
    seen += chosen
    for row, index in enumerate(chosen):
      scored = batch["target_BL"][row][batch["weight_BL"][row] > 0]
      assert tuple(scored) == pairs[index].target
    assert not batch["weight_BL"][len(chosen):].any()
  assert sorted(seen) == list(range(10)) and shapes <= {(4, 32), (4, 48), (4, 60)}


def test_a_result_that_is_not_a_number_is_an_error():
  params = jax.tree.map(lambda leaf: leaf * np.nan, tiny.init())
  with pytest.raises(ValueError, match="request 0 has log-probability nan"):
    requests.run(targets.make(tiny.hidden), params, [Pair((1,), (2,))], vocabulary=tiny.V, batch=2,
                 length=8)


@pytest.mark.parametrize("pair,words", [
  (Pair((1, tiny.V), (2,)), f"id {tiny.V} of its context"), (Pair((1,), (-1, 2)), "id -1 of its"),
  (Pair((-2, 1), (2,)), "id -2 of its context"), (Pair((1,), (tiny.V,)), "its target is outside"),
])
def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_scored(pair, words):
  def never(params, batch):
    raise AssertionError

  asked = [Pair((0,), (tiny.V - 1,)), pair]
  with pytest.raises(ValueError, match=f"request 1: .*{words}"):
    requests.run(never, None, asked, vocabulary=tiny.V, batch=1, length=8)


def test_text_ends_before_the_first_stop_string_in_it():
  assert requests.before("one\n\ntwo. three", ["three", ".", "", "\n\n"]) == "one"
  assert requests.before("one two", ["xx", ""]) == "one two"
  assert requests.before("one", []) == "one"


def test_generation_ends_at_an_end_token_or_at_a_stop_string_over_several_tokens():
  def decode(ids, special):
    return "".join({1: "a", 2: "\n", 3: "END", 9: "<end>"}[i] for i in ids if special or i != 9)

  def ended(ids, stops, ends=()):
    return requests.finished(ids, stops, ends, decode)

  assert not ended([1, 2], ["\n\n"]) and ended([1, 2, 2], ["\n\n"])
  assert not ended([1, 9], [], [8]) and ended([1, 9], [], [8, 9])
  assert ended([3, 1], ["Da", "x"]) and ended([1, 9], ["<end>"])  # inside tokens, special ones too
  assert not ended([], ["a", ""]) and not ended([1, 1], [""])
