"""What a model on disk may differ in from the one it was made from, and what it may not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from experiments import comparison
from hybridlm import lazy
from hybridlm.config import Rope
from hybridlm.interop import huggingface
from hybridlm.prune import stream
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

CFG = models.make("tied", "M*", V=37, vocabulary=31, dt_limits=(0.001, float("inf")), context=64)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
  """A tied model with padded rows, and what a class makes of it that ties and pads nothing."""
  folder = tmp_path_factory.mktemp("made") / "hf"
  leaves = lazy.of(models.params(CFG, 3.0))
  huggingface.write(folder, CFG, leaves, family="nemotron_h")
  return comparison.Side(CFG, leaves), comparison.Side(*huggingface.open(folder))


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["by block", "whole"])
def test_a_head_may_be_spelled_out_and_padding_left_out(sides, small, monkeypatch):
  monkeypatch.setattr(comparison, "SMALL", small)
  source, made = sides
  assert made.cfg.V == 31 and not made.cfg.tied
  assert comparison.compare(source, made, None) < 1e-5
  with pytest.raises(RuntimeError, match="another shape"):
    comparison.compare(made, source, None)


@pytest.mark.parametrize("path", ["head/w_head_DV", "blocks/01/w_v_DKE"])
def test_values_digits_and_lost_numbers_are_seen(sides, path):
  source, made = sides

  def changed(change, dtype="float32"):
    leaf = made.leaves[path]
    other = lazy.Leaf(leaf.shape, np.dtype(dtype), lambda: change(leaf.read()).astype(dtype))
    return comparison.Side(made.cfg, {**made.leaves, path: other})

  with pytest.raises(RuntimeError, match=f"leaf '{path}' of the target differs by up to"):
    comparison.compare(source, changed(lambda w: np.nextafter(w, np.float32(9))), None)
  with pytest.raises(RuntimeError, match="is float16 .*, not float32"):
    comparison.compare(source, changed(np.copy, "float16"), None)


def test_a_number_that_rounding_makes_infinite_is_refused(sides):
  source, made = sides
  path, most = "embed/w_embed_VD", np.finfo(np.float32).max
  wide = source.leaves[path]._replace(read=lambda: np.full((37, 16), most))
  short = lazy.Leaf((31, 16), np.dtype(jnp.bfloat16), lambda: np.full((31, 16), np.inf, "bfloat16"))
  one, two = (
    comparison.Side(side.cfg, {**side.leaves, path: leaf})
    for side, leaf in ((source, wide), (made, short))
  )
  with pytest.raises(RuntimeError, match="bfloat16 cannot hold a value of the source"):
    comparison.compare(one, two, None, dtype="bfloat16")


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["by block", "whole"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_cut_of_every_axis_is_the_masked_source_with_its_queries_scaled(
  small, dtype, monkeypatch, tmp_path
):
  monkeypatch.setattr(comparison, "SMALL", small)
  cfg = models.make(**{"pattern": "*-*-", "activation": "swiglu", "D": 18, "E": 8, "V": 37},
                    vocabulary=31, rope=Rope(base=50.0))
  params = models.params(cfg, 3.0)
  keep = {
    "keep_V": [*range(3, 30), 33], "keep_X": [2, 3],
    "02": {"keep_E": [0, 2, 4, 6], "keep_KJ": [[0, 1], [1, 2]], "keep_K": [1]},
  }
  plan = Plan(cfg, tree_hash(params), keep)
  made_cfg, leaves = stream.cut(cfg, lazy.of(params), plan)
  huggingface.write(tmp_path / "hf", made_cfg, leaves, family="llama", dtype=dtype)
  source = comparison.Side(cfg, lazy.of(params))
  made = comparison.Side(*huggingface.open(tmp_path / "hf"))
  assert made.cfg.blocks[0].rope == Rope(base=50.0)
  assert comparison.compare(source, made, plan, dtype=dtype) < 1e-5
  other = dataclasses.replace(plan, keep={**plan.keep, "keep_V": [*range(2, 29), 33]})
  with pytest.raises(RuntimeError, match="leaf .* of the target differs by up to"):
    comparison.compare(source, made, other, dtype=dtype)
