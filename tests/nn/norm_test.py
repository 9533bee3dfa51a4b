"""The residual norm of a config, with and without counts of what survived."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from hybridlm.nn import norm


@pytest.mark.parametrize("variant", ["untied", "layernorm"])
def test_a_count_of_everything_changes_neither_value_nor_gradient(variant):
  cfg = models.make(variant, D=4)
  leaves = {"norm_gain_D": jnp.arange(1.0, 5.0), "norm_bias_D": jnp.ones(4)}
  # One channel survives and is exactly zero.
  x_BLD = jnp.array([[[1.0, 0.0, -2.0, 3.0]]])

  def summed(x_BLD, count):
    return jnp.sum(jnp.sin(norm.residual(cfg, leaves, x_BLD, count)))

  want, want_grad = jax.value_and_grad(summed)(x_BLD, None)
  got, got_grad = jax.value_and_grad(summed)(x_BLD, jnp.float32(4))
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  np.testing.assert_allclose(got_grad, want_grad, rtol=1e-5, atol=1e-6)
