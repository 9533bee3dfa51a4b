"""How published folders say which tokens frame a text, and which end it."""

import json

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from hybridlm.eval import prompts

BOS, EOS, PAD = 0, 1, 2
SETTINGS = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": None}


def text(*, frame=True):
  """A byte-level tokenizer of 3 special tokens and 256 bytes, as JSON."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = ["<bos>", "<eos>", "<pad>", *letters]
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(
    vocab={word: i for i, word in enumerate(words)}, merges=[]))
  inner.add_special_tokens(words[:3])
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  if frame:
    inner.post_processor = tokenizers.processors.TemplateProcessing(
      single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)])
  return inner.to_str()


def write(folder, *, frame=True, template=None, **records):
  """A model's folder of these JSON files."""
  (folder / "tokenizer.json").write_text(text(frame=frame))
  if template is not None:
    (folder / "chat_template.jinja").write_text(template)
  for name, record in records.items():
    (folder / f"{name}.json").write_text(json.dumps(record))
  return folder


def test_a_text_starts_with_the_start_token_once(tmp_path):
  own = prompts.of_folder(write(tmp_path, tokenizer_config=SETTINGS))
  assert (own.prefix, own.ends, own.name) == (BOS, (EOS,), tmp_path.name)
  with_start, without = list(own.encode("a b")), list(own.encode("a b", False))
  assert with_start == [BOS, *without] and len(without) == 3
  assert list(own.encode("<bos>a b")) == with_start
  assert own.decode(with_start, True) == "<bos>a b" and own.decode(with_start, False) == "a b"


@pytest.mark.parametrize("flags", [
  {}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True},
  {"add_eos_token": False},
])
@pytest.mark.parametrize("frame", [True, False])
def test_tokenizer_json_alone_decides_about_the_frame(tmp_path, flags, frame):
  own = prompts.of_folder(write(tmp_path, frame=frame, tokenizer_config=SETTINGS | flags))
  assert list(own.encode("a")) == [BOS] * frame + list(own.encode("a", False))
  assert len(own.encode("a", False)) == 1


def test_without_a_start_token_the_end_of_a_text_is_the_prefix(tmp_path):
  settings = {"eos_token": "<eos>"}
  own = prompts.of_folder(write(tmp_path, frame=False, tokenizer_config=settings,
                                config={"bos_token_id": BOS, "eos_token_id": EOS}))
  assert (own.bos, own.prefix, own.ends) == (None, EOS, (EOS,))
  assert BOS not in own.encode("a")


def test_every_end_that_a_file_names_ends_a_text(tmp_path):
  own = prompts.of_folder(write(
    tmp_path, tokenizer_config=SETTINGS, generation_config={"eos_token_id": [PAD, EOS]},
    config={"eos_token_id": EOS},
  ))
  assert own.ends == (EOS, PAD)
  bare = tmp_path / "bare"
  bare.mkdir()
  assert prompts.of_folder(write(bare, config={"eos_token_id": PAD})).ends == (PAD,)
  (bare / "config.json").unlink()
  own = prompts.of_folder(bare)
  assert (own.largest, own.ends) == (258, (259,))  # the id after the largest


def test_a_template_of_its_own_file_comes_before_the_settings(tmp_path):
  named = [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
  settings = {**SETTINGS, "chat_template": named}
  own = prompts.of_folder(write(tmp_path, tokenizer_config=settings))
  assert own.templates == {"default": "A", "tools": "B"}
  assert own.words == {"bos_token": "<bos>", "eos_token": "<eos>"}
  settings["chat_template"] = {each["name"]: each["template"] for each in named}
  assert prompts.of_folder(write(tmp_path, tokenizer_config=settings)).templates == own.templates
  settings["chat_template"] = "C"
  assert prompts.of_folder(write(tmp_path, tokenizer_config=settings)).templates["default"] == "C"
  own = prompts.of_folder(write(tmp_path, tokenizer_config=settings, template="D"))
  assert own.templates == {"default": "D"}


def test_a_tokenizer_of_ours_has_no_special_tokens_but_its_end():
  class Letters:
    eot, V = 26, 27

    def encode(self, text):
      return [ord(letter) - 97 for letter in text]

    def decode(self, ids):
      return "".join(chr(97 + i) for i in ids if i < 26)

  own = prompts.of_tokenizer(Letters(), "letters")
  assert (own.prefix, own.ends, own.encode("abc")) == (26, (26,), [0, 1, 2])
  assert own.largest == 26
  assert own.decode((1, 26), True) == "b" and own.templates == {}


@pytest.mark.parametrize("name,content,words", [
  ("tokenizer.json", "{", "tokenizer.json is not JSON of the tokenizers library"),
  ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
  ("config.json", "[3]", r"config.json holds '\[3\]', not an object"),
  ("tokenizer_config.json", '{"chat_template": [{"template": "A"}]}', "no template with a name"),
  ("tokenizer_config.json", '{"chat_template": ["A"]}', "holds 'A', which is no template"),
  ("tokenizer_config.json", '{"chat_template": {"default": 3}}', "no template with a name"),
  ("tokenizer_config.json", '{"eos_token": "</s>"}', "token '</s>' of tokenizer_config.json is"),
])
def test_a_damaged_file_is_named(tmp_path, name, content, words):
  write(tmp_path, tokenizer_config=SETTINGS)
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=words):
    prompts.of_folder(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
    prompts.of_folder(tmp_path)
