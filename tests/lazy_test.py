"""Leaves that are read one at a time are the tree they stand for."""

import jax
import numpy as np

from cases import models
from hybridlm import axes, lazy


def test_leaves_read_one_by_one_make_the_tree_again():
  cfg = models.make()
  params = models.params(cfg)
  leaves = lazy.of(params)
  assert {p: x.shape for p, x in leaves.items()} == {p: x.shape for p, x in axes.leaves(params)}
  again = lazy.tree({path: leaf.read() for path, leaf in leaves.items()})
  assert jax.tree.structure(again) == jax.tree.structure(params)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
