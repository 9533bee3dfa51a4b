"""What the backward pass keeps of the forward pass, and what it computes again, by name."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name

KEPT = "block_input"  # the name that the residual stream before a block has for policies


class Remat(NamedTuple):
  """A choice: `block` around each block and `unit` around each repeated unit; None: nothing."""

  block: Callable | None
  unit: Callable | None = None


# `docs/results/aot.md` has what each costs in memory and in work.
REMATS: Mapping[str, Remat] = {
  "none": Remat(None),
  "block": Remat(policies.nothing_saveable),
  "unit": Remat(policies.nothing_saveable, policies.nothing_saveable),
  "dots": Remat(policies.dots_with_no_batch_dims_saveable),
  "offload": Remat(policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[KEPT], offload_src="device",
    offload_dst="pinned_host",
  )),
}


def around_block(name: str, fn: Callable, *, scanned: bool) -> Callable:
  """Returns one block's `(x, ...) -> (x, seen)` with what the named choice computes again.

  Inside a scan the two passes are loops of their own, and nothing need keep them apart.
  """
  policy = REMATS[name].block
  if policy is None:
    return fn

  def named(x, *rest):
    return fn(checkpoint_name(x, KEPT), *rest)

  return jax.checkpoint(named, policy=policy, prevent_cse=not scanned)


def around_unit(name: str, fn: Callable, *, scanned: bool) -> Callable:
  """Returns one turn of a repeated unit, with what the named choice computes again around it."""
  policy = REMATS[name].unit
  return fn if policy is None else jax.checkpoint(fn, policy=policy, prevent_cse=not scanned)
