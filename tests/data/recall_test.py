"""Recall to be learnt: each question has its answer in the document, and only answers count."""

import numpy as np
import pytest

from hybridlm.data import packing, pipeline, recall, sources

PAIRS, DISTANCE = 5, 3
SIZE = 4 * PAIRS + DISTANCE + 2  # symbols, the end of the line, and that of the document


def corpus(tokenizer="bytes", documents=40, **sizes):
  source = sources.Source(
    "recall", "recall", **{"pairs": PAIRS, "distance": DISTANCE, "documents": documents} | sizes)
  return pipeline.Corpus(pipeline.DataSpec((source,), tokenizer))


def answers(text):
  """Returns what a reader answers to each question of a document, and what stands there."""
  shown, asked = text[: 2 * PAIRS], text[2 * PAIRS + DISTANCE : -1]
  known = dict(zip(shown[::2], shown[1::2], strict=True))
  return [known[key] for key in asked[::2]], list(asked[1::2])


def test_keys_are_asked_for_whatever_was_asked_before_and_their_values_are_the_answers():
  found = corpus().documents("recall", "all")
  for document in found:
    said, wanted = answers(document.text)
    assert said == wanted and len(said) == PAIRS and set(said) <= set(recall.VALUES)
    assert document.text[2 * PAIRS :][:DISTANCE].isdigit() and document.text[-1] == "\n"
    assert [part.text for part in document.parts if part.counts] == wanted
  assert len({document.text for document in found}) == 40
  # 5 (4/5)^5 = 1.6 keys a document are not asked for.
  missed = [PAIRS - len(set(answers(document.text)[0])) for document in found]
  assert 1.2 < np.mean(missed) < 2.1
  assert found == corpus(documents=60).documents("recall", "all")[:40]


@pytest.mark.parametrize("tokenizer", ["bytes", "sotu_1024"])
def test_rows_that_fit_hold_whole_documents_of_an_id_a_symbol_with_answers_alone_as_targets(
  tokenizer
):
  made = corpus(tokenizer)
  tokens, decode = made.tokens("recall", "train"), made.tokenizer.decode
  assert set(np.diff(tokens.start)) == {SIZE}
  packed = pipeline.eval_batches(made, source="recall", split="train", batch=8, length=2 * SIZE)
  alone = recall.rows(tokens, batch=8, limit=9)
  for batch, count in ((packed[0], 2), (alone[0], 1)):
    for row in range(8):
      token_L, weight_L = batch["token_BL"][row], batch["weight_BL"][row]
      assert weight_L.sum() == count * PAIRS and len(set(batch["segment_BL"][row])) == count
      for begin in range(0, count * SIZE, SIZE):
        said, _ = answers(decode(token_L[begin + 1 : begin + SIZE]))
        target_L = batch["target_BL"][row, begin : begin + SIZE]
        assert list(decode(target_L[weight_L[begin : begin + SIZE] > 0])) == said


def test_documents_one_a_row_are_filled_up_with_rows_that_count_nothing():
  tokens = corpus().tokens("recall", "valid")  # four documents
  found = recall.rows(tokens, batch=3, limit=2)
  assert [batch["token_BL"].shape for batch in found] == [(3, SIZE)] * 2
  assert [batch["weight_BL"].sum() for batch in found] == [3 * PAIRS, PAIRS]
  assert not found[1]["segment_BL"][1:].any()
  assert len(recall.rows(tokens, batch=3, limit=1)) == 1
  uneven = packing.join([np.arange(1, 3), np.arange(3, 7)], eot=0, V=9)
  (batch,) = recall.rows(uneven, batch=2, limit=1)
  assert batch["segment_BL"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
  assert batch["token_BL"].tolist() == [[0, 1, 2, 0, 0], [0, 3, 4, 5, 6]]
  assert batch["weight_BL"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


@pytest.mark.parametrize("sizes, words", [
  ({"pairs": 27}, "source 'recall': .*pairs=27.*1..26"),
  ({"pairs": 0}, "pairs=0"), ({"distance": -1}, "distance=-1"), ({"documents": 0}, "0 documents"),
])
def test_recall_that_cannot_be_made_is_told_with_its_source(sizes, words):
  with pytest.raises(ValueError, match=words):
    corpus(**sizes).documents("recall", "all")
