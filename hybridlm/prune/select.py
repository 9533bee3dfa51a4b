"""Scores and target sizes in, a plan out."""

from typing import Any

import numpy as np

from hybridlm.config import Attention, Mamba, Mlp, ModelConfig, block_name
from hybridlm.prune import sizes, stay
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores
from hybridlm.prune.sized import sized
from hybridlm.prune.sizes import KINDS, KNOWN, Targets

__all__ = [
  "KINDS", "KNOWN", "Targets", "kept_blocks", "kept_layers", "order", "orders", "plan",
  "rank_heads", "rank_queries", "sized", "top",
]
WINDOW = "score_window_X"


def order(score: np.ndarray) -> np.ndarray:
  """Returns the indices of the last axis, best first; ties go to the lower index."""
  return np.argsort(-np.asarray(score), axis=-1, kind="stable")


def top(score: np.ndarray, count: int) -> np.ndarray:
  """Returns the indices of the `count` best entries of the last axis, ascending.

  Ties go to the lower index, so that the same scores always give the same plan.
  """
  return np.sort(order(score)[..., :count], axis=-1).astype(np.int32)


def rank_heads(score_GHP: np.ndarray, channels: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns `(keep_P, keep_GH)`: channels first, then heads in each group on what survives.

  One choice of channels serves all heads; a head's score counts surviving channels only
  (arXiv 2504.11409, equations 20-24).
  """
  keep_P = top(np.linalg.norm(score_GHP, axis=(0, 1)), channels)
  return keep_P, top(np.linalg.norm(score_GHP[..., keep_P], axis=-1), heads)


def rank_queries(score_KJ: np.ndarray, groups: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns `(keep_KJ, keep_K)`: queries in each KV group first, then groups on what survives."""
  keep_KJ = top(score_KJ, queries)
  left_KJ = np.take_along_axis(score_KJ, keep_KJ, axis=1)
  return keep_KJ, top(np.linalg.norm(left_KJ, axis=1), groups)


def _mixer(block: Any, scores: Scores, name: str, size: dict[str, int]) -> dict[str, np.ndarray]:
  found = {}
  if any(size[letter] < getattr(block, letter) for letter in "GHP"):
    score_GHP = scores.get(f"{name}/score_GHP")
    keep_P, keep_GH = rank_heads(score_GHP, size["P"], size["H"])
    left_GHP = np.take_along_axis(score_GHP[..., keep_P], keep_GH[..., None], axis=1)
    found = {"keep_P": keep_P, "keep_GH": keep_GH,
             "keep_G": top(np.linalg.norm(left_GHP, axis=(1, 2)), size["G"])}
  if size.get("N") == 0:
    found["keep_GN"] = np.zeros((block.G, 0), np.int32)
  elif isinstance(block, Mamba) and size["N"] < block.N:
    found["keep_GN"] = top(scores.get(f"{name}/score_GN"), size["N"])
  return found


def _attention(
  block: Attention, scores: Scores, name: str, size: dict[str, int]
) -> dict[str, np.ndarray]:
  found = {}
  if size["J"] < block.J or size["K"] < block.K:
    score_KJ = scores.get(f"{name}/score_KJ")
    found["keep_KJ"], found["keep_K"] = rank_queries(score_KJ, size["K"], size["J"])
  if size["E"] < block.E:
    best = order(scores.get(f"{name}/score_E"))
    found["keep_E"] = np.asarray(sizes.keep_width(block, size["E"], best), np.int32)
  return found


def _inside(
  cfg: ModelConfig, scores: Scores, index: int, size: dict[str, int]
) -> dict[str, np.ndarray]:
  """Returns the index arrays of one block; an axis that stays whole has none."""
  block, name = cfg.blocks[index], block_name(index)
  if isinstance(block, Mlp):
    whole = size["F"] == block.F
    return {} if whole else {"keep_F": top(scores.get(f"{name}/score_F"), size["F"])}
  make = _attention if isinstance(block, Attention) else _mixer
  found = make(block, scores, name, size)
  last = {"keep_GH": "H", "keep_P": "P", "keep_G": "G", "keep_KJ": "J", "keep_K": "K"}
  whole = {keep for keep, letter in last.items() if size.get(letter) == getattr(block, letter, 0)}
  return {keep: rows for keep, rows in found.items() if keep not in whole}


def _window(cfg: ModelConfig, scores: Scores, targets: Targets, count: int) -> list[int] | None:
  """Returns the blocks that the cheapest window leaves; None where scores are of single blocks.

  Raises:
    ValueError: scores of windows of another length, or floors that every window breaks.
  """
  if WINDOW not in scores.sums:
    return None
  total, length = len(cfg.blocks), int(scores.meta["window"])
  if length != total - count:
    if "score_X" in scores.sums or count == total:
      return None
    raise ValueError(f"target blocks={count}: the scores are of windows of {length} blocks, so "
                     f"{total - length} of {total} can stay; calibrate windows of {total - count}")
  floors = stay.depth_floors(targets, count)
  for start in np.argsort(scores.get(WINDOW), kind="stable"):
    left = [index for index in range(total) if not start <= index < start + length]
    kinds = "".join(cfg.blocks[index].symbol for index in left)
    if all(kinds.count(kind) >= floor for kind, floor in floors.items()):
      return left
  raise ValueError(f"target blocks={count}: every window of {length} blocks breaks the floors "
                   f"{floors}")


def kept_blocks(cfg: ModelConfig, scores: Scores, targets: Targets) -> np.ndarray:
  """Returns the blocks that stay by the target `blocks`: those listed, or the best by score.

  A window that goes whole is chosen by what the model loses without it; single blocks by theirs.
  At least as many of a kind stay as `floors` says.

  Raises:
    ValueError: more blocks than the parent has, none, an index that is not one of them, or floors
      that cannot be met.
  """
  target = targets["blocks"]
  if isinstance(target, (list, tuple)):
    named = stay.listed(cfg, target)
    stay.check_listed(cfg, targets, named)
    return np.asarray(named, np.int32)
  count = stay.counted(target, "blocks", len(cfg.blocks))
  left = _window(cfg, scores, targets, count)
  if left is None:
    floors = stay.depth_floors(targets, count)
    left = stay.best(order(scores.get("score_X")), cfg.pattern, count, floors)
  return np.asarray(left, np.int32)


def _layer_scores(cfg: ModelConfig, scores: Scores) -> np.ndarray:
  return scores.get("score_X").reshape(len(cfg.blocks) // 2, 2).sum(axis=1)


def kept_layers(cfg: ModelConfig, scores: Scores, targets: Targets) -> np.ndarray:
  """Returns the blocks of the layers that stay: those whose two depth scores have the largest sum.

  A layer is a mixer and the MLP after it, as published dense and hybrid models count them; keeping
  layers whole keeps a model one that those formats can hold.

  Raises:
    ValueError: blocks that are not such pairs, more layers than the parent has, none, or floors
      that cannot be met.
  """
  target = targets["layers"]
  kinds = stay.layers(cfg, target)
  count = stay.counted(target, "layers", len(kinds))
  floors = stay.depth_floors(targets, count, paired=True)
  first = 2 * np.asarray(stay.best(order(_layer_scores(cfg, scores)), kinds, count, floors))
  return np.stack([first, first + 1], axis=1).ravel().astype(np.int32)


def orders(cfg: ModelConfig, scores: Scores, targets: Targets) -> dict[str, Any]:
  """Returns the rankings by which `sized` chooses the very blocks that `plan` would.

  >>> targets = {"D": 8, "blocks": 3}
  >>> small = select.sized(cfg, targets, **select.orders(cfg, scores, targets))
  >>> small == select.plan(cfg, scores, targets).small_config()
  True
  """
  found: dict[str, Any] = {}
  if sizes.whole(targets.get("blocks")):
    left = kept_blocks(cfg, scores, targets).tolist()
    found["order_X"] = [*left, *(i for i in range(len(cfg.blocks)) if i not in left)]
  if "layers" in targets:
    stay.layers(cfg, targets["layers"])
    found["order_X"] = order(_layer_scores(cfg, scores)).tolist()
  if sizes.whole(targets.get("noop")) and targets["noop"]:
    found["order_ssm_X"] = order(scores.get("score_ssm_X")).tolist()
  return found


def plan(cfg: ModelConfig, scores: Scores, targets: Targets) -> Plan:
  """Returns the plan that keeps the best-scored entries of every axis.

  Inner choices come before outer ones: channels, then heads in each group on the channels that
  survive, then groups on what survives in them; queries, then KV groups; blocks, then no-ops among
  those that stay.

  Args:
    cfg: the parent.
    scores: what `scores.calibrate` measured on it.
    targets: sizes. D; F; H (heads a group) or heads (a block: a multiple of the groups that stay);
      P; G; N (0: the SSM becomes a no-op); K; J; E. All but D may be a mapping from block index to
      size. `noop`: blocks whose SSM becomes a no-op, or how many. `blocks`: how many stay, or the
      list of those that do; or `layers`: how many pairs of a mixer and an MLP. `floors`: block
      kind -> how many stay at least. An axis that is not named keeps its size.

  Raises:
    ValueError: an unknown target; a size larger than the parent's, zero, or one that groups cannot
      share equally; scores that miss an axis.

  >>> plan = hybridlm.plan(cfg, scores, {"F": 11, "H": 3})
  >>> [block.F for block in plan.small_config().blocks if block.symbol == "-"]
  [11]
  """
  sizes.check(cfg, targets)
  keep: dict[str, Any] = {}
  width = sizes.width(cfg, targets)
  if width < cfg.D:
    keep["keep_D"] = top(scores.width(), width)
  left = np.arange(len(cfg.blocks))
  if "blocks" in targets:
    keep["keep_X"] = left = kept_blocks(cfg, scores, targets)
  if "layers" in targets:
    keep["keep_X"] = left = kept_layers(cfg, scores, targets)
  count = targets.get("noop", 0)
  by_need = order(scores.get("score_ssm_X")) if sizes.whole(count) and count else ()
  noop = stay.silent(cfg, targets, left.tolist(), by_need)
  for index in range(len(cfg.blocks)):
    size = sizes.inside(cfg, targets, index, index in noop)
    found = _inside(cfg, scores, index, size)
    if found:
      keep[block_name(index)] = found
  return Plan(cfg, scores.meta["parameters"], keep)
