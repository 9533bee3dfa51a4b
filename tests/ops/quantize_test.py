"""Eight-bit numbers with scales: what rounding may cost, and products of rounded operands."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybridlm.ops.project import project
from hybridlm.ops.quantize import FORWARD, GRADIENT, restored, scaled

X, W = (3, 10, 16), (16, 2, 4, 6)
BITS = {FORWARD: (4, 2.0**-10), GRADIENT: (3, 2.0**-17)}  # 2^-bits of a value, or half the smallest


def draw(shape, seed, dtype=jnp.float32):
  """Returns values over many binades."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 1, shape), dtype)


def rounded(x, dtype):
  """Returns what an array is in eight bits, by another implementation, in float64."""
  x = np.asarray(x, np.float32)
  scale = np.abs(x).max() / np.float32(ml_dtypes.finfo(dtype).max)
  return (x / scale).astype(dtype).astype(np.float64) * np.float64(scale)


def loss(x_BLD, w_DGHP, pull):
  return jnp.sum(project(x_BLD, w_DGHP, quantize="fp8") * pull)


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT, jnp.int8])
@pytest.mark.parametrize("power", [-30, 17])
def test_a_tensor_times_a_power_of_two_has_the_same_eight_bits_and_a_scale_times_that(dtype, power):
  x = draw((7, 33), 0)
  plain, moved = scaled(x, dtype), scaled(x * 2.0**power, dtype)
  np.testing.assert_array_equal(
    *(np.asarray(s.values).astype(np.float32) for s in (plain, moved))
  )
  assert moved.scale == plain.scale * 2.0**power


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT, jnp.int8])
def test_rounding_costs_half_a_step_and_the_largest_value_nothing(dtype):
  x = draw((5, 6, 7), 1)
  for over in (None, (0, 2)):
    small = scaled(x, dtype, over=over)
    off = np.abs(np.asarray(restored(small, jnp.float32, over=over) - x, np.float64))
    scale = np.expand_dims(small.scale, (0, 1, 2) if over is None else over)
    if dtype == jnp.int8:
      allowed = 0.5 * scale * np.ones(x.shape)
    else:
      bits, least = BITS[dtype]
      allowed = np.maximum(2.0**-bits * np.abs(x), least * scale)
    assert (off <= allowed * (1 + 1e-5)).all() and off.max() > 0
    assert off.ravel()[np.abs(x).argmax()] <= 1e-6 * np.abs(x).max()


def test_a_projection_in_fp8_is_that_of_operands_in_e4m3_and_its_gradients_of_one_in_e5m2():
  x, w, pull = draw(X, 0), draw(W, 1), draw((*X[:2], *W[1:]), 2)
  y, back = jax.vjp(lambda x, w: project(x, w, quantize="fp8"), x, w)
  small_x, small_w = (rounded(v, ml_dtypes.float8_e4m3fn) for v in (x, w))
  small_pull = rounded(pull, ml_dtypes.float8_e5m2)
  x_bar, w_bar = back(pull)
  for got, want in (
    (y, np.einsum("bld,dghp->blghp", small_x, small_w)),
    (x_bar, np.einsum("blghp,dghp->bld", small_pull, small_w)),
    (w_bar, np.einsum("bld,blghp->dghp", small_x, small_pull)),
  ):
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
    assert got.dtype == jnp.float32
  wide = np.einsum("bld,dghp->blghp", *(np.asarray(v, np.float64) for v in (x, w)))
  off_x, off_w = np.abs(small_x - np.asarray(x)), np.abs(small_w - np.asarray(w))
  allowed = (
    np.einsum("bld,dghp->blghp", off_x, np.abs(w))
    + np.einsum("bld,dghp->blghp", np.abs(small_x), off_w)
  )
  assert (np.abs(y - wide) <= allowed + 1e-6 * np.abs(wide).max()).all()


def test_fp8_sums_bfloat16_in_float32_and_gives_gradients_in_the_operands_dtypes():
  # Ones are exact in eight bits; a running sum of them in bfloat16 would stop at 256.
  x, w = jnp.ones((3, 516), jnp.bfloat16), jnp.ones((516, 5), jnp.float32)
  y, back = jax.vjp(lambda x, w: project(x, w, quantize="fp8"), x, w)
  np.testing.assert_array_equal(y, jnp.full((3, 5), 516, jnp.bfloat16))
  assert [y.dtype, *(v.dtype for v in back(y))] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_zeros_stay_zero_with_finite_slopes_and_what_is_not_finite_is_seen():
  x, w, pull = jnp.zeros(X), draw(W, 1), draw((*X[:2], *W[1:]), 2)
  assert not project(x, w, quantize="fp8").any()
  for slope in jax.grad(loss, argnums=(0, 1))(x, w, pull):
    assert jnp.isfinite(slope).all()
  for bad in (jnp.inf, jnp.nan):
    assert jnp.isnan(project(x.at[0, 0, 0].set(bad), w, quantize="fp8")).all()


def test_fp8_on_several_devices_is_fp8_on_one():
  grid = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
  x, w, pull = draw((4, 24, 16), 0), draw(W, 1), draw((4, 24, *W[1:]), 2)
  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  want = gradient(x, w, pull)
  where = NamedSharding(grid, PartitionSpec("data", "sequence"))
  x, pull = jax.device_put((x, pull), where)
  with jax.set_mesh(grid):
    program = jax.jit(gradient).lower(x, w, pull).compile()
    got = program(x, w, pull)
  assert "all-gather" not in program.as_text()
  for v, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(v, wanted, atol=2e-5 * np.abs(wanted).max())


def test_another_name_is_refused():
  with pytest.raises(ValueError, match="quantize='fp4' is not one of none, fp8"):
    project(jnp.ones((2, 16)), jnp.ones((16, 4)), quantize="fp4")
