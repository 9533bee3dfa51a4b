"""What training carries from step to step. The teacher is not in it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class TrainState(NamedTuple):
  """Updates made so far, parameters (a nested dict), and the optimiser's state."""

  step: Int[Array, ""]
  params: Any
  opt_state: Any


def create(params: Any, optimizer: Any) -> TrainState:
  """Returns a state at step 0 on copies of `params`, so that donating it leaves those alive."""
  own = jax.tree.map(jnp.copy, params)
  return TrainState(jnp.zeros((), jnp.int32), own, optimizer.init(own))


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a tree path as text: `params/blocks/07/w_up_DF`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """Returns (path, leaf) pairs in the order of `jax.tree.leaves`."""
  return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _buffers(leaf: Any) -> Iterator[int]:
  if isinstance(leaf, jax.Array):
    for shard in leaf.addressable_shards:
      if shard.data.size:
        yield shard.data.unsafe_buffer_pointer()


def check_apart(state: TrainState, frozen: Any) -> None:
  """Raises where two leaves of the state, or one of it and one of `frozen`, share memory.

  A step donates its state, so a shared buffer would be overwritten under its other owner.

  Raises:
    ValueError: names both leaves.
  """
  owners = {}
  for where, tree in (("state", state), ("frozen", frozen)):
    for name, leaf in named_leaves(tree):
      for pointer in _buffers(leaf):
        other = owners.get(pointer)
        if where == "state" and other is None:
          owners[pointer] = f"state {name}"
        elif other is not None:
          raise ValueError(f"{other} and {where} {name} share a buffer, and a step donates its "
                           "state: copy one of them (train.state.create copies)")
