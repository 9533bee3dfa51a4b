"""Logits against transformers: on checkpoints it saved, and on folders that it loads from us.

Run `python -m pytest -m parity -s tests/interop` for the table of errors.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import checkpoints, models
from cases.checkpoints import CASES, CHUNK, LENGTHS
from hybridlm import lazy
from hybridlm.interop import huggingface
from hybridlm.prune import plan as plans
from hybridlm.prune.trees import tree_hash

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 2e-4
WITH_SSM = [case for case, (prefix, _) in CASES.items() if prefix not in ("Llama", "Nemotron")]
SIZES = {
  "P": {"P": 4},
  "H": {"H": 2},
  "F": {"F": 13},
  "D": {"D": 17},
  "J": {"J": 2},
  "K": {"K": 1},
  "E": {"E": 5},
  "N": {"N": 3},
  "G": {"G": 1},
  "V": {"V": 21},
  "blocks": {"X": (0, 1, 3)},
  "all": {
    "P": 3, "H": 2, "F": 11, "D": 19, "J": 1, "K": 1, "E": 5, "N": 3, "G": 1, "V": 23,
    "X": (1, 2, 3, 4),
  },
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()


def opened(folder):
  """Returns the config, chunked as the cases are, and the parameters of a folder."""
  cfg, leaves = huggingface.open(folder)
  params = {path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()}
  return cfg.replace(chunk=CHUNK), lazy.tree(params)


def error(got_BLV, want_BLV):
  """Returns the largest difference as a share of the largest logit."""
  return float(np.abs(got_BLV - want_BLV).max() / np.abs(want_BLV).max())


def compare(cfg, params, model, lengths):
  """Returns the error at each length, after checking the argmax of every position."""
  found = []
  for length in lengths:
    token_BL = checkpoints.tokens(cfg.V, (2, length), seed=length)
    want_BLV = checkpoints.logits(model, token_BL)
    got_BLV = np.asarray(hybridlm.forward(cfg, params, token_BL))
    np.testing.assert_array_equal(got_BLV.argmax(-1), want_BLV.argmax(-1))
    found.append(error(got_BLV, want_BLV))
  return found


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_there_and_back(case, tmp_path):
  model = checkpoints.make(case)
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  there = compare(cfg, params, model, LENGTHS)
  family = huggingface.write(
    tmp_path / "ours", cfg, lazy.of(params), like=tmp_path / "theirs"
  )
  assert family == model.config.model_type
  back = compare(cfg, params, checkpoints.load(tmp_path / "ours"), LENGTHS[-1:])
  errors = "  ".join(f"L={length}: {each:.1e}" for length, each in zip(LENGTHS, there, strict=True))
  print(f"\n{case:16} {cfg.pattern:6} {errors}  back: {back[0]:.1e}")
  assert max(there + back) <= TOLERANCE


@pytest.mark.parametrize("case", WITH_SSM)
def test_the_comparison_would_see_a_missing_ssm(case, tmp_path):
  model = checkpoints.make(case)
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  token_BL = checkpoints.tokens(cfg.V, (2, LENGTHS[-1]))
  want_BLV = checkpoints.logits(model, token_BL)
  for leaves in params["blocks"].values():
    for name in leaves:
      if name.startswith(("w_b_", "conv_bias_b_")):
        leaves[name] = jnp.zeros_like(leaves[name])
  moved = error(np.asarray(hybridlm.forward(cfg, params, token_BL)), want_BLV)
  print(f"\n{case:16} without the SSM: {moved:.2f}")
  assert moved > 100 * TOLERANCE


def test_below_the_limit_dt_is_clamped_in_prefill_and_only_we_clamp_it_in_decode(tmp_path):
  """transformers clamps dt to time_step_min in prefill but not in its cached step; we do in both.

  dt = softplus(-10) = 4.5e-5 here, and the published limit 0.05.
  """
  import torch

  model = checkpoints.make("nemotron_h_g2", time_step_min=0.05)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.endswith("dt_bias"):
        parameter.fill_(-10.0)
      if name.endswith("in_proj.weight"):
        parameter[-6:] = 0  # dt's rows: dt is its bias alone
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  prefill = compare(cfg, params, model, LENGTHS)
  assert max(prefill) <= TOLERANCE
  token_BL = checkpoints.tokens(cfg.V, (2, LENGTHS[-1]))
  ids = torch.from_numpy(token_BL).long()
  with torch.no_grad():
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    step_BLV = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits.numpy()
  whole_BLV = np.asarray(hybridlm.forward(cfg, params, token_BL))[:, -1:]
  unlike = error(step_BLV, whole_BLV)
  print(f"\ndt below its limit: prefill {max(prefill):.1e}, their cached step {unlike:.2f} apart")
  assert unlike > 10 * TOLERANCE


@pytest.mark.parametrize("axis", SIZES)
def test_a_pruned_hybrid_loads_in_transformers_with_equal_logits(axis, tmp_path):
  model = checkpoints.make("nemotron_h_g2")
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  small_cfg, small = hybridlm.cut(cfg, params, models.plan(cfg, params, SIZES[axis]))
  huggingface.write(tmp_path / "ours", small_cfg, lazy.of(small), like=tmp_path / "theirs")
  found = compare(small_cfg, small, checkpoints.load(tmp_path / "ours"), LENGTHS[-1:])
  print(f"\npruned {axis:7} {small_cfg.pattern:6} {found[0]:.1e}")
  assert max(found) <= TOLERANCE
  assert huggingface.open(tmp_path / "ours")[0].replace(chunk=CHUNK) == small_cfg


@pytest.mark.parametrize("case, pairs", [
  ("llama", "every second"), ("llama", "first"), ("nemotron_bias", "first"), ("bamba_g1", "first"),
])
def test_kept_rotary_pairs_turn_in_transformers_as_they_did(case, pairs, tmp_path):
  model = checkpoints.make(case)
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  keep = {}
  for index, block in enumerate(cfg.blocks):
    if block.symbol == "*":
      half = plans.pairs(block)
      rows = np.arange(0, half, 2) if pairs == "every second" else np.arange(half - 1)
      channels = [*rows, *(rows + half), *range(2 * half, block.E)]
      keep[f"{index:02d}"] = {"keep_E": channels}
  plan = hybridlm.Plan(cfg, tree_hash(params), keep)
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  huggingface.write(tmp_path / "ours", small_cfg, lazy.of(small), like=tmp_path / "theirs")
  found = compare(small_cfg, small, checkpoints.load(tmp_path / "ours"), LENGTHS[-1:])
  print(f"\n{case:16} {pairs:12} {found[0]:.1e}")
  assert max(found) <= TOLERANCE


def test_a_tied_hybrid_gets_a_head_of_its_own_where_the_class_does_not_tie(tmp_path):
  model = checkpoints.make("mamba2_g1")
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  assert cfg.tied
  huggingface.write(tmp_path / "ours", cfg, lazy.of(params), family="nemotron_h")
  hybrid = checkpoints.load(tmp_path / "ours")
  assert hybrid.lm_head.weight.data_ptr() != hybrid.get_input_embeddings().weight.data_ptr()
  assert max(compare(cfg, params, hybrid, LENGTHS[-1:])) <= TOLERANCE


def test_padded_rows_of_the_vocabulary_are_left_out_of_what_is_published(tmp_path):
  model = checkpoints.make("nemotron_h_g1")
  model.save_pretrained(tmp_path / "theirs")
  cfg, params = opened(tmp_path / "theirs")
  padded = cfg.replace(vocabulary=cfg.V - 4)
  huggingface.write(tmp_path / "ours", padded, lazy.of(params))
  published = checkpoints.load(tmp_path / "ours")
  token_BL = checkpoints.tokens(padded.vocabulary, (2, LENGTHS[-1]))
  got_BLV = np.asarray(hybridlm.forward(padded, params, token_BL))[..., : padded.vocabulary]
  assert error(got_BLV, checkpoints.logits(published, token_BL)) <= TOLERANCE
