"""The embedding on a mesh: no device is given the table, and values and gradients stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cases import models
from hybridlm import layout
from hybridlm.nn import embed
from hybridlm.train import mesh as meshes

SIZES = {"fsdp": 2, "tensor": 2, "sequence": 2}


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_a_divided_table_gives_the_vectors_and_the_gradient_of_a_whole_one(name):
  cfg = models.make(V=32, layout=name)
  rng, token_BL = np.random.default_rng(0), models.tokens(cfg, (4, 6))
  table_VD = jnp.asarray(rng.normal(size=(cfg.V, cfg.D)), jnp.float32)
  weight_BLD = rng.normal(size=(4, 6, cfg.D)).astype(np.float32)

  def loss(table_VD):
    x_BLD = embed.lookup(cfg, table_VD, token_BL)
    return jnp.sum(weight_BLD * x_BLD), x_BLD

  both, grid = jax.grad(loss, has_aux=True), meshes.make(SIZES)
  grad_VD, x_BLD = both(table_VD)
  rules = layout.LAYOUTS[name].parameters
  spec = layout.spec("table", "VD", table_VD.shape, rules, grid.shape)
  where = NamedSharding(grid, spec)
  with jax.set_mesh(grid):
    program = jax.jit(both, out_shardings=(where, None)).lower(
      jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype, sharding=where)).compile()
  got_VD, got_BLD = program(jax.device_put(table_VD, where))
  np.testing.assert_array_equal(got_BLD, x_BLD)
  np.testing.assert_allclose(got_VD, grad_VD, atol=1e-5)
  assert f"f32[{cfg.V},{cfg.D}]" not in program.as_text()  # no device holds all of it
