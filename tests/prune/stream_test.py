"""A tree that is read leaf by leaf is cut and hashed as one in memory is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import axes, lazy
from hybridlm.config import block_name
from hybridlm.prune import cut as cutting
from hybridlm.prune import stream
from hybridlm.prune.trees import tree_hash

SIZES = {
  "inside groups": {"H": 3, "P": 4, "J": 2, "N": 3},
  "groups and what is in them": {"H": 3, "G": 1, "N": 2, "J": 2, "K": 1, "E": 6, "V": 19},
  "all": {
    "H": 3, "P": 5, "F": 13, "D": 11, "J": 2, "K": 1, "E": 6, "V": 19, "X": (0, 2, 3, 4),
    0: {"G": 1}, 2: {"N": 0},
  },
}


def stored(params, order):
  """Returns lazy leaves whose memory is in the given order of axes; shapes stay canonical."""

  def read(leaf):
    array = np.asarray(leaf)
    return np.ascontiguousarray(array.transpose(order(array.ndim))).transpose(
      np.argsort(order(array.ndim))
    )

  return {
    path: lazy.Leaf(leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: read(leaf))
    for path, leaf in axes.leaves(params)
  }


ORDERS = {
  "canonical": lambda n: tuple(range(n)),
  "reversed": lambda n: tuple(reversed(range(n))),
  "first axis fastest": lambda n: (*range(1, n), 0),
  "last axis slowest": lambda n: (n - 1, *range(n - 1)),
}


@functools.cache
def cut_in_memory(sizes, dtype):
  """Returns a config, its parameters, a plan and what it leaves of them."""
  cfg = models.make("layernorm" if dtype == "float32" else "untied")
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), models.params(cfg))
  plan = models.plan(cfg, params, SIZES[sizes])
  return cfg, params, plan, *cutting.cut(cfg, params, plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_leaves_cut_as_they_are_read_are_the_cut_tree_bit_for_bit(sizes, order, dtype):
  cfg, params, plan, want_cfg, want = cut_in_memory(sizes, dtype)
  small_cfg, leaves = stream.cut(cfg, stored(params, ORDERS[order]), plan)
  assert small_cfg == want_cfg and list(leaves) == [path for path, _ in axes.leaves(want)]
  for path, leaf in axes.leaves(want):
    got = leaves[path].read()
    assert got.dtype == leaf.dtype and got.shape == leaf.shape == leaves[path].shape
    assert got.tobytes() == np.asarray(leaf).tobytes(), path


def test_a_transposed_leaf_is_cut_without_being_turned():
  w_DF = np.arange(35, dtype=np.float32).reshape(7, 5).T
  got = stream.take(w_DF, "DF", {"keep_D": np.array([0, 3]), "keep_F": np.array([1, 2, 6])})
  np.testing.assert_array_equal(got, w_DF[np.ix_([0, 3], [1, 2, 6])])
  assert got.T.flags.c_contiguous


def test_heads_are_kept_per_group_in_whatever_order_memory_holds_them():
  w_DGHP = np.arange(3 * 2 * 4 * 5).reshape(3, 2, 4, 5)
  keep_GH = np.array([[0, 3], [1, 2]])
  want = np.stack([w_DGHP[:, g, keep_GH[g]] for g in range(2)], axis=1)
  for order in ((0, 1, 2, 3), (1, 2, 3, 0), (3, 1, 0, 2), (2, 3, 1, 0)):
    held = np.ascontiguousarray(w_DGHP.transpose(order)).transpose(np.argsort(order))
    got = stream.take(held, "DGHP", {"keep_GH": keep_GH})
    np.testing.assert_array_equal(got, want)


def test_blocks_masked_one_by_one_are_the_blocks_of_the_masked_tree():
  cfg = models.make("layernorm")
  params = models.params(cfg)
  plan = models.plan(cfg, params, SIZES["all"])
  masked, kept = cutting.mask(cfg, params, plan)
  for index in plan.blocks:
    name = block_name(index)
    folder, counts = stream.mask_block(cfg, plan, index, params["blocks"][name])
    assert folder.keys() == masked["blocks"][name].keys()
    assert all(bool((folder[leaf] == masked["blocks"][name][leaf]).all()) for leaf in folder)
    assert counts["count"] == kept["count"]
    assert jax.tree.all(jax.tree.map(
      lambda a, b: bool((a == b).all()), counts["inner"], kept["blocks"].get(name)
    ))


@pytest.mark.parametrize("piece", [24, 200, 1 << 20])
@pytest.mark.parametrize("order", ORDERS)
def test_the_hash_of_leaves_read_one_by_one_is_the_hash_of_the_tree(order, piece, monkeypatch):
  monkeypatch.setattr(stream, "PIECE", piece)
  cfg = models.make("tied", "M*-" * 4)
  params = models.params(cfg)
  params["blocks"]["03"] = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16), params["blocks"]["03"]
  )
  leaves = stored(params, ORDERS[order])
  assert stream.tree_hash(leaves) == tree_hash(params)
  assert stream.tree_hash(dict(reversed(leaves.items()))) == tree_hash(params)


def test_folders_are_hashed_in_the_order_of_the_tree_from_a_hundred_blocks_on():
  cfg = models.make(pattern="-" * 102, D=2, F=3, V=4)
  params = lazy.tree({
    path: np.full(leaf.shape, len(path), np.float32)
    for path, leaf in axes.leaves(jax.eval_shape(lambda: hybridlm.init(cfg)))
  })
  assert block_name(101) in params["blocks"]
  assert stream.tree_hash(lazy.of(params)) == tree_hash(params)


def test_a_plan_of_other_parameters_is_refused_by_their_hash():
  cfg = models.make()
  params = models.params(cfg)
  plan = models.plan(cfg, params, {"F": 11})
  stream.check_source(lazy.of(params), plan)
  other = {**params, "final": {"norm_gain_D": params["final"]["norm_gain_D"] * 2}}
  with pytest.raises(ValueError, match=f"made for parameters {plan.source[:12]}, the ones given"):
    stream.check_source(lazy.of(other), plan)


def test_a_plan_of_other_sizes_is_refused_before_anything_is_read():
  cfg = models.make()
  plan = models.plan(cfg, models.params(cfg), {"F": 11})
  wide = models.make(F=25)
  unread = {
    path: lazy.Leaf(leaf.shape, leaf.dtype, pytest.fail) for path, leaf in
    lazy.of(models.params(cfg)).items()
  }
  with pytest.raises(ValueError, match="a model of other sizes"):
    stream.cut(wide, unread, plan)
  with pytest.raises(ValueError, match="lack the leaf 'blocks/00/a_log_GH'"):
    stream.cut(cfg, {p: x for p, x in unread.items() if "a_log" not in p}, plan)
  small_cfg, leaves = stream.cut(cfg, unread, plan)
  assert small_cfg == dataclasses.replace(plan.small_config()) and leaves
