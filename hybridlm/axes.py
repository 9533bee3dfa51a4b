"""The axis alphabet: a name ends in its axes, and nothing else says what a dimension is.

One letter, one meaning. Pruning, sharding, cost and weight conversion read these letters; no code
finds a dimension by its size or its position.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ALPHABET: Mapping[str, str] = {
  "B": "batch",
  "L": "position",
  "S": "earlier position",
  "V": "vocabulary",
  "D": "residual width",
  "F": "MLP width",
  "W": "convolution taps",
  "C": "chunks",
  "Q": "chunk length",
  "K": "key-value heads",
  "J": "queries per key-value head",
  "E": "attention head width",
  "U": "attention value width, where it is not E",
  "G": "SSM groups",
  "H": "SSM heads per group",
  "P": "SSM head channels",
  "N": "SSM state",
  "M": "meta tokens",
  "R": "dt rank (Mamba-1)",
  "T": "top tokens of the teacher",
  "X": "stacked layers",
  "Y": "channels where parallel branches meet",
}


def of(name: str) -> str:
  """Returns the axes a parameter name ends in: `w_up_DF` -> `DF`.

  Raises:
    ValueError: the last word of the name is not made of distinct letters of the alphabet.
  """
  letters = name.rpartition("_")[2]
  if "_" not in name or not letters or not set(letters) <= set(ALPHABET):
    raise ValueError(f"leaf {name!r} does not end in axis letters of the alphabet")
  if len(set(letters)) != len(letters):
    raise ValueError(f"leaf {name!r} repeats an axis letter")
  return letters


def stem(name: str) -> str:
  """Returns a parameter name without its axes: `w_up_DF` -> `w_up`."""
  return name[: -len(of(name)) - 1]


def dimension(name: str, letter: str) -> int:
  """Returns the index of axis `letter` in a leaf: `w_up_DF`, `F` -> 1."""
  letters = of(name)
  if letter not in letters:
    raise ValueError(f"leaf {name!r} has no axis {letter!r}")
  return letters.index(letter)


def shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Returns the shape a leaf has where every letter has the given size.

  Raises:
    ValueError: a letter of the name has no size.
  """
  letters = of(name)
  missing = [letter for letter in letters if letter not in sizes]
  if missing:
    raise ValueError(f"leaf {name!r}: no size is known for axis {missing[0]!r}")
  return tuple(sizes[letter] for letter in letters)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields `(path, leaf)` of a nested dict in key order, paths like `blocks/07/w_up_DF`."""
  for key in sorted(tree):
    path = f"{prefix}{key}"
    if isinstance(tree[key], Mapping):
      yield from leaves(tree[key], f"{path}/")
    else:
      yield path, tree[key]


def rename(tree: Mapping[str, Any], change) -> dict[str, Any]:
  """Returns the tree with every leaf name passed through `change`; folder names stay."""
  return {
    (key if isinstance(value, Mapping) else change(key)): (
      rename(value, change) if isinstance(value, Mapping) else value
    )
    for key, value in tree.items()
  }


def stack(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns equal trees as one, with X on the left of every leaf: `w_up_DF` -> `w_up_XDF`.

  Raises:
    ValueError: no tree, or trees whose leaves differ in name or shape.
  """
  if not trees:
    raise ValueError("stack: no layers given")
  shapes = [{path: jnp.shape(leaf) for path, leaf in leaves(tree)} for tree in trees]
  for index, other in enumerate(shapes):
    if other != shapes[0]:
      path = min(k for k in shapes[0].keys() | other.keys() if shapes[0].get(k) != other.get(k))
      raise ValueError(
        f"stack: layer {index} differs from layer 0 at {path}: {other.get(path)} against "
        f"{shapes[0].get(path)}"
      )
  # What lies in the host's memory stays there: a stack may be too large for one device.
  stacked = jax.tree.map(
    lambda *parts: (np if isinstance(parts[0], np.ndarray) else jnp).stack(parts), *trees)
  return rename(stacked, lambda name: f"{stem(name)}_X{of(name)}")


def unstack(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns the layers of a stacked tree, in order: the inverse of `stack`.

  Raises:
    ValueError: a leaf without X on the left, or stacks of unequal height.
  """
  heights = {}
  for path, leaf in leaves(tree):
    if not of(path.rpartition("/")[2]).startswith("X"):
      raise ValueError(f"unstack: leaf {path!r} has no X on the left")
    heights[path] = leaf.shape[0]
  if len(set(heights.values())) != 1:
    raise ValueError(f"unstack: stacks of unequal height: {sorted(set(heights.values()))}")
  plain = rename(tree, lambda name: f"{stem(name)}_{of(name)[1:]}")
  count = next(iter(heights.values()))
  return [jax.tree.map(lambda leaf, index=index: leaf[index], plain) for index in range(count)]
