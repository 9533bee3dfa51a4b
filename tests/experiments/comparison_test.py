"""What a model on disk may differ in from the one it was made from, and what it may not."""

import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from experiments import comparison
from hybridlm import lazy
from hybridlm.interop import huggingface

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
