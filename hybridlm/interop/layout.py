"""The one engine between published tensors and leaves: layout strings, read in both directions.

A layout names the dimensions of a published tensor by axis letters: "GHP 1 W" is a tensor of
three dimensions, the first holding G, H and P flattened in that order, the second of size one.
Sizes come from letters alone. Pieces of one tensor are joined along its first dimension.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hybridlm import axes

Sizes = Mapping[str, int]


def _one_plus(published: np.ndarray) -> np.ndarray:
  return published.astype(np.float32) + np.float32(1)


def _minus_one(leaf: np.ndarray) -> np.ndarray:
  return leaf.astype(np.float32) - np.float32(1)


# Name -> (published to leaf, leaf to published). Both sides of a change are computed in float32.
CHANGES: Mapping[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
  "one_plus": (_one_plus, _minus_one),
}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A leaf as contiguous rows of a published tensor.

  Attributes:
    leaf: its path within its folder of the canonical tree, axes included.
    layout: the published dimensions, separated by spaces; letters of one dimension are flattened
      in their order, "1" is a dimension of size one.
    change: a name of `CHANGES` where the published values are not the leaf's; None otherwise.
  """

  leaf: str
  layout: str
  change: str | None = None

  def __post_init__(self):
    letters = self.layout.replace(" ", "").replace("1", "")
    if sorted(letters) != sorted(axes.of(self.name)):
      raise ValueError(f"layout {self.layout!r} does not hold each axis of {self.leaf!r} once")
    if self.change is not None and self.change not in CHANGES:
      raise ValueError(f"{self.leaf!r}: change {self.change!r} is not one of {', '.join(CHANGES)}")

  @property
  def name(self) -> str:
    """The leaf's own name, without folders."""
    return self.leaf.rpartition("/")[2]

  @property
  def letters(self) -> str:
    """The axes in the order the published tensor holds them."""
    return self.layout.replace(" ", "").replace("1", "")

  def shape(self, sizes: Sizes) -> tuple[int, ...]:
    """Returns the shape of this piece in the published tensor."""
    groups = self.layout.split()
    return tuple(math.prod(sizes[x] for x in group if x != "1") for group in groups)

  def dtype(self, stored: np.dtype) -> np.dtype:
    """Returns the dtype of the other side, given one side's."""
    return stored if self.change is None else np.dtype(np.float32)


def shape(pieces: Sequence[Piece], sizes: Sizes) -> tuple[int, ...]:
  """Returns the shape of the published tensor that joins these pieces.

  Raises:
    ValueError: the pieces differ in more than their number of rows.
  """
  shapes = [piece.shape(sizes) for piece in pieces]
  if len({each[1:] for each in shapes}) != 1:
    raise ValueError(f"pieces {[piece.layout for piece in pieces]} cannot be joined: {shapes}")
  return (sum(each[0] for each in shapes), *shapes[0][1:])


def rows(pieces: Sequence[Piece], sizes: Sizes) -> list[tuple[int, int]]:
  """Returns `(start, stop)` of each piece in the first dimension of the joined tensor."""
  stops = list(itertools.accumulate(piece.shape(sizes)[0] for piece in pieces))
  return list(zip([0, *stops[:-1]], stops, strict=True))


def to_leaf(piece: Piece, published: np.ndarray, sizes: Sizes) -> np.ndarray:
  """Returns the leaf in its canonical axis order: a view of the published rows where none change.

  Raises:
    ValueError: the rows are not of the shape that the layout says.
  """
  if published.shape != piece.shape(sizes):
    raise ValueError(
      f"leaf {piece.leaf!r}: published rows have shape {published.shape}, layout "
      f"{piece.layout!r} says {piece.shape(sizes)}"
    )
  order = [piece.letters.index(letter) for letter in axes.of(piece.name)]
  leaf = published.reshape([sizes[letter] for letter in piece.letters]).transpose(order)
  return leaf if piece.change is None else CHANGES[piece.change][0](leaf)


def to_published(piece: Piece, leaf: np.ndarray, sizes: Sizes) -> np.ndarray:
  """Returns the published rows that hold a leaf: the inverse of `to_leaf`.

  Raises:
    ValueError: the leaf is not of the shape that its letters say.
  """
  if leaf.shape != axes.shape(piece.name, sizes):
    raise ValueError(
      f"leaf {piece.leaf!r} has shape {leaf.shape}, its letters say {axes.shape(piece.name, sizes)}"
    )
  order = [axes.dimension(piece.name, letter) for letter in piece.letters]
  changed = leaf if piece.change is None else CHANGES[piece.change][1](leaf)
  return changed.transpose(order).reshape(piece.shape(sizes))
