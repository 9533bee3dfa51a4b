"""Trimming a model's vocabulary: the rows that stay compute as before, files say new ids."""

import json

import numpy as np
import pytest

import hybridlm
from cases import commands, models
from experiments import console, trim
from hybridlm import lazy
from hybridlm.data import tokenizers
from hybridlm.data import trim as trimming
from hybridlm.interop import native

TEXTS = ["the cat sat on the mat and the other cat sat there too, then the hat sat on the cat",
         "a rat and a cat and 12 hats, 1234 mats: that is what the other one thinks"] * 3
COMMON = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
          "special": True}


def files(folder):
  """Writes the files of a published tokenizer of 302 ids: `<s>` is 0, `<end>` and `<pad>` last."""
  parts = json.loads(tokenizers.train(TEXTS, V=300).text)
  vocab = {"<s>": 0} | {token: i + 1 for token, i in parts["model"]["vocab"].items()}
  parts["model"]["vocab"] = vocab
  ids = {"<s>": 0, "<end>": len(vocab), "<pad>": len(vocab) + 1}
  parts["added_tokens"] = [{"id": i, "content": token, **COMMON} for token, i in ids.items()]
  settings = {"eos_token": "<end>", "added_tokens_decoder": {
    str(i): {"content": token} for token, i in ids.items()}}
  folder.mkdir()
  for name, plain in {
    "tokenizer.json": parts, "tokenizer_config.json": settings, "vocab.json": vocab,
    "generation_config.json": {
      "bos_token_id": 0, "eos_token_id": [ids["<end>"]], "pad_token_id": ids["<pad>"],
      "suppress_tokens": [7], "temperature": 0.5},
  }.items():
    (folder / name).write_text(json.dumps(plain))
  return ids


@pytest.fixture(name="place")
def _place(request, tmp_path, monkeypatch):
  """A folder with a text and a model of 302 ids, two rows of padding and a tokenizer."""
  monkeypatch.chdir(tmp_path)
  ids = files(tmp_path / "like")
  variant = getattr(request, "param", "untied")
  cfg = models.make(variant, pattern="M-", V=304, vocabulary=ids["<pad>"] + 1)
  native.write(tmp_path / "model", cfg, lazy.of(models.params(cfg)), like=tmp_path / "like")
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "one.txt").write_text("\n".join(TEXTS))
  return tmp_path


def run(*argv):
  """Returns the exit code of the command."""
  return console.call(trim.main, ["trim", *argv])


LINE = ("--model=model", "--text=texts", "--V=270", "--target=small")


@pytest.mark.parametrize("place, form", [("tied", "hybridlm"), ("untied", "hf")],
                         indirect=["place"])
def test_logits_of_the_tokens_that_stay_are_the_parents(place, capsys, form):
  assert run(*LINE, f"--format={form}") == 0, capsys.readouterr().err
  cfg, params = hybridlm.load(place / "model")
  small_cfg, small = hybridlm.load(place / "small")
  assert (small_cfg.V, small_cfg.real_vocabulary) == (270, 270)
  remap = trimming.Remap.load(place / "small" / trimming.REMAP)
  parent = tokenizers.load("model", V=304)
  tokenizer = tokenizers.load("small")
  assert (remap.parent, remap.trimmed) == (tokenizers.load("model").fingerprint,
                                           tokenizer.fingerprint)
  text = "the other cat thinks \U0001f642 1234"
  ids = tokenizer.encode(text)
  assert parent.decode(remap.keep_V[ids]) == text and tokenizer.decode(ids) == text
  want = hybridlm.forward(cfg, params, remap.keep_V[ids][None])[..., remap.keep_V]
  got = hybridlm.forward(small_cfg, small, np.asarray(ids)[None])
  np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))
  out = capsys.readouterr().out
  assert "tokens: " in out and "with 302 ids" in out and "with 270" in out and "saved: " in out


