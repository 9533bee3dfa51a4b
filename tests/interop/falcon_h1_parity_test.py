"""Falcon-H1 against transformers on configurations drawn at random, there and back.

Run `python -m pytest -m parity -s tests/interop/falcon_h1_parity_test.py` for the table of errors.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import checkpoints, models
from hybridlm import lazy
from hybridlm.interop import huggingface

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 2e-4
LENGTHS = (1, 23, 40)
STEPS = 24
SEEDS = range(8)
SCALARS = (
  "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier",
  "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)
FLAGS = (
  "mamba_rms_norm", "mamba_norm_before_gate", "mamba_conv_bias", "attention_bias", "mlp_bias",
  "tie_word_embeddings",
)
SIZES = {
  "P": {"P": 4},
  "H": {"H": 2},
  "G": {"G": 1},
  "N": {"N": 3},
  "K": {"K": 1},
  "J": {"J": 2},
  "F": {"F": 13},
  "D": {"D": 17},
  "V": {"V": 21},
  "layer": {"X": (2, 3)},
  "all": {"P": 3, "H": 2, "F": 11, "D": 19, "J": 1, "K": 1, "N": 3, "G": 1, "V": 23},
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()


def drawn(seed):
  """Returns the arguments of a random small config: sizes, flags and every multiplier."""
  rng = np.random.default_rng(seed)

  def size(low, high):
    return int(rng.integers(low, high + 1))

  def multipliers(count):
    return [float(x) for x in np.exp(rng.uniform(-1, 1, count)) * rng.choice([-1, 1], count)]

  groups, K = size(1, 3), size(1, 3)
  heads, channels = groups * size(1, 3), size(2, 7)
  flags = {name: bool(size(0, 1)) for name in FLAGS}
  return {
    "vocab_size": size(29, 60), "hidden_size": size(14, 34), "intermediate_size": size(11, 40),
    "num_hidden_layers": size(1, 3), "num_key_value_heads": K,
    "num_attention_heads": K * size(1, 4), "head_dim": 2 * size(2, 7),
    "mamba_n_groups": groups, "mamba_n_heads": heads, "mamba_d_head": channels,
    "mamba_d_ssm": heads * channels, "mamba_d_state": size(2, 11), "mamba_d_conv": size(2, 4),
    "mamba_chunk_size": 8, "max_position_embeddings": 128, "rms_norm_eps": 10.0 ** -size(3, 6),
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0 ** size(2, 11)},
    "mlp_multipliers": multipliers(2), "ssm_multipliers": multipliers(5),
    **dict(zip(SCALARS, multipliers(len(SCALARS)), strict=True)), **flags,
  }


def opened(model, folder):
  """Returns the config and the parameters of a model that transformers saves."""
  model.save_pretrained(folder)
  cfg, leaves = huggingface.open(folder)
  cfg = cfg.replace(chunk=checkpoints.CHUNK)
  return cfg, lazy.tree({path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()})


def errors(cfg, params, model):
  """Returns the error at each length as a share of the largest logit; every argmax is equal."""
  found = []
  for length in LENGTHS:
    token_BL = checkpoints.tokens(cfg.V, (2, length), seed=length)
    want_BLV = checkpoints.logits(model, token_BL)
    got_BLV = np.asarray(hybridlm.forward(cfg, params, token_BL))
    np.testing.assert_array_equal(got_BLV.argmax(-1), want_BLV.argmax(-1))
    found.append(float(np.abs(got_BLV - want_BLV).max() / np.abs(want_BLV).max()))
  return found


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_a_random_falcon_are_those_of_transformers_there_and_back(seed, tmp_path):
  model = checkpoints.build("FalconH1", drawn(seed), seed=seed)
  cfg, params = opened(model, tmp_path / "theirs")
  there = errors(cfg, params, model)
  assert huggingface.write(tmp_path / "ours", cfg, lazy.of(params)) == "falcon_h1"
  back = errors(cfg, params, checkpoints.load(tmp_path / "ours"))
  plain = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert {plain[name] for name in SCALARS} == {1.0}
  assert {*plain["mlp_multipliers"], *plain["ssm_multipliers"]} == {1.0}
  gate = cfg.blocks[0].ssm.gate
  row = "  ".join(f"L={length}: {each:.1e}" for length, each in zip(LENGTHS, there, strict=True))
  print(f"\n{seed} {gate:6} tied={cfg.tied!s:5} {row}  back: {max(back):.1e}")
  assert max(there + back) <= TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_tokens_of_a_random_falcon_are_those_of_transformers(seed, tmp_path):
  import torch

  model = checkpoints.build("FalconH1", drawn(seed), seed=seed)
  model.generation_config.eos_token_id = None
  cfg, params = opened(model, tmp_path / "theirs")
  prompt_BL = checkpoints.tokens(cfg.V, (3, 9), seed=seed)
  want_BL = model.generate(
    torch.from_numpy(prompt_BL).long(), do_sample=False, max_new_tokens=STEPS,
    min_new_tokens=STEPS, eos_token_id=None, pad_token_id=0,
    attention_mask=torch.ones(prompt_BL.shape, dtype=torch.long),
  )
  got_BL = np.asarray(hybridlm.generate(cfg, params, prompt_BL, steps=STEPS))
  np.testing.assert_array_equal(got_BL, want_BL[:, prompt_BL.shape[1] :].numpy())
  # Rows that repeat one token would agree too easily.
  assert np.mean([len(set(row)) for row in got_BL.tolist()]) > 3


@pytest.mark.parametrize("stems", [("w_b_", "conv_bias_b_"), ("w_v_", "b_v_"), ("w_z_",)])
def test_the_comparison_would_see_a_missing_branch(stems, tmp_path):
  model = checkpoints.make("falcon_h1_norm")
  cfg, params = opened(model, tmp_path / "theirs")
  token_BL = checkpoints.tokens(cfg.V, (2, LENGTHS[-1]))
  want_BLV = checkpoints.logits(model, token_BL)
  for leaves in params["blocks"].values():
    for name in leaves:
      if name.startswith(stems):
        leaves[name] = jnp.zeros_like(leaves[name])
  got_BLV = np.asarray(hybridlm.forward(cfg, params, token_BL))
  assert np.abs(got_BLV - want_BLV).max() > 100 * TOLERANCE * np.abs(want_BLV).max()


@pytest.mark.parametrize("case", SIZES)
def test_a_pruned_falcon_loads_in_transformers_with_equal_logits(case, tmp_path):
  model = checkpoints.make("falcon_h1_norm")
  cfg, params = opened(model, tmp_path / "theirs")
  small_cfg, small = hybridlm.cut(cfg, params, models.plan(cfg, params, SIZES[case]))
  huggingface.write(tmp_path / "ours", small_cfg, lazy.of(small), like=tmp_path / "theirs")
  found = errors(small_cfg, small, checkpoints.load(tmp_path / "ours"))
  print(f"\npruned {case:6} {small_cfg.pattern:5} {max(found):.1e}")
  assert max(found) <= TOLERANCE
  assert huggingface.open(tmp_path / "ours")[0].replace(chunk=checkpoints.CHUNK) == small_cfg
