"""Devices as a named grid, and where each leaf and batch lies on it, read from axis letters."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hybridlm import axes
from hybridlm.train.state import path_name

# Letter -> mesh axis; an earlier letter has priority where a leaf holds several.
RULES: Mapping[str, str] = {"G": "model", "K": "model", "F": "model", "V": "model", "D": "data"}


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


def _along(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
  """Returns the number of devices along one mesh axis, or several."""
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.shape[name] for name in names)


def _check_rules(mesh: Mesh, rules: Mapping[str, Any]) -> None:
  for letter, names in rules.items():
    for name in (names,) if isinstance(names, str) else names or ():
      if name not in mesh.shape:
        raise ValueError(f"sharding rule {letter} -> {name}: the mesh has {', '.join(mesh.shape)}")


def leaf_spec(mesh: Mesh, path: str, shape: tuple[int, ...], rules: Mapping[str, Any]):
  """Returns the sharding of one leaf; a leaf without axes in its name (a counter) is replicated.

  Raises:
    ValueError: a dimension that the mesh axis does not divide.
  """
  if not shape:
    return PartitionSpec()
  name = path.rpartition("/")[2]
  spec = axes.spec(name, rules)
  for letter, size, where in zip(axes.of(name), shape, spec, strict=True):
    if size % _along(mesh, where):
      raise ValueError(f"leaf {path}: {letter}={size} is not a multiple of mesh axis "
                       f"{where}={_along(mesh, where)}")
  return spec


def shardings(mesh: Mesh, tree: Any, rules: Mapping[str, Any]) -> Any:
  """Returns the sharding of every leaf of a parameter tree, or of a whole train state.

  Args:
    mesh: from `make`.
    tree: arrays or shapes; leaf names end in axes, and so do those of the optimiser's moments.
    rules: axis letter -> mesh axis (or several, or None); letters that are absent replicate.

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


def shard_batch(mesh: Mesh, batch: Mapping[str, Any], *, axis: str = "data") -> dict[str, Any]:
  """Returns the batch with its rows spread along one mesh axis.

  Raises:
    ValueError: the mesh has no such axis, or rows that it does not divide.
  """
  _check_rules(mesh, {"B": axis})
  for name, x_BL in batch.items():
    if x_BL.shape[0] % mesh.shape[axis]:
      raise ValueError(f"batch {name}: B={x_BL.shape[0]} is not a multiple of mesh axis "
                       f"{axis}={mesh.shape[axis]}")
  return jax.device_put(dict(batch), NamedSharding(mesh, PartitionSpec(axis)))
