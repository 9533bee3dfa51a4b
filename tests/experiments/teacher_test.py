"""The teacher's store, and distillation in several runs: what they hold, reuse and refuse."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import commands
from configs import quickstart_toy
from experiments import artefacts, lessons, pipeline, settings, storing, teacher
from hybridlm import bind
from hybridlm.data import store

V, STEPS, BATCH = 257, 6, 2


class Interrupted(Exception):
  """Stands for whatever kills a run."""


def grid(*sizes):
  """Returns a mesh of the first devices."""
  devices = jax.devices()[: int(np.prod(sizes))]
  kinds = (jax.sharding.AxisType.Auto,) * 4
  return jax.make_mesh(
    sizes, ("data", "fsdp", "tensor", "sequence"), devices=devices, axis_types=kinds)


def setup(place, *, mesh=(1, 1, 1, 1), **changes):
  """Returns a toy job on little text: sections changed, `distil={"steps": 3}`."""
  c = quickstart_toy.get_config()
  c.model.update(pattern="-", K=None, J=None, E=None, G=None, H=None, P=None, N=None, W=None)
  c.targets.update(H=None, P=None, J=None)
  c.calibrate.axes = "FD"
  c.data.sources.main.update(kind="text", path=str(place / "text"))
  c.evaluate.update(outside="main", ngram=0)
  c.findings.heads = ()
  c.distil.update(steps=STEPS, batch=BATCH, temperature=2.0)
  c.store.update(dtype="float32")
  for name, value in changes.items():
    c[name].update(value)
  return settings.setup(c, grid(*mesh), cache=place / "cache")


def fill(folder, s, taught):
  """Writes the store of a job into a folder, as its stage does."""
  folder.mkdir(exist_ok=True)
  storing.write(s, "store").run(folder, {"teacher": taught})
  return folder


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory):
  """A folder with `text`, a finished `teacher`, and its `store` of all tokens."""
  place = tmp_path_factory.mktemp("place")
  (place / "text").mkdir()
  for i in range(30):
    (place / "text" / f"{i:02d}.txt").write_text("".join(chr(97 + (i * j) % 26) for j in range(99)))
  s = setup(place)
  artefacts.save_model(place / "teacher", s.cfg, hybridlm.init(s.cfg, seed=1))
  hashes = artefacts.hashes(place / "teacher")
  artefacts.write_json(place / "teacher" / "done.json", {"files": hashes})
  fill(place / "store", s, place / "teacher")
  return place


def distil(place, **changes):
  """Returns the job that learns from the store, checked."""
  s = setup(place, distil={"store": str(place / "store"), **changes})
  return s, storing.opened(s)


def test_learning_from_a_store_of_all_tokens_equals_learning_from_the_teacher(place):
  s, found = distil(place)
  student = hybridlm.init(s.cfg, seed=2)
  taught = artefacts.load_model(place / "teacher")[1]
  batch = next(s.train_batches(s.c.distil, s.c.seed + 1).joined(found))
  terms = {"temperature": 2.0, "kl": 1.0, "ce": 0.5}
  read = {name: jnp.asarray(value) for name, value in batch.items()}
  online, stored = (
    jax.value_and_grad(lambda params, loss=loss: loss(params, taught, read)["loss"])(student)
    for loss in (bind.distillation_loss(s.cfg, s.cfg, **terms), bind.stored_loss(s.cfg, **terms))
  )
  np.testing.assert_allclose(stored[0], online[0], rtol=1e-6)
  for one, want in zip(jax.tree.leaves(stored[1]), jax.tree.leaves(online[1]), strict=True):
    np.testing.assert_allclose(one, want, atol=1e-6 * float(jnp.abs(want).max()))
  valid = found.join_valid(s.validation(s.c.distil)[0])
  assert valid["top_id_BLT"].shape == (2, 32, V) and np.all(valid["tail_log_BL"] < -1e29)


def test_the_most_likely_tokens_and_the_rest_come_from_any_mesh_and_batch_size(place, tmp_path):
  some = {"top_k": 5, "batch": 4, "steps": 3}
  split = setup(place, mesh=(2, 1, 1, 2), distil=some, evaluate={"batch": 4})
  few = store.Store(fill(tmp_path / "few", split, place / "teacher"))
  s, whole = distil(place)
  assert few.rows == whole.rows and few.key.train == whole.key.train
  stream = s.train_batches(s.c.distil, s.c.seed + 1)
  for one, all_ in itertools.islice(zip(stream.joined(few), stream.joined(whole), strict=True), 3):
    np.testing.assert_array_equal(one["top_id_BLT"], all_["top_id_BLT"][:, :, :5])
    np.testing.assert_allclose(one["top_log_BLT"], all_["top_log_BLT"][:, :, :5], atol=2e-6)
    rest_BL = np.log(np.exp(all_["top_log_BLT"][:, :, 5:]).sum(2))
    np.testing.assert_allclose(one["tail_log_BL"], rest_BL, atol=2e-6)


def test_a_store_whose_writing_was_killed_goes_on_with_the_next_file(place, tmp_path, monkeypatch):
  s = setup(place, store={"dtype": "float32", "file_mib": 1})
  monkeypatch.setattr(store, "record_size", lambda *_: (1 << 20) // (2 * BATCH))
  seal, calls = store.seal, []

  def dies(folder, part, first, records):
    calls.append((part, first))
    if len(calls) == 3:
      (folder / f"{part}-{first:012d}.partial").write_bytes(b"half")
      raise Interrupted
    return seal(folder, part, first, records)

  calm = commands.files(fill(tmp_path / "calm", s, place / "teacher"))
  monkeypatch.setattr(store, "seal", dies)
  with pytest.raises(Interrupted):
    fill(tmp_path / "killed", s, place / "teacher")
  with pytest.raises(FileNotFoundError, match="it is none, or unfinished"):
    store.Store(tmp_path / "killed")
  shutil.copytree(tmp_path / "killed", tmp_path / "other")
  found = commands.files(fill(tmp_path / "killed", s, place / "teacher"))
  assert calls == [("train", 0), ("train", 4), ("train", 8), ("train", 8), ("valid", 0)]
  assert found == calm and len(calm) == 5
  # Batches and files of other sizes: no row is left out.
  other = setup(place, distil={"batch": 3, "steps": 4}, store={"dtype": "float32", "file_mib": 2})
  found = store.Store(fill(tmp_path / "other", other, place / "teacher"))
  assert calls[5:] == [("train", 6), ("valid", 0)]
  assert not list((tmp_path / "other").glob("*.partial"))
  monkeypatch.undo()
  found.verify()
  streams = (s.train_batches(s.c.distil, s.c.seed + 1).joined(each)
             for each in (found, store.Store(tmp_path / "calm")))
  for one, want in itertools.islice(zip(*streams, strict=True), STEPS):
    np.testing.assert_array_equal(one["top_id_BLT"], want["top_id_BLT"])
    np.testing.assert_allclose(one["tail_log_BL"], want["tail_log_BL"], atol=2e-6)


@pytest.mark.parametrize("changes, told", [
  ({"distil": {"temperature": 1.0}}, "another temperature: it was made with 2.0, this run has 1.0"),
  ({"distil": {"top_k": 9}}, f"another top_k: it was made with {V}, this run has 9"),
  ({"data": {"length": 16}}, "another sequence length: it was made with 32, this run has 16"),
  ({"data": {"tokenizer": "sotu_1024"}}, "another tokenizer: it was made with 'bytes' (bytes), "
   "this run has 'sotu_1024' (bpe-"),
  ({"distil": {"teacher_precision": "int8"}}, "another precision of the teacher: it was made with "
   "'', this run has 'int8'"),
  ({"distil": {"validate_batches": 2}}, "another validation data: it was made with "),
  ({"distil": {"steps": 7}}, "it has 12 rows of training data, too few for 7 steps of 2"),
  ({"distil": {"top_k": 300}}, "distil.top_k=300 must lie in 0..257, the vocabulary"),
  ({"store": {"dtype": "float64"}}, "store.dtype='float64' is not one of float16, float32"),
])
def test_a_store_of_something_else_is_refused_before_anything_is_computed(place, changes, told):
  s = setup(place, **changes)
  s.c.distil.store = str(place / "store")
  with pytest.raises(ValueError, match=re.escape(told)):
    pipeline.build(s)


@pytest.mark.parametrize("changes, told", [
  ({"top_k": 300}, "distil.top_k=300 must lie in 0..257, the vocabulary"),
  ({"intermediate": ("out", "state")}, "distil: intermediate: 'state': no block of '-' has one"),
])
def test_a_loss_that_the_teacher_cannot_have_is_refused_before_anything_is_computed(
    place, changes, told):
  s = setup(place, distil=changes)
  with pytest.raises(ValueError, match=re.escape(told)):
    pipeline.build(s)


def test_other_data_orders_and_damaged_stores_are_refused(place, tmp_path):
  s = setup(place, distil={"store": str(place / "store")})
  s.c.seed = 5
  with pytest.raises(ValueError, match="another training data or their order: it was made with"):
    pipeline.build(s)
  s.c.distil.store = str(tmp_path)
  with pytest.raises(FileNotFoundError, match="there is no store.json"):
    pipeline.build(s)


def test_the_store_of_another_teacher_is_refused_as_soon_as_the_teacher_is_there(place, tmp_path):
  s, _ = distil(place)
  artefacts.save_model(tmp_path, s.cfg, hybridlm.init(s.cfg, seed=3))
  artefacts.write_json(tmp_path / "done.json", {"files": artefacts.hashes(tmp_path)})
  stage, = (each for each in pipeline.build(s) if each.name == "distil")
  with pytest.raises(ValueError, match="distil.store: another teacher: the store was made with "):
    stage.run(tmp_path, {"teacher": tmp_path, "cut": tmp_path})
  assert not (tmp_path / "log.json").exists()


def test_a_teacher_with_a_tokenizer_of_its_own_is_refused_beside_another(place, tmp_path):
  folder = tmp_path / "mine"
  s = setup(place)
  artefacts.save_model(folder, s.cfg, hybridlm.init(s.cfg, seed=1))
  model = folder / artefacts.MODEL
  setup(place, teacher={"path": str(model)})  # it brings none: nothing to compare
  inner = hybridlm.data.tokenizers.train(["aa bb aa bb aa bb cc cc"], V=V)
  (model / "tokenizer.json").write_text(inner.text)
  told = f"data.tokenizer='bytes' is not that of the teacher in {model}, whose ids"
  with pytest.raises(ValueError, match=re.escape(told)):
    setup(place, teacher={"path": str(model)})
  setup(place, teacher={"path": str(model)}, data={"tokenizer": str(model / "tokenizer.json")})


RUNS = ({"steps": 4, "peak": 1e-3}, {"steps": 3, "length": 16, "batch": 4})


def test_runs_of_a_distillation_say_what_differs_and_start_from_the_run_before(place):
  s = setup(place, distil={"stages": RUNS}, scratch={"peak": 4e-3})
  first, last = lessons.setups(s)
  assert (first.c.distil.steps, first.c.data.length) == (4, 32)
  assert (last.c.distil.steps, last.c.distil.batch, last.c.data.length) == (3, 4, 16)
  assert first.c.scratch.peak == pytest.approx(4e-6 / s.c.distil.peak)
  assert last.c.scratch.peak == 4e-3
  made = {stage.name: stage for stage in pipeline.build(s)}
  names = [name for name in made if name.startswith(("distil", "scratch"))]
  assert names == ["distil_stage1", "distil", "scratch_stage1", "scratch"]
  assert made["distil_stage1"].needs[:2] == ("teacher", "cut")
  assert made["distil"].needs[:2] == ("teacher", "distil_stage1")
  assert made["scratch"].needs == ("scratch_stage1",) and made["scratch_stage1"].needs == ()
  stores = [stage.name for stage in teacher.build(s)]
  assert stores == ["teacher", "store_stage1", "store"]
  rows = [next(each.train_batches(each.c.distil, each.c.seed + 1))["token_BL"] for each in (
    first, dataclasses.replace(last, c=first.c))]
  one, other = rows
  assert one.shape == (2, 32) and np.array_equal(one, other)
  assert next(last.train_batches(last.c.distil, last.c.seed + 1))["token_BL"].shape == (4, 16)


def test_a_run_may_have_a_teacher_of_its_own_for_its_store_and_its_lesson(place, tmp_path):
  s = setup(place)
  artefacts.save_model(tmp_path, s.cfg, hybridlm.init(s.cfg, seed=3))
  path = str(tmp_path / artefacts.MODEL)
  s = setup(place, distil={"stages": (*RUNS, {"steps": 2, "teacher": path})})
  made = {stage.name: stage for stage in pipeline.build(s)}
  assert made["distil_stage1"].needs[:2] == ("teacher", "cut")
  assert made["distil"].needs[:2] == ("teacher_stage3", "distil_stage2")
  stores = {stage.name: stage.needs for stage in teacher.build(s)}
  assert stores["store_stage2"] == ("teacher",) and stores["store"] == ("teacher_stage3",)
  other = s.cfg.replace(V=300, vocabulary=300)
  artefacts.save_model(tmp_path / "b", other, hybridlm.init(other, seed=3))
  path = str(tmp_path / "b" / artefacts.MODEL)
  s = setup(place, distil={"stages": ({"teacher": path},)})
  with pytest.raises(ValueError, match="distil.stages: stage 1: teacher=.* predicts 300 tokens, "):
    pipeline.build(s)
  wide = s.cfg.replace(D=s.cfg.D + 4)
  artefacts.save_model(tmp_path / "c", wide, hybridlm.init(wide, seed=3))
  runs = {"teacher": str(tmp_path / "c" / artefacts.MODEL)}
  pipeline.build(setup(place, distil={"stages": (runs,)}))
  s = setup(place, distil={"stages": (runs,), "intermediate": ("out",)})
  with pytest.raises(ValueError, match="distil.stages: stage 1: teacher=.* has not the sizes of"):
    pipeline.build(s)


@pytest.mark.parametrize("runs, told", [
  ({"steps": 3}, "distil.stages=steps: 3 is not a tuple of runs"),
  ((3,), "distil.stages: stage 1: 3 is not a table"),
  (({}, {"stesp": 3}), "distil.stages: stage 2: stesp is unknown; nearest: steps"),
  (({"steps": 0},), "distil.stages: stage 1: distil.steps=0 must be at least 1"),
  (({"steps": "x"},), "distil.stages: stage 1: distil.steps='x'"),
  (({"length": 10**6},), "distil.stages: stage 1: data.sources.main"),
  (({"phases": ((0, (("none", 1.0),)),)},), "distil.stages: stage 1: the phase at step 0 mixes"),
])
def test_a_run_that_cannot_be_is_refused_by_number(place, runs, told):
  s = setup(place)
  with s.c.distil.ignore_type():
    s.c.distil.stages = runs
  with pytest.raises(ValueError, match=re.escape(told)):
    lessons.setups(s)


def test_the_log_of_a_run_goes_on_where_the_run_before_it_ended(tmp_path):
  def log(tokens, seconds):
    return {
      "train": [{"tokens": tokens, "ce": 1.0}], "valid": [],
      "summary": {"steps": 2, "tokens": tokens, "seconds": seconds, "machine": "m",
                  "tokens_per_second": tokens / seconds,
                  "time": {"stepping": seconds, "mfu": seconds / 10, "steps": 2,
                           "process_memory_bytes": tokens}},
    }

  for name, tokens in (("one", 10), ("two", 30)):
    (tmp_path / name).mkdir()
    artefacts.write_json(tmp_path / name / "log.json", log(tokens, tokens / 10))
  for _ in range(2):  # a second time changes nothing
    lessons.go_on(tmp_path / "two", tmp_path / "one")
    found = artefacts.read_json(tmp_path / "two" / "log.json")
    assert [each["tokens"] for each in found["train"]] == [10, 40]
    summary = found["summary"]
    assert (summary["steps"], summary["tokens"], summary["seconds"]) == (4, 40, 4.0)
    assert summary["tokens_per_second"] == 10 and len(summary["stages"]) == 2
    assert summary["time"]["mfu"] == pytest.approx((1 * 0.1 + 3 * 0.3) / 4)
    assert summary["time"]["process_memory_bytes"] == 30 and summary["time"]["steps"] == 4
  lessons.go_on(tmp_path / "one", tmp_path)  # there is none before it
  assert artefacts.read_json(tmp_path / "one" / "log.json")["summary"]["steps"] == 2


@pytest.mark.slow
def test_one_command_writes_a_store_and_another_distils_from_it_in_two_runs(tmp_path):
  unset = [f"--config.model.{name}=" for name in "KJEGHPNW"] + [
    f"--config.targets.{name}=" for name in "HPJ"]
  quick = [
    "--config.model.pattern=-", "--config.calibrate.axes=FD", "--config.evaluate.ngram=0",
    "--config.evaluate.outside=main", "--config.findings.heads=()", "--config.scratch.run=none",
    *unset,
  ]
  argv = [commands.TOY, "--workdir=job", "--config.distil.top_k=7", *quick]
  runs = "--config.distil.stages=({'steps':2},{'steps':2,'length':16,'batch':4,'store':''})"
  learns = "--config.distil.store=job/store_stage1"
  (code, out, err), (again, _, trouble), (refused, _, told) = commands.drive([
    ("teacher", [*argv, runs]), ("distill", [*argv, runs, learns]),
    ("distill", [*argv, "--config.distil.store=job/store_stage1"]),
  ], cwd=tmp_path)
  assert (code, err) == (0, "") and "store_stage1: job/store_stage1: 4 rows of 32 tokens" in out
  assert (again, trouble) == (0, "")
  log = json.loads((tmp_path / "job" / "distil" / "log.json").read_text())
  assert [each["steps"] for each in log["summary"]["stages"]] == [2, 2]
  assert log["summary"]["tokens"] == 2 * 2 * 32 + 2 * 4 * 16
  assert refused == 2 and told.count("\n") == 1
  assert "too few for 4 steps of 2" in told


