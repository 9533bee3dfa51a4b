"""Which part of a loss each device of the mesh in force computes."""

import math
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

ROWS, POSITIONS, COLUMNS = ("data", "fsdp"), "sequence", "tensor"


class Place(NamedTuple):
  """Mesh axes that divide rows B, positions L and the vocabulary V; all empty on one device.

  `sums` are added up over `rows` and `positions`. The gradient of a head, which is as wide as D,
  ends where its parameters are: `scatter` is the axis among `rows` that divides D.
  """

  rows: tuple[str, ...] = ()
  positions: str | None = None
  columns: str | None = None
  scatter: str | None = None

  @property
  def tokens(self) -> tuple[str, ...]:
    """Axes whose devices have tokens of their own."""
    return (*self.rows, self.positions) if self.positions else self.rows

  @property
  def alone(self) -> bool:
    """Whether one device computes all."""
    return not (self.tokens or self.columns)

  def spec(self, letters: str) -> PartitionSpec:
    """Returns where an array lies whose axes are `letters`, of B, L, V and others."""
    where = {"B": self.rows or None, "L": self.positions, "V": self.columns}
    return PartitionSpec(*(where.get(letter) for letter in letters))

  def head(self) -> PartitionSpec:
    """Returns where the gradient of a head [D, V] lies."""
    return PartitionSpec(self.scatter, self.columns)


def free() -> set[str]:
  """Returns the axes of the mesh in force that are not the caller's own.

  Inside `jax.shard_map` axes are the caller's, and the arrays a device's own.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return set()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name for name, kind in kinds if kind != AxisType.Manual}


def sizes() -> dict[str, int]:
  """Returns axis -> devices of the mesh in force, for free axes that divide anything."""
  mesh = jax.sharding.get_abstract_mesh()
  return {name: mesh.shape[name] for name in sorted(free()) if mesh.shape[name] > 1}


def of(batch: int, length: int, width: int) -> Place:
  """Returns who computes what of a loss over [batch, length] tokens, by the mesh in force.

  One row alone is computed on every device.

  Raises:
    ValueError: rows or positions that the devices along their axes do not divide.
  """
  found = sizes()
  rows = tuple(name for name in ROWS if name in found and batch > 1)
  for letter, size, names in (("B", batch, rows), ("L", length, (POSITIONS,))):
    devices = math.prod(found.get(name, 1) for name in names)
    if size % devices:
      where = ", ".join(f"{name}={found[name]}" for name in names)
      raise ValueError(f"loss: {letter}={size} is not a multiple of the devices along {where}")
  scatter = ROWS[1] if ROWS[1] in rows and width % found[ROWS[1]] == 0 else None
  positions, columns = (name if name in found else None for name in (POSITIONS, COLUMNS))
  return Place(rows, positions, columns, scatter)


def reduced(place: Place, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns a device's sums added up over all tokens."""
  return sums if not place.tokens else jax.tree.map(lambda v: jax.lax.psum(v, place.tokens), sums)


def gathered(place: Place, grad_DV: jax.Array) -> jax.Array:
  """Returns the gradient of a head added up over all tokens, each device its part of D."""
  if place.scatter:
    grad_DV = jax.lax.psum_scatter(grad_DV, place.scatter, scatter_dimension=0, tiled=True)
  rest = tuple(name for name in place.tokens if name != place.scatter)
  return jax.lax.psum(grad_DV, rest) if rest else grad_DV
