"""The scan under a mesh: rows, groups and positions on devices of their own, same numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from cases import ssd as cases
from hybridlm.ops import mesh as meshes
from hybridlm.ops.ssd import api, vjp

L = 40
CASES = {
  "plain": cases.Case(L=L),
  "given state": cases.Case(L=L, state="random", skip=True, seed=4),
  # Documents of all lengths: some end inside a shard, some at its edge, some span several.
  "resets": cases.Case(L=L, resets=0.1, state="random", skip=True, seed=5),
  "bfloat16": cases.Case(L=L, resets=0.1, state="random", skip=True, dtype="bfloat16", seed=6),
}
MESHES = {"sequence=8": {"sequence": 8}, "sequence=5": {"sequence": 5},
          "data=3 sequence=2": {"data": 3, "sequence": 2},
          "sequence=4 tensor=2": {"sequence": 4, "tensor": 2}}
VALUES = cases.rounding(L, cases.N)
GRADIENTS = cases.rounding(L, cases.N, cases.H, cases.P)


def mesh(sizes):
  """Returns a mesh of as many of the eight devices as `sizes` ask for."""
  kinds = (AxisType.Auto,) * len(sizes)
  devices = jax.devices()[: math.prod(sizes.values())]
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def split(arguments):
  """Returns the arguments that have gradients, and the others."""
  given = {name: jnp.asarray(v) for name, v in arguments.items() if v is not None}
  segment_BL = given.pop("segment_BL", None)
  return given, {"segment_BL": segment_BL}


def outputs_and_gradients(arguments, scan):
  """Returns y, the state, and the gradients of both weighted at random."""
  floats, rest = split(arguments)

  def run(floats):
    y_BLGHP, state_BGHPN = scan(**floats, **rest)
    rng = np.random.default_rng(9)
    weights = (rng.standard_normal(v.shape).astype(np.float32) for v in (y_BLGHP, state_BGHPN))
    loss = sum(jnp.sum(v * w) for v, w in zip((y_BLGHP, state_BGHPN), weights, strict=True))
    return loss, (y_BLGHP, state_BGHPN)

  gradients, (y_BLGHP, state_BGHPN) = jax.jit(jax.grad(run, has_aux=True))(floats)
  return {"y": y_BLGHP, "state": state_BGHPN}, gradients


@functools.cache
def alone(name):
  """Returns what the recurrence makes of a case on one device."""
  return outputs_and_gradients(
    cases.make(CASES[name]), functools.partial(api.ssd, impl="reference")
  )


def close(got, want, tolerance, label):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  scale = max(np.abs(want).max(), 0.1)
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=label)


def agrees(got, name):
  """Asserts that outputs and gradients are those of one device, up to rounding."""
  rounded = CASES[name].dtype == "bfloat16"
  for pair, tolerance in ((0, VALUES), (1, GRADIENTS)):
    want = alone(name)[pair]
    assert set(got[pair]) == set(want)
    for label, v in want.items():
      close(got[pair][label], v, 2**-7 if rounded else tolerance, label)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_a_sequence_on_several_devices_gives_what_one_gives(name, sizes):
  grid = mesh(MESHES[sizes])
  with jax.set_mesh(grid):
    got = outputs_and_gradients(cases.make(CASES[name]), functools.partial(api.ssd, chunk=3))
  agrees(got, name)


@pytest.mark.parametrize("name", ["given state", "resets"])
def test_rows_and_groups_on_several_devices_give_what_one_gives(name):
  scan = functools.partial(vjp.ssd, passes=api.CHUNKED, chunk=8)

  def over_mesh(**arrays):
    return meshes.over(scan, arrays, ("y_BLGHP", "state_BGHPN"), meshes.MESH_AXES, "ssd")

  with jax.set_mesh(mesh({"data": 3, "tensor": 2})):
    program = jax.jit(lambda given: over_mesh(**given[0], **given[1]))
    text = program.lower(split(cases.make(CASES[name]))).as_text()
    got = outputs_and_gradients(cases.make(CASES[name]), over_mesh)
  # Each device is given one row of one group.
  assert f"tensor<1x{L}x1x{cases.H}x{cases.P}xf32>" in text
  agrees(got, name)


def test_a_size_that_the_mesh_does_not_divide_is_refused():
  floats, _ = split(cases.make(cases.Case(L=37)))
  with (
    jax.set_mesh(mesh({"sequence": 8})),
    pytest.raises(ValueError, match="L=37 is not a multiple of mesh axis sequence=8 in ssd"),
  ):
    api.ssd(**floats)


def test_the_caller_may_name_the_axes_of_the_mesh():
  arguments = cases.make(CASES["given state"])
  floats, rest = split(arguments)
  with jax.set_mesh(mesh({"rows": 2, "time": 4})):
    y_BLGHP, _ = jax.jit(lambda v: api.ssd(**v, **rest, mesh_axes={"L": "time"}))(floats)
  close(y_BLGHP, alone("given state")[0]["y"], VALUES, "y")
  assert y_BLGHP.sharding.spec[1] == "time"


def test_inside_shard_map_the_scan_is_of_what_the_device_holds():
  floats, rest = split(cases.make(cases.Case(L=L)))
  moving = {name for name in floats if "L" in name.rpartition("_")[2]}
  spec = {name: jax.P(None, "sequence" if name in moving else None) for name in floats}

  def local(floats):
    return api.ssd(**floats, **rest)[0]

  with jax.set_mesh(mesh({"sequence": 8})):
    mapped = jax.shard_map(
      local, in_specs=(spec,), out_specs=jax.P(None, "sequence"), check_vma=False
    )
    y_BLGHP = np.asarray(jax.jit(mapped)(floats))
  for start in range(0, L, L // 8):
    span = slice(start, start + L // 8)
    part = {name: v[:, span] if name in moving else v for name, v in floats.items()}
    close(y_BLGHP[:, span], local(part), VALUES, f"positions from {start}")
