"""A mesh changes where numbers lie, not what they are; what does not divide is refused."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from cases import tiny
from hybridlm.train import mesh, optim, state, step

SGD = optim.Optimizer(*optax.sgd(0.5), optax.constant_schedule(0.5))
# tests/conftest.py asks for eight devices of one CPU.
SIZES = {"fsdp": 4, "tensor": 2}
ROWS = 32  # a vocabulary that two devices can share


def test_every_leaf_is_split_as_its_letters_say_and_so_are_its_moments():
  grid = mesh.make(SIZES)
  optimizer = optim.make(peak=0.1, steps=4)
  now = state.create(tiny.init(rows=ROWS), optimizer)
  specs = {
    state.path_name(path): sharding.spec
    for path, sharding in jax.tree_util.tree_leaves_with_path(
      mesh.shardings(grid, now, mesh.RULES)
    )
  }
  expected = {
    "embed/w_embed_VD": PartitionSpec("tensor", "fsdp"),
    "blocks/00/norm_gain_D": PartitionSpec("fsdp"),
    "blocks/00/w_up_DF": PartitionSpec("fsdp", "tensor"),
    "blocks/00/w_down_FD": PartitionSpec("tensor", "fsdp"),
    "blocks/00/b_down_D": PartitionSpec("fsdp"),
    "head/w_head_DV": PartitionSpec("fsdp", "tensor"),
  }
  for leaf, spec in expected.items():
    copies = [path for path in specs if path.endswith(leaf)]
    assert len(copies) == 3 and {specs[path] for path in copies} == {spec}
  counters = [path for path in specs if not path.endswith(tuple(expected))]
  assert counters and {specs[path] for path in counters} == {PartitionSpec()}


@pytest.mark.parametrize(
  "sizes,accumulate",
  [(SIZES, 1), (SIZES, 2), ({"data": 2, "fsdp": 4}, 1), ({"data": 1, "tensor": 8}, 1)],
)
def test_eight_devices_make_the_same_step_as_one(sizes, accumulate):
  grid = mesh.make(sizes)
  params, teacher = tiny.init(rows=ROWS), tiny.init(1, rows=ROWS)
  batch = tiny.batch(0, rows=16)
  one, alone = step.make_step(tiny.distillation, SGD)(state.create(params, SGD), teacher, batch)
  start = state.create(params, SGD)
  where = mesh.shardings(grid, start, mesh.RULES)
  run = step.make_step(tiny.distillation, SGD, accumulate=accumulate, shardings=where)
  frozen = mesh.place(teacher, mesh.shardings(grid, teacher, mesh.RULES))
  many, spread = run(mesh.place(start, where), frozen, mesh.shard_batch(grid, batch))
  assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, many, where))
  for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  for name in alone:
    assert float(spread[name]) == pytest.approx(float(alone[name]), rel=1e-5), name


def test_placed_arrays_share_no_memory_with_what_they_were_made_from():
  grid = mesh.make({"data": 8})
  params = tiny.init()
  for rules in ({}, {"D": "data"}):
    where = mesh.shardings(grid, params, rules)
    placed = mesh.place(params, where)
    state.check_apart(state.TrainState(0, placed, ()), params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, placed, where))
    assert tiny.same(placed, params)


def test_a_batch_is_spread_by_rows():
  grid = mesh.make(SIZES)
  batch = tiny.batch(0, rows=12)
  spread = mesh.shard_batch(grid, batch)
  for name, x_BL in spread.items():
    assert {shard.data.shape for shard in x_BL.addressable_shards} == {(3, tiny.LENGTH)}
    np.testing.assert_array_equal(x_BL, batch[name])


@pytest.mark.parametrize(
  "sizes,message",
  [
    ({"data": 3}, "mesh data=3 needs 3 devices, but 8 are here"),
    ({"data": 4, "tensor": 4}, "mesh data=4 × tensor=4 needs 16 devices, but 8 are here"),
    ({"data": 0}, "mesh data=0: every axis has at least 1 device"),
    ({}, "mesh no axis needs 1 devices, but 8 are here"),
  ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    mesh.make(sizes)


def test_a_dimension_the_mesh_does_not_divide_is_refused_by_leaf_and_letter():
  grid = mesh.make(SIZES)
  with pytest.raises(ValueError, match="embed/w_embed_VD: V=31 is not a multiple of.* tensor=2"):
    mesh.shardings(grid, tiny.init(), mesh.RULES)


def test_a_batch_the_mesh_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="batch token_BL: B=6 is not a multiple of.* fsdp=4"):
    mesh.shard_batch(mesh.make(SIZES), tiny.batch(0, rows=6))


def test_a_rule_for_an_axis_the_mesh_has_not_is_refused():
  grid = mesh.make({"data": 8})
  with pytest.raises(ValueError, match="rule F -> model: the mesh has data"):
    mesh.shardings(grid, tiny.init(), {"F": "model"})
  with pytest.raises(ValueError, match="rule B -> rows: the mesh has data"):
    mesh.shard_batch(grid, tiny.batch(0), {"B": "rows"})


@pytest.mark.parametrize("held, process, expected", [
  ({0: {0, 1, 2, 3}}, 0, (0, 1)),
  ({0: {0, 1}, 1: {2, 3}}, 1, (1, 2)),
  ({0: {0}, 1: {1}, 2: {0}, 3: {1}}, 3, (1, 2)),  # two and two hold the same rows
  ({0: {0, 1}, 1: {0, 1}}, 1, (0, 1)),
  ({0: {0, 2}, 1: {1, 3}}, 1, (0, 1)),  # no share of equal ones: all read everything
  ({0: {0, 1, 2}, 1: {3}}, 1, (0, 1)),
  ({0: {0, 1}, 1: {2, 3}}, 7, (0, 1)),
])
def test_processes_that_hold_the_same_rows_read_the_same_share(held, process, expected):
  assert mesh.share(held, process, max(map(max, held.values())) + 1) == expected


def test_of_one_process_the_mesh_is_its_own_and_the_batch_whole():
  grid = mesh.make({"data": 4, "fsdp": 2})
  assert mesh.own(grid) is grid and mesh.row_share(grid) == (0, 1)
