"""A Mamba-2 mixer may norm before its gate, or not at all: the laws hold for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm.blocks import GATES
from hybridlm.nn import mamba, serve

LENGTHS, TOTAL = (5, 2), 8
SIZES = {"H": 3, "P": 4, "N": 3, "G": 1, "D": 11}
OTHERS = [gate for gate in GATES if gate != "gated"]
TOLERANCE = 1e-5


def made(gate):
  """Returns a model of a mixer and one without its state, and its parameters."""
  cfg = models.make(pattern="MC", gate=gate, chunk=4)
  return cfg, models.params(cfg, 5.0)


@pytest.mark.parametrize("gate", OTHERS)
def test_the_masked_model_is_the_cut_one_and_one_token_after_the_other_is_all_at_once(gate):
  cfg, params = made(gate)
  plan = models.plan(cfg, params, SIZES)
  small_cfg, small = hybridlm.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)
  assert [block.gate for block in small_cfg.blocks] == [gate] * 2
  assert ("count_G" in kept["blocks"].get("00", {})) == (gate == "before")
  token_BL = models.tokens(cfg, (len(LENGTHS), TOTAL))
  want_BLV = hybridlm.forward(small_cfg, small, token_BL)
  assert models.error(hybridlm.forward(cfg, masked, token_BL, kept=kept), want_BLV) < TOLERANCE
  length_B, rows_B = np.array(LENGTHS), np.arange(len(LENGTHS))
  fused = serve.fuse(small_cfg, small)
  prefill = jax.jit(serve.prefill, static_argnames=("cfg", "size"))
  step = jax.jit(serve.step, static_argnames="cfg")
  logits_BV, cache = prefill(small_cfg, fused, token_BL[:, :5], length_B, size=TOTAL)
  assert models.error(logits_BV, want_BLV[rows_B, length_B - 1]) < TOLERANCE
  for count in range(TOTAL - max(LENGTHS)):
    logits_BV, cache = step(small_cfg, fused, cache, token_BL[rows_B, length_B + count])
    assert models.error(logits_BV, want_BLV[rows_B, length_B + count]) < TOLERANCE


def test_each_gate_is_another_function_of_the_same_scan():
  cfg, params = made("gated")
  leaves = params["blocks"]["00"]
  shape = (1, 3, *leaves["gate_gain_GHP"].shape)
  y_BLGHP, z_BLGHP = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
  z = np.asarray(z_BLGHP, np.float64)
  silu, gain = z / (1 + np.exp(-z)), np.asarray(leaves["gate_gain_GHP"])

  def normed(u):
    return u / np.sqrt(np.mean(u**2, axis=(-2, -1), keepdims=True) + cfg.eps) * gain

  y = np.asarray(y_BLGHP, np.float64)
  wanted = {"gated": normed(y * silu), "before": normed(y) * silu, "none": y * silu}
  assert set(wanted) == set(GATES)
  for gate, want in wanted.items():
    block = models.make(pattern="M", gate=gate).blocks[0]
    got = mamba.gated(cfg, block, leaves, y_BLGHP, z_BLGHP)
    np.testing.assert_allclose(got, jnp.asarray(want), rtol=1e-5, atol=1e-6, err_msg=gate)
