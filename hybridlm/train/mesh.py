"""Devices as a named grid, and where each leaf and batch lies on it, read from axis letters."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hybridlm import axes, layout
from hybridlm.train.state import path_name

# Of models that ask for no layout of their own.
RULES: layout.Rules = layout.LAYOUTS[layout.DEFAULT].parameters
ROWS: layout.Rules = {letter: layout.LAYOUTS[layout.DEFAULT].activations[letter] for letter in "BL"}


def make(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of all devices: axis name -> number of devices along it, in that order.

  `devices` are others than this machine's, such as those that programs are compiled for elsewhere.

  Raises:
    ValueError: a size below 1, or sizes whose product is not the number of devices.
  """
  text = " × ".join(f"{name}={size}" for name, size in sizes.items()) or "no axis"
  if any(size < 1 for size in sizes.values()):
    raise ValueError(f"mesh {text}: every axis has at least 1 device")
  needed, found = math.prod(sizes.values()), len(jax.devices() if devices is None else devices)
  if needed != found:
    raise ValueError(f"mesh {text} needs {needed} devices, but {found} are here")
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def _check_rules(mesh: Mesh | AbstractMesh, rules: layout.Rules) -> None:
  for letter, mesh_axes in rules.items():
    for name in layout.names(mesh_axes):
      if name not in mesh.shape and name not in layout.AXES:
        raise ValueError(f"sharding rule {letter} -> {name}: the mesh has {', '.join(mesh.shape)}")


def rows(mesh: Mesh) -> int:
  """Returns among how many devices the rows of a batch are divided."""
  return math.prod(mesh.shape.get(name, 1) for name in layout.names(ROWS["B"]))


def leaf_spec(
  mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...], rules: layout.Rules
) -> PartitionSpec:
  """Returns the sharding of one leaf; a leaf without axes in its name (a counter) is replicated.

  Raises:
    ValueError: a dimension that the mesh axis does not divide, nor its stand-in.
  """
  if not shape:
    return PartitionSpec()
  letters = axes.of(path.rpartition("/")[2])
  return layout.spec(f"leaf {path}", letters, shape, rules, mesh.shape)


def shardings(mesh: Mesh | AbstractMesh, tree: Any, rules: layout.Rules = RULES) -> Any:
  """Returns the sharding of every leaf of a parameter tree, or of a whole train state.

  Args:
    mesh: from `make`, or its sizes alone.
    tree: arrays or shapes; leaf names end in axes, and so do those of the optimiser's moments.
    rules: axis letter -> mesh axis, or several; letters that are absent replicate, and so do the
      axes of `layout.AXES` that the mesh has not.

  Raises:
    ValueError: a rule for an axis the mesh has not, or a dimension that does not divide.
  """
  _check_rules(mesh, rules)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, leaf_spec(mesh, path_name(path), leaf.shape, rules)),
    tree,
  )


def own(mesh: Mesh) -> Mesh:
  """Returns a mesh of this process's devices alone: along each axis a divisor of `mesh`'s.

  What divides over `mesh` divides over it too. In a run of one process it is `mesh` itself.
  """
  if not mesh.is_multi_process:
    return mesh
  left, sizes = len(jax.local_devices()), {}
  for name in sorted(mesh.axis_names, key=lambda name: name != "fsdp"):
    sizes[name] = math.gcd(left, mesh.shape[name])
    left //= sizes[name]
  shape = tuple(sizes[name] for name in mesh.axis_names)
  devices = jax.local_devices()[: math.prod(shape)]
  kinds = (AxisType.Auto,) * len(shape)
  return jax.make_mesh(shape, mesh.axis_names, axis_types=kinds, devices=devices)


@functools.lru_cache
def row_share(mesh: Mesh) -> tuple[int, int]:
  """Returns which share of a batch this process reads, and how many shares there are.

  Processes whose devices hold the same rows read the same share. Where a process's rows are not one
  share of equal ones, each reads the whole batch: share 0 of 1.
  """
  along = tuple(name for name in layout.names(ROWS["B"]) if name in mesh.shape)
  where, count = NamedSharding(mesh, PartitionSpec(along)), rows(mesh)
  held: dict[int, set[int]] = {}
  for device, (part, *_) in where.devices_indices_map((count,)).items():
    held.setdefault(device.process_index, set()).update(range(count)[part])
  return share(held, jax.process_index(), count)


def share(held: Mapping[int, set[int]], process: int, count: int) -> tuple[int, int]:
  """Returns a process's share and how many there are, by which of `count` parts each one holds."""
  mine = sorted(held.get(process, ()))
  size = len(mine)
  alike = {tuple(sorted(parts)) for parts in held.values()}
  even = {tuple(range(first, first + size)) for first in range(0, count, max(1, size))}
  if not size or alike != even:
    return 0, 1
  return mine[0] // size, count // size


def put(tree: Any, where: Any) -> Any:
  """Returns the arrays laid out as the shardings say; they may share memory with those given.

  Where devices are other processes', every process gives the whole arrays, and nothing is sent.
  """
  def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
    everywhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or everywhere:
      return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

  return jax.tree.map(one, tree, where)


def place(tree: Any, where: Any) -> Any:
  """Returns copies of the arrays, laid out as the shardings say."""
  # What is put may alias the source for one of the shards, may_alias=False or not.
  return jax.tree.map(jnp.copy, put(tree, where))


def fetch(tree: Any) -> Any:
  """Returns the whole arrays in this process's memory; all processes call it for their own."""
  def one(leaf: Any) -> Any:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
      return jax.device_get(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(one, tree)


def batch_shardings(
  mesh: Mesh, batch: Mapping[str, Any], rules: layout.Rules = ROWS
) -> dict[str, NamedSharding]:
  """Returns where each array of a batch lies; names end in axes, as `token_BL`.

  Raises:
    ValueError: a rule for an axis the mesh has not, or rows or positions that do not divide.
  """
  _check_rules(mesh, rules)
  return {
    name: NamedSharding(
      mesh, layout.spec(f"batch {name}", axes.of(name), x_BL.shape, rules, mesh.shape)
    )
    for name, x_BL in batch.items()
  }


def shard_batch(
  mesh: Mesh, batch: Mapping[str, Any], rules: layout.Rules = ROWS
) -> dict[str, Any]:
  """Returns the batch with its rows, and its positions, spread over the mesh.

  batch: of several processes, this one's share of the rows, see `row_share`.

  Raises:
    ValueError: as `batch_shardings` does.
  """
  _, count = row_share(mesh)
  whole = {
    name: jax.ShapeDtypeStruct((x_BL.shape[0] * count, *x_BL.shape[1:]), x_BL.dtype)
    for name, x_BL in batch.items()
  }
  where = batch_shardings(mesh, whole, rules)
  if not mesh.is_multi_process:
    return jax.device_put(dict(batch), where)
  return {
    name: jax.make_array_from_process_local_data(where[name], np.asarray(x_BL), whole[name].shape)
    for name, x_BL in batch.items()
  }
