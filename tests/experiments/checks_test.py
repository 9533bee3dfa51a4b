"""A config with a value that no run can use is refused before anything runs, under its key."""

import math

import jax
import pytest

from cases import models
from configs import hymba_prune_twin, quickstart_toy
from experiments import calibration, checks, settings
from experiments.mistakes import is_mistake
from hybridlm.data import pipeline, sources

HUGE = 10**9
VALUES = [
  ("seed=-1", ["seed=-1"]),
  ("seed=4294967296", ["seed=4294967296"]),
  ("data.length=0", ["data.length=0"]),
  ("calibrate.estimator='best'", ["calibrate.estimator='best'", "activation"]),
  ("calibrate.depth='best'", ["calibrate.depth='best'", "kl", "influence"]),
  ("calibrate.axes='HX'", ["calibrate.axes='HX'"]),
  ("calibrate.axes=''", ["calibrate.axes=''"]),
  ("calibrate.split='some'", ["some", "train"]),
  ("distil.temperature=0.0", ["distil.temperature=0.0"]),
  ("distil.temperature=float('nan')", ["distil.temperature=nan"]),
  ("distil.kl=-1.0", ["distil.kl=-1.0"]),
  ("distil.ce=float('inf')", ["distil.ce=inf"]),
  ("distil.kl=0.0", ["distil.kl=0.0", "distil.ce=0.0"]),
  ("distil.precision='fp4'", ["distil.precision='fp4'", "float32, bfloat16, fp8"]),
  ("distil.precision='fp8'", ["distil.precision='fp8'", "wide_ends=4", "none of the"]),
  ("guard.action='hope'", ["guard.action='hope'", "stop, skip, rollback"]),
  ("guard={'action': 'rollback', 'spike': 0.0, 'limit': 10, 'back': 3}",
   ["guard.back=3", "keep=2"]),
  ("distil.wide_ends=-1", ["distil.wide_ends=-1"]),
  ("distil.teacher_precision='int4'", ["distil.teacher_precision='int4'", "int8"]),
  ("teacher.validate_every=-1", ["teacher.validate_every=-1"]),
  ("teacher.save_every=-1", ["teacher.save_every=-1"]),
  ("distil.validate_batches=0", ["distil.validate_batches=0"]),
  ("distil.warmup=-1", ["distil", "warmup=-1"]),
  ("distil.steps=0", ["distil.steps=0"]),
  ("evaluate.speed_repeats=0", ["evaluate.speed_repeats=0"]),
  ("evaluate.ngram=-1", ["evaluate.ngram=-1"]),
  ("evaluate.ngram=20", ["evaluate.ngram=20", "64 bits"]),
  (f"evaluate.ngram={HUGE}", [f"evaluate.ngram={HUGE}", "64 bits"]),
  ("evaluate.batches=0", ["evaluate.batches=0"]),
  ("scratch.peak=-1.0", ["scratch", "peak=-1.0"]),
  ("scratch.run='some'", ["scratch.run='some'"]),
  ("export.format='gguf'", ["export.format='gguf'", "none, hf"]),
  ("export.family='gpt9'", ["export.family='gpt9'", "llama"]),
  ("findings.heads=(5, 2)", ["findings.heads=(5, 2)", "1..4"]),
  ("findings.heads=(0,)", ["findings.heads=(0,)"]),
  ("findings.heads=(2.0,)", ["findings.heads", "whole"]),
  ("calibrate.estimator='activation,F=best'", ["calibrate.estimator=", "best", "flap"]),
  ("calibrate.estimator='activation,Q=flap'", ["calibrate.estimator=", "Q=flap"]),
  ("correct.run='after'", ["correct.run='after'", "none, before, beside"]),
  ("repair.run='best'", ["repair.run='best'", "least_squares"]),
  ("repair.order='last'", ["repair.order='last'", "one_by_one"]),
  ("repair.order='together'", ["repair.order='together'", "repair.target='out'", "mix"]),
  ("repair.target='in'", ["repair.target='in'", "mix, out"]),
  ("repair.gain='half'", ["repair.gain='half'", "rescale"]),
  ("repair.ridge=0.0", ["repair.ridge=0.0"]),
  ("repair.ridge=float('nan')", ["repair.ridge=nan"]),
  ("repair.batches=0", ["repair.batches=0"]),
  ("repair.rigde=0.1", ["repair.rigde is unknown", "repair.ridge"]),
  ("targets.Q=3", ["targets.Q is unknown"]),
  ("targets.V=100", ["targets.V is unknown"]),
  ("targets.N=6", ["N=6", "5"]),
  ("targets.N='few'", ["N='few'"]),
  ("targets.N=4", ["score_GN"]),  # not calibrated
  ("targets.E=11", ["E=11", "10"]),
  ("targets.K=0", ["K=0"]),
  ("targets.F=(16, 8)", ["targets.F=(16, 8)", "pairs"]),
  ("targets.F=((0, 16),)", ["target F: block 0"]),
  ("targets.noop=2", ["noop=2"]),
  ("targets.noop=1", ["score_ssm_X"]),  # not calibrated
  ("targets.floors=(('?', 1),)", ["floors", "?"]),
  ("plan.path='search'", ["plan.path='search'", "search.space is empty"]),
  ("schedule=({'targets': {'D': 17}},)", ["schedule: round 1", "D=17", "16"]),
  ("findings.seeds=0", ["findings.seeds=0"]),
  ("model.window=0", ["model: ", "window=0"]),
  ("model.meta=-1", ["model: ", "meta=-1"]),
  ("model.rope=0.0", ["model: ", "base=0.0"]),
  ("model.global_layers=(3,)", ["model: ", "global_layers names layer 3"]),
  ("model.ssm='mamba1'", ["model: ", "nothing in it uses 'ssm'"]),
  ("assess.recall=('main',)", ["assess.recall=('main',)", "no source of kind 'recall'"]),
  ("assess.steps=0", ["assess.steps=0"]),
]
PARALLEL = [
  ("model.U=9", ["model: ", "ssm has G·H·P=48 channels", "Y=54"]),
  ("model.kv_groups=((0, 1),)", ["model: ", "layer 0 is global"]),
  ("model.kv_groups=((1, 2), (2, 3))", ["model: ", "layer 3; with attention there are 3"]),
  ("model.fusion='product'", ["model: ", "'product'", "mean, sum"]),
  # However many attentions scores will choose.
  ("export.format='hf'", ["export: ", "block 0 joins attention and SSM heads by the mean"]),
]