def test_the_files_beside_the_model_speak_of_new_ids(place, capsys):
  assert run(*LINE, "--format=hf") == 0, capsys.readouterr().err
  names = {path.name for path in (place / "small").iterdir()}
  assert {"tokenizer.json", "tokenizer_config.json", "remap.json", "generation_config.json"} < names
  assert "vocab.json" not in names
  plain = {name: json.loads((place / "small" / f"{name}.json").read_text())
           for name in ("config", "tokenizer_config", "generation_config", "tokenizer")}
  config = plain["config"]
  assert [config[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [0, [268], 269]
  assert config["vocab_size"] == 270
  assert plain["generation_config"] == {
    "bos_token_id": 0, "eos_token_id": [268], "pad_token_id": 269, "temperature": 0.5}
  decoder = plain["tokenizer_config"]["added_tokens_decoder"]
  assert {i: token["content"] for i, token in decoder.items()} == {
    "0": "<s>", "268": "<end>", "269": "<pad>"}
  added = {token["content"]: token["id"] for token in plain["tokenizer"]["added_tokens"]}
  assert added == {"<s>": 0, "<end>": 268, "<pad>": 269}
  assert tokenizers.load("small").eot == 268


def test_ids_that_only_a_settings_file_names_stay_and_older_vocabularies_are_left_out(
  place, capsys
):
  path = place / "model" / "generation_config.json"
  gone = 290  # a merged token that the text does not need
  path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_bos_token_id": gone}))
  (place / "model" / "tokenizer.model").write_bytes(b"speaks of old ids")
  assert run(*LINE) == 0, capsys.readouterr().err
  remap = trimming.Remap.load(place / "small" / trimming.REMAP)
  new, = np.flatnonzero(remap.keep_V == gone)
  plain = json.loads((place / "small" / "generation_config.json").read_text())
  assert plain["forced_bos_token_id"] == new
  assert not (place / "small" / "tokenizer.model").exists()


@pytest.mark.parametrize("argv, words", [
  (("--model=model", "--target=small"), "give --V="),
  (("--V=270", "--target=small"), "give --model=PATH, or --config=FILE"),
  (("--model=none", "--V=270", "--target=small"), "no such file or folder"),
  ((*LINE, "--V=258"), "--V=258: V=258 must lie between 259"),
  ((*LINE, "--V=303"), "and 302, all there are"),
  ((*LINE, "--tokenizer=bytes"), "has no merges: there is nothing to trim"),
  ((*LINE, "--tokenizer=sotu_1024"), "has 1024 ids, the model model knows 302"),
  ((*LINE, "--end=<none>"), "has no token '<none>'"),
  ((*LINE, "--family=llama"), "--family=llama needs --format=hf"),
  ((*LINE, "--format=hf", "--family=llama"), "llama"),
  ((*LINE, "--target=texts"), "holds files that hybridlm did not write"),
  (("--config=configs/quickstart_toy.py", "--V=270", "--target=small"), "teacher.path is empty"),
  (("--config=configs/quickstart_toy.py", "--V=270", "--target=small", "--end=x"),
   "--end is for a model without a config"),
])
def test_what_cannot_be_trimmed_is_one_line_and_nothing_is_written(place, capsys, argv, words):
  before = commands.files(place)
  assert run(*argv) == 2
  captured = capsys.readouterr()
  assert words in captured.err and captured.err.count("\n") == 1
  assert commands.files(place) == before


def test_a_config_says_what_to_trim_and_takes_the_result_as_its_teacher(place, capsys):
  source = ["--config.data.sources.main.kind=text", "--config.data.sources.main.path=texts"]
  job = ["--config=configs/quickstart_toy.py", "--config.data.tokenizer=teacher", *source]
  (place / "texts" / "two.txt").write_text(TEXTS[0])
  assert run(*job, "--config.teacher.path=model", "--V=280", "--target=small") == 0, (
    capsys.readouterr().err)
  assert run("--model=small", "--text=texts", "--V=262", "--target=smaller") == 0, (
    capsys.readouterr().err)  # trimmed once more
  assert tokenizers.load("smaller").V == 262
  parent = tokenizers.load("small")
  remap = trimming.Remap.load("smaller/remap.json")
  assert remap.parent == parent.fingerprint
