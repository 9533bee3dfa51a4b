"""Where the branches of a parallel block meet: which channels of the fusion a plan keeps."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm import axes
from hybridlm.config import Attention, Block, Fusion, Parallel, attention_of, ssm_of

BRANCHES = ("attention", "ssm")
# The index array that turns a branch off where it keeps nothing.
SWITCH: Mapping[str, str] = {"attention": "keep_K", "ssm": "keep_G"}
# Index arrays that decide which channels a branch writes.
WRITTEN = {"keep_K", "keep_KJ", "keep_E", "keep_U", "keep_G", "keep_GH", "keep_P"}


def branch(block: Block, name: str) -> Any:
  """Returns the part of a block that is attention or SSM; None where it has none."""
  return attention_of(block) if name == "attention" else ssm_of(block)


def on(block: Block, keep: Mapping[str, Any], name: str) -> bool:
  """Whether a block has a branch, or is one, that index arrays do not turn off."""
  switch = SWITCH[name]
  return branch(block, name) is not None and not (switch in keep and len(keep[switch]) == 0)


def places(block: Parallel, keep: Mapping[str, Any], name: str) -> np.ndarray:
  """Returns which channels of the fusion a branch still writes, in its own order."""
  if not on(block, keep, name):
    return np.zeros(0, np.int32)
  part = branch(block, name)
  letters = f"KJ{part.value}" if isinstance(part, Attention) else "GHP"
  sizes = [getattr(part, letter) for letter in letters]
  row = np.arange(np.prod(sizes)).reshape(sizes)
  own = [(axes.of(each), np.asarray(rows, np.int32)) for each, rows in keep.items()]
  # Choices inside a group have a row for every group of the parent: they come first.
  for inner, rows in sorted(own, key=lambda item: -len(item[0])):
    if set(inner) <= set(letters):
      axis = letters.index(inner[-1])
      row = (np.take(row, rows, axis=axis) if len(inner) == 1
             else np.take_along_axis(row, rows[..., None], axis=axis))
  return np.asarray(block.fusion.places(name), np.int32)[row.ravel()]


def keep_Y(block: Block, keep: Mapping[str, Any]) -> np.ndarray | None:
  """Returns the channels of a mean that a branch still writes; None where all stay."""
  if not isinstance(block, Parallel) or block.fusion.kind != "mean":
    return None
  found = np.union1d(*(places(block, keep, name) for name in BRANCHES)).astype(np.int32)
  return None if len(found) == block.fusion.Y else found


def fusion(block: Parallel, keep: Mapping[str, Any]) -> Fusion:
  """Returns how the branches that stay meet, counted in the channels that do."""
  if block.fusion.kind != "mean" or not WRITTEN & set(keep):
    return block.fusion
  left = keep_Y(block, keep)
  left = np.arange(block.fusion.Y) if left is None else left
  rows = {name: np.searchsorted(left, places(block, keep, name)) for name in BRANCHES}
  return Fusion("mean", len(left), **{name: runs(row, len(left)) for name, row in rows.items()})


def runs(row: np.ndarray, size: int) -> tuple[tuple[int, int], ...] | None:
  """Returns ascending numbers as runs `(first, stop)`; None for all of a size, and for no number.

  >>> runs([0, 1, 4], 5)
  ((0, 2), (4, 5))
  """
  if len(row) in (0, size):
    return None
  ends = [-1, *np.flatnonzero(np.diff(row) > 1).tolist(), len(row) - 1]
  return tuple((int(row[a + 1]), int(row[b]) + 1) for a, b in itertools.pairwise(ends))
