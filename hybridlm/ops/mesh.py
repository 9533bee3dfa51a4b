"""An operation on a mesh: every device is given its own part, by the letters of array names."""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import AxisType, PartitionSpec

# Letter -> mesh axes, where a mesh in force has them: rows, positions, groups, key-value heads.
MESH_AXES: Mapping[str, str | tuple[str, ...]] = {
  "B": ("data", "fsdp"), "L": "sequence", "G": "tensor", "K": "tensor",
}
# What is divided where a letter's own size is not; arrays without it are whole on every device.
STAND_INS: Mapping[str, str] = {"G": "H", "K": "J"}
MeshAxes = Mapping[str, str | tuple[str, ...]]


def free() -> dict[str, int]:
  """Returns axis -> devices of the mesh in force, without axes that a `shard_map` has taken."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
  return {name: size for name, size, kind in kinds if kind != AxisType.Manual}


def along(letter: str, mesh_axes: MeshAxes) -> tuple[str, ...]:
  """Returns the axes of the mesh in force, of several devices, that a letter is divided over."""
  found, names = free(), mesh_axes.get(letter) or ()
  names = (names,) if isinstance(names, str) else names
  return tuple(name for name in names if found.get(name, 1) > 1)


def divided(sizes: Mapping[str, int], mesh_axes: MeshAxes, owner: str) -> dict[str, tuple]:
  """Returns letter -> axes of the mesh in force that divide arrays of these letters.

  G that does not divide falls to H, and K to J; arrays that have no such letter are whole then. One
  row alone is whole on every device.
  Raises ValueError, naming `owner`, for a size that the devices do not divide.
  """
  found, where = free(), {}
  for letter in mesh_axes:
    names = along(letter, mesh_axes)
    if letter not in sizes or not names or (letter, sizes[letter]) == ("B", 1):
      continue
    devices, other = math.prod(found[name] for name in names), STAND_INS.get(letter)
    if sizes[letter] % devices == 0:
      where[letter] = names
    elif other is None or (other in sizes and sizes[other] % devices):
      what = "" if other not in sizes else f", nor is {other}={sizes.get(other)},"
      raise ValueError(f"{letter}={sizes[letter]} is not a multiple of mesh axis "
                       f"{' × '.join(names)}={devices}{what} in {owner}")
    elif other in sizes:
      where[other] = names
  return where


def over(
  function: Callable,
  arrays: Mapping[str, jax.Array | None],
  outputs: tuple[str, ...],
  mesh_axes: MeshAxes,
  owner: str,
) -> tuple[jax.Array, ...]:
  """Returns `function(**arrays)`, a tuple, with every device of the mesh on its own part.

  The names of `arrays` and `outputs` end in axis letters; arrays that are None are left out.
  Devices along mesh axes that no letter has do the same work. Without a mesh of several devices,
  or inside `jax.shard_map` over all of its axes, where the arrays are a device's own already, it
  is a plain call.
  Raises ValueError for a size that its mesh axes do not divide.
  """
  given = {name: v for name, v in arrays.items() if v is not None}
  found = free()
  if math.prod(found.values()) == 1:
    return function(**given)
  sizes = {}
  for name, v in given.items():
    sizes |= dict(zip(_letters(name), v.shape, strict=True))
  where = divided(sizes, mesh_axes, owner)

  def spec(name):
    return PartitionSpec(*(where.get(letter) for letter in _letters(name)))

  mapped = jax.shard_map(
    lambda given: function(**given),
    in_specs=({name: spec(name) for name in given},),
    out_specs=tuple(spec(name) for name in outputs),
    axis_names=set(found),
    check_vma=False,
  )
  return mapped(given)


def from_before(
  v: jax.Array, distance: int, axis: str, otherwise: jax.Array
) -> jax.Array:
  """Returns the `v` of the device `distance` places before along a mesh axis.

  `otherwise` where there is none. Runs inside `jax.shard_map`.
  """
  size = jax.lax.axis_size(axis)
  moved = jax.lax.ppermute(v, axis, [(i, i + distance) for i in range(size - distance)])
  return jax.numpy.where(jax.lax.axis_index(axis) >= distance, moved, otherwise)


def _letters(name):
  return name.rpartition("_")[2]
