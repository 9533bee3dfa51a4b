"""Operations on a mesh: every device on its own part, with the values and gradients of one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cases import ssd as cases
from hybridlm.ops import mesh, norm
from hybridlm.ops.attention import attend
from hybridlm.ops.conv import causal_conv
from hybridlm.ops.ssd import api

GRID = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
LONG = {"sequence": 8}


def grid(sizes):
  devices = jax.devices()[: int(np.prod(list(sizes.values())))]
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def normal(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def agree(run, arrays, sizes, tolerance=2e-5):
  """Asserts that `run(*arrays)` and its gradients on a mesh are those of one device."""
  def loss(arrays):
    out = run(*arrays)
    weight = np.random.default_rng(9).normal(size=out.shape).astype(np.float32)
    return jnp.sum(weight * out), out

  both = jax.grad(loss, has_aux=True)
  want = jax.jit(both)(arrays)
  with jax.set_mesh(grid(sizes)):
    got = jax.jit(both)(arrays)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("sizes", [GRID, LONG], ids=["mixed", "reach over two neighbours"])
def test_a_convolution_reaches_over_the_borders_of_divided_positions(sizes):
  rng, channels = np.random.default_rng(0), (2, 3)
  # On eight devices each has two positions, fewer than the three before that a tap of four reads.
  segment_BL = jnp.asarray(np.cumsum(rng.random((2, 16)) < 0.15, axis=1), jnp.int32)
  arrays = (normal(rng, 2, 16, *channels), normal(rng, 4, *channels), normal(rng, *channels))
  agree(lambda *v: causal_conv(*v, segment_BL=segment_BL, channels="GP"), arrays, sizes)


@pytest.mark.parametrize("sizes,heads,window", [
  (GRID, (2, 3), 5), (LONG, (1, 2), None), ({"fsdp": 2, "tensor": 3}, (2, 3), None),
], ids=["mixed, windowed", "positions", "queries of a key head divided"])
def test_attention_sees_the_keys_of_all_devices_that_it_may_see(sizes, heads, window):
  rng, (K, J) = np.random.default_rng(1), heads
  segment_BL = jnp.asarray(np.cumsum(rng.random((2, 24)) < 0.15, axis=1), jnp.int32)
  arrays = (normal(rng, 2, 24, K, J, 4), normal(rng, 2, 24, K, 4), normal(rng, 2, 24, K, 4))
  agree(lambda *v: attend(*v, segment_BL=segment_BL, window=window, block=2), arrays, sizes)


def test_a_scan_on_heads_of_its_own_gives_what_all_give():
  made = cases.make(cases.Case(L=20, resets=0.1, seed=3))
  given = {name: jnp.asarray(v) for name, v in made.items() if v is not None}
  segment_BL = given.pop("segment_BL")
  heads = given["a_GH"].shape
  sizes = {"fsdp": 1, "tensor": heads[1], "sequence": 2}
  assert heads[0] % heads[1]  # groups cannot be divided so

  def run(*v):
    return api.ssd(**dict(zip(given, v, strict=True)), segment_BL=segment_BL, chunk=4)[0]

  agree(run, tuple(given.values()), sizes, cases.rounding(20, cases.N, cases.H, cases.P))


def test_the_gated_norm_of_divided_heads_sums_a_statistic_and_gathers_nothing():
  rng, place = np.random.default_rng(2), grid({"data": 2, "tensor": 4})
  y_BLGHP, gain_GHP = normal(rng, 2, 5, 2, 4, 3), normal(rng, 2, 4, 3)
  z_BLGHP = normal(rng, *y_BLGHP.shape)

  def loss(y_BLGHP, z_BLGHP, gain_GHP):
    return jnp.sum(jnp.sin(norm.gated_rms_norm(y_BLGHP, z_BLGHP, gain_GHP, eps=1e-5)))

  run = jax.grad(loss, argnums=(0, 1, 2))
  rows = NamedSharding(place, PartitionSpec("data", None, None, "tensor"))
  gains = NamedSharding(place, PartitionSpec(None, "tensor"))
  spread = jax.device_put((y_BLGHP, z_BLGHP, gain_GHP), (rows, rows, gains))
  program = jax.jit(run, out_shardings=(rows, rows, gains)).lower(*spread).compile()
  found = set(re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(",
                         program.as_text()))
  assert found == {"all-reduce"}
  for a, b in zip(program(*spread), run(y_BLGHP, z_BLGHP, gain_GHP), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_every_device_is_given_its_part_and_what_does_not_divide_is_refused():
  arrays = {"x_BLGH": jnp.ones((4, 6, 3, 2)), "b_BLG": jnp.ones((4, 6, 3)), "none_B": None}
  seen = {}

  def run(**given):
    seen.update({name: v.shape for name, v in given.items()})
    return (given["x_BLGH"],)

  over = functools.partial(mesh.over, run, arrays, ("y_BLGH",), mesh.MESH_AXES, "here")
  assert over()[0].shape == (4, 6, 3, 2) and seen["x_BLGH"] == (4, 6, 3, 2)
  with jax.set_mesh(grid({"data": 2, "fsdp": 2, "tensor": 2})):
    assert jax.jit(over)()[0].shape == (4, 6, 3, 2)
  assert seen == {"x_BLGH": (1, 6, 3, 1), "b_BLG": (1, 6, 3)}  # three groups: heads are divided
  with (
    jax.set_mesh(grid({"tensor": 4})),
    pytest.raises(ValueError, match="G=3 is not a multiple of mesh axis tensor=4, nor is H=2, in"),
  ):
    over()
