"""Packing loses nothing, repeats nothing, and keeps documents apart."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from hybridlm.data import packing

SIZES = st.lists(st.integers(1, 19), min_size=1, max_size=9)


def numbered(sizes):
  """Returns documents whose ids are all different, as arrays and joined; eot is 0."""
  edges = np.cumsum([1, *sizes])
  documents = [np.arange(a, b, dtype=np.int32) for a, b in zip(edges[:-1], edges[1:], strict=True)]
  return documents, packing.join(documents, eot=0, V=int(edges[-1]))


def expected(documents):
  """Returns every (input, target) pair, document by document."""
  return sorted(pair for ids in documents for pair in zip([0, *ids], [*ids, 0], strict=True))


def found(rows):
  """Returns every (input, target) pair that counts."""
  return sorted((int(t), int(u)) for row in rows for t, u, w in zip(
    row["token_BL"], row["target_BL"], row["weight_BL"], strict=True) if w)


@pytest.mark.parametrize("order", ["given", "shuffled"])
@hypothesis.settings(deadline=None)
@hypothesis.given(sizes=SIZES, length=st.integers(1, 23), epoch=st.integers(0, 3))
def test_an_epoch_predicts_every_token_exactly_once_from_the_one_before(
  order, sizes, length, epoch
):
  documents, tokens = numbered(sizes)
  rows = packing.Rows(tokens, length=length, order=order, seed=7)
  epoch_rows = [rows[epoch * len(rows) + r] for r in range(len(rows))]
  assert found(epoch_rows) == expected(documents)


@hypothesis.settings(deadline=None)
@hypothesis.given(sizes=SIZES, length=st.integers(1, 23), epoch=st.integers(0, 3))
def test_a_segment_is_one_piece_of_one_document(sizes, length, epoch):
  documents, tokens = numbered(sizes)
  owner = {int(i): n for n, ids in enumerate(documents) for i in ids}
  rows = packing.Rows(tokens, length=length, order="shuffled", seed=7)
  for r in range(len(rows)):
    row = rows[epoch * len(rows) + r]
    segment_L, token_L, target_L = row["segment_BL"], row["token_BL"], row["target_BL"]
    owners = []
    for segment in range(1, segment_L.max() + 1):
      (place,) = np.nonzero(segment_L == segment)
      np.testing.assert_array_equal(np.diff(place), 1)
      np.testing.assert_array_equal(token_L[place][1:], target_L[place][:-1])
      assert 0 not in token_L[place][1:]  # eot only starts a segment
      ids = {int(i) for i in (*token_L[place], *target_L[place])} - {0}
      assert len({owner[i] for i in ids}) == 1
      owners.append(owner[ids.pop()])
    assert len(set(owners)) == len(owners)


@hypothesis.settings(deadline=None)
@hypothesis.given(sizes=SIZES, length=st.integers(1, 23))
def test_padding_is_the_end_of_the_last_row_only(sizes, length):
  _, tokens = numbered(sizes)
  rows = packing.Rows(tokens, length=length, order="given")
  for r in range(len(rows)):
    row = rows[r]
    real = length if r + 1 < len(rows) else sum(sizes) + len(sizes) - length * r
    assert 0 < real <= length
    np.testing.assert_array_equal(row["weight_BL"], np.arange(length) < real)
    np.testing.assert_array_equal(row["segment_BL"] > 0, np.arange(length) < real)
    assert not row["token_BL"][real:].any() and not row["target_BL"][real:].any()


def test_three_documents_are_laid_out_as_written_down_by_hand():
  tokens = packing.join([np.array([1, 2]), np.array([3]), np.array([4, 5, 6])], eot=9, V=10)
  rows = packing.Rows(tokens, length=5, order="given")
  assert [{k: v.tolist() for k, v in rows[r].items()} for r in range(len(rows))] == [
    {"token_BL": [9, 1, 2, 9, 3], "target_BL": [1, 2, 9, 3, 9],
     "segment_BL": [1, 1, 1, 2, 2], "weight_BL": [1, 1, 1, 1, 1]},
    {"token_BL": [9, 4, 5, 6, 9], "target_BL": [4, 5, 6, 9, 9],
     "segment_BL": [1, 1, 1, 1, 0], "weight_BL": [1, 1, 1, 1, 0]},
  ]
  assert {k: v.dtype for k, v in rows[0].items()} == {
    "token_BL": np.int32, "target_BL": np.int32, "segment_BL": np.int32, "weight_BL": np.float32}


def test_epochs_and_seeds_lay_documents_differently_and_repeat_themselves():
  _, tokens = numbered([3] * 40)

  rows = [packing.Rows(tokens, length=160, order="shuffled", seed=seed) for seed in range(3)]
  streams = [rows[s][n]["token_BL"].tolist() for n in range(3) for s in range(3)]
  assert len({tuple(s) for s in streams}) == 9
  assert rows[1][0]["token_BL"].tolist() == streams[1]
  given_order = packing.Rows(tokens, length=160, order="given")
  assert given_order[0]["token_BL"].tolist() == given_order[5]["token_BL"].tolist()


def test_a_large_vocabulary_keeps_its_ids_and_a_small_one_takes_half_the_memory():
  ids = np.array([0, 65_535, 65_536, 99_998], np.int32)
  large = packing.join([ids], eot=99_999, V=100_000)
  np.testing.assert_array_equal(large.flat, [99_999, *ids, 99_999])
  assert packing.join([ids[:2]], eot=3, V=65_536).flat.dtype == np.uint16


@pytest.mark.parametrize("bad", [-1, 31, 70_000])
def test_an_id_outside_the_vocabulary_is_named_with_its_document(bad):
  with pytest.raises(ValueError, match=f"document 1 holds id {bad}, outside the vocabulary of 31"):
    packing.join([np.array([30]), np.array([5, bad, 2])], eot=0, V=31)


def test_an_unknown_order_is_named():
  _, tokens = numbered([3])
  with pytest.raises(ValueError, match="order 'sorted' is unknown"):
    packing.Rows(tokens, length=2, order="sorted")
