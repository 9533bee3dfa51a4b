"""The command that converts and cuts models on disk: what it writes, refuses, and leaves behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import commands, models
from experiments import artefacts, comparison, console, conversion, convert, random_checkpoint
from hybridlm import axes, config, lazy
from hybridlm.interop import dispatch, folders, huggingface, native
from hybridlm.prune import cut as cutting
from hybridlm.prune import stream
from hybridlm.prune.trees import tree_hash

CFG = models.make("untied", "M-*", dt_limits=(0.001, float("inf")), context=64)
SMALL = CFG.replace(
  D=11, blocks=tuple(
    dataclasses.replace(block, **sizes) for block, sizes in
    zip(CFG.blocks, ({"H": 3, "P": 5}, {"F": 13}, {"J": 2}), strict=True)
  ),
)
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 30}}, "added_tokens": []}


@pytest.fixture(scope="module")
def params():
  return models.params(CFG, 5.0)


@pytest.fixture
def source(tmp_path, params):
  """A published folder with a tokenizer and special ids."""
  texts = tmp_path / "texts"
  texts.mkdir()
  (texts / "tokenizer.json").write_text(json.dumps(TOKENIZER), "utf-8")
  ids = {"model_type": "nemotron_h", "eos_token_id": 30}
  (texts / "config.json").write_text(json.dumps(ids), "utf-8")
  huggingface.write(tmp_path / "source", CFG, lazy.of(params), family="nemotron_h", like=texts)
  return tmp_path / "source"


@pytest.fixture
def plan(tmp_path, params):
  made = random_checkpoint.random_plan(CFG, SMALL, tree_hash(params))
  made.save(tmp_path / "plan.json")
  return made


def run(capsys, command=convert, **flags):
  code = console.call(command.main, ["x", *(f"--{key}={value}" for key, value in flags.items())])
  out = capsys.readouterr()
  return code, out.out, out.err


def values(folder):
  cfg, leaves = dispatch.open(folder)
  return cfg, {path: leaf.read() for path, leaf in leaves.items()}


def equal(got, tree):
  want = dict(axes.leaves(tree))
  assert got.keys() == want.keys()
  for path, leaf in want.items():
    assert got[path].dtype == leaf.dtype and (got[path] == np.asarray(leaf)).all(), path


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["by block", "whole"])
def test_a_folder_cut_on_disk_is_the_tree_cut_in_memory(
  capsys, tmp_path, source, plan, params, small, monkeypatch
):
  monkeypatch.setattr(comparison, "SMALL", small)
  code, out, err = run(
    capsys, source=source, target=tmp_path / "t", plan=tmp_path / "plan.json"
  )
  assert (code, err) == (0, "") and "hashing it took" in out and "largest difference" in out
  cfg, got = values(tmp_path / "t")
  small_cfg, want = cutting.cut(CFG, params, plan)
  assert cfg.blocks == small_cfg.blocks == SMALL.blocks
  equal(got, want)
  assert json.loads((tmp_path / "t" / "tokenizer.json").read_text("utf-8")) == TOKENIZER
  assert json.loads((tmp_path / "t" / "config.json").read_text("utf-8"))["eos_token_id"] == 30
  assert not [p for p in tmp_path.iterdir() if p.name.startswith("t.")]


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["by block", "whole"])
def test_there_and_back_again_is_the_same_folder(capsys, tmp_path, source, small, monkeypatch):
  monkeypatch.setattr(comparison, "SMALL", small)
  flags = {"source": source, "target": tmp_path / "ours", "format": "hybridlm"}
  assert run(capsys, **flags)[0] == 0
  assert native.open(tmp_path / "ours")[0].blocks == CFG.blocks
  assert run(capsys, source=tmp_path / "ours", target=tmp_path / "back", format="hf")[0] == 0
  for name, data in commands.files(source).items():
    if name not in ("generation_config.json", folders.MARK):
      assert (tmp_path / "back" / name).read_bytes() == data, name


def test_special_ids_survive_a_folder_of_ours(capsys, tmp_path, source):
  assert run(capsys, source=source, target=tmp_path / "n", format="hybridlm")[0] == 0
  assert run(capsys, source=tmp_path / "n", target=tmp_path / "back")[0] == 0
  assert json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))["eos_token_id"] == 30


def test_a_model_of_a_workdir_is_a_source(capsys, tmp_path, params):
  artefacts.save_model(tmp_path / "student", CFG, params)
  flags = {"source": tmp_path / "student" / "model", "target": tmp_path / "t", "format": "hybridlm"}
  assert run(capsys, **flags)[::2] == (0, "")
  cfg, got = values(tmp_path / "t")
  assert cfg == CFG
  equal(got, params)


def test_another_dtype_rounds_what_is_multiplied_and_says_so(capsys, tmp_path, source, params):
  flags = {"source": source, "target": tmp_path / "t", "format": "hybridlm", "dtype": "bfloat16"}
  code, out, _ = run(capsys, **flags)
  assert code == 0 and "bfloat16/float32" in out
  cfg, got = values(tmp_path / "t")
  assert cfg.dtype == "bfloat16"
  want = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.astype(
      jnp.bfloat16 if path[-1].key.startswith(("w_", "conv_x", "conv_b_W", "conv_c"))
      else leaf.dtype
    ), params,
  )
  equal(got, want)


def refuses(capsys, tmp_path, message, **flags):
  code, out, err = run(capsys, **{"target": tmp_path / "t", **flags})
  assert code == 2 and err.count("\n") == 1 and message in err, err
  left = {path.name for path in tmp_path.iterdir()}
  assert not [name for name in left if name.startswith("t.") or name == "t"], left


def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, source, plan, params):
  refuses(capsys, tmp_path, "give --source=PATH")
  refuses(capsys, tmp_path, "no such file or folder", source=tmp_path / "absent")
  refuses(capsys, tmp_path, "holds neither", source=tmp_path)
  refuses(capsys, tmp_path, "should be one of", source=source, format="onnx")
  refuses(capsys, tmp_path, "needs --format=hf", source=source, format="hybridlm", family="llama")
  refuses(capsys, tmp_path, "cannot express this model", source=source, family="llama")
  refuses(capsys, tmp_path, "no.json: no such file", source=source, plan=tmp_path / "no.json")
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "notes").write_text("mine", "utf-8")
  refuses(capsys, tmp_path, "did not write", source=source, target=tmp_path / "theirs")
  (source / "tokenizer.json").write_text(
    json.dumps({"model": {"vocab": {"a": 31}}, "added_tokens": []}), "utf-8"
  )
  refuses(capsys, tmp_path, "holds the id 31, the model's vocabulary ends at V=31", source=source)


def test_a_plan_of_other_parameters_is_refused_before_anything_is_written(
  capsys, tmp_path, source, plan, params
):
  other = {**params, "final": {"norm_gain_D": params["final"]["norm_gain_D"] * 2}}
  native.write(tmp_path / "other", CFG, lazy.of(other))
  file = tmp_path / "plan.json"
  refuses(capsys, tmp_path, "made for parameters", source=tmp_path / "other", plan=file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(capsys, tmp_path, params, dtype, value):
  bad = jax.tree.map(lambda leaf: np.array(leaf.astype(dtype)), params)
  bad["blocks"]["01"]["w_up_DF"][3, 5] = value
  native.write(tmp_path / "bad", CFG, lazy.of(bad))
  message = f"{tmp_path}/bad: leaf 'blocks/01/w_up_DF' holds {value} at (3, 5)"
  refuses(capsys, tmp_path, message, source=tmp_path / "bad")
  made = random_checkpoint.random_plan(CFG, SMALL, tree_hash(bad))
  made.save(tmp_path / "bad.json")
  refuses(capsys, tmp_path, message, source=tmp_path / "bad", plan=tmp_path / "bad.json")


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["by block", "whole"])
@pytest.mark.parametrize("wrong", ["blocks/00/w_dt_DGH", "blocks/01/w_down_FD", "head/w_head_DV"])
def test_a_target_that_is_not_the_source_is_seen_and_removed(
  tmp_path, source, plan, monkeypatch, wrong, small
):
  monkeypatch.setattr(comparison, "SMALL", small)
  cut = stream.cut

  def faulty(*args):
    cfg, leaves = cut(*args)
    leaf = leaves[wrong]
    return cfg, {**leaves, wrong: leaf._replace(read=lambda: np.flip(leaf.read(), 0))}

  monkeypatch.setattr(stream, "cut", faulty)
  job = conversion.Job(str(source), str(tmp_path / "t"), plan=str(tmp_path / "plan.json"))
  with pytest.raises(RuntimeError, match="of the target differs by"):
    conversion.convert(job, say=str)
  assert not [path for path in tmp_path.iterdir() if path.name.startswith("t")
              and path.name != "texts"]


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["by block", "whole"])
@pytest.mark.parametrize("format", dispatch.FORMATS)
@pytest.mark.parametrize("dtype", conversion.DTYPES)
def test_a_plan_and_another_dtype_go_together(
  capsys, tmp_path, source, plan, params, small, format, dtype, monkeypatch
):
  monkeypatch.setattr(comparison, "SMALL", small)
  flags = {"source": source, "plan": tmp_path / "plan.json", "format": format, "dtype": dtype}
  code, out, err = run(capsys, target=tmp_path / "t", **flags)
  assert (code, err) == (0, "") and "every leaf is the source's" in out
  for path, leaf in axes.leaves(cutting.cut(CFG, params, plan)[1]):
    got = values(tmp_path / "t")[1][path]
    short = dtype == "bfloat16" and (format == "hf" or "/w_" in path or "/conv_x" in path)
    assert got.dtype == (dtype if short else got.dtype)
    assert np.array_equal(got, np.asarray(leaf).astype(got.dtype)), path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_gains_that_a_class_stores_as_another_number_may_be_rounded_there(
  capsys, tmp_path, dtype, monkeypatch
):
  monkeypatch.setattr(comparison, "SMALL", 0)
  cfg = models.make(
    "untied", "*-*-", norm="layernorm1p", rope=hybridlm.config.Rope(), context=64
  )
  params = models.params(cfg, 5.0)
  native.write(tmp_path / "source", cfg, lazy.of(params))
  small = cfg.replace(D=11)
  random_checkpoint.random_plan(cfg, small, tree_hash(params)).save(tmp_path / "plan.json")
  flags = {"source": tmp_path / "source", "family": "nemotron"}
  flags |= {"dtype": dtype} if dtype else {}
  assert run(capsys, target=tmp_path / "t", **flags)[::2] == (0, "")
  code, out, err = run(capsys, target=tmp_path / "s", plan=tmp_path / "plan.json", **flags)
  assert (code, err) == (0, "") and "largest difference" in out


@pytest.mark.parametrize("leaf, format, dtype, planned", [
  ("blocks/00/w_dt_DGH", "hf", None, False), ("blocks/00/w_b_DGN", "hybridlm", None, True),
  ("blocks/00/conv_c_WGN", "hf", None, True), ("blocks/02/w_q_DKJE", "hybridlm", "bfloat16", False),
  ("blocks/02/w_q_DKJE", "hf", "bfloat16", True), ("final/norm_gain_D", "hf", None, True),
])
def test_a_leaf_that_hardly_moves_the_output_is_still_compared(
  tmp_path, monkeypatch, leaf, format, dtype, planned
):
  params = hybridlm.init(CFG, seed=0)
  native.write(tmp_path / "source", CFG, lazy.of(params))
  random_checkpoint.random_plan(CFG, SMALL, tree_hash(params)).save(tmp_path / "plan.json")
  opened = dispatch.open

  def damaged(path):
    cfg, leaves = opened(path)
    if str(path).endswith("source"):
      return cfg, leaves
    read = leaves[leaf].read
    value = np.nan if leaf.startswith("final") else 0
    return cfg, {**leaves, leaf: leaves[leaf]._replace(read=lambda: read() * value)}

  monkeypatch.setattr(dispatch, "open", damaged)
  plan = str(tmp_path / "plan.json") if planned else None
  job = conversion.Job(str(tmp_path / "source"), str(tmp_path / "t"), format, None, plan, dtype)
  with pytest.raises(RuntimeError, match=f"leaf '{leaf}' of the target differs by"):
    conversion.convert(job, say=str)
  assert not list(tmp_path.glob("t*"))


@pytest.mark.parametrize("format", dispatch.FORMATS)
def test_what_is_not_verified_yet_does_not_load(capsys, tmp_path, source, format, monkeypatch):
  compare, seen = comparison.compare, []

  def looking(*args, **options):
    assert (tmp_path / "t.unverified" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds neither"):
      dispatch.open(tmp_path / "t.unverified")
    shutil.copytree(tmp_path / "t.unverified", tmp_path / "left")
    return seen.append(1) or compare(*args, **options)

  monkeypatch.setattr(comparison, "compare", looking)
  flags = {"source": source, "target": tmp_path / "t", "format": format}
  assert run(capsys, **flags)[::2] == (0, "") and seen
  assert values(tmp_path / "t")[0].blocks == CFG.blocks
  monkeypatch.undo()
  (tmp_path / "left").rename(tmp_path / "t.unverified")
  assert run(capsys, **flags)[::2] == (0, "") and not (tmp_path / "t.unverified").exists()


def test_siblings_are_looked_at_before_the_source_is(capsys, tmp_path, source, monkeypatch):
  def never(path):
    raise AssertionError(path)

  monkeypatch.setattr(dispatch, "open", never)
  for name in ("u.partial", "u.unverified", "u.unverified.partial", ".u.hybridlm-old"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text("mine", "utf-8")
    refuses(capsys, tmp_path, f"{name}: exists and", source=source, target=tmp_path / "u")
    shutil.rmtree(tmp_path / name)
  (tmp_path / "plain").write_text("mine", "utf-8")
  refuses(capsys, tmp_path, "is not a folder", source=source, target=tmp_path / "plain" / "u")


def test_outputs_tell_a_cut_that_keeps_other_entries_than_the_plan(tmp_path, source, monkeypatch):
  monkeypatch.setattr(comparison, "SMALL", 0)
  random_checkpoint.random_plan(CFG, SMALL, tree_hash(models.params(CFG, 5.0))).save(
    tmp_path / "plan.json")
  take = stream.take

  def other(w, letters, keeps):
    return take(w, letters, {name: np.sort((keep + 1) % 4) if name == "keep_GH" else keep
                             for name, keep in keeps.items()})

  monkeypatch.setattr(stream, "take", other)
  job = conversion.Job(str(source), str(tmp_path / "t"), plan=str(tmp_path / "plan.json"))
  with pytest.raises(RuntimeError, match="block 0 of the target differs by"):
    conversion.convert(job, say=str)


# Stops for ever in the middle of the second half of the tensors it writes.
KILLED = """
import sys, time
from experiments import conversion
from hybridlm.interop import safetensors
count = 0
write = safetensors._write_piece
def slow(*args):
  global count
  count += 1
  if count > 6:
    print("half", flush=True)
    time.sleep(600)
  write(*args)
