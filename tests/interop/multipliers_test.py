"""Multipliers of a published config.json: each is folded into the leaves that it scales, once."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cases.checkpoints import GOLDEN, edited
from hybridlm.interop import huggingface, safetensors

ODD = 0.3
GRANITE, FALCON = GOLDEN / "granite_rope", GOLDEN / "falcon_h1_norm"
KEYS = (
  "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier",
  "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "mlp_multipliers",
  "ssm_multipliers",
)
# Keys set to a value, and the leaves that change by which factor; every other one stays as it is.
FALCONS = {
  "embedding": ({"embedding_multiplier": ODD}, {"w_embed": ODD, "norm_gain": 1 / ODD}),
  "logits": ({"lm_head_multiplier": ODD}, {"norm_gain": ODD}),
  "key": ({"key_multiplier": ODD}, {"w_k": ODD, "b_k": ODD}),
  "attention in": ({"attention_in_multiplier": ODD}, {"w_q": ODD, "w_k": ODD, "w_v": ODD}),
  "attention out": ({"attention_out_multiplier": ODD}, {"w_o": ODD, "b_o": ODD}),
  "SSM in": (
    {"ssm_in_multiplier": ODD}, {"w_z": ODD, "w_x": ODD, "w_b": ODD, "w_c": ODD, "w_dt": ODD},
  ),
  "SSM out": ({"ssm_out_multiplier": ODD}, {"w_out": ODD}),
  "SSM rows": (
    {"ssm_multipliers": [2, 3, 5, 7, 11]}, {"w_z": 2, "w_x": 3, "w_b": 5, "w_c": 7, "w_dt": 11},
  ),
  "MLP": ({"mlp_multipliers": [ODD, -2.0]}, {"w_gate": ODD, "w_down": -2.0}),
}
GRANITES = {
  "embedding": ({"embedding_multiplier": 12}, {"w_embed": 12, "norm_gain": 1 / 12}),
  "logits": ({"logits_scaling": 8.0}, {"norm_gain": 1 / 8}),
  "residual": ({"residual_multiplier": ODD}, {"w_out": ODD, "w_o": ODD, "w_down": ODD}),
  "attention": ({"attention_multiplier": ODD}, {"w_q": ODD * math.sqrt(4)}),
}
CASES = {
  **{f"falcon_h1 {name}": (FALCON, *case) for name, case in FALCONS.items()},
  **{f"granite {name}": (GRANITE, *case) for name, case in GRANITES.items()},
}


def ones(plain):
  """Returns a config.json with every multiplier one, as a table without them is read."""
  return {key: value for key, value in plain.items() if key not in KEYS}


def read(source, folder, keys, tensors=None):
  """Returns the config and the leaves of a folder like another, with some keys set."""
  made = edited(source, folder, config=lambda plain: ones(plain) | keys, tensors=tensors)
  cfg, leaves = huggingface.open(made)
  return cfg, {path: (leaf.read(), leaf.dtype) for path, leaf in leaves.items()}


def factor(path, wanted):
  """Returns what a leaf is to be multiplied by; the one norm that has a say is the last."""
  name = path.rpartition("/")[2].rpartition("_")[0]
  return 1.0 if name == "norm_gain" and "final" not in path else wanted.get(name, 1.0)


@pytest.mark.parametrize("case", CASES)
def test_a_multiplier_changes_the_leaves_that_it_scales_and_no_other(case, tmp_path):
  source, keys, wanted = CASES[case]
  cfg, plain = read(source, tmp_path / "plain", {})
  scaled_cfg, scaled = read(source, tmp_path / "scaled", keys)
  assert scaled_cfg == cfg and cfg.tied
  touched = set()
  for path, (leaf, _) in scaled.items():
    times = factor(path, wanted)
    np.testing.assert_allclose(leaf, plain[path][0] * np.float32(times), rtol=3e-7, err_msg=path)
    touched |= {path.rpartition("/")[2].rpartition("_")[0]} if times != 1 else set()
  assert touched == set(wanted)


def test_a_head_of_its_own_takes_what_the_logits_are_multiplied_by(tmp_path):
  def headed(held):
    return held | {"lm_head.weight": held["model.embed_tokens.weight"] * 2}

  keys = {"tie_word_embeddings": False, "embedding_multiplier": ODD, "lm_head_multiplier": 0.7}
  _, leaves = read(FALCON, tmp_path / "in", keys, headed)
  _, plain = read(FALCON, tmp_path / "plain", {})
  embed_VD = plain["embed/w_embed_VD"][0]
  np.testing.assert_allclose(leaves["embed/w_embed_VD"][0], ODD * embed_VD, rtol=3e-7)
  np.testing.assert_allclose(leaves["head/w_head_DV"][0], 1.4 * embed_VD.T, rtol=3e-7)
  np.testing.assert_array_equal(leaves["final/norm_gain_D"][0], plain["final/norm_gain_D"][0])


def test_products_that_bfloat16_cannot_hold_are_float32_and_powers_of_two_stay(tmp_path):
  def halved(held):
    return {name: value.astype(jnp.bfloat16) for name, value in held.items()}

  keys = {"attention_out_multiplier": ODD, "ssm_out_multiplier": -0.25}
  _, leaves = read(FALCON, tmp_path / "in", keys, halved)
  _, plain = read(FALCON, tmp_path / "plain", {}, halved)
  narrow, wide = np.dtype(jnp.bfloat16), np.dtype(np.float32)
  for path, (leaf, dtype) in leaves.items():
    odd = path.endswith(("w_o_KJED", "b_o_D"))
    assert leaf.dtype == dtype == (wide if odd else narrow), path
  out, before = (each["blocks/00/w_out_GHPD"][0].astype(np.float32) for each in (leaves, plain))
  np.testing.assert_array_equal(out, -0.25 * before)


def test_what_is_written_has_multipliers_of_one_and_is_read_without_a_change(tmp_path):
  cfg, leaves = huggingface.open(FALCON)
  huggingface.write(tmp_path / "out", cfg, leaves)
  plain = json.loads((tmp_path / "out" / "config.json").read_text())
  assert {plain[key] for key in KEYS[:7]} == {1.0}
  assert plain["mlp_multipliers"] == [1.0] * 2 and plain["ssm_multipliers"] == [1.0] * 5
  stored = safetensors.open_folder(tmp_path / "out")
  found = stored["model.layers.0.self_attn.k_proj.bias"].read().reshape(2, 10)
  np.testing.assert_array_equal(found, leaves["blocks/00/b_k_KE"].read())
  _, again = huggingface.open(tmp_path / "out")
  for path, leaf in leaves.items():
    np.testing.assert_array_equal(again[path].read(), leaf.read(), err_msg=path)
