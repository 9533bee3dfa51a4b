"""Witten-Bell n-grams against a few lines that count with dictionaries, and against their law."""

import collections
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hybridlm.eval import ngram

END = 256
TEXTS = st.lists(st.text("abé", max_size=12), min_size=1, max_size=4)


def padded(text, order):
  return [END] * (order - 1) + list(text.encode()) + [END]


def count(texts, n):
  """Returns counts by (context, symbol) for one order, straight from the definition."""
  counts = collections.defaultdict(collections.Counter)
  for text in texts:
    symbols = padded(text, n)
    for i in range(n - 1, len(symbols)):
      counts[tuple(symbols[i - n + 1 : i])][symbols[i]] += 1
  return counts


def probability(tables, context, symbol):
  """Returns P(symbol | context) by recursion from the longest context to none."""
  n = len(context) + 1
  below = probability(tables, context[1:], symbol) if context else 1 / 257
  seen = tables[n - 1].get(context, collections.Counter())
  total, kinds = seen.total(), len(seen)
  return below if not total else (seen[symbol] + kinds * below) / (total + kinds)


def brute_bits(train, test, order):
  tables = [count(train, n) for n in range(1, order + 1)]
  bits = size = 0
  for text in test:
    symbols = padded(text, order)
    size += len(text.encode())
    for i in range(order - 1, len(symbols)):
      bits -= math.log2(probability(tables, tuple(symbols[i - order + 1 : i]), symbols[i]))
  return bits / size


@hypothesis.settings(deadline=None)
@hypothesis.given(train=TEXTS, test=TEXTS, order=st.integers(1, 5))
def test_every_order_spends_the_bits_of_the_definition(train, test, order):
  hypothesis.assume(any(test))
  found = ngram.bits_per_byte(ngram.fit(train, order=order), test)
  wanted = [brute_bits(train, test, n) for n in range(1, order + 1)]
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


@hypothesis.settings(deadline=None)
@hypothesis.given(train=TEXTS, before=st.text("abcé", max_size=9), order=st.integers(1, 6))
def test_probabilities_after_any_context_sum_to_one(train, before, order):
  found = ngram.distribution(ngram.fit(train, order=order), before.encode())
  assert found.shape == (order, 257)
  assert (found > 0).all()
  np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)


@hypothesis.settings(deadline=None)
@hypothesis.given(train=TEXTS, text=st.text("abcé", min_size=1, max_size=9))
def test_the_bits_of_a_text_are_those_of_its_distributions(train, text):
  model = ngram.fit(train, order=4)
  data = text.encode()
  bits = sum(-np.log2(ngram.distribution(model, data[:i])[:, symbol])
             for i, symbol in enumerate([*data, END]))
  np.testing.assert_allclose(ngram.bits_per_byte(model, [text]), bits / len(data), rtol=1e-12)


@hypothesis.settings(deadline=None)
@hypothesis.given(train=TEXTS, test=TEXTS, order=st.integers(2, 6))
def test_lower_orders_do_not_depend_on_the_highest(train, test, order):
  hypothesis.assume(any(test))
  high = ngram.bits_per_byte(ngram.fit(train, order=order), test)
  low = ngram.bits_per_byte(ngram.fit(train, order=order - 1), test)
  np.testing.assert_allclose(high[:-1], low, rtol=1e-12)


def test_documents_never_see_each_other():
  model = ngram.fit(["abcd", "efgh", "ijkl"], order=4)
  np.testing.assert_allclose(
    ngram.bits_per_byte(model, ["cd", "efgh"]) * 6,
    ngram.bits_per_byte(model, ["cd"]) * 2 + ngram.bits_per_byte(model, ["efgh"]) * 4)
  shuffled = ngram.fit(["ijkl", "abcd", "efgh"], order=4)
  np.testing.assert_array_equal(
    ngram.distribution(model, b"abcd"), ngram.distribution(shuffled, b"abcd"))


def test_bytes_that_training_never_saw_share_what_smoothing_leaves():
  found = ngram.distribution(ngram.fit(["aab"], order=3), b"aa")
  unseen = [s for s in range(256) if s not in b"ab"]
  assert (np.ptp(found[:, unseen], axis=1) == 0).all()
  # Order 1: a twice, b and the end once, three kinds of symbols.
  np.testing.assert_allclose(found[0, [97, 98, 256, 0]], np.array([2, 1, 1, 0]) / 7 + 3 / 7 / 257)


def test_an_order_of_eight_is_exact_on_text_and_refused_where_codes_would_overflow():
  text = "".join(map(chr, range(32, 127))) * 3
  model = ngram.fit([text], order=8)
  np.testing.assert_allclose(
    ngram.bits_per_byte(model, [text[5:40]])[-1], brute_bits([text], [text[5:40]], 8))
  many = "".join(map(chr, range(2048)))
  with pytest.raises(ValueError, match="order 9 over .* different symbols do not fit 64 bits"):
    ngram.fit([many], order=9)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="order 0 is below 1"):
    ngram.fit(["a"], order=0)
  with pytest.raises(ValueError, match="no byte to divide by"):
    ngram.bits_per_byte(ngram.fit(["a"], order=2), [""])
