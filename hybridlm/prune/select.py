"""Scores and target sizes in, a plan out."""

from typing import Any

import numpy as np

from hybridlm.config import Mlp, ModelConfig, attention_of, block_name, ssm_of
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
# Targets that count blocks, and the score of what the model loses where one block is among them.
NEEDS = {"noop": "ssm_X", "attention_off": "attention_X", "ssm_off": "ssm_branch_X"}


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


def _mixer(part: Any, scores: Scores, name: str, size: dict[str, int]) -> dict[str, np.ndarray]:
  if not size["G"]:
    return {"keep_G": np.zeros(0, np.int32)}
  found = {}
  if any(size[letter] < getattr(part, letter) for letter in "GHP"):
    score_GHP = scores.get(f"{name}/score_GHP")
    keep_P, keep_GH = rank_heads(score_GHP, size["P"], size["H"])
    left_GHP = np.take_along_axis(score_GHP[..., keep_P], keep_GH[..., None], axis=1)
    found = {"keep_P": keep_P, "keep_GH": keep_GH,
             "keep_G": top(np.linalg.norm(left_GHP, axis=(1, 2)), size["G"])}
  if size.get("N") == 0:
    found["keep_GN"] = np.zeros((part.G, 0), np.int32)
  elif size.get("N", np.inf) < getattr(part, "N", 0):
    found["keep_GN"] = top(scores.get(f"{name}/score_GN"), size["N"])
  if size.get("R", np.inf) < getattr(part, "R", 0):
    found["keep_R"] = top(scores.get(f"{name}/score_R"), size["R"])
  return found


def _attention(
  part: Any, scores: Scores, name: str, size: dict[str, int], group: dict[str, int]
) -> dict[str, np.ndarray]:
  """Returns the index arrays of attention; `group`: the blocks it shares keys with, itself too.

  K, E and U of a group are chosen by the sum of its blocks' scores, J by each block's own: `group`
  says how many queries of each block are left in every KV group.
  """
  if not size["K"]:
    return {"keep_K": np.zeros(0, np.int32)}
  found = {}
  if size["J"] < part.J or size["K"] < part.K:
    found["keep_KJ"], _ = rank_queries(scores.get(f"{name}/score_KJ"), size["K"], size["J"])
  if size["K"] < part.K:
    rows = [(scores.get(f"{each}/score_KJ"), J) for each, J in group.items()]
    rows = [np.take_along_axis(row, top(row, J), axis=1) for row, J in rows]
    found["keep_K"] = top(np.sum([np.linalg.norm(row, axis=1) for row in rows], axis=0), size["K"])
  if size["E"] < part.E:
    best = order(np.sum([scores.get(f"{each}/score_E") for each in group], axis=0))
    found["keep_E"] = np.asarray(sizes.keep_width(part, size["E"], best), np.int32)
  if size.get("U", np.inf) < (part.U or 0):
    found["keep_U"] = top(np.sum([scores.get(f"{each}/score_U") for each in group], axis=0),
                          size["U"])
  return found


def _inside(
  cfg: ModelConfig, scores: Scores, index: int, size: dict[str, int], group: dict[str, int]
) -> dict[str, np.ndarray]:
  """Returns the index arrays of one block; an axis that stays whole has none."""
  block, name = cfg.blocks[index], block_name(index)
  if isinstance(block, Mlp):
    whole = size["F"] == block.F
    return {} if whole else {"keep_F": top(scores.get(f"{name}/score_F"), size["F"])}
  attention, mixer, found = attention_of(block), ssm_of(block), {}
  if attention is not None:
    found |= _attention(attention, scores, name, size, group)
  if mixer is not None:
    found |= _mixer(mixer, scores, name, size)
  last = {"keep_GH": "H", "keep_P": "P", "keep_G": "G", "keep_KJ": "J", "keep_K": "K"}
  whole = {keep for keep, letter in last.items() if size.get(letter) == getattr(block, letter, 0)}
  return {keep: rows for keep, rows in found.items() if keep not in whole}


def _groups(cfg: ModelConfig, left: list[int], size: list[dict[str, int]]) -> list[dict[str, int]]:
  """Returns for each block those whose keys are chosen with its own, with the queries each keeps.

  Blocks that go, and attention that does, have no say in what the others keep.
  """
  found = [{block_name(index): own.get("J", 0)} for index, own in enumerate(size)]
  for group in cfg.kv_groups:
    reading = [index for index in group if index in left and size[index]["K"]]
    for index in reading:
      found[index] = {block_name(other): size[other]["J"] for other in reading}
  return found


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
    if stay.torn(cfg, left):
      continue
    if all(kinds.count(kind) >= floor for kind, floor in floors.items()):
      return left
  raise ValueError(f"target blocks={count}: every window of {length} blocks breaks the floors "
                   f"{floors}" + (" or takes keys that others read" if cfg.kv_groups else ""))


