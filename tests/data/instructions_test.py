"""Instruction data: answers are learnt, prompts are read, and rows keep it so."""

import collections
import itertools
import json
import re

import numpy as np
import pytest

from hybridlm.data import instructions, pipeline, sources, tokenizers

PAIR = {"prompt": "Name a colour.\n", "response": "red é"}
TALK = {"messages": [
  {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "yes"}, {"role": "user", "content": "Sure?"},
  {"role": "assistant", "content": "no"},
]}


def corpus(folder, records, *, template="plain", tokenizer="bytes", cache=None):
  """Returns a corpus of one source of conversations, all of them for every split."""
  (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
  source = sources.Source("talk", "instructions", str(folder / "talk.jsonl"), template=template)
  return pipeline.Corpus(pipeline.DataSpec((source,), tokenizer), folder=cache)


def learnt(made, batches):
  """Returns the text and the ends that targets of weight 1 spell, by row."""
  eot = made.tokenizer.eot
  return [
    "".join("|" if i == eot else chr(i) for i in row[weight > 0])
    for batch in batches
    for row, weight in zip(batch["target_BL"], batch["weight_BL"], strict=True)
  ]


@pytest.mark.parametrize("template, records, want", [
  ("plain", [PAIR], "red \xc3\xa9|"),  # as bytes
  ("plain", [TALK], "yesno|"),
  ("labels", [TALK], "yes\n\nno\n\n|"),
  ("plain", [PAIR, TALK, {"messages": TALK["messages"][:4]}], "red \xc3\xa9|yesno|yes"),
])
def test_only_answers_and_the_ends_after_them_are_targets_that_count(
    tmp_path, template, records, want):
  made = corpus(tmp_path, records, template=template, cache=tmp_path / "ids")
  for _ in range(2):  # the second time from kept ids
    batches = pipeline.eval_batches(made, source="talk", split="all", batch=3, length=11)
    assert "".join(learnt(made, batches)) == want
    made = pipeline.Corpus(made.spec, folder=tmp_path / "ids")


def test_packing_keeps_what_counts_whatever_the_order_of_documents(tmp_path):
  records = [{"prompt": "q" * (i % 5), "response": chr(97 + i)} for i in range(12)]
  made = corpus(tmp_path, records)
  tokens = made.tokens("talk", "train")
  epoch = -(-int(tokens.start[-1]) // 7)
  stream = pipeline.train_batches(made, batch=1, length=7, seed=5)
  for _ in range(2):
    found = collections.Counter("".join(learnt(made, itertools.islice(stream, epoch))))
    want = [document.parts[-1].text for document in made.documents("talk", "train")]
    assert found == collections.Counter([*want, *"|" * len(want)])


def test_templates_write_special_tokens_as_one_id_that_no_text_spells(tmp_path):
  inner = tokenizers.train(["some text some text"], V=258)
  parts = json.loads(inner.text)
  parts["added_tokens"] = [
    {"id": 300 + n, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
     "normalized": False, "special": True}
    for n, name in enumerate(("<|im_start|>", "<|im_end|>"))
  ]
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(parts))
  made = corpus(tmp_path, [{"messages": [
    {"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]}],
    template="chatml", tokenizer=str(path))
  tokens = made.tokens("talk", "all")
  start, end = (made.tokenizer.added()[name] for name in ("<|im_start|>", "<|im_end|>"))
  assert (tokens.flat == start).sum() == 2 and (tokens.flat == end).sum() == 2
  assert made.tokenizer.decode(tokens.flat) == "user\n<|im_end|>\nassistant\na\n"
  counted = tokens.flat[1:][tokens.counts[1:]]
  assert counted.tolist() == [*made.tokenizer.encode("a"), end]
  bare = corpus(tmp_path, [TALK], template="chatml")
  with pytest.raises(ValueError, match=re.escape("source 'talk' needs the special token '<|im_st")):
    bare.tokens("talk", "all")


def test_what_is_learnt_belongs_to_the_fingerprint_of_the_data(tmp_path):
  one = sources.Document("a", "xy", (instructions.Part("x", False), instructions.Part("y", True)))
  other = one._replace(parts=(instructions.Part("xy", True),))
  prints = {sources.fingerprint([each]) for each in (one, other, one._replace(parts=()))}
  assert len(prints) == 3


@pytest.mark.parametrize("record, told", [
  ({"prompt": "x"}, "line 1: not an object with a string under 'response'"),
  ({"prompt": "x", "response": ""}, "line 1: there is no answer to learn"),
  ({"messages": "x"}, "line 1: 'messages' holds no list"),
  ({"messages": [{"role": "tool", "content": "x"}]}, "line 1, message 1: role 'tool' is not one"),
  ({"messages": [{"role": "user"}]}, "line 1, message 1: not an object with a string under 'conte"),
  ({"prompt": "\ud800", "response": "y"}, "line 1: 'prompt' holds half a surrogate pair at 0"),
  ([1], "line 1: not an object"),
])
def test_a_record_of_another_form_is_refused_by_line_and_reason(tmp_path, record, told):
  with pytest.raises(ValueError, match=re.escape(told)):
    corpus(tmp_path, [record]).tokens("talk", "all")


def test_an_unknown_template_is_refused(tmp_path):
  with pytest.raises(ValueError, match="written as 'chat'; templates are plain, labels, chatml"):
    corpus(tmp_path, [PAIR], template="chat").tokens("talk", "all")


def test_plain_text_counts_whole(tmp_path):
  (tmp_path / "a.txt").write_text("plain")
  made = pipeline.Corpus(pipeline.DataSpec((sources.Source("main", "text", str(tmp_path)),)))
  batch, = pipeline.eval_batches(made, source="main", split="all", batch=1, length=6)
  assert made.tokens("main", "all").counts is None and np.all(batch["weight_BL"] == 1)
