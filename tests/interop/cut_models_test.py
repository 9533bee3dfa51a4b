"""What a cut leaves of a model goes out and comes back, or is refused with the block named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import axes, lazy
from hybridlm.config import Rope
from hybridlm.interop import huggingface, native
from hybridlm.prune import cut as cutting
from hybridlm.prune.trees import tree_hash

DENSE = {"pattern": "*-", "activation": "swiglu", "D": 18}


def kept(cfg, params, keep):
  """Returns the cut of a plan given by its index arrays."""
  return cutting.cut(cfg, params, hybridlm.Plan(cfg, tree_hash(params), keep))


def assert_comes_back(folder, cfg, params, family):
  """Writes and opens a model of a family: other words perhaps, the same logits."""
  huggingface.write(folder, cfg, lazy.of(params), family=family)
  found, leaves = huggingface.open(folder)
  read = lazy.tree({path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()})
  token_BL = models.tokens(cfg)
  want = hybridlm.forward(cfg, params, token_BL)
  assert models.error(hybridlm.forward(found, read, token_BL), want) < 1e-5
  return found


def test_equal_cuts_of_every_axis_are_a_nemotron_h_again(tmp_path):
  cfg = models.make(vocabulary=29)
  params = models.params(cfg, 5.0)
  sizes = {"H": 3, "G": 1, "P": 5, "N": 3, "F": 13, "D": 11, "J": 2, "K": 1, "E": 6}
  small_cfg, small = cutting.cut(cfg, params, models.plan(cfg, params, {**sizes, "V": 19}))
  small_cfg = small_cfg.replace(vocabulary=None)  # a published vocabulary has no padding
  found = assert_comes_back(tmp_path / "hf", small_cfg, small, "nemotron_h")
  assert {letter: found.size(letter) for letter in sizes} == sizes and found.V == 19
  plain = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
  assert [plain[key] for key in ("head_dim", "ssm_state_size", "n_groups")] == [6, 3, 1]


# Kept pairs of 8, and the base they are a series of; None: of no base.
PAIRS = {
  "every second": ((0, 2, 4, 6), 50.0),
  "the first three": ((0, 1, 2), 50.0 ** (3 / 8)),
  "every third": ((0, 3, 6), 50.0 ** (9 / 8)),
  "the first": ((0,), 50.0),
  "without the first": ((1, 2, 3), None),
  "with a gap": ((0, 1, 3), None),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_go_out_where_one_base_makes_them_and_are_refused_elsewhere(case, tmp_path):
  rows, base = PAIRS[case]
  cfg = models.make(**{**DENSE, "E": 16, "rope": Rope(base=50.0)})
  params = models.params(cfg, 5.0)
  keep_E = [*rows, *(row + 8 for row in rows)]
  small_cfg, small = kept(cfg, params, {"00": {"keep_E": keep_E}})
  assert small_cfg.blocks[0].rope.frequency == tuple(50.0 ** (-row / 8) for row in rows)
  if base is None:
    reason = "block 0 keeps 3 pairs of rotary positions that are no geometric series from 1"
    with pytest.raises(ValueError, match=f"llama cannot express this model: {reason}"):
      huggingface.write(tmp_path / "hf", small_cfg, lazy.of(small), family="llama")
    assert not (tmp_path / "hf").exists()
    return
  found = assert_comes_back(tmp_path / "hf", small_cfg, small, "llama")
  assert found.blocks[0].E == 2 * len(rows)
  assert found.blocks[0].rope.base == pytest.approx(base, rel=1e-9)


def test_partly_rotary_heads_state_the_share_of_what_is_left(tmp_path):
  cfg = models.make("layernorm", pattern="*-", E=16, rope=Rope(base=50.0, rotary=8), window=None)
  params = models.params(cfg, 5.0)
  small_cfg, small = kept(cfg, params, {"00": {"keep_E": [0, 2, 4, 6, 8, 11, 13, 14, 15]}})
  found = assert_comes_back(tmp_path / "hf", small_cfg, small, "nemotron")
  assert (found.blocks[0].E, found.blocks[0].rope.rotary) == (9, 4)


@pytest.mark.parametrize("sizes, reason", [
  ({0: {"N": 3}}, "blocks 0 and 2 differ in N: 3 against 5"),
  ({2: {"G": 1}}, "blocks 0 and 2 differ in G: 2 against 1"),
  ({3: {"E": 6}}, "blocks 3 and 4 differ in E: 6 against 10"),
  ({4: {"K": 1}}, "blocks 3 and 4 differ in K: 2 against 1"),
  ({2: {"N": 0}}, "block 2 is a Mamba mixer without its state"),
])
def test_unequal_blocks_and_blocks_without_a_state_are_refused_by_name(sizes, reason, tmp_path):
  cfg = models.make(pattern="M-M**")
  small_cfg = models.plan(cfg, models.params(cfg), sizes).small_config()
  with pytest.raises(ValueError, match=f"nemotron_h cannot express this model: {reason}"):
    huggingface.describe(small_cfg, "nemotron_h")


def test_a_block_no_class_has_is_one_reason_and_not_one_of_each_family():
  cfg = models.make(pattern="C-")
  with pytest.raises(ValueError) as caught:
    huggingface.describe(cfg)
  assert str(caught.value).startswith("no family can express this model: block 0 is a Mamba mixer")
  assert str(caught.value).count("block 0") == 1


def test_serving_notes_count_a_convolution_without_states():
  notes = huggingface.serving_notes(models.make(pattern="C-", F=96, G=4, H=6, P=3))
  assert notes[0] == "tensor parallel sizes this shape allows: 1, 2, 4"
  assert len(notes) == 1  # 72 channels, a multiple of 8
  odd = huggingface.serving_notes(models.make(pattern="C-", G=2, H=3, P=6))
  assert "block 0 has 36 convolution channels" in odd[1]


def test_our_own_folder_holds_every_cut_bit_for_bit(tmp_path):
  cfg = models.make(**{"rope": Rope(base=50.0)})
  params = models.params(cfg)
  sizes = {0: {"N": 3, "G": 1}, 2: {"N": 0, "H": 3}, 3: {"K": 1, "E": 6}, "V": 19}
  small_cfg, small = cutting.cut(cfg, params, models.plan(cfg, params, sizes))
  assert small_cfg.pattern == "M-C*-" and small_cfg.blocks[3].rope.frequency
  native.write(tmp_path / "m", small_cfg, lazy.of(small))
  found, leaves = native.open(tmp_path / "m")
  assert found == small_cfg
  for path, leaf in axes.leaves(small):
    np.testing.assert_array_equal(leaves[path].read(), leaf, err_msg=path)
