"""The laws of the norms: the formula, and that a masked input equals a cut one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.ops import norm

B, L, D, G, H, P = 2, 7, 16, 2, 4, 6
EPS = 1e-5
# 0.003 makes the mean of squares as small as eps; the offset makes the mean large.
SCALES = {"usual": (1.0, 0.0), "tiny": (0.003, 0.0), "far": (1.0, 30.0)}
KEPT_D = np.array([0, 1, 3, 4, 7, 8, 12, 13, 15])


def draw(*shape, seed=0, scale=1.0, offset=0.0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return jnp.asarray(scale * rng.standard_normal(shape) + offset, dtype)


def mask(array, keep, axis=-1):
  """Returns `array` with zeros where its index on `axis` is not in `keep`."""
  kept = np.isin(np.arange(array.shape[axis]), keep)
  shape = [1] * array.ndim
  shape[axis] = -1
  return jnp.where(kept.reshape(shape), array, 0)


def rms(x, gain):
  x = np.asarray(x, np.float64)
  return np.asarray(gain) * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS)


def standard(x, gain, bias):
  x = np.asarray(x, np.float64)
  x = x - x.mean(axis=-1, keepdims=True)
  return np.asarray(gain) * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS) + np.asarray(bias)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_norms_follow_their_formula(scale):
  x_BLD = draw(B, L, D, scale=scale[0], offset=scale[1])
  gain_D, bias_D = draw(D, seed=1), draw(D, seed=2)
  np.testing.assert_allclose(
    norm.rms_norm(x_BLD, gain_D, eps=EPS), rms(x_BLD, gain_D), rtol=2e-6, atol=2e-6
  )
  np.testing.assert_allclose(
    norm.layer_norm(x_BLD, gain_D, bias_D, eps=EPS), standard(x_BLD, gain_D, bias_D), atol=2e-5
  )


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_masked_input_with_its_count_gives_what_the_cut_input_gives(scale):
  x_BLD = draw(B, L, D, scale=scale[0], offset=scale[1])
  # A survivor that happens to be zero still counts.
  x_BLD = x_BLD.at[:, :, KEPT_D[2]].set(0)
  gain_D, bias_D = draw(D, seed=1), draw(D, seed=2)
  masked = [mask(v, KEPT_D) for v in (x_BLD, gain_D, bias_D)]
  cut = [v[..., KEPT_D] for v in (x_BLD, gain_D, bias_D)]
  count = jnp.float32(len(KEPT_D))
  got = norm.rms_norm(*masked[:2], eps=EPS, count=count)
  np.testing.assert_allclose(got[..., KEPT_D], norm.rms_norm(*cut[:2], eps=EPS), rtol=1e-6)
  assert not np.any(np.delete(got, KEPT_D, axis=-1))
  got = norm.layer_norm(*masked, eps=EPS, count=count)
  want = norm.layer_norm(*cut, eps=EPS)
  np.testing.assert_allclose(got[..., KEPT_D], want, rtol=1e-5, atol=4e-6)
  assert not np.any(np.delete(got, KEPT_D, axis=-1))


@pytest.mark.parametrize("run", [norm.gated_rms_norm, norm.rms_norm_then_gate])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_gated_norm_of_masked_heads_and_channels_is_that_of_the_cut_ones(scale, run):
  y_BLGHP = draw(B, L, G, H, P, scale=scale[0], offset=scale[1])
  z_BLGHP, gain_GHP = draw(B, L, G, H, P, seed=1), draw(G, H, P, seed=2)
  keep_H, keep_P = np.array([0, 1, 3]), np.array([1, 2, 4, 5])

  def masked(array):
    return mask(mask(array, keep_H, -2), keep_P, -1)

  def cut(array):
    return array[..., keep_H, :][..., keep_P]

  # z is not masked: silu(z) meets a zero of y.
  count_G = jnp.full(G, float(len(keep_H) * len(keep_P)))
  got = run(masked(y_BLGHP), z_BLGHP, masked(gain_GHP), eps=EPS, count_G=count_G)
  want = run(cut(y_BLGHP), cut(z_BLGHP), cut(gain_GHP), eps=EPS)
  np.testing.assert_allclose(cut(got), want, rtol=2e-6, atol=1e-6)
  np.testing.assert_array_equal(got, masked(got))


def test_the_gate_is_where_its_name_says_and_groups_do_not_mix():
  y_BLGHP, z_BLGHP = draw(B, L, G, H, P), draw(B, L, G, H, P, seed=1)
  gain_GHP = draw(G, H, P, seed=2)
  first = norm.gated_rms_norm(y_BLGHP, z_BLGHP, gain_GHP, eps=EPS)
  last = norm.rms_norm_then_gate(y_BLGHP, z_BLGHP, gain_GHP, eps=EPS)
  z, y = np.asarray(z_BLGHP, np.float64), np.asarray(y_BLGHP)
  silu = z / (1 + np.exp(-z))
  np.testing.assert_allclose(norm.gate(y_BLGHP, z_BLGHP), y * silu, rtol=4e-6, atol=1e-6)
  for g in range(G):
    gain = gain_GHP[g].reshape(H * P)
    want = rms((y * silu)[:, :, g].reshape(B, L, H * P), gain)
    np.testing.assert_allclose(first[:, :, g].reshape(B, L, H * P), want, rtol=4e-6, atol=1e-6)
    want = rms(y[:, :, g].reshape(B, L, H * P), gain) * silu[:, :, g].reshape(B, L, H * P)
    np.testing.assert_allclose(last[:, :, g].reshape(B, L, H * P), want, rtol=4e-6, atol=1e-6)


def test_a_different_count_in_each_group_reaches_its_own_group():
  y_BLGHP, z_BLGHP = draw(B, L, G, H, P), draw(B, L, G, H, P, seed=1)
  gain_GHP = jnp.ones((G, H, P))
  plain = norm.gated_rms_norm(y_BLGHP, z_BLGHP, gain_GHP, eps=0.0)
  count_G = jnp.array([H * P, H * P / 4])
  counted = norm.gated_rms_norm(y_BLGHP, z_BLGHP, gain_GHP, eps=0.0, count_G=count_G)
  np.testing.assert_allclose(counted[:, :, 0], plain[:, :, 0], rtol=1e-6)
  np.testing.assert_allclose(counted[:, :, 1], plain[:, :, 1] / 2, rtol=1e-6)


def test_bfloat16_inputs_are_normed_in_float32():
  # 300 and its neighbours round to the same bfloat16 when squared there.
  x_D = jnp.array([300.0, 302.0, -298.0, 296.0], jnp.bfloat16)
  gain_D = jnp.array([1.0, 0.5, 2.0, 1.5], jnp.float32)
  got = norm.rms_norm(x_D, gain_D, eps=EPS)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, jnp.asarray(rms(x_D, gain_D), jnp.bfloat16))
  bias_D = jnp.zeros(4)
  got = norm.layer_norm(x_D[:2], gain_D[:2], bias_D[:2], eps=EPS)
  np.testing.assert_array_equal(got, jnp.array([-1.0, 0.5], jnp.bfloat16))
  y_BLGHP, z_BLGHP = (draw(B, L, G, H, P, seed=seed, dtype=jnp.bfloat16) for seed in (0, 1))
  gain_GHP = draw(G, H, P, seed=2)
  wide = [v.astype(jnp.float32) for v in (y_BLGHP, z_BLGHP)]
  for run in (norm.gated_rms_norm, norm.rms_norm_then_gate):
    got, want = (run(*arrays, gain_GHP, eps=EPS) for arrays in ((y_BLGHP, z_BLGHP), wide))
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
  np.testing.assert_array_equal(
    norm.gate(y_BLGHP, z_BLGHP), norm.gate(*wide).astype(jnp.bfloat16)
  )


def test_gradients_of_a_row_of_zeros_are_finite():
  def rms_norm(x_D):
    return jnp.sum(norm.rms_norm(x_D, jnp.ones(5), eps=EPS, count=jnp.float32(3)))

  def layer_norm(x_D):
    return jnp.sum(norm.layer_norm(x_D, jnp.ones(5), jnp.ones(5), eps=EPS, count=jnp.float32(3)))

  for run in (rms_norm, layer_norm):
    assert np.all(np.isfinite(jax.grad(run)(jnp.zeros(5))))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_count_that_is_traced_gives_one_program_for_all_counts(kind):
  x_BLD, gain_D, bias_D = draw(B, L, D), draw(D, seed=1), draw(D, seed=2)
  compiled = []

  @jax.jit
  def run(x_BLD, count):
    compiled.append(kind)
    if kind == "rms":
      return norm.rms_norm(x_BLD, gain_D, eps=EPS, count=count)
    return norm.layer_norm(x_BLD, gain_D, bias_D, eps=EPS, count=count)

  for size in (9, 12):
    keep = np.arange(size)
    cut = x_BLD[..., :size]
    got = run(mask(x_BLD, keep), jnp.float32(size))[..., :size]
    want = rms(cut, gain_D[:size]) if kind == "rms" else standard(cut, gain_D[:size], bias_D[:size])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert compiled == [kind]


@pytest.mark.parametrize("kind", ["rms", "layer", "gated", "then gate"])
@pytest.mark.parametrize("counted", [False, True], ids=["all", "counted"])
def test_gradients_of_the_norms_are_the_slopes_of_their_formulas(kind, counted):
  count, by_head = 11.0 if counted else None, kind in ("gated", "then gate")
  count_G = jnp.array([19.0, 13.0]) if counted else None
  sizes = [19.0, 13.0] if counted else [H * P, H * P]

  def formula(x, gain, other):
    if by_head:
      silu = other / (1 + np.exp(-other))
      u = x * silu if kind == "gated" else x
      mean = np.sum(u**2, (-2, -1), keepdims=True) / np.reshape(sizes, (-1, 1, 1))
      return u / np.sqrt(mean + EPS) * gain * (1 if kind == "gated" else silu)
    centre = np.sum(x, -1, keepdims=True) / (count or D) if kind == "layer" else 0
    v = x - centre
    mean = np.sum(v**2, -1, keepdims=True) / (count or D)
    return v / np.sqrt(mean + EPS) * gain + (other if kind == "layer" else 0)

  def run(x, gain, other):
    if by_head:
      gated = norm.gated_rms_norm if kind == "gated" else norm.rms_norm_then_gate
      return gated(x, other, gain, eps=EPS, count_G=count_G)
    if kind == "layer":
      return norm.layer_norm(x, gain, other, eps=EPS, count=count)
    return norm.rms_norm(x, gain, eps=EPS, count=count)

  tail = (G, H, P) if by_head else (D,)
  other = (B, L, *tail) if by_head else tail
  arrays = [draw(*shape, seed=i) for i, shape in enumerate([(B, L, *tail), tail, other])]
  weight, directions = draw(B, L, *tail, seed=3), [draw(*v.shape, seed=4) for v in arrays]
  slopes = jax.jit(jax.grad(lambda v: jnp.sum(run(*v) * weight)))(arrays)
  wide = [np.asarray(v, np.float64) for v in arrays]
  for i, slope in enumerate(slopes):
    moved = [
      [v + (j == i) * step * np.float64(directions[j]) for j, v in enumerate(wide)]
      for step in (1e-5, -1e-5)
    ]
    up, down = (np.sum(formula(*v) * np.float64(weight)) for v in moved)
    assert np.sum(slope * directions[i]) == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-4)
