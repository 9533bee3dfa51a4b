"""The face: every example in its docstrings runs, one after the other, as a user types them."""

import doctest

import jax
import jax.numpy as jnp
import pytest

import hybridlm
from cases import models
from hybridlm import lazy
from hybridlm.interop import dispatch

ORDER = (
  "init", "save", "load", "forward", "generate", "calibrate", "plan", "mask", "cut",
  "language_loss", "distillation_loss", "cost",
)


def test_every_example_of_the_face_runs(tmp_path):
  cfg = models.make(pattern="M-")
  names = {"hybridlm": hybridlm, "jnp": jnp, "folder": tmp_path / "model"}
  names |= {"batches": models.batches(cfg), "token_BL": models.tokens(cfg)}
  for name in ORDER:
    found = doctest.DocTestFinder(recurse=False).find(getattr(hybridlm, name), name, globs=names)
    assert found and found[0].examples, name
    found[0].globs = names
    result = doctest.DocTestRunner().run(found[0], clear_globs=False)
    assert result.failed == 0, name


def test_the_face_offers_what_it_says():
  assert set(ORDER) | {"ModelConfig", "Plan", "Scores"} == set(hybridlm.__all__)
  assert hybridlm.config.PRESETS["nemotron_h_8b"].pattern.startswith("M-M-")
  assert callable(hybridlm.ops.ssd.api.ssd)


def test_forward_can_be_compiled_and_differentiated():
  cfg = models.make(pattern="M-")
  params, token_BL = models.params(cfg), models.tokens(cfg)
  compiled = jax.jit(lambda tree, ids: hybridlm.forward(cfg, tree, ids))
  want = hybridlm.forward(cfg, params, token_BL)
  assert models.error(compiled(params, token_BL), want) < 1e-5


def test_a_document_in_pieces_is_refused():
  cfg = models.make(pattern="M-")
  segment_BL = jnp.array([[1, 1, 2, 0, 1], [1, 0, 2, 0, 0]])
  with pytest.raises(ValueError, match="segment 1 of row 0 comes back after a gap in forward"):
    hybridlm.forward(cfg, models.params(cfg), jnp.zeros((2, 5), jnp.int32), segment_BL)


def test_a_teacher_of_another_vocabulary_is_refused():
  with pytest.raises(ValueError, match="student predicts 31 tokens, teacher 29"):
    hybridlm.distillation_loss(models.make(), models.make(vocabulary=29))


@pytest.mark.parametrize("format", ["hybridlm", "hf"])
def test_what_is_saved_is_what_is_loaded(tmp_path, format):
  cfg = models.make("tied" if format == "hybridlm" else "untied", context=99)
  params = models.params(cfg)
  hybridlm.save(tmp_path / "model", cfg, params, format=format)
  again, loaded = hybridlm.load(tmp_path / "model")
  assert again == cfg
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, params)))
  half = hybridlm.load(tmp_path / "model", dtype="bfloat16")[1]
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("format", ["hybridlm", "hf"])
def test_parameters_of_another_model_are_not_saved(tmp_path, format):
  params = models.params(models.make())
  with pytest.raises(ValueError, match="w_down_FD.*has shape"):
    hybridlm.save(tmp_path / "model", models.make(F=25), params, format=format)
  assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_not_loaded_or_saved(tmp_path):
  cfg, params = models.make(), models.params(models.make())
  with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
    hybridlm.load(tmp_path / "nothing")
  with pytest.raises(ValueError, match="neither model.json nor config.json"):
    hybridlm.load(tmp_path)
  (tmp_path / "weights.bin").touch()
  with pytest.raises(ValueError, match="weights.bin: a model is a folder or a .gguf file"):
    hybridlm.load(tmp_path / "weights.bin")
  with pytest.raises(ValueError, match="format 'onnx' is not one of hybridlm, hf"):
    hybridlm.save(tmp_path / "model", cfg, params, format="onnx")
  with pytest.raises(ValueError, match="family 'llama' is of format 'hf'"):
    hybridlm.save(tmp_path / "model", cfg, params, family="llama")


@pytest.mark.parametrize("format", ["hybridlm", "hf"])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, format):
  cfg, params = models.make(), models.params(models.make())
  broken = params | {"final": {"norm_gain_D": params["final"]["norm_gain_D"].at[3].set(jnp.nan)}}
  with pytest.raises(ValueError, match="save: leaf 'final/norm_gain_D' holds values"):
    hybridlm.save(tmp_path / "model", cfg, broken, format=format)
  assert not list(tmp_path.iterdir())
  dispatch.write(tmp_path / "model", cfg, lazy.of(broken), format=format)
  with pytest.raises(ValueError, match="load .*model: leaf 'final/norm_gain_D' holds values"):
    hybridlm.load(tmp_path / "model")
  with pytest.raises(ValueError, match="dtype 'int8' is not one of float32, bfloat16"):
    hybridlm.load(tmp_path / "model", dtype="int8")
