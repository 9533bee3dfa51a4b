"""What several pruning steps need to know of a parameter tree: its hash and its buffers."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes


def tree_hash(params: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of a tree: paths, dtypes, shapes and bytes of every leaf."""
  digest = hashlib.sha256()
  for path, leaf in axes.leaves(params):
    array = np.asarray(leaf)
    digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
  return digest.hexdigest()


def shared_buffers(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """Returns the paths in `one` whose device buffers `other` also holds."""

  def pointers(leaf):
    return {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}

  held = set().union(*(pointers(x) for _, x in axes.leaves(other) if isinstance(x, jax.Array)))
  return [path for path, x in axes.leaves(one) if isinstance(x, jax.Array) and pointers(x) & held]


def check_finite(params: Mapping[str, Any], place: str) -> None:
  """Raises where a leaf holds what is no number; `place` begins the message.

  Raises:
    ValueError: names the first such leaf.
  """
  for path, leaf in axes.leaves(params):
    if not bool(jnp.isfinite(leaf).all()):
      raise ValueError(f"{place}: leaf {path!r} holds values that are not finite")
