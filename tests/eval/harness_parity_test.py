"""The adapter gives the harness what its own adapter gives it, on the same weights and tasks."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import published
from experiments import evaluate, mistakes, tasks
from hybridlm import lazy
from hybridlm.eval import prompts as texts
from hybridlm.interop import huggingface

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LIMIT = 20
CONTEXT = 128
NAMES = ("local_piqa", "local_text", "local_writing")
WRITING = """task: local_writing
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e ", "."], max_gen_toks: 16, do_sample: false}}
process_results: !function sums.texts
metric_list:
  - {{metric: letters, aggregation: mean, higher_is_better: true}}
  - {{metric: checksum, aggregation: mean, higher_is_better: true}}
"""
# Numbers that say whether two texts are the same: a random model never gives the true one.
SUMS = """import zlib


def texts(doc, results):
  return {"letters": len(results[0]), "checksum": zlib.crc32(results[0].encode()) % 100003}
"""


@pytest.fixture(name="local", scope="module")
def _local(tmp_path_factory):
  """A folder of three local tasks."""
  folder = tmp_path_factory.mktemp("tasks")
  tasks.require()
  tasks.write(folder)
  path = json.dumps(str(folder / "local_piqa.jsonl"))
  (folder / "local_writing.yaml").write_text(WRITING.format(path=path))
  (folder / "sums.py").write_text(SUMS)
  return folder


@pytest.fixture(name="folder", scope="module", params=["llama", "nemotron_h"])
def _folder(request, tmp_path_factory):
  """A random model with a tokenizer of its own, as transformers writes it."""
  folder = tmp_path_factory.mktemp(request.param)
  words = [each["question"] for each in tasks.piqa()][:400]
  published.save(request.param, folder, words, context=CONTEXT)
  return folder


@pytest.fixture(name="model", scope="module")
def _model(folder):
  cfg, leaves = huggingface.open(folder)
  params = {path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()}
  return cfg, lazy.tree(params), texts.of_folder(folder)


@pytest.fixture(name="theirs", scope="module")
def _theirs(folder):
  from lm_eval.models.huggingface import HFLM

  return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3, max_length=CONTEXT)


def ours(model, **extra):
  from hybridlm.eval import harness, targets

  cfg, params, prompts = model

  def hidden(params, batch):
    return hybridlm.api.apply_hidden(cfg, params, batch)

  extra = {"vocabulary": cfg.V, "batch": 4, "length": CONTEXT} | extra
  return harness.Adapter(targets.make(hidden), params, prompts, **extra)


def asked(method, *arguments):
  from lm_eval.api.instance import Instance

  return [Instance(method, {}, each, number) for number, each in enumerate(arguments)]


def test_results_of_local_tasks_are_those_of_the_harness_own_adapter(local, model, theirs):
  from hybridlm.eval import harness

  adapter = ours(model, generate=tasks.generator(*model[:2]))
  theirs.batch_size_per_gpu = 1  # see test_generated_text_ends_where_the_harness_own_ends
  found, wanted = (
    harness.evaluate(each, NAMES, include_path=str(local), limit=LIMIT)
    for each in (adapter, theirs)
  )
  same(found, wanted, NAMES)
  assert wanted["local_text"]["bits_per_byte"] > 1 and 0 < wanted["local_piqa"]["acc"] < 1


def same(found, wanted, names):
  """Whether two runs of tasks agree, in numbers that say something."""
  assert set(found) == set(wanted) == set(names)
  numbers = [(task, key) for task in names for key, value in wanted[task].items()
             if isinstance(value, (int, float)) and not key.endswith("_stderr")]
  assert len(numbers) >= 2 * len(names)
  for task, key in numbers:
    assert found[task][key] == pytest.approx(wanted[task][key], rel=1e-3), (task, key)
  # Texts are the same to the letter.
  assert found["local_writing"]["checksum"] == wanted["local_writing"]["checksum"] > 0
  assert wanted["local_writing"]["letters"] > 1


def test_the_command_gives_what_the_harness_own_adapter_gives_of_chats(
  local, folder, theirs, tmp_path, capsys
):
  from hybridlm.eval import harness

  names, out = ("local_piqa", "local_writing"), tmp_path / "out.json"
  theirs.batch_size_per_gpu = 1
  wanted = harness.evaluate(theirs, names, include_path=str(local), limit=LIMIT, chat=True)
  code = evaluate.start([
    "evaluate", f"--model={folder}", f"--tasks={','.join(names)}", f"--include_path={local}",
    "--apply_chat_template", f"--limit={LIMIT}", "--batch=4", f"--out={out}",
  ])
  assert code == 0, capsys.readouterr().err
  found = json.loads(out.read_text())["tasks"]
  same(found, wanted, names)
  plain = harness.evaluate(theirs, names, include_path=str(local), limit=LIMIT)
  assert plain["local_writing"]["checksum"] != wanted["local_writing"]["checksum"]
  assert f"| local_writing | checksum | {found['local_writing']['checksum']:.4f} |" in (
    capsys.readouterr().out)


def test_each_request_gets_the_same_answer(model, theirs):
  long = "one two three four five six seven " * 20
  asks = asked(
    "loglikelihood", ("The sun", " rises"), ("The sun ", "rises"), ("", "rises in the east"),
    ("<bos>", "x"), ("<bos>The sun", " rises"), ("", "<bos>The sun"), (long, " eight nine"),
    ("caf", "\u00e9 12345"), ("a" * 300, "b" * 40), ("The sun", "'s light\n\nfades"),
  )
  adapter = ours(model)
  found, wanted = adapter.loglikelihood(asks), theirs.loglikelihood(asks)
  assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
  assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], rel=1e-4)
  rolling = asked("loglikelihood_rolling", ("short",), (long,), ("",), ("<bos>" + long + "end",))
  np.testing.assert_allclose(adapter.loglikelihood_rolling(rolling),
                             theirs.loglikelihood_rolling(rolling), rtol=1e-4)


@pytest.mark.parametrize("flags", [
  {"add_bos_token": False}, {"add_eos_token": False}, {"add_bos_token": True}, {},
])
@pytest.mark.parametrize("framed", [True, False])
def test_a_text_is_framed_as_transformers_frames_it(tmp_path, flags, framed):
  import transformers

  inner = published.tokenizer(["one two three four"])
  if not framed:
    inner.post_processor = None
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>").save_pretrained(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | flags))
  theirs, own = transformers.AutoTokenizer.from_pretrained(tmp_path), texts.of_folder(tmp_path)
  for text in ("one two", ""):
    for special in (True, False):
      wanted = theirs.encode(text, add_special_tokens=special)
      assert list(own.encode(text, special)) == wanted
  assert own.encode("one", True)[0] == 0 or not framed


def test_a_greedy_continuation_is_told_from_another(model, theirs):
  cfg, params, prompts = model
  ids = list(prompts.encode("The sun is"))
  start = len(ids)
  for _ in range(6):
    ids.append(int(hybridlm.forward(cfg, params, np.array([ids]))[0, -1].argmax()))
  from hybridlm.eval import requests

  pairs = [requests.Pair(tuple(ids[:start]), tuple(ids[start:])),
           requests.Pair(tuple(ids[:start]), (*ids[start:-1], ids[-1] ^ 1))]
  found = ours(model)._run(pairs, "greedy")
  wanted = theirs._loglikelihood_tokens([(None, list(p.context), list(p.target)) for p in pairs])
  assert [one.greedy for one in found] == [greedy for _, greedy in wanted] == [True, False]
  assert [one.logprob for one in found] == pytest.approx([one for one, _ in wanted], rel=1e-4)


def test_generated_text_ends_where_the_harness_own_ends(model, theirs):
  until = {"until": ["e ", "\n"], "max_gen_toks": 24, "do_sample": False}
  asks = asked("generate_until", ("The sun is", until), ("one two " * 60, until), ("A", until),
               ("Because the", {**until, "until": ["zzz"], "max_gen_toks": 9}))
  # One row a batch there: rows that go on after their stop string are another matter.
  theirs.batch_size_per_gpu = 1
  wanted = theirs.generate_until(asks)
  assert ours(model, generate=tasks.generator(*model[:2])).generate_until(asks) == wanted
  assert any(wanted)


def test_what_a_request_samples_depends_on_its_number_and_the_seed_alone(model):
  settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 0}
  asks = asked("generate_until", *([("The sun is", settings)] * 3), ("A", settings),
               ("one two three", settings))
  write = tasks.generator(*model[:2])
  found = {batch: ours(model, generate=write, batch=batch).generate_until(asks)
           for batch in (1, 2, 4)}
  assert found[1] == found[2] == found[4]
  assert len(set(found[1][:3])) == 3 and all(found[1])
  other = ours(model, generate=write, seed=1).generate_until(asks)
  assert all(one != two for one, two in zip(found[1], other, strict=True))


def test_settings_that_change_no_text_are_taken(model):
  write = ours(model, generate=tasks.generator(*model[:2])).generate_until
  plain = {"until": [], "max_gen_toks": 5, "do_sample": False}
  more = {"use_cache": True, "num_return_sequences": 1, "num_beams": 1, "top_k": -1}
  assert write(asked("generate_until", ("a b", plain | more))) == write(
    asked("generate_until", ("a b", plain)))


def test_a_chat_becomes_the_prompt_that_transformers_makes(model, theirs):
  chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  "}]
  adapter, name = ours(model), model[2].name
  open_end = [*chat, {"role": "assistant", "content": "Well, "}]
  for messages, reply in ((chat, True), (open_end, False)):
    assert adapter.apply_chat_template(messages, reply) == theirs.apply_chat_template(
      messages, reply)
  assert adapter.chat_template(True) == theirs.chat_template(True)
  assert adapter.tokenizer_name == name and adapter.chat_template(False) is None
  with pytest.raises(ValueError, match=f"{name} has no chat template 'other'; it has default"):
    adapter.chat_template("other")


def test_a_template_that_refuses_system_messages_goes_without_them(model):
  refusing = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
              "{% for m in messages %}{{ m['content'] | trim }};{% endfor %}")
  cfg, params, prompts = model
  import dataclasses

  adapter = ours((cfg, params, dataclasses.replace(prompts, templates={"default": refusing})))
  chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}]
  assert adapter.apply_chat_template(chat) == "Hi;"
  assert adapter.apply_chat_template(chat, add_generation_prompt=False) == "Hi"
  with pytest.raises(ValueError, match="the chat template refuses this chat: no"):
    from hybridlm.eval import chat as chats

    chats.render(refusing, chat, words={}, reply=True)


@pytest.mark.parametrize("settings,words", [
  ({"num_beams": 4}, "generation setting num_beams=4 must be 1"),
  ({"num_return_sequences": 2}, "generation setting num_return_sequences=2 must be 1"),
  ({"penalty_alpha": 0.5}, "generation setting 'penalty_alpha' is unknown"),
  ({"max_gen_toks": CONTEXT}, f"{CONTEXT} new tokens leave no room for a prompt in"),
])
def test_generation_that_cannot_be_done_is_refused(model, settings, words):
  adapter = ours(model, generate=tasks.generator(*model[:2]))
  with pytest.raises(ValueError, match=words):
    adapter.generate_until(asked("generate_until", ("a", settings)))
  with pytest.raises(ValueError, match="no way to generate"):
    ours(model).generate_until(asked("generate_until", ("a", {})))


def bare():
  """An adapter that answers nothing."""
  from hybridlm.eval import harness

  reader = texts.of_tokenizer(types.SimpleNamespace(eot=0, V=1), "none")
  return harness.Adapter(lambda params, batch: None, None, reader, vocabulary=1)


TASK = "task: {name}\ndataset_path: {path}\noutput_type: multiple_choice\n"


def test_a_task_without_its_data_is_one_line_that_names_it(tmp_path, local):
  from hybridlm.eval import harness

  for name, path in (("far", "somebody/some-data"), ("near", json.dumps(str(tmp_path / "gone")))):
    (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, path=path))
  hint = "HF_DATASETS_OFFLINE=0 HF_HUB_OFFLINE=0"
  for name, words, hinted in (("far", "somebody/some-data", True), ("near", "gone", False)):
    with pytest.raises(ValueError, match=f"task '{name}' cannot be loaded: .*{words}") as caught:
      harness.evaluate(bare(), [name], include_path=str(tmp_path))
    assert (hint in str(caught.value)) is hinted and "\n" not in str(caught.value)
    assert mistakes.is_mistake(caught.value)


def test_an_unknown_task_is_named_with_its_neighbours(local):
  from hybridlm.eval import harness

  with pytest.raises(ValueError, match="task 'local_pika' is unknown; nearest: local_piqa"):
    harness.evaluate(bare(), ["local_pika"], include_path=str(local))
