"""Checkpoints that transformers 5.23 wrote, with its logits: read, run, and written back.

`python -m cases.checkpoints` made them; this needs neither torch nor transformers.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import checkpoints
from hybridlm import lazy
from hybridlm.interop import huggingface, safetensors

TOLERANCE = 2e-4
FAMILIES = {
  "nemotron_h_g2": ("nemotron_h", "M-M*-"),
  "mamba2_g2": ("mamba2", "MMM"),
  "llama3": ("llama", "*-*-"),
  "nemotron_bias": ("nemotron", "*-*-"),
  "bamba_g1": ("bamba", "M-*-"),
  "granite_rope": ("granitemoehybrid", "M-*-"),
  "falcon_h1_norm": ("falcon_h1", "=-=-"),
}
# Their multipliers are part of the weights when they are written back.
FOLDED = ("falcon_h1_norm",)


def test_there_is_a_golden_folder_a_family():
  assert set(FAMILIES) == set(checkpoints.GOLDENS)
  assert set(FAMILIES) == {path.name for path in checkpoints.GOLDEN.iterdir()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_model_gives_the_logits_its_own_class_gave(name):
  folder = checkpoints.GOLDEN / name
  cfg, leaves = huggingface.open(folder)
  params = lazy.tree({path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()})
  expected = np.load(folder / "expected.npz")
  want_BLV = expected["logits_BLV"]
  got_BLV = np.asarray(
    hybridlm.forward(cfg.replace(chunk=checkpoints.CHUNK), params, expected["token_BL"])
  )
  assert cfg.pattern == FAMILIES[name][1]
  assert np.abs(got_BLV - want_BLV).max() <= TOLERANCE * np.abs(want_BLV).max()
  np.testing.assert_array_equal(got_BLV.argmax(-1), want_BLV.argmax(-1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_model_is_written_back_byte_for_byte(name, tmp_path):
  folder = checkpoints.GOLDEN / name
  cfg, leaves = huggingface.open(folder)
  assert huggingface.write(tmp_path / "out", cfg, leaves, like=folder) == FAMILIES[name][0]
  want, got = safetensors.open_folder(folder), safetensors.open_folder(tmp_path / "out")
  assert set(got) == set(want)
  for tensor in () if name in FOLDED else want:
    assert got[tensor].dtype == want[tensor].dtype
    assert got[tensor].read().tobytes() == want[tensor].read().tobytes(), tensor
  again_cfg, again = huggingface.open(tmp_path / "out")
  assert again_cfg == cfg
  for path in leaves:
    assert again[path].read().tobytes() == leaves[path].read().tobytes(), path
