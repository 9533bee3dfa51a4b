"""Projections: the einsum they stand for, and its slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybridlm.ops.project import project

SHAPES = {
  "BLD,DGHP->BLGHP": ((2, 7, 16), (16, 2, 4, 6), 1),
  "BLGHP,GHPD->BLD": ((2, 7, 2, 4, 6), (2, 4, 6, 16), 3),
  "BLKJE,KJED->BLD": ((2, 7, 2, 3, 10), (2, 3, 10, 16), 3),
  "BLD,DV->BLV": ((2, 7, 16), (16, 31), 1),
  "D,DF->F": ((16,), (16, 24), 1),
}


def draw(shape, seed, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("subscripts", SHAPES)
def test_a_projection_is_its_einsum_in_value_and_gradient(subscripts):
  x_shape, w_shape, inputs = SHAPES[subscripts]
  x, w = draw(x_shape, 0), draw(w_shape, 1)
  y_bar = draw(jnp.einsum(subscripts, x, w).shape, 2)
  y, pull = jax.vjp(lambda x, w: project(x, w, inputs=inputs), x, w)
  x64, w64, y_bar64 = (np.asarray(v, np.float64) for v in (x, w, y_bar))
  np.testing.assert_allclose(y, np.einsum(subscripts, x64, w64), atol=2e-5)
  names, out = subscripts.split("->")
  x_names, w_names = names.split(",")
  x_bar, w_bar = pull(y_bar)
  np.testing.assert_allclose(
    x_bar, np.einsum(f"{out},{w_names}->{x_names}", y_bar64, w64), atol=2e-5
  )
  np.testing.assert_allclose(
    w_bar, np.einsum(f"{x_names},{out}->{w_names}", x64, y_bar64), atol=2e-5
  )


def test_bfloat16_is_summed_in_float32_and_rounded_once():
  # A running sum of ones in bfloat16 would stop at 256.
  x, w = jnp.ones((3, 514), jnp.bfloat16), jnp.ones((514, 5), jnp.bfloat16)
  y, pull = jax.vjp(project, x, w)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.full((3, 5), 514, jnp.bfloat16))
  x_bar, w_bar = pull(y)
  assert x_bar.dtype == w_bar.dtype == jnp.bfloat16
  wide = project(x, w, dtype=jnp.float32)
  assert wide.dtype == jnp.float32
  np.testing.assert_array_equal(wide, np.full((3, 5), 514.0))


@pytest.mark.parametrize(
  ("shape", "inputs", "message"),
  [
    ((15, 4), 1, r"the last 1 axes of x \(2, 16\) are not the first of w \(15, 4\)"),
    ((16, 2, 4), 2, r"the last 2 axes of x \(2, 16\) are not the first of w"),
    ((16, 4), 0, "inputs 0 is not from 1 to the axes"),
    ((16, 4), 3, "inputs 3 is not from 1 to the axes"),
  ],
)
def test_axes_that_do_not_match_are_refused(shape, inputs, message):
  with pytest.raises(ValueError, match=message):
    project(jnp.ones((2, 16)), jnp.ones(shape), inputs=inputs)


def test_positions_on_several_devices_stay_there():
  grid = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
  x_BLD, w_DGH = draw((4, 24, 5), 0), draw((5, 2, 3), 1)

  def loss(x_BLD, w_DGH):
    return jnp.sum(project(x_BLD, w_DGH) ** 2)

  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  want = gradient(x_BLD, w_DGH)
  x_BLD = jax.device_put(x_BLD, NamedSharding(grid, PartitionSpec("data", "sequence")))
  with jax.set_mesh(grid):
    program = jax.jit(gradient).lower(x_BLD, w_DGH).compile()
    got = program(x_BLD, w_DGH)
  assert "all-gather" not in program.as_text()
  for v, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(v, wanted, atol=2e-5 * np.abs(wanted).max())