safetensors._write_piece = slow
conversion.convert(conversion.Job(sys.argv[1], sys.argv[2], sys.argv[3]), say=print)
"""


@pytest.mark.parametrize("format", dispatch.FORMATS)
def test_a_run_that_is_killed_leaves_no_folder_that_looks_whole(capsys, tmp_path, source, format):
  flags = {"source": source, "target": tmp_path / "t", "format": format}
  before = set(tmp_path.iterdir())
  process = subprocess.Popen(
    [sys.executable, "-c", KILLED, *map(str, flags.values())], stdout=subprocess.PIPE, text=True,
    env=commands.environment(),
  )
  assert any(line == "half\n" for line in process.stdout)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  left = set(tmp_path.iterdir()) - before
  assert left and not (tmp_path / "t").exists()
  for folder in left:
    with pytest.raises((ValueError, FileNotFoundError)):
      values(folder)
  code, _, err = run(capsys, **flags)
  assert (code, err) == (0, "") and set(tmp_path.iterdir()) - before == {tmp_path / "t"}


def test_random_checkpoints_are_equal_for_a_seed_and_cut_by_their_plan(
  capsys, tmp_path, monkeypatch
):
  presets = {**config.PRESETS, "big": CFG, "little": SMALL, "other": SMALL.replace(V=30)}
  monkeypatch.setattr(config, "PRESETS", presets)
  flags = {"preset": "big", "plan": tmp_path / "p.json", "targets": "little"}
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    code, _, err = run(capsys, random_checkpoint, target=tmp_path / name, seed=seed, **flags)
    assert (code, err) == (0, "")
  a, b, c = (values(tmp_path / name)[1] for name in "abc")
  equal(a, lazy.tree(b))
  assert all(leaf.dtype == jnp.bfloat16 and not (leaf == c[path]).all() for path, leaf in a.items())
  made = hybridlm.Plan.load(tmp_path / "p.json")
  assert made.small_config() == SMALL and made.source == tree_hash(lazy.tree(c))
  bad = {**flags, "targets": "other", "target": tmp_path / "d"}
  assert "targets: no plan cuts" in run(capsys, random_checkpoint, **bad)[2]
  assert "not one of" in run(capsys, random_checkpoint, **{**bad, "preset": "huge"})[2]
  assert not os.path.exists(tmp_path / "d")
