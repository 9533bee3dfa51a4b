"""Next-sentence choices: how they are made, and that the right model gets them right."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.eval import choice, targets

DOCUMENTS = [
  " ".join(f"The {name} of document {d} comes as number {i}." for i, name in enumerate(
    ["heron", "badger", "otter", "kestrel", "newt", "adder", "plover", "stoat"]))
  for d in range(3)
]


def encode(text, special):
  """Bytes."""
  return list(text.encode())


def next_byte(params, batch):
  """A model that knows one text: after any two of its bytes it is sure of the third."""
  before_BL = jnp.pad(jnp.asarray(batch["token_BL"])[:, :-1], ((0, 0), (1, 0)))
  return params[before_BL, batch["token_BL"]], jnp.eye(256)


def table(texts):
  """Log-counts of a byte after two others, in all texts."""
  counts = np.ones((256, 256, 256), np.float32)
  for text in texts:
    ids = list(text.encode())
    np.add.at(counts, (ids[:-2], ids[1:-1], ids[2:]), 100)
  return jnp.log(jnp.asarray(counts))


def test_sentences_are_cut_at_marks_before_capitals_only():
  text = 'He left at 3.15 p.m. yesterday.  "Did he?" She asked.\n(He did!) So it ends'
  assert choice.sentences(text) == [
    "He left at 3.15 p.m. yesterday.", '"Did he?"', "She asked.", "(He did!)", "So it ends",
  ]
  assert choice.sentences(" \n") == []


def test_an_item_is_a_place_in_a_document_and_other_sentences_of_it():
  found = choice.items(DOCUMENTS, count=9, seed=4, context=2)
  assert len(found) == 9
  for item in found:
    home = [text for text in DOCUMENTS if f"{item.context} {item.options[item.answer]}" in text]
    assert len(home) == 1
    assert all(option in choice.sentences(home[0]) for option in item.options)
    assert len(set(item.options)) == 4 and not any(o in item.context for o in item.options)
  assert len({item.options[item.answer] for item in found}) == 9
  assert len({item.answer for item in found}) > 1


def test_a_seed_decides_the_items_and_another_changes_them():
  one, same, other = (choice.items(DOCUMENTS, count=5, seed=seed) for seed in (1, 1, 2))
  assert one == same and one != other


def test_texts_with_too_few_sentences_are_refused():
  with pytest.raises(ValueError, match="16 items wanted, the 3 documents give 15"):
    choice.items(DOCUMENTS, count=16, seed=0)
  repeated = ["It is the same sentence again. " * 9]
  with pytest.raises(ValueError, match="1 items wanted, the 1 documents give 0"):
    choice.items(repeated, count=1, seed=0)


def test_the_option_of_largest_mean_log_probability_a_token_is_chosen():
  def fixed(params, batch):  # byte b has logit -b·params, whatever came before
    shape = batch["token_BL"].shape
    return jnp.ones((*shape, 1)), -params * jnp.arange(256.0)[None] / 256

  # Mean, not sum: the long option is made of likelier bytes, though it sums to less.
  item = choice.Item("Context.", ("zz", "!" * 60, "yyy"), 1)
  short = item._replace(answer=0)
  found = choice.measure(targets.make(fixed), jnp.float32(9), [item, short, item], encode,
                         prefix=0, vocabulary=256, batch=2, length=99)
  assert found["accuracy"] == 2 / 3 and found["chance"] == pytest.approx(1 / 3)
  assert found["count"] == 3 and found["low"] < 2 / 3 < found["high"]


def test_a_model_that_knows_the_document_chooses_right_and_one_that_knows_nothing_does_not():
  # Each place differs from the others by its animal and number, which its context foretells.
  items = [
    choice.Item(f"Then {a}", tuple(f"{b}-{b}{b}" for b in "pqrs"), "pqrs".index(a))
    for a in "pqrsqr"
  ]
  params = table([f"Then {a} {a}-{a}{a}" for a in "pqrs"])
  score = targets.make(next_byte)
  sizes = {"prefix": 0, "vocabulary": 256, "batch": 3, "length": 32}
  known = choice.measure(score, params, items, encode, **sizes)
  assert known["accuracy"] == 1.0 and known["chance"] == 0.25
  flat = choice.measure(score, jnp.zeros_like(params), items, encode, **sizes)
  assert flat["accuracy"] == 1 / 6  # the first of equals: right where the answer is "p"
