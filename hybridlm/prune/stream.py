"""Cuts and hashes of trees that are not in memory: one leaf at a time, in its own memory order."""

import concurrent.futures
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes, config, lazy, strides
from hybridlm.config import ModelConfig, block_name
from hybridlm.prune import cut as cutting
from hybridlm.prune.plan import Plan

# What is turned into canonical order at once for hashing, while the piece before is hashed.
PIECE = 32 << 20


def take(w: np.ndarray, w_axes: str, keeps: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns a leaf with only the kept entries: `cut.keep_axis` for each array of `keeps`.

  Works in the memory order of `w` and returns a view of that order, so that a transposed view is
  never turned. Slow axes are cut first, groups before what is inside them: what they drop is not
  touched again.
  """
  order = strides.memory_order(w)
  letters = "".join(w_axes[i] for i in order)
  w = w.transpose(order)
  used = {own: keep for own, keep in _named(keeps) if set(own) <= set(letters)}
  used = {own: keep[used[own[0]]] if own[0] in used and len(own) > 1 else keep
          for own, keep in used.items()}

  def place(own):
    return max(letters.index(own[-1]), *(letters.index(x) + 0.5 for x in own[:-1] if x in used), 0)

  for own in sorted(used, key=place):
    w = _take(w, letters, used[own], own)
  return w.transpose(np.argsort(order))


def _named(keeps: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
  return [(axes.of(name), keep) for name, keep in keeps.items()]


def _take(w: np.ndarray, letters: str, keep: np.ndarray, own: str) -> np.ndarray:
  """Returns `w` with entries `keep` of axis `own[-1]`, which may vary along the axes before it."""
  axis = letters.index(own[-1])
  if len(own) == 1:
    return np.take(w, keep, axis=axis)
  made = np.empty((*w.shape[:axis], keep.shape[-1], *w.shape[axis + 1 :]), w.dtype)
  for where in np.ndindex(keep.shape[:-1]):
    place: list[int | slice] = [slice(None)] * w.ndim
    for letter, index in zip(own[:-1], where, strict=True):
      place[letters.index(letter)] = index
    left = [i for i in range(w.ndim) if isinstance(place[i], slice)]
    made[tuple(place)] = np.take(w[tuple(place)], keep[where], axis=left.index(axis))
  return made


def scaled(w: np.ndarray, scale: np.float32) -> np.ndarray:
  """Returns a leaf times `cut.query_scale`, computed in float32, in its own dtype."""
  return w if scale == 1 else (w.astype(np.float32) * scale).astype(w.dtype)


def _cut_leaf(
  leaf: lazy.Leaf, name: str, keeps: Mapping[str, np.ndarray], scale: np.float32
) -> lazy.Leaf:
  letters = axes.of(name)
  sizes = {own[-1]: keep.shape[-1] for own, keep in _named(keeps) if set(own) <= set(letters)}
  shape = tuple(sizes.get(a, n) for a, n in zip(letters, leaf.shape, strict=True))

  def read() -> np.ndarray:
    return scaled(take(leaf.read(), letters, keeps), scale)

  return lazy.Leaf(shape, leaf.dtype, read)


def cut(
  cfg: ModelConfig, leaves: lazy.Leaves, plan: Plan
) -> tuple[ModelConfig, dict[str, lazy.Leaf]]:
  """Returns the smaller config and its leaves, cut when they are read: `cut.cut`, not in memory.

  The parent's hash is not looked at here, because that reads all of it: see `check_source`.

  Raises:
    ValueError: the plan was made for other sizes, or the leaves are not the config's tree.
  """
  cutting.check_sizes(cfg, plan)
  config.check(cfg, lazy.tree(leaves))
  small_cfg = plan.small_config(cfg)
  made = {}
  for path, _ in axes.leaves(config.shapes(small_cfg)):
    *folder, name = path.split("/")
    if folder[0] == "blocks":
      new = int(folder[1])
      old = plan.blocks[new]
      scale = cutting.query_scale(name, cfg.blocks[old], small_cfg.blocks[new])
      source = leaves[f"blocks/{block_name(old)}/{name}"]
      made[path] = _cut_leaf(source, name, plan.inside(old), scale)
    else:
      made[path] = _cut_leaf(leaves[path], name, plan.outside(), np.float32(1))
  return small_cfg, made


def mask_block(
  cfg: ModelConfig, plan: Plan, index: int, folder: Mapping[str, Any]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """Returns `(leaves, kept)` of one block that stays, as `cut.mask` gives them for the whole model.

  Args:
    cfg: the parent.
    plan: what is kept of it.
    index: the block, in the parent.
    folder: its leaves by name.
  """
  whole = cutting.stays(plan)
  own = {**whole["blocks"][block_name(index)], "stay_D": whole["stay_D"]}
  kept = {
    "count": jnp.sum(whole["stay_D"]), "inner": cutting.counts(cfg.blocks[index], own) or None
  }
  return cutting.zero_folder(folder, own), kept


def _ahead(pool: concurrent.futures.Executor, steps: Iterable[Callable[[], Any]]) -> Iterator[Any]:
  """Yields each step's result while another thread works on the next; never two at a time."""
  coming = None
  for step in steps:
    found = None if coming is None else [coming.result()]
    coming = pool.submit(step)
    if found:
      yield found.pop()
  if coming is not None:
    yield coming.result()


def _canonical(pool: concurrent.futures.Executor, leaves: lazy.Leaves) -> Iterator[Any]:
  """Yields what `trees.tree_hash` digests, in its order."""
  paths = sorted(leaves, key=lambda path: path.split("/"))
  arrays = _ahead(pool, (leaves[path].read for path in paths))
  for path, array in zip(paths, arrays, strict=True):
    yield f"{path} {leaves[path].dtype} {leaves[path].shape}\n".encode()
    for piece in strides.pieces(array, PIECE):
      yield strides.raw(piece)


def tree_hash(leaves: lazy.Leaves) -> str:
  """Returns the SHA-256 of a tree that is not in memory: equal to `trees.tree_hash` of it.

  One thread reads a leaf ahead, another puts its pieces in order, one ahead of the hashing.
  """
  digest = hashlib.sha256()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    pieces = _canonical(pool, leaves)
    for piece in _ahead(pool, iter(lambda: functools.partial(next, pieces, None), None)):
      if piece is None:
        break
      digest.update(piece)
  return digest.hexdigest()


def check_source(leaves: lazy.Leaves, plan: Plan) -> None:
  """Raises unless the plan was made from these very parameters; reads all of them.

  Raises:
    ValueError: names both hashes.
  """
  found = tree_hash(leaves)
  if found != plan.source:
    raise ValueError(
      f"plan: made for parameters {plan.source[:12]}, the ones given are {found[:12]}"
    )
