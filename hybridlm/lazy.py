"""A parameter tree that is not in memory: leaves know their shape and are read one at a time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hybridlm import axes


class Leaf(NamedTuple):
  """One leaf somewhere else: its shape, its dtype (bfloat16 included), and how to fetch it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


# Leaves by their path in the canonical tree: `blocks/07/w_up_DF`.
Leaves = Mapping[str, Leaf]


def of(params: Mapping[str, Any]) -> dict[str, Leaf]:
  """Returns a tree in memory as leaves by path; reading one copies it to the host."""
  return {
    path: Leaf(tuple(leaf.shape), np.dtype(leaf.dtype), lambda leaf=leaf: np.asarray(leaf))
    for path, leaf in axes.leaves(params)
  }


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns values by path as nested dicts: `blocks/07/w_up_DF` -> `blocks`, `07`, `w_up_DF`."""
  nested: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *folders, last = path.split("/")
    place = nested
    for part in folders:
      place = place.setdefault(part, {})
    place[last] = leaf
  return nested