def grid(data=1):
  """Returns a grid of devices along the batch."""
  return jax.make_mesh((data, 1), ("data", "tensor"), devices=jax.devices()[:data])


@pytest.mark.parametrize("change, words", VALUES)
def test_a_value_that_no_run_can_use_is_refused_under_its_key(change, words, tmp_path):
  refused(quickstart_toy.get_config(), change, words, tmp_path)


def refused(c, change, words, tmp_path):
  key, _, value = change.partition("=")
  *folders, name = key.split(".")
  tree = c
  for folder in folders:
    tree = tree[folder]
  with c.unlocked(), c.ignore_type():
    tree[name] = eval(value)
  with pytest.raises(ValueError) as caught:
    settings.setup(c, grid(), cache=tmp_path / "cache")
  assert is_mistake(caught.value) and "\n" not in str(caught.value)
  assert all(word in str(caught.value) for word in words), str(caught.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, words", PARALLEL)
def test_a_parallel_model_that_cannot_be_is_refused_under_its_key(change, words, tmp_path):
  refused(hymba_prune_twin.get_config(), change, words, tmp_path)


def test_an_estimator_that_cannot_score_a_block_is_refused_before_a_teacher_is_trained(tmp_path):
  c = hymba_prune_twin.get_config()
  c.calibrate.update(estimator="wanda,D=activation,M=activation", axes="HPFDJME")
  s = settings.setup(c, grid(), cache=tmp_path)
  with pytest.raises(ValueError, match="calibrate: estimator 'wanda' cannot score axis E of block"):
    calibration.stage(s)


def test_a_search_without_a_bound_and_one_after_rounds_are_refused(tmp_path):
  c = quickstart_toy.get_config()
  c.plan.path, c.search.space.D = "search", (12, 14)
  with pytest.raises(ValueError, match="plan.path='search': nothing bounds it.*budget.parameters"):
    settings.setup(c, grid(), cache=tmp_path)
  c.budget.parameters = 9000
  assert settings.setup(c, grid(), cache=tmp_path).small is None
  for path in ("search", "mine.json"):
    c.plan.path, c.schedule = path, ({"targets": {"D": 14}},)
    with pytest.raises(ValueError, match=f"schedule and plan.path='{path}' are both given"):
      settings.setup(c, grid(), cache=tmp_path)


def test_heads_of_a_teacher_without_heads_are_refused():
  with pytest.raises(ValueError, match=r"findings.heads=\(2,\): .* '-\*' has no Mamba block"):
    checks.heads([2], models.make(pattern="-*"))
  checks.heads([], models.make(pattern="-*"))
  with pytest.raises(ValueError, match=r"findings.heads=\(2,\): .* 'M-=' has parallel blocks"):
    checks.heads([2], models.make(pattern="M-=", U=8))


def corpus(tmp_path, sizes, tokenizer="bytes"):
  """Returns a corpus whose training split has documents of these many letters."""
  c = quickstart_toy.get_config()
  for number, size in enumerate(sizes, 1):
    (tmp_path / f"{number:02d}.txt").write_text("x" * size)
  (tmp_path / "00.txt").write_text("test")
  c.data.sources.main.update(kind="text", path=str(tmp_path))
  c.data.tokenizer = tokenizer
  return settings.corpus(c)


def test_a_split_of_just_one_sequence_is_long_enough_and_one_token_more_is_not(tmp_path):
  found = corpus(tmp_path, (3, 7, 1))
  checks.sequence(found, "main", "train", 14)  # 11 letters and 3 ends
  with pytest.raises(ValueError, match="data.sources.main.*'train' has 14 tokens.*length=15"):
    checks.sequence(found, "main", "train", 15)


def test_where_tokens_stand_for_many_bytes_the_split_is_counted_in_tokens(tmp_path):
  found = corpus(tmp_path, (30, 70, 1), tokenizer="sotu_1024")
  count = int(found.tokens("main", "train").start[-1])
  assert 3 < count
  checks.sequence(found, "main", "train", count)
  with pytest.raises(ValueError, match=f"has {count} tokens"):
    checks.sequence(found, "main", "train", count + 1)


@pytest.mark.parametrize("sizes,layout,message", [
  ({"data": 2, "sequence": 3}, "sharded", "data.length=32 is not a multiple of mesh.sequence=3"),
  ({"fsdp": 2, "tensor": 3}, "rows", "teacher.batch=2 is not .*mesh.fsdp × mesh.tensor=6"),
  ({"data": 2}, "row", "mesh.layout='row' is not one of sharded, copied, rows"),
])
def test_rows_and_positions_that_a_mesh_or_a_layout_cannot_divide_are_refused(
  sizes, layout, message
):
  c = quickstart_toy.get_config()
  c.mesh.layout = layout
  count = math.prod(sizes.values())
  place = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])
  with pytest.raises(ValueError, match=message):
    checks.values(c, place)


