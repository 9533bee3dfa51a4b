"""Scores and target sizes in, a plan out."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm.config import Attention, Mamba, Mlp, ModelConfig, block_name
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

# Target -> the block kind whose size it is. "heads" counts all heads of a block, in all groups.
KINDS = {"H": Mamba, "heads": Mamba, "P": Mamba, "F": Mlp, "J": Attention}
KNOWN = ("D", *KINDS, "blocks", "layers")
Targets = Mapping[str, Any]


def top(score: np.ndarray, count: int) -> np.ndarray:
  """Returns the indices of the `count` best entries of the last axis, ascending.

  Ties go to the lower index, so that the same scores always give the same plan.
  """
  order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
  return np.sort(order, axis=-1).astype(np.int32)


def rank_heads(score_GHP: np.ndarray, channels: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns `(keep_P, keep_GH)`: channels first, then heads in each group on what survives.

  One choice of channels serves all heads; a head's score counts surviving channels only
  (arXiv 2504.11409, equations 20-24).
  """
  keep_P = top(np.linalg.norm(score_GHP, axis=(0, 1)), channels)
  return keep_P, top(np.linalg.norm(score_GHP[..., keep_P], axis=-1), heads)


def wanted(targets: Targets, name: str, index: int, parent: int, per: int = 1) -> int:
  """Returns the size a block shall have: its own where targets differ by block.

  Args:
    targets: sizes by letter; a mapping from block index to size where they differ.
    name: a key of `targets`; where it is absent the parent's size stays.
    index: the block.
    parent: the size the parent has, in the unit of `name`.
    per: the result must be a multiple of this (heads of a block: its groups).

  Raises:
    ValueError: not a whole number, zero, larger than the parent, or not a multiple of `per`.
  """
  value = targets.get(name, parent)
  if isinstance(value, Mapping):
    value = value.get(index, value.get(str(index), parent))
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
    raise ValueError(f"target {name}={value!r} of block {index}: not a whole number of at least 1")
  if value > parent:
    raise ValueError(f"target {name}={value} of block {index}: larger than the parent's {parent}")
  if value % per:
    raise ValueError(
      f"target {name}={value} of block {index}: not a multiple of its {per} groups; every group "
      "keeps as many heads"
    )
  return int(value)


def _check_names(cfg: ModelConfig, targets: Targets) -> None:
  for name, value in targets.items():
    if name not in KNOWN:
      raise ValueError(f"target {name!r} is not one of {', '.join(KNOWN)}")
    kind = KINDS.get(name)
    if kind and not any(isinstance(block, kind) for block in cfg.blocks):
      raise ValueError(f"target {name}={value}: no block of {cfg.pattern!r} has this axis")
    if isinstance(value, Mapping) and not kind:
      raise ValueError(f"target {name}={value!r}: one size for the whole model, not one a block")
    for index in value if isinstance(value, Mapping) else ():
      inside = str(index).isdigit() and int(index) < len(cfg.blocks)
      if not inside or (kind and not isinstance(cfg.blocks[int(index)], kind)):
        raise ValueError(f"target {name}: block {index} of {cfg.pattern!r} has no such axis")
  for pair in (("H", "heads"), ("blocks", "layers")):
    if set(pair) <= set(targets):
      raise ValueError(f"targets {' and '.join(pair)} both given: they are one size in two units")


def _inside(
  cfg: ModelConfig, scores: Scores, targets: Targets, index: int
) -> dict[str, np.ndarray]:
  """Returns the index arrays of one block; an axis that stays whole has none."""
  block, name = cfg.blocks[index], block_name(index)
  found = {}
  if isinstance(block, Mlp):
    size = wanted(targets, "F", index, block.F)
    if size < block.F:
      found["keep_F"] = top(scores.get(f"{name}/score_F"), size)
  elif isinstance(block, Attention):
    size = wanted(targets, "J", index, block.J)
    if size < block.J:
      found["keep_KJ"] = top(scores.get(f"{name}/score_KJ"), size)
  else:
    channels = wanted(targets, "P", index, block.P)
    heads = wanted(targets, "H", index, block.H)
    if "heads" in targets:
      heads = wanted(targets, "heads", index, block.G * block.H, per=block.G) // block.G
    if (heads, channels) != (block.H, block.P):
      keep_P, keep_GH = rank_heads(scores.get(f"{name}/score_GHP"), channels, heads)
      found |= {"keep_P": keep_P} if channels < block.P else {}
      found |= {"keep_GH": keep_GH} if heads < block.H else {}
  return found


