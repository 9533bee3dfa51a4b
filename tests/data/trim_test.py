"""Trimmed vocabularies lose no text: what stays, what it is built of, and how texts are cut."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers as library

from hybridlm.data import tokenizers, trim

TEXTS = ["the cat sat on the mat and the other cat sat there too, then the hat sat on the cat",
         "a rat and a cat and 12 hats, 1234 mats: that is what the other one thinks"] * 3
DIGITS = {"type": "Sequence", "pretokenizers": [
  {"type": "Digits", "individual_digits": True},
  {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}


def published(text, *, pairs=True, split=None):
  """Returns a tokenizer with special tokens at both ends of its ids, as published ones have."""
  parts = json.loads(text)
  if not pairs:  # merges as older files have them: one text with a space between
    parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]
  vocab = {"<s>": 0} | {token: i + 1 for token, i in parts["model"]["vocab"].items()}
  last = len(vocab)
  parts["model"]["vocab"] = vocab
  parts["pre_tokenizer"] = split or parts["pre_tokenizer"]
  common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  parts["added_tokens"] = [
    {"id": 0, "content": "<s>", "special": True, **common},
    {"id": last, "content": "<end>", "special": True, **common},
  ]
  parts["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
               {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
             {"SpecialToken": {"id": "<end>", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                       "<end>": {"id": "<end>", "ids": [last], "tokens": ["<end>"]}},
  }
  return tokenizers.Bpe(json.dumps(parts), end="<end>")


@pytest.fixture(scope="module", params=["trained", "published", "digits"])
def parent(request):
  """Returns a tokenizer of some kind: without special tokens, with, and splitting digits off."""
  bpe = tokenizers.train(TEXTS, V=300)
  if request.param == "trained":
    return bpe
  digits = request.param == "digits"
  return published(bpe.text, pairs=digits, split=DIGITS if digits else None)


def trimmed(parent, V, texts=TEXTS, **options):
  """Returns what stays and the tokenizer that is left."""
  keep_V = trim.keep(parent, trim.count(parent, texts), V=V, **options)
  own = json.loads(parent.text).get("added_tokens")
  return keep_V, tokenizers.Bpe(trim.trim(parent, keep_V), end="<end>" if own else None)


@hypothesis.settings(deadline=None, max_examples=25,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(V=st.integers(260, 300), text=st.text(st.one_of(
  st.sampled_from("the cat sat 12\n"), st.characters(codec="utf-8"))))
@hypothesis.example(V=260, text="the other cat \U0001f642 sat <end> 12")
def test_trimmed_ids_mapped_back_write_the_same_text(parent, V, text):
  keep_V, small = trimmed(parent, V)
  ids = small.encode(text)
  assert parent.decode(keep_V[ids]) == text == small.decode(ids)
  assert small.V == len(keep_V) == V and keep_V[small.eot] == parent.eot
  assert (small.byte_lengths_V == parent.byte_lengths_V[keep_V]).all()
  whole = parent.encode(text)
  if set(whole.tolist()) <= set(keep_V.tolist()):  # what survives is cut alike
    assert (keep_V[ids] == whole).all()
  else:
    assert len(ids) > 0


def test_bytes_specials_and_the_end_stay_and_every_token_stays_with_its_parts(parent):
  parts = json.loads(parent.text)
  vocab = parts["model"]["vocab"]
  singles = {i for token, i in vocab.items() if len(token) == 1}
  added = {token["id"] for token in parts.get("added_tokens") or []}
  assert len(singles) == 256
  least = len(singles | added | {parent.eot})
  for V in (least, least + 1, 280, parent.V):
    keep_V, small = trimmed(parent, V)
    stay = set(keep_V.tolist())
    assert singles | added | {parent.eot} <= stay and len(stay) == V
    for pair in parts["model"]["merges"]:
      left, right = pair.split(" ") if isinstance(pair, str) else pair
      if vocab[left + right] in stay:
        assert {vocab[left], vocab[right]} <= stay
    rest = [token for token, i in json.loads(small.text)["model"]["vocab"].items()
            if i not in {new for new, old in enumerate(keep_V) if old in singles | added}]
    made = [left + right for left, right in
            (pair.split(" ") if isinstance(pair, str) else pair
             for pair in json.loads(small.text)["model"]["merges"])]
    assert sorted(rest) == sorted(made)  # no token without its merge, no merge without its token
  assert json.loads(small.text) == json.loads(parent.text) | {
    "added_tokens": parts.get("added_tokens") or []}  # all of it stays: nothing changes


def test_special_tokens_have_new_ids_wherever_the_file_names_them():
  parent = published(tokenizers.train(TEXTS, V=300).text)
  keep_V, small = trimmed(parent, 270)
  new = {int(old): at for at, old in enumerate(keep_V)}
  parts = json.loads(small.text)
  ids = {token["content"]: token["id"] for token in parts["added_tokens"]}
  assert ids == {"<s>": 0, "<end>": new[parent.eot]} and small.eot == 269
  found = library.Tokenizer.from_str(small.text).encode("a", "b").ids
  assert found[-1] == small.eot and len(found) == 3


def brute(parent, count_V, V):
  """Returns the closed vocabulary that drops the fewest places, by trying all."""
  parts = json.loads(parent.text)
  vocab, merges = parts["model"]["vocab"], parts["model"]["merges"]
  built, of = {i: int(count_V[i]) for i in vocab.values()}, {}
  for left, right in reversed(merges):
    token = vocab[left + right]
    of[token] = (vocab[left], vocab[right])
    for part in of[token]:
      built[part] += built[token]
  tokens = list(of)
  best = None
  for mask in range(1 << len(tokens)):
    chosen = {token for at, token in enumerate(tokens) if mask >> at & 1}
    if len(chosen) != V - 257 or any(part in of and part not in chosen
                                     for token in chosen for part in of[token]):
      continue
    lost = sum(built[token] for token in tokens if token not in chosen)
    best = lost if best is None else min(best, lost)
  return best


def test_the_choice_costs_as_few_tokens_as_any_closed_choice():
  parent = tokenizers.train(TEXTS, V=268)
  count_V = trim.count(parent, TEXTS)
  whole = int(count_V.sum())
  for V in (259, 262, 265):
    _, small = trimmed(parent, V)
    assert trim.count(small, TEXTS).sum() - whole <= brute(parent, count_V, V)


def test_counts_are_of_each_id_and_decide_what_stays():
  parent = tokenizers.train(TEXTS, V=300)
  count_V = trim.count(parent, ["cat cat", "cat"])
  ids, counts = np.unique(np.concatenate([parent.encode("cat cat"), parent.encode("cat")]),
                          return_counts=True)
  assert (count_V[ids] == counts).all() and count_V.sum() == counts.sum()
  keep_V, small = trimmed(parent, 260, texts=[" cat cat"] * 3)
  assert len(small.encode(" cat")) == 1 and len(small.encode(" the")) == 4


def test_ids_that_are_asked_for_stay_with_their_parts():
  parent = tokenizers.train(TEXTS, V=300)
  wanted, = parent.encode(" other")
  with_it, small = trimmed(parent, 270, texts=["xyz"], also=[wanted])
  assert wanted in with_it and len(small.encode(" other")) == 1


def test_the_map_is_a_file_that_comes_back_and_a_damaged_one_says_so(tmp_path):
  made = trim.Remap(np.array([0, 3, 4], np.int32), "bpe-1", "bpe-2")
  made.save(tmp_path / trim.REMAP)
  again = trim.Remap.load(tmp_path / trim.REMAP)
  assert again.keep_V.tolist() == [0, 3, 4] and again[1:] == ("bpe-1", "bpe-2")
  assert json.loads((tmp_path / trim.REMAP).read_text())["old_of_new"] == [0, 3, 4]
  good = json.loads((tmp_path / trim.REMAP).read_text())
  for change in ({"format": "x"}, {"old_of_new": [3, 0]}, {"old_of_new": [-1]},
                 {"old_of_new": ["0"]}, {"old_of_new": []}):
    (tmp_path / "bad.json").write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match="bad.json is not a remap of token ids"):
      trim.Remap.load(tmp_path / "bad.json")
  with pytest.raises(FileNotFoundError, match="no such file"):
    trim.Remap.load(tmp_path / "none.json")


def test_sizes_and_choices_that_lose_text_are_refused():
  parent = published(tokenizers.train(TEXTS, V=300).text)
  count_V = trim.count(parent, TEXTS)
  for V in (257, 302):
    with pytest.raises(ValueError, match=f"V={V} must lie between 258, the bytes.*and 301"):
      trim.keep(parent, count_V, V=V)
  with pytest.raises(ValueError, match="counts are of 3 ids, the tokenizer has 301"):
    trim.keep(parent, count_V[:3], V=270)
  with pytest.raises(ValueError, match="id 400 is to stay, and no token"):
    trim.keep(parent, count_V, V=270, also=[400])
  with pytest.raises(ValueError, match="leaves out id 0: bytes, special tokens and the end stay"):
    trim.trim(parent, range(1, 301))
  cat, = parent.encode(" cat")
  with pytest.raises(ValueError, match=f"keep_V keeps id {cat} without its parts"):
    trim.trim(parent, [*range(257), cat, 300])


@pytest.mark.parametrize("change, message", [
  ({"continuing_subword_prefix": "##"}, r"marks parts of words \(continuing_subword_prefix='##'\)"),
  ({"end_of_word_suffix": "</w>"}, r"marks parts of words \(end_of_word_suffix='</w>'\)"),
])
def test_words_with_marked_parts_are_refused(change, message):
  parent = tokenizers.train(TEXTS, V=300)
  parts = json.loads(parent.text)
  parts["model"] |= change
  parent.text = json.dumps(parts)  # as one that the library reads would be
  with pytest.raises(ValueError, match=message):
    trim.keep(parent, np.zeros(parent.V, np.int64), V=270)
  with pytest.raises(ValueError, match=message):
    trim.trim(parent, range(300 + 1))


def test_padding_has_the_new_id_or_none_where_its_token_goes():
  parent = published(tokenizers.train(TEXTS, V=300).text)
  padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
             "pad_type_id": 0, "pad_token": "<end>"}
  keep_V = trim.keep(parent, trim.count(parent, TEXTS), V=270)
  gone = min(set(range(parent.V)) - set(keep_V.tolist()))
  for old, new in ((parent.eot, 269), (gone, None)):
    text = json.dumps(json.loads(parent.text) | {"padding": {**padding, "pad_id": old}})
    made = json.loads(trim.trim(tokenizers.Bpe(text, end="<end>"), keep_V))["padding"]
    assert made == (None if new is None else {**padding, "pad_id": new})