def test_rows_that_watch_a_run_are_divided_as_its_own_are():
  c, sizes = quickstart_toy.get_config(), {"fsdp": 2, "tensor": 2}
  c.mesh.layout = "rows"
  c.teacher.batch = c.distil.batch = 4
  c.evaluate.batch = 6
  place = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:4])
  with pytest.raises(ValueError, match="evaluate.batch=6 is not .*mesh.fsdp × mesh.tensor=4"):
    checks.values(c, place)


def test_a_batch_that_the_devices_do_not_divide_is_refused(tmp_path):
  with pytest.raises(ValueError, match="teacher.batch=2 is not a multiple of .* mesh.fsdp=4"):
    settings.setup(quickstart_toy.get_config(), grid(4), cache=tmp_path)


def test_a_template_whose_tokens_the_tokenizer_has_not_is_refused_before_anything_runs(tmp_path):
  talk = tmp_path / "talk.jsonl"
  talk.write_text('{"prompt": "ask", "response": "answer"}\n')
  for template in ("labels", "chatml"):
    source = sources.Source("talk", "instructions", str(talk), template=template)
    found = pipeline.Corpus(pipeline.DataSpec((source,)))
    if template == "labels":
      checks.sequence(found, "talk", "all", 8)
      continue
    with pytest.raises(ValueError, match="data.sources.talk needs the special token '<.im_start"):
      checks.sequence(found, "talk", "all", 8)
