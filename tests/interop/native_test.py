"""Our own folder holds exactly one model: config, leaves by path, and tokenizer files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from hybridlm import axes, lazy
from hybridlm.config import Llama3Scaling, Rope
from hybridlm.interop import native, safetensors


def config_of(path):
  return json.loads((path / "model.json").read_text("utf-8"))


def change(folder, **fields):
  plain = {**config_of(folder), **fields}
  (folder / "model.json").write_text(json.dumps(plain), "utf-8")


@pytest.fixture
def folder(tmp_path):
  cfg = models.make()
  native.write(tmp_path / "m", cfg, lazy.of(models.params(cfg)))
  return tmp_path / "m"


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_a_model_written_and_opened_is_the_same_bit_for_bit(tmp_path, variant):
  rope = {"rope": Rope(scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))} if variant == "swiglu" else {}
  cfg = models.make(variant, dt_limits=(0.001, float("inf")), context=99, **rope)
  params = models.params(cfg)
  params["blocks"]["01"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["blocks"]["01"])
  native.write(tmp_path / "m", cfg, lazy.of(params))
  found, leaves = native.open(tmp_path / "m")
  assert found == cfg and list(leaves) == [path for path, _ in axes.leaves(params)]
  for path, leaf in axes.leaves(params):
    got = leaves[path].read()
    assert got.dtype == leaves[path].dtype == leaf.dtype and got.shape == leaves[path].shape
    assert got.tobytes() == np.asarray(leaf).tobytes()


def test_opening_reads_no_weights(folder, monkeypatch):
  monkeypatch.setattr(safetensors, "read", pytest.fail)
  native.open(folder)


def test_tokenizer_files_of_another_folder_are_carried_on(tmp_path, folder):
  vocabulary = '{"model": {"vocab": {"a": 0}}}'
  (tmp_path / "tokenizer.json").write_text(vocabulary, "utf-8")
  cfg, leaves = native.open(folder)
  native.write(tmp_path / "n", cfg, leaves, like=tmp_path)
  assert (tmp_path / "n" / "tokenizer.json").read_text("utf-8") == vocabulary
  (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 31}}}', "utf-8")
  with pytest.raises(ValueError, match="holds the id 31, the model's vocabulary ends at V=31"):
    native.write(tmp_path / "x", cfg, leaves, like=tmp_path)
  assert not (tmp_path / "x").exists()


def test_a_folder_can_be_replaced_by_what_is_read_from_it(folder):
  cfg, leaves = native.open(folder)
  want = {path: leaf.read() for path, leaf in leaves.items()}
  native.write(folder, cfg, leaves)
  got = native.open(folder)[1]
  assert all((got[path].read() == want[path]).all() for path in want)


def test_a_model_that_lacks_a_leaf_is_not_written(tmp_path):
  cfg = models.make()
  leaves = lazy.of(models.params(cfg))
  del leaves["final/norm_gain_D"]
  with pytest.raises(ValueError, match="lack the leaf 'final/norm_gain_D'"):
    native.write(tmp_path / "m", cfg, leaves)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fields", "message"), [
  ({"format": None}, "its format is None, not 'hybridlm-model-1'"),
  ({"format": "hybridlm-model-2"}, "its format is"),
  ({"D": "16"}, "model.json: model config: .*'16'"),
  ({"eps": []}, "model.json: model config"),
  ({"blocks": "M-"}, "model.json"),
  ({"blocks": [{"kind": "E"}]}, "block 0 has kind 'E'"),
  ({"colour": 1}, "colour"),
  ({"V": 10**3000}, "shape"),
  ({"D": 17}, r"shape \(.*\), model.json says"),
])
def test_a_config_that_no_model_has_is_one_line_with_the_file(folder, fields, message):
  change(folder, **fields)
  with pytest.raises(ValueError, match=message) as caught:
    native.open(folder)
  assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
  assert len(str(caught.value)) < len(str(folder)) + 400


def test_tensors_that_are_not_the_configs_tree_are_named(folder):
  blocks = config_of(folder)["blocks"]
  change(folder, blocks=blocks[:-1])
  with pytest.raises(ValueError, match="tensor 'blocks/04/.*: model.json has no such leaf"):
    native.open(folder)
  change(folder, blocks=blocks + blocks[-1:])
  with pytest.raises(ValueError, match="tensor 'blocks/05/.*: missing"):
    native.open(folder)


def test_leaves_of_whole_numbers_are_refused(tmp_path):
  cfg = models.make(pattern="-")
  params = jax.tree.map(lambda x: np.asarray(x, np.int8), models.params(cfg))
  with pytest.raises(ValueError, match="has dtype int8, leaves are float32 or bfloat16"):
    native.write(tmp_path / "m", cfg, lazy.of(params))
  native.write(tmp_path / "m", cfg, lazy.of(models.params(cfg)))
  safetensors.write_folder(
    tmp_path / "m", [(p, x.shape, x.dtype, x.read) for p, x in lazy.of(params).items()], metadata={}
  )
  with pytest.raises(ValueError, match="dtype int8, leaves are float32 or bfloat16"):
    native.open(tmp_path / "m")


def test_a_folder_without_a_config_or_weights_says_which_file_is_missing(folder):
  (folder / "model.safetensors").rename(folder / "gone")
  with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
    native.open(folder)
  (folder / "model.json").unlink()
  with pytest.raises(FileNotFoundError, match="model.json: no such file"):
    native.open(folder)
