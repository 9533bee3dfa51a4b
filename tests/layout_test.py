"""Where arrays lie: letters and their stand-ins, refused sizes, gradients that go the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybridlm import layout

RULES = layout.LAYOUTS["sharded"].parameters


def spec(letters, shape, rules=RULES, **along):
  return tuple(layout.spec(f"leaf w_{letters}", letters, shape, rules, along))


@pytest.mark.parametrize("letters,shape,along,want", [
  ("DGHP", (16, 4, 3, 5), {"tensor": 2, "fsdp": 4}, ("fsdp", "tensor", None, None)),
  ("DGHP", (16, 2, 8, 5), {"tensor": 8}, (None, None, "tensor", None)),  # H within the group
  ("DGN", (16, 2, 5), {"tensor": 8}, (None, None, None)),  # shared by the heads of a group
  ("DKJE", (16, 3, 4, 6), {"tensor": 4}, (None, None, "tensor", None)),
  ("DKE", (16, 3, 6), {"tensor": 4}, (None, None, None)),
  ("XDF", (3, 16, 8), {"tensor": 4, "fsdp": 2}, (None, "fsdp", "tensor")),
  ("D", (7,), {"fsdp": 1, "tensor": 8}, (None,)),
])
def test_a_letter_that_has_no_divisor_falls_to_its_stand_in(letters, shape, along, want):
  assert spec(letters, shape, **along) == want


def test_rows_may_lie_over_several_axes_and_every_layout_gives_an_axis_to_one_letter():
  rules = layout.LAYOUTS["rows"]
  along = {"data": 2, "fsdp": 2, "tensor": 3, "sequence": 1}
  assert spec("BLD", (12, 5, 7), rules.activations, **along) == (
    ("data", "fsdp", "tensor"), None, None)
  assert spec("VD", (7, 12), rules.parameters, **along) == (None, ("fsdp", "tensor"))
  for each in layout.LAYOUTS.values():
    for table in each:
      assert {axis for names in table.values() for axis in layout.names(names)} <= set(layout.AXES)


@pytest.mark.parametrize("letters,shape,message", [
  ("DGHP", (16, 3, 5, 2), "leaf w_DGHP: neither G=3 nor H=5 is a multiple of mesh axis tensor=4"),
  ("FD", (6, 16), "leaf w_FD: F=6 is not a multiple of mesh axis tensor=4"),
])
def test_a_size_that_nothing_divides_is_refused_by_leaf_and_letter(letters, shape, message):
  with pytest.raises(ValueError, match=message):
    spec(letters, shape, tensor=4)


def test_without_a_mesh_nothing_moves():
  x_BLD = jnp.ones((3, 5, 7))
  assert layout.constrain("sharded", x_BLD, "BLD") is x_BLD
  assert layout.used("sharded", {"w_up_DF": x_BLD[0]}, jnp.bfloat16)["w_up_DF"].dtype == "bfloat16"


def test_a_used_leaf_is_whole_over_rows_and_its_gradient_is_divided_as_it_was():
  grid = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  where = NamedSharding(grid, PartitionSpec("fsdp", "tensor"))
  rng = np.random.default_rng(0)
  w_DF, x_BD = rng.normal(size=(6, 4)), rng.normal(size=(4, 6))

  def loss(w_DF):
    used = layout.used("sharded", {"w_up_DF": w_DF}, jnp.float32)["w_up_DF"]
    return jnp.sum(jnp.sin(x_BD @ used)), used

  with jax.set_mesh(grid):
    grad_DF, used = jax.jit(jax.grad(loss, has_aux=True))(jax.device_put(w_DF, where))
  assert grad_DF.sharding.is_equivalent_to(where, 2)
  assert used.sharding.is_equivalent_to(NamedSharding(grid, PartitionSpec(None, "tensor")), 2)
  np.testing.assert_allclose(grad_DF, x_BD.T @ np.cos(x_BD @ w_DF), atol=1e-5)
