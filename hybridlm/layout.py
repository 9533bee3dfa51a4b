"""Where models lie on a mesh: one table from axis letters to mesh axes, by name, and its use.

A mesh has up to four axes. Rows (B) are spread over `data` and `fsdp`, positions (L) over
`sequence`. Groups, key-value heads, MLP channels and the vocabulary (G, K, F, V) are spread over
`tensor`; where its devices do not divide G or K, the heads inside them (H, J) are, and what the
heads of a group share is on every device. Parameters and moments are spread over `fsdp` by D.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, DTypeLike, Shaped

from hybridlm import axes

# The axes of a mesh, in the order of its devices: neighbours are along the last.
AXES = ("data", "fsdp", "tensor", "sequence")
# What is divided where a letter's own size is not; a leaf without it is whole on every device.
STAND_INS: Mapping[str, str] = {"G": "H", "K": "J"}
Rules = Mapping[str, str | tuple[str, ...]]


class Layout(NamedTuple):
  """Letter -> mesh axes, for parameters (with moments and scores) and for activations.

  An earlier letter has priority where one array has several for the same mesh axis.
  """

  parameters: Rules
  activations: Rules


_TENSOR = {"G": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
_ROWS = {"B": ("data", "fsdp"), "L": "sequence"}
LAYOUTS: Mapping[str, Layout] = {
  # Parameters over all devices but those of `data`: gathered over `fsdp` where they are used.
  "sharded": Layout({**_TENSOR, "D": "fsdp"}, {**_ROWS, **_TENSOR}),
  # Parameters whole along `fsdp`: nothing to gather, for models that are only read.
  "copied": Layout(dict(_TENSOR), {**_ROWS, **_TENSOR}),
  # Devices of `tensor` hold rows of their own too, and parameters are gathered where they are used;
  # a loss that divides the vocabulary over `tensor` moves the head once more.
  "rows": Layout(
    {"D": ("fsdp", "tensor")}, {"B": ("data", "fsdp", "tensor"), "L": "sequence"}
  ),
}
DEFAULT = "sharded"


def names(mesh_axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of a rule as a tuple."""
  return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())


def spec(
  owner: str, letters: str, shape: tuple[int, ...], rules: Rules, along: Mapping[str, int]
) -> PartitionSpec:
  """Returns how an array is divided; a letter that has no divisor falls to its stand-in.

  Args:
    owner: what an error calls the array.
    letters: its axes. Dimensions after them are whole.
    shape: its sizes.
    rules: letter -> mesh axes.
    along: mesh axis -> devices along it; axes that are absent have one.

  Raises:
    ValueError: a rule for a letter outside the alphabet, or a size that neither its own nor its
      stand-in's devices divide.
  """
  unknown = set(rules) - set(axes.ALPHABET)
  if unknown:
    raise ValueError(f"sharding rule for {min(unknown)!r}: not a letter of the axis alphabet")
  sizes, placed, used = dict(zip(letters, shape, strict=False)), {}, set()
  for letter, mesh_axes in rules.items():
    wanted = tuple(name for name in names(mesh_axes) if along.get(name, 1) > 1)
    if letter not in sizes or not wanted or used & set(wanted):
      continue
    taker = _taker(owner, letter, sizes, wanted, math.prod(along[name] for name in wanted))
    if taker is not None:
      placed[taker] = wanted[0] if len(wanted) == 1 else wanted
      used |= set(wanted)
  return PartitionSpec(*(placed.get(letter) for letter in letters))


def _taker(owner, letter, sizes, wanted, devices) -> str | None:
  """Returns the letter that devices divide for `letter`: itself or its stand-in; None: neither."""
  if sizes[letter] % devices == 0:
    return letter
  other, where = STAND_INS.get(letter), f"mesh axis {' × '.join(wanted)}={devices}"
  if other is None:
    raise ValueError(f"{owner}: {letter}={sizes[letter]} is not a multiple of {where}")
  if other in sizes and sizes[other] % devices:
    raise ValueError(f"{owner}: neither {letter}={sizes[letter]} nor {other}={sizes[other]} is a "
                     f"multiple of {where}")
  return other if other in sizes else None


def free() -> dict[str, int]:
  """Returns mesh axis -> devices of the mesh in force, without axes that `shard_map` has taken.

  Axes of one device are left out: there is nothing to divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
  return {name: size for name, size, kind in kinds if kind == AxisType.Auto and size > 1}


def constrain(
  layout: str, x: Shaped[Array, "..."], letters: str
) -> Shaped[Array, "..."]:
  """Returns an activation laid out on the mesh in force (`jax.set_mesh`); without one, as it is.

  Raises:
    ValueError: a size that the mesh does not divide.
  """
  along = free()
  if not along:
    return x
  where = activation(layout, f"activation {letters}", letters, x.shape, along)
  return jax.lax.with_sharding_constraint(x, where)


def activation(
  layout: str, owner: str, letters: str, shape: tuple[int, ...], along: Mapping[str, int]
) -> PartitionSpec:
  """Returns how an activation is divided, as `spec` does; one row alone is on every device.

  Raises:
    ValueError: a size that the mesh does not divide.
  """
  rules = LAYOUTS[layout].activations
  if dict(zip(letters, shape, strict=False)).get("B") == 1:
    rules = {letter: mesh_axes for letter, mesh_axes in rules.items() if letter != "B"}
  return spec(owner, letters, shape, rules, along)


def used(
  layout: str, leaves: Mapping[str, jax.Array], dtype: DTypeLike | None
) -> dict[str, jax.Array]:
  """Returns leaves as a block uses them: in a dtype, whole along mesh axes that divide rows too.

  Their cotangents are divided as the leaves were, so each device adds up its own part alone.
  Names end in axes. Without a mesh in force nothing moves.

  Raises:
    ValueError: a size that the mesh does not divide.
  """
  leaves = {name: leaf.astype(dtype or leaf.dtype) for name, leaf in leaves.items()}
  along, table = free(), LAYOUTS[layout]
  if not along:
    return leaves
  kept = {
    letter: mesh_axes for letter, mesh_axes in table.parameters.items()
    if not set(names(mesh_axes)) & set(names(table.activations["B"]))
  }

  def gather(name, leaf):
    letters = axes.of(name)
    own, whole = (
      spec(f"leaf {name}", letters, leaf.shape, rules, along) for rules in (table.parameters, kept)
    )
    return leaf if own == whole else _moved(whole, own, leaf)

  return {name: gather(name, leaf) for name, leaf in leaves.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(to: PartitionSpec, back: PartitionSpec, leaf):
  """Returns a leaf laid out as `to` says; its cotangent is laid out as `back` says."""
  return jax.lax.with_sharding_constraint(leaf, to)


def _moved_forward(to, back, leaf):
  return _moved(to, back, leaf), None


def _moved_backward(to, back, _, bar):
  return (jax.lax.with_sharding_constraint(bar, back),)


_moved.defvjp(_moved_forward, _moved_backward)
