"""The selective scan where numbers are hard, its memory, and its parts on a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from cases import selective as cases
from cases.ssd import rounding
from hybridlm.ops.selective import api

B, L, H, N = 1, 300, 3, 5
# Range of dt (log-uniform) and of -a.
EXTREMES = {
  "steps near zero": ((1e-38, 1e-20), (0.5, 2)),
  "huge steps": ((1e3, 1e8), (0.5, 2)),
  "steep rates": ((0.01, 1), (1e6, 1e12)),
  "steps of all sizes": ((1e-12, 1e6), (1e-6, 1e6)),
}
# float32 cannot tell smaller numbers from zero.
TINY = float(np.finfo(np.float32).tiny)
MESHES = {
  "rows and channels": {"data": 3, "tensor": 2},
  "positions and channels": {"sequence": 4, "tensor": 2},
}


def arguments(name):
  """Returns the arguments of a case in float32."""
  (low, high), rates = EXTREMES[name]
  rng = np.random.default_rng(sorted(EXTREMES).index(name))
  drawn = {
    "x_BLH": rng.standard_normal((B, L, H)),
    "dt_BLH": np.exp(rng.uniform(np.log(low), np.log(high), (B, L, H))),
    "a_HN": -np.exp(rng.uniform(*np.log(rates), (H, N))),
    "b_BLN": rng.standard_normal((B, L, N)),
    "c_BLN": rng.standard_normal((B, L, N)),
    "skip_H": rng.standard_normal(H),
    "state_BHN": rng.standard_normal((B, H, N)),
  }
  return {name: v.astype(np.float32) for name, v in drawn.items()}


@functools.cache
def program(impl, chunk):
  """Returns a compiled scan with its gradients."""

  def loss(floats, segment_BL):
    outputs = api.selective(**floats, segment_BL=segment_BL, impl=impl, chunk=chunk)
    rng = np.random.default_rng(9)
    weights = (rng.standard_normal(v.shape).astype(np.float32) for v in outputs)
    return sum(jnp.sum(v * w) for v, w in zip(outputs, weights, strict=True)), outputs

  return jax.jit(jax.grad(loss, has_aux=True))


def close(got, want, tolerance, label):
  """Asserts agreement up to a share of the largest entry wanted of each channel; all is finite.

  `label` ends in axis letters. Channels differ in size by as much as their rates do.
  """
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.all(np.isfinite(got)), label
  others = tuple(i for i, letter in enumerate(label.rpartition("_")[2]) if letter != "H")
  limit = tolerance * np.abs(want).max(axis=others) + TINY
  assert np.all(np.abs(got - want).max(axis=others) <= limit), label


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_steps_and_rates_give_values_and_gradients_of_float64(name):
  given = arguments(name)
  got, (y_BLH, state_BHN) = program("chunked", 32)(given, None)
  want_y, want_state = cases.recurrence(**given)
  close(y_BLH, want_y, rounding(L, N), "y_BLH")
  close(state_BHN, want_state, rounding(L, N), "state_BHN")
  with jax.enable_x64(True):
    wide = {name: jnp.asarray(v, jnp.float64) for name, v in given.items()}
    want, _ = program("reference", None)(wide, None)
  for leaf, v in got.items():
    close(v, want[leaf], rounding(L, N, H), leaf)


def test_memory_of_a_long_scan_and_its_gradient_is_far_below_the_naive_one():
  B, L, H, N = 1, 8192, 256, 16
  shapes = [(B, L, H), (B, L, H), (H, N), (B, L, N), (B, L, N)]
  floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

  def loss(*arrays):
    return jnp.sum(api.selective(*arrays)[0] ** 2)

  for run in (lambda *arrays: api.selective(*arrays), jax.grad(loss, argnums=tuple(range(5)))):
    memory = jax.jit(run).lower(*floats).compile().memory_analysis()
    # Unfused, every position holds the states of all channels.
    assert 0 < memory.temp_size_in_bytes < 4 * B * L * H * N / 2


@pytest.mark.parametrize("sizes", MESHES)
def test_devices_with_parts_of_their_own_give_what_one_gives(sizes):
  # Documents of all lengths: some end inside a device's part, some at its edge, some span several.
  given = cases.make(cases.Case(L=40, resets=0.1))
  segment_BL = given.pop("segment_BL")
  want, outputs = program("chunked", 3)(given, segment_BL)
  kinds = (AxisType.Auto,) * len(MESHES[sizes])
  grid = jax.make_mesh(
    tuple(MESHES[sizes].values()), tuple(MESHES[sizes]), axis_types=kinds,
    devices=jax.devices()[: math.prod(MESHES[sizes].values())],
  )
  with jax.set_mesh(grid):
    run = program.__wrapped__("chunked", 3)
    got, others = run(given, segment_BL)
    text = run.lower(given, segment_BL).as_text()
  held = [n // MESHES[sizes].get(axis, 1) for n, axis in zip(
    (3, 40, 6), ("data", "sequence", "tensor"), strict=True)]
  assert f"tensor<{'x'.join(map(str, held))}xf32>" in text
  for a, b in zip(jax.tree.leaves((got, others)), jax.tree.leaves((want, outputs)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1, float(jnp.abs(b).max())))


def test_channels_that_the_mesh_does_not_divide_are_refused():
  grid = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  with (
    jax.set_mesh(grid),
    pytest.raises(ValueError, match="H=6 is not a multiple of mesh axis tensor=4 in selective"),
  ):
    api.selective(**{name: jnp.asarray(v) for name, v in cases.make(cases.CASES["bare"]).items()})
