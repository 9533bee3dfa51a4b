"""The axis alphabet: names say axes, sharding and stacking read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import axes


@pytest.mark.parametrize(
  "name, letters, stem",
  [("w_up_DF", "DF", "w_up"), ("dt_bias_GH", "GH", "dt_bias"), ("w_out_GHPD", "GHPD", "w_out")],
)
def test_a_name_ends_in_its_axes(name, letters, stem):
  assert (axes.of(name), axes.stem(name)) == (letters, stem)
  assert axes.dimension(name, letters[-1]) == len(letters) - 1


@pytest.mark.parametrize("name", ["w_up", "w_up_", "DF", "w_DD", "w_up_Df", "gain_Z"])
def test_a_name_without_axes_is_refused_by_name(name):
  with pytest.raises(ValueError, match=repr(name)):
    axes.of(name)


def test_shapes_follow_the_letters_and_a_letter_without_size_is_named():
  assert axes.shape("w_x_DGHP", {"D": 16, "G": 2, "H": 4, "P": 6}) == (16, 2, 4, 6)
  with pytest.raises(ValueError, match="'P'"):
    axes.shape("w_x_DGHP", {"D": 16, "G": 2, "H": 4})


def test_unstack_undoes_stack_exactly():
  rng = np.random.default_rng(0)
  layers = [
    {
      "m": {"w_up_DF": jnp.asarray(rng.normal(size=(3, 5)))},
      "gain_D": jnp.asarray(rng.normal(size=3)),
    }
    for _ in range(4)
  ]
  stacked = axes.stack(layers)
  assert stacked["m"]["w_up_XDF"].shape == (4, 3, 5)
  for one, other in zip(layers, axes.unstack(stacked), strict=True):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_layers_that_differ_cannot_be_stacked_and_the_leaf_is_named():
  one, other = {"gain_D": jnp.ones(3)}, {"gain_D": jnp.ones(4)}
  with pytest.raises(ValueError, match="layer 1 .* gain_D"):
    axes.stack([one, other])
  with pytest.raises(ValueError, match="no X"):
    axes.unstack(one)
  with pytest.raises(ValueError, match="unequal height"):
    axes.unstack({"gain_XD": jnp.ones((2, 3)), "b_XF": jnp.ones((3, 3))})
