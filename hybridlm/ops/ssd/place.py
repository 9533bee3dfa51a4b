"""Where a kernel may run: the platform it was written for, and its own part of a mesh."""

from collections.abc import Callable, Mapping

import jax
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, PartitionSpec

# Letter -> mesh axis, where a mesh in force has it. Rows and groups of a scan are independent.
MESH_AXES: Mapping[str, str] = {"B": "data", "L": "sequence", "G": "tensor"}

_only_on = core.Primitive("only_on")
_only_on.def_abstract_eval(lambda x, *, platform, name: x)
batching.defvectorized(_only_on)


def _lower(context, x, *, platform, name):
  platforms = context.platforms or context.module_context.platforms
  others = sorted(set(platforms) - {platform})
  if others:
    raise ValueError(f"ssd implementation {name!r} runs on {platform}, not on {others[0]}")
  return [x]


mlir.register_lowering(_only_on, _lower)


def only_on(x: jax.Array, *, platform: str, name: str) -> jax.Array:
  """Returns `x`; a program that holds this refuses to be lowered for another platform.

  So a program for a platform that is not here can be compiled ahead of time, and one for this
  machine is refused before it runs. `name` is the implementation that the error names.
  """
  return jax.jit(lambda x: _only_on.bind(x, platform=platform, name=name))(x)


def free_axes(mesh_axes: Mapping[str, str]) -> dict[str, str]:
  """Returns letter -> axis of the mesh in force that XLA, and not the caller, divides work over."""
  free = _free()
  return {letter: name for letter, name in mesh_axes.items() if name in free}


def over_mesh(
  scan: Callable, arrays: Mapping[str, jax.Array | None], outputs: tuple[str, ...],
  mesh_axes: Mapping[str, str],
) -> tuple[jax.Array, ...]:
  """Returns `scan(**arrays)` with every device of the mesh in force on its own part.

  The names of `arrays` and `outputs` end in axis letters. Devices along mesh axes that no letter
  has do the same work. Without a mesh, or inside `jax.shard_map` over all of its axes, where the
  arrays are a device's own already, it is a plain call.
  Raises ValueError for a size that its mesh axis does not divide.
  """
  given = {name: v for name, v in arrays.items() if v is not None}
  free, where = _free(), free_axes(mesh_axes)
  if not free:
    return scan(**given)
  mesh = jax.sharding.get_abstract_mesh()

  def spec(name):
    return PartitionSpec(*(where.get(letter) for letter in name.rpartition("_")[2]))

  for name, v in given.items():
    for letter, size in zip(name.rpartition("_")[2], v.shape, strict=True):
      if letter in where and size % mesh.shape[where[letter]]:
        raise ValueError(
          f"{name}: {letter}={size} is not a multiple of mesh axis "
          f"{where[letter]}={mesh.shape[where[letter]]} in ssd"
        )
  mapped = jax.shard_map(
    lambda given: scan(**given),
    in_specs=({name: spec(name) for name in given},),
    out_specs=tuple(spec(name) for name in outputs),
    axis_names=free,
    check_vma=False,
  )
  return mapped(given)


def _free() -> set[str]:
  """Returns the axes of the mesh in force that are not the caller's own."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return set()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name for name, kind in kinds if kind != AxisType.Manual}
