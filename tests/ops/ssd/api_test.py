"""The door to the scan: a kernel that is named runs or says why not."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from hybridlm.ops.ssd import api

PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


def shapes(*, B=2, L=256, G=2, H=2, P=64, N=128, dtype="bfloat16"):
  """Returns the arguments of a scan, as shapes."""
  wide = {"dt_BLGH": (B, L, G, H), "a_GH": (G, H), "skip_GH": (G, H)}
  wide["state_BGHPN"] = (B, G, H, P, N)
  narrow = {"x_BLGHP": (B, L, G, H, P), "b_BLGN": (B, L, G, N), "c_BLGN": (B, L, G, N)}
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in wide.items()} | {
    name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in narrow.items()
  }


def gradient(given, **options):
  """Returns the gradient of a sum over the outputs, for every argument."""
  def loss(given):
    y_BLGHP, state_BGHPN = api.ssd(**given, **options)
    return jnp.sum(y_BLGHP.astype(jnp.float32)) + jnp.sum(state_BGHPN)

  return jax.grad(loss)(given)


def lowered(program, given, name):
  """Returns the text of a program for the platform of a kernel."""
  traced = jax.jit(program).trace(given)
  return traced.lower(lowering_platforms=(PLATFORMS[name],)).as_text()


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_named_kernel_is_lowered_for_its_own_platform_and_refused_on_another(name):
  program = functools.partial(gradient, impl=name)
  text = lowered(program, shapes(), name)
  assert len(re.findall("custom_call @(?:tpu_custom_call|mosaic_gpu)", text)) >= 2
  with pytest.raises(ValueError, match=f"ssd implementation '{name}' runs on .*, not on cpu"):
    jax.jit(program).lower(shapes())


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_kernel_takes_a_sequence_shorter_than_its_chunk(name):
  text = lowered(lambda given: api.ssd(**given, impl=name), shapes(L=37), name)
  assert "-> (tensor<2x37x2x2x64xbf16>" in text.replace(' {jax.result_info = "result[0]"}', "")


@pytest.mark.parametrize("name", PLATFORMS)
def test_under_a_mesh_a_kernel_is_given_its_own_rows_and_groups(name):
  # Along `stage`, which no letter of a scan has, devices do the same work.
  kinds = (AxisType.Auto,) * 3
  grid = jax.make_mesh((2, 2, 2), ("data", "stage", "tensor"), axis_types=kinds)
  with jax.set_mesh(grid):
    text = lowered(lambda given: api.ssd(**given, impl=name), shapes(B=10, G=14), name)
  calls = [line for line in text.splitlines() if "custom_call @tpu" in line or "mosaic_gpu" in line]
  assert calls
  for line in calls:
    types = re.findall(r"tensor<([0-9x]+)x[a-z]", line[line.rindex(" : ") :])
    # The largest array is x, of half the rows and half the groups.
    assert max(math.prod(map(int, v.split("x"))) for v in types) == 5 * 256 * 7 * 2 * 64
