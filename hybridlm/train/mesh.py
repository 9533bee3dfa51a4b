"""Devices as a named grid, and where each leaf and batch lies on it, read from axis letters."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridlm import axes, layout
from hybridlm.train.state import path_name

# Of models that ask for no layout of their own.
RULES: layout.Rules = layout.LAYOUTS[layout.DEFAULT].parameters
ROWS: layout.Rules = {letter: layout.LAYOUTS[layout.DEFAULT].activations[letter] for letter in "BL"}


def make(sizes: Mapping[str, int]) -> Mesh:
  """Returns a mesh of all devices: axis name -> number of devices along it, in that order.

  Raises:
    ValueError: a size below 1, or sizes whose product is not the number of devices.
  """
  text = " × ".join(f"{name}={size}" for name, size in sizes.items()) or "no axis"
  if any(size < 1 for size in sizes.values()):
    raise ValueError(f"mesh {text}: every axis has at least 1 device")
  needed, found = math.prod(sizes.values()), jax.device_count()
  if needed != found:
    raise ValueError(f"mesh {text} needs {needed} devices, but {found} are here")
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def _check_rules(mesh: Mesh, rules: layout.Rules) -> None:
  for letter, mesh_axes in rules.items():
    for name in layout.names(mesh_axes):
      if name not in mesh.shape and name not in layout.AXES:
        raise ValueError(f"sharding rule {letter} -> {name}: the mesh has {', '.join(mesh.shape)}")


def rows(mesh: Mesh) -> int:
  """Returns among how many devices the rows of a batch are divided."""
  return math.prod(mesh.shape.get(name, 1) for name in layout.names(ROWS["B"]))


def leaf_spec(mesh: Mesh, path: str, shape: tuple[int, ...], rules: layout.Rules):
  """Returns the sharding of one leaf; a leaf without axes in its name (a counter) is replicated.

  Raises:
    ValueError: a dimension that the mesh axis does not divide, nor its stand-in.
  """
  if not shape:
    return PartitionSpec()
  letters = axes.of(path.rpartition("/")[2])
  return layout.spec(f"leaf {path}", letters, shape, rules, mesh.shape)


def shardings(mesh: Mesh, tree: Any, rules: layout.Rules = RULES) -> Any:
  """Returns the sharding of every leaf of a parameter tree, or of a whole train state.

  Args:
    mesh: from `make`.
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


def place(tree: Any, where: Any) -> Any:
  """Returns copies of the arrays, laid out as the shardings say."""
  # device_put alone may alias the source for one of the shards, may_alias=False or not.
  return jax.tree.map(
    lambda leaf, sharding: jnp.copy(jax.device_put(leaf, sharding)), tree, where
  )


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

  Raises:
    ValueError: as `batch_shardings` does.
  """
  return jax.device_put(dict(batch), batch_shardings(mesh, batch, rules))