def kept_blocks(cfg: ModelConfig, scores: Scores, targets: Targets) -> np.ndarray:
  """Returns the blocks that stay by the target `blocks`: those listed, or the best by score.

  A window that goes whole is chosen by what the model loses without it; single blocks by theirs.
  At least as many of a kind stay as `floors` says. A block whose keys and values others read is
  never behind them.

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
    ranked = order(scores.get("score_X"))
    left = stay.best(ranked, cfg.pattern, count, floors, stay.readers(cfg))
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
  ranked = order(_layer_scores(cfg, scores))
  first = 2 * np.asarray(stay.best(ranked, kinds, count, floors, stay.by_layer(cfg)))
  return np.stack([first, first + 1], axis=1).ravel().astype(np.int32)


def orders(cfg: ModelConfig, scores: Scores, targets: Targets) -> dict[str, Any]:
  """Returns the rankings by which `sized` chooses the very blocks that `plan` would.

  >>> targets = {"D": 8, "blocks": 3}
  >>> small = select.sized(cfg, targets, **select.orders(cfg, scores, targets))
  >>> small == select.plan(cfg, scores, targets).small_config()
  True

  But for where the branches of a parallel block meet: see `sized`.
  """
  found: dict[str, Any] = {}
  if sizes.whole(targets.get("blocks")):
    left = kept_blocks(cfg, scores, targets).tolist()
    found["order_X"] = [*left, *(i for i in range(len(cfg.blocks)) if i not in left)]
  if "layers" in targets:
    stay.layers(cfg, targets["layers"])
    found["order_X"] = order(_layer_scores(cfg, scores)).tolist()
  for name, depth in NEEDS.items():
    if sizes.whole(targets.get(name)) and targets[name]:
      found[f"order_{depth}"] = order(scores.get(f"score_{depth}")).tolist()
  return found


def _outside(cfg: ModelConfig, scores: Scores, targets: Targets) -> dict[str, np.ndarray]:
  """Returns the index arrays of D and of the meta tokens; of what stays whole there is none."""
  found, width = {}, sizes.width(cfg, targets)
  if width < cfg.D:
    found["keep_D"] = top(scores.width(), width)
  meta = sizes.width(cfg, targets, "M") if cfg.meta else 0
  if meta < cfg.meta:
    found["keep_M"] = top(scores.get("score_M") if meta else np.zeros(0), meta)
  return found


def plan(cfg: ModelConfig, scores: Scores, targets: Targets) -> Plan:
  """Returns the plan that keeps the best-scored entries of every axis.

  Inner choices come before outer ones: channels, then heads in each group on the channels that
  survive, then groups on what survives in them; queries, then KV groups; blocks, then branches of
  parallel blocks and no-ops among those that stay.

  Args:
    cfg: the parent.
    scores: what `scores.calibrate` measured on it.
    targets: sizes. D; M (0: no meta tokens); F; H (heads a group) or heads (a block: a multiple of
      the groups that stay); P; G; N (0: the SSM becomes a no-op); R; K; J; E; U. All but D and M
      may be a mapping from block index to size; K, E and U of a block hold for those that read its
      keys. `noop`: blocks whose SSM becomes a no-op, or how many. `attention_off` and `ssm_off`:
      parallel blocks that lose this branch, or how many. `blocks`: how many stay, or the list of
      those that do; or `layers`: how many pairs of a mixer and an MLP. `floors`: block kind -> how
      many stay at least. An axis that is not named keeps its size.

  Raises:
    ValueError: an unknown target; a size larger than the parent's, zero, or one that groups cannot
      share equally; scores that miss an axis.

  >>> plan = hybridlm.plan(cfg, scores, {"F": 11, "H": 3})
  >>> [block.F for block in plan.small_config().blocks if block.symbol == "-"]
  [11]
  """
  sizes.check(cfg, targets)
  targets = sizes.shared(cfg, targets)
  keep: dict[str, Any] = _outside(cfg, scores, targets)
  left = list(range(len(cfg.blocks)))
  for name, choose in (("blocks", kept_blocks), ("layers", kept_layers)):
    if name in targets:
      keep["keep_X"] = choose(cfg, scores, targets)
      left = keep["keep_X"].tolist()
  ranks = orders(cfg, scores, {name: targets[name] for name in NEEDS if name in targets})
  gone = stay.fates(cfg, targets, left, **ranks)
  size = [sizes.inside(cfg, targets, i, gone.get(i, ())) for i in range(len(cfg.blocks))]
  for index, group in enumerate(_groups(cfg, left, size)):
    found = _inside(cfg, scores, index, size[index], group)
    if found:
      keep[block_name(index)] = found
  return Plan(cfg, scores.meta["parameters"], keep)