def kept_blocks(cfg: ModelConfig, scores: Scores, target: Any) -> np.ndarray:
  """Returns the blocks that stay: the best by depth score, or the ones listed.

  Raises:
    ValueError: more blocks than the parent has, none, or an index that is not one of them.
  """
  count = len(cfg.blocks)
  if isinstance(target, (list, tuple)):
    whole = all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in target)
    listed = sorted(set(target)) if whole else []
    if not listed or listed[0] < 0 or listed[-1] >= count or len(listed) != len(target):
      raise ValueError(f"target blocks={target!r}: not distinct indices of the {count} blocks")
    return np.asarray(listed, np.int32)
  whole = isinstance(target, (int, np.integer)) and not isinstance(target, bool)
  if not whole or not 1 <= target <= count:
    raise ValueError(f"target blocks={target!r}: the parent has {count}, keep 1 to {count}")
  return top(scores.get("score_X"), target)


def kept_layers(cfg: ModelConfig, scores: Scores, target: Any) -> np.ndarray:
  """Returns the blocks of the layers that stay: those whose two depth scores have the largest sum.

  A layer is a mixer and the MLP after it, as published dense and hybrid models count them; keeping
  layers whole keeps a model one that those formats can hold.

  Raises:
    ValueError: blocks that are not such pairs, or more layers than the parent has, or none.
  """
  pairs = len(cfg.blocks) // 2
  mixers, mlps = cfg.blocks[::2], cfg.blocks[1::2]
  whole = len(cfg.blocks) == 2 * pairs and all(isinstance(block, Mlp) for block in mlps)
  if not whole or any(isinstance(block, Mlp) for block in mixers):
    raise ValueError(f"target layers={target!r}: {cfg.pattern!r} is not made of layers, a mixer "
                     "and an MLP each; name blocks")
  number = isinstance(target, (int, np.integer)) and not isinstance(target, bool)
  if not number or not 1 <= target <= pairs:
    raise ValueError(f"target layers={target!r}: the parent has {pairs}, keep 1 to {pairs}")
  first = 2 * top(scores.get("score_X").reshape(pairs, 2).sum(axis=1), target)
  return np.stack([first, first + 1], axis=1).ravel()


def plan(cfg: ModelConfig, scores: Scores, targets: Targets) -> Plan:
  """Returns the plan that keeps the best-scored entries of every axis.

  Args:
    cfg: the parent.
    scores: what `scores.calibrate` measured on it.
    targets: sizes: D, F, H (heads per group) or heads (per block), P, J; a size may be a mapping
      from block index to size. `blocks`: how many stay, or the list of those that do; or
      `layers`: how many pairs of a mixer and an MLP stay. An axis that is not named keeps its size.

  Raises:
    ValueError: an unknown target; a size larger than the parent's, zero, or heads that groups
      cannot share equally; scores that miss an axis.

  >>> plan = hybridlm.plan(cfg, scores, {"F": 11, "H": 3})
  >>> [block.F for block in plan.small_config().blocks if block.symbol == "-"]
  [11]
  """
  _check_names(cfg, targets)
  keep: dict[str, Any] = {}
  width = wanted({"D": targets.get("D", cfg.D)}, "D", 0, cfg.D)
  if width < cfg.D:
    keep["keep_D"] = top(scores.width(), width)
  if "blocks" in targets:
    keep["keep_X"] = kept_blocks(cfg, scores, targets["blocks"])
  if "layers" in targets:
    keep["keep_X"] = kept_layers(cfg, scores, targets["layers"])
  for index in range(len(cfg.blocks)):
    found = _inside(cfg, scores, targets, index)
    if found:
      keep[block_name(index)] = found
  return Plan(cfg, scores.meta["parameters"], keep)
