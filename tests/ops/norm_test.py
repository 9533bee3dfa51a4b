"""Norms against their formulas in float64, and masked inputs against cut ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.ops import norm

EPS = 1e-5
SCALES = (1.0, 1e-3)  # at 1e-3 the mean square is below eps: a wrong count cannot hide
KEPT = np.array([0, 2, 3, 7, 8])


def draw(*shape, scale=1.0):
  """Returns standard normal numbers times a scale."""
  return jnp.asarray(scale * np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def test_they_equal_their_formulas():
  x, gain, bias = draw(3, 7, 11), draw(11), draw(1, 11)[0]
  x64, gain64, bias64 = (np.asarray(a, np.float64) for a in (x, gain, bias))
  rms = x64 / np.sqrt(np.square(x64).mean(-1, keepdims=True) + EPS) * gain64
  np.testing.assert_allclose(norm.rms_norm(x, gain, eps=EPS), rms, rtol=2e-5, atol=1e-6)
  centred = x64 - x64.mean(-1, keepdims=True)
  layer = centred / np.sqrt(x64.var(-1, keepdims=True) + EPS) * gain64 + bias64
  np.testing.assert_allclose(norm.layer_norm(x, gain, bias, eps=EPS), layer, rtol=2e-5, atol=1e-5)


def test_the_gate_comes_before_the_norm_and_groups_stay_apart():
  y, z, gain = draw(2, 3, 2, 4, 6), draw(2, 3, 2, 4, 6)[::-1], draw(2, 4, 6)
  y64, z64, gain64 = (np.asarray(a, np.float64) for a in (y, z, gain))
  gated = y64 * z64 / (1 + np.exp(-z64))
  want = gated / np.sqrt(np.square(gated).mean((-2, -1), keepdims=True) + EPS) * gain64
  np.testing.assert_allclose(norm.gated_rms_norm(y, z, gain, eps=EPS), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["rms", "layer"])
def test_masked_entries_and_a_count_give_the_cut_norm(name, scale):
  x, gain, bias = draw(3, 7, 11, scale=scale) + scale, draw(11), draw(1, 11)[0]
  gone = np.setdiff1d(np.arange(11), KEPT)
  masked = [a.at[..., gone].set(0.0) for a in (x, gain, bias)]
  cut = [a[..., KEPT] for a in (x, gain, bias)]
  call = norm.rms_norm if name == "rms" else norm.layer_norm
  count = {"rms": 2, "layer": 3}[name]
  got = call(*masked[:count], eps=EPS, count=jnp.float32(len(KEPT)))
  want = call(*cut[:count], eps=EPS)
  np.testing.assert_allclose(got[..., KEPT], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got[..., gone], 0.0)
  wrong = call(*masked[:count], eps=EPS)[..., KEPT]
  assert float(jnp.abs(wrong - want).max()) > 1e-3


@pytest.mark.parametrize("scale", SCALES)
def test_a_gated_norm_counts_what_is_left_of_each_group(scale):
  y, z, gain = draw(2, 3, 2, 4, 6, scale=scale), draw(2, 3, 2, 4, 6)[::-1], draw(2, 4, 6)
  stays = np.zeros((2, 4, 6), bool)
  stays[0, [0, 2], 1:], stays[1, [1, 3], 1:] = True, True
  masked = [jnp.where(stays, a, 0.0) for a in (y, z, gain)]
  count_G = jnp.full(2, 10.0)
  got = norm.gated_rms_norm(*masked, eps=EPS, count_G=count_G)
  for group, heads in ((0, [0, 2]), (1, [1, 3])):
    cut = [a[..., group : group + 1, heads, 1:] for a in (y, z)]
    want = norm.gated_rms_norm(*cut, gain[group : group + 1, heads, 1:], eps=EPS)
    np.testing.assert_allclose(
      got[..., group, heads, 1:], want[..., 0, :, :], rtol=1e-5, atol=1e-6
    )


def test_statistics_are_float32_whatever_comes_in():
  # Squares of these underflow or lose all digits in bfloat16's sum.
  x = jnp.full((1, 4096), 3.0, jnp.bfloat16)
  got = norm.rms_norm(x, jnp.ones(4096), eps=EPS)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), 1.0, rtol=2**-8)


def test_gradients_of_a_row_of_zeros_are_finite():
  for call, extra in ((norm.rms_norm, ()), (norm.layer_norm, (jnp.zeros(5),))):
    gradient = jax.grad(lambda x, call=call, extra=extra: call(
      x, jnp.ones(5), *extra, eps=EPS, count=jnp.float32(3)).sum())(jnp.zeros(5))
    assert bool(jnp.isfinite(gradient).all())
