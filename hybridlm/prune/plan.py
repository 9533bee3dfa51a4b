"""A plan is data: which entries of which axis each block keeps, as a small JSON manifest.

Index arrays are named like parameters: `keep_GH` holds, for each group G, the heads H that stay,
`keep_P` one choice of channels for all heads, `keep_X` the blocks that stay. Rows belong to the
parent's groups, those that go included: inner choices are made before outer ones.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm import axes
from hybridlm.config import (
  Attention,
  Block,
  GatedConv,
  Mamba,
  Mamba1,
  ModelConfig,
  Parallel,
  Rope,
  attention_of,
  block_name,
  ssm_of,
)
from hybridlm.prune import meeting

FORMAT = "hybridlm-plan-1"
# Index arrays a plan may hold: inside a block, by its axes. The last letter is the axis cut.
INSIDE = (
  "keep_GH", "keep_G", "keep_P", "keep_GN", "keep_R", "keep_F", "keep_KJ", "keep_K", "keep_E",
  "keep_U",
)
OUTSIDE = ("keep_D", "keep_X", "keep_V", "keep_M")
# What blocks that read the same keys and values keep alike.
ALIKE = ("keep_K", "keep_E", "keep_U")
Index = tuple


@dataclasses.dataclass(frozen=True)
class Plan:
  """Kept indices of one parent.

  Attributes:
    config: the parent.
    source: SHA-256 of the parent's parameters (`trees.tree_hash`).
    keep: `keep_D`, `keep_X`, `keep_V`, `keep_M` and, under a block's folder name, its own index
      arrays. What is not named is kept whole. Rows are ascending; `keep_GH`, `keep_GN` and
      `keep_KJ` have one row for every group of the parent, all equally long, and `keep_G` and
      `keep_K` then drop whole rows. `keep_GN` of empty rows makes a Mamba-2 mixer a `GatedConv`;
      a `keep_K` or `keep_G` of nothing turns that branch of a parallel block off, a `keep_M` of
      nothing leaves no meta tokens. Which channels meet in a fusion follows. Blocks that share
      keys keep K, E and U alike.
  """

  config: ModelConfig
  source: str
  keep: Mapping[str, Any]

  def __post_init__(self):
    object.__setattr__(self, "keep", _frozen(self.keep))
    check(self)

  def array(self, name: str, index: int | None = None) -> np.ndarray | None:
    """Returns an index array, of block `index` or of the whole model; None where all is kept."""
    folder = self.keep if index is None else self.keep.get(block_name(index), {})
    return np.asarray(folder[name], np.int32) if name in folder else None

  @property
  def blocks(self) -> tuple[int, ...]:
    """Indices, in the parent, of the blocks that stay."""
    return tuple(self.keep.get("keep_X", range(len(self.config.blocks))))

  def inside(self, index: int) -> dict[str, np.ndarray]:
    """Returns every index array that concerns a leaf of block `index`, D and Y included."""
    own = self.keep.get(block_name(index), {})
    found = {name: self.array(name, index) for name in own}
    meet = meeting.keep_Y(self.config.blocks[index], own)
    found |= {} if meet is None else {"keep_Y": meet}
    return found | ({"keep_D": self.array("keep_D")} if "keep_D" in self.keep else {})

  def outside(self) -> dict[str, np.ndarray]:
    """Returns the index arrays that concern leaves outside the blocks."""
    names = ("keep_D", "keep_V", "keep_M")
    return {name: self.array(name) for name in names if name in self.keep}

  @property
  def tokens(self) -> np.ndarray:
    """The parent's ids of the tokens the small model predicts, in the order of its own ids."""
    rows = np.asarray(self.keep.get("keep_V", range(self.config.V)), np.int32)
    return rows[rows < self.config.real_vocabulary]

  def small_config(self, parent: ModelConfig | None = None) -> ModelConfig:
    """Returns the config of what the plan leaves of `parent`; None takes the plan's own."""
    parent = self.config if parent is None else parent
    small = {
      "D": len(self.keep.get("keep_D", range(parent.D))),
      "blocks": tuple(
        left(parent.blocks[index], self.keep.get(block_name(index), {})) for index in self.blocks
      ),
    }
    if "keep_M" in self.keep:
      small["meta"] = len(self.keep["keep_M"])
    if "keep_V" in self.keep:
      rows = self.keep["keep_V"]
      real = sum(row < parent.real_vocabulary for row in rows)
      small |= {"V": len(rows), "vocabulary": None if real == len(rows) else real}
    return parent.replace(**small)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the manifest as JSON, whole or not at all."""
    plain = {
      "format": FORMAT,
      "source": self.source,
      "config": self.config.to_dict(),
      "keep": self.keep,
    }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Plan":
    """Returns the plan a manifest holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a plan, or keeps what its parent has not.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"plan {path}: no such file")
    try:
      plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"plan {path}: not JSON: {error}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
      raise ValueError(f"plan {path}: its format is not {FORMAT!r}")
    missing = {"source", "config", "keep"} - set(plain)
    if missing:
      raise ValueError(f"plan {path}: the key {min(missing)!r} is missing")
    for key, kind, word in (("keep", dict, "a table"), ("source", str, "a SHA-256")):
      if not isinstance(plain[key], kind):
        raise ValueError(f"plan {path}: {key} must be {word}, not {plain[key]!r}")
    return cls(ModelConfig.from_dict(plain["config"]), plain["source"], plain["keep"])


def left(block: Block, keep: Mapping[str, Any]) -> Block:
  """Returns what index arrays leave of a block, which may be one of another kind."""
  if not isinstance(block, Parallel):
    return _part(block, keep)
  parts = {
    name: _part(meeting.branch(block, name), keep) if meeting.on(block, keep, name) else None
    for name in meeting.BRANCHES
  }
  return Parallel(**parts, fusion=meeting.fusion(block, keep))


def _part(part: Any, keep: Mapping[str, Any]) -> Any:
  """Returns what index arrays leave of a block that is no parallel one, or of a branch."""
  sizes = {}
  for name, rows in keep.items():
    letters = axes.of(name)
    if letters[-1] in part.axes:
      sizes[letters[-1]] = len(rows) if len(letters) == 1 else len(rows[0])
  if sizes.get("N") == 0:
    own = {field.name: getattr(part, field.name) for field in dataclasses.fields(GatedConv)}
    del sizes["N"]
    return GatedConv(**{**own, **sizes})
  if isinstance(part, Attention) and part.rope and "keep_E" in keep:
    return dataclasses.replace(part, rope=_turning(part, keep["keep_E"]), **sizes)
  return dataclasses.replace(part, **sizes)


def pairs(block: Block) -> int:
  """Returns how many pairs of channels are turned: i and i + pairs, from channel 0 on."""
  block = attention_of(block)
  return 0 if block.rope is None else (block.rope.rotary or block.E) // 2


def _turning(block: Attention, keep_E: tuple[int, ...]) -> Rope | None:
  """Returns the rotary positions of the pairs that stay; None where none does."""
  half, rope = pairs(block), block.rope
  stay = [channel for channel in keep_E if channel < half]
  if len(stay) == half:
    return dataclasses.replace(rope, rotary=2 * half) if len(keep_E) < block.E else rope
  if not stay:
    return None
  frequency = rope.frequencies(block.E)
  return Rope(
    base=rope.base, rotary=2 * len(stay), frequency=tuple(frequency[pair] for pair in stay)
  )


def _frozen(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _frozen(item) for key, item in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return tuple(_frozen(item) for item in value)
  return int(value) if isinstance(value, np.integer) else value


def _check_row(row: Any, size: int, place: str) -> None:
  whole = isinstance(row, tuple) and all(type(i) is int for i in row)
  if not whole:
    raise ValueError(f"plan: {place} is not a list of whole numbers")
  if not row:
    raise ValueError(f"plan: {place} keeps nothing; at least one entry must stay")
  if list(row) != sorted(set(row)):
    raise ValueError(f"plan: {place} is not strictly ascending")
  if row[0] < 0 or row[-1] >= size:
    raise ValueError(f"plan: {place} keeps index {row[0] if row[0] < 0 else row[-1]} of {size}")


def _check_array(name: str, value: Any, block: Block, size: Mapping[str, int], place: str) -> None:
  letters = axes.of(name)
  if value == () and isinstance(block, Parallel) and name in meeting.SWITCH.values():
    return  # the branch goes off
  if len(letters) == 1:
    _check_row(value, size[letters], f"{place}{name}")
    return
  if not isinstance(value, tuple) or len(value) != size[letters[0]]:
    raise ValueError(f"plan: {place}{name} needs one row for each of {size[letters[0]]}")
  stateful = isinstance(ssm_of(block), Mamba)
  if name == "keep_GN" and stateful and all(row == () for row in value):
    return  # no state at all: what is left is a GatedConv
  for index, row in enumerate(value):
    _check_row(row, size[letters[1]], f"{place}{name} row {index}")
  counts = sorted({len(row) for row in value})
  if len(counts) > 1:
    raise ValueError(f"plan: {place}{name} keeps {counts} entries; every group keeps as many")


def _check_pairs(block: Block, keep_E: tuple[int, ...], place: str) -> None:
  half, kept = pairs(block), set(keep_E)
  for one in range(half):
    if (one in kept) != (one + half in kept):
      stays, goes = (one, one + half) if one in kept else (one + half, one)
      raise ValueError(
        f"plan: {place}keep_E keeps channel {stays} without {goes}: under rotary positions the two "
        "channels of a pair stay or go together"
      )


def _has(block: Block, name: str, value: Any) -> bool:
  """Whether a block has the axis of an index array; G and P of a Mamba-1 mixer are fixed."""
  if name not in INSIDE or not set(axes.of(name)) <= set(block.axes):
    return False
  fixed = isinstance(ssm_of(block), Mamba1) and name in ("keep_G", "keep_P")
  return not fixed or (value == () and name == "keep_G" and isinstance(block, Parallel))


def _check_inside(cfg: ModelConfig, index: int, arrays: Mapping[str, Any]) -> None:
  block, name = cfg.blocks[index], block_name(index)
  for inner, array in arrays.items():
    if not _has(block, inner, array):
      raise ValueError(f"plan: block {name} ({block.symbol}) has no axis for {inner!r}")
    _check_array(inner, array, block, cfg.sizes(index), f"block {name}: ")
  if "keep_E" in arrays:
    _check_pairs(block, arrays["keep_E"], f"block {name}: ")
  if not any(meeting.on(block, arrays, branch) for branch in meeting.BRANCHES) and isinstance(
    block, Parallel
  ):
    raise ValueError(f"plan: block {name}: both branches off; drop the block (keep_X) instead")


def _check_groups(plan: Plan) -> None:
  """Raises where blocks that read the same keys and values would no longer agree on them."""
  cfg, stay = plan.config, set(plan.blocks)
  for owner, *readers in cfg.kv_groups:
    left = {
      index: plan.keep.get(block_name(index), {}) for index in (owner, *readers)
      if index in stay
    }
    left = {i: keep for i, keep in left.items() if meeting.on(cfg.blocks[i], keep, "attention")}
    reading = [index for index in left if index != owner]
    if reading and owner not in left:
      raise ValueError(f"plan: block {reading[0]} reads the keys and values of block {owner}, "
                       "whose attention goes; they go together, or the reader alone")
    for name, index in itertools.product(ALIKE, reading):
      if _rows(cfg, index, left[index], name) != _rows(cfg, owner, left[owner], name):
        raise ValueError(f"plan: block {block_name(index)}: {name} is not that of block "
                         f"{block_name(owner)}, whose keys and values it reads")


def _rows(cfg: ModelConfig, index: int, keep: Mapping[str, Any], name: str) -> Any:
  """Returns an index array of a block, all of the axis where it has none."""
  return keep.get(name, tuple(range(cfg.sizes(index).get(axes.of(name), 0))))


def check(plan: Plan) -> None:
  """Raises unless every index array fits the plan's parent.

  Raises:
    ValueError: names the array, the block and the rule it breaks.
  """
  cfg = plan.config
  folders = {block_name(index): index for index in range(len(cfg.blocks))}
  sizes = {"D": cfg.D, "V": cfg.V, "X": len(cfg.blocks), "M": cfg.meta}
  for name, value in plan.keep.items():
    if name == "keep_M" and not cfg.meta:
      raise ValueError("plan: keep_M, but the parent has no meta tokens")
    if name == "keep_M" and value == ():
      continue  # no meta tokens at all
    if name in OUTSIDE:
      _check_row(value, sizes[axes.of(name)], name)
      continue
    if name not in folders or not isinstance(value, Mapping):
      raise ValueError(f"plan: {name!r} is neither a block of the parent nor one of {OUTSIDE}")
    _check_inside(cfg, folders[name], value)
  _check_groups(plan)
  real = plan.keep.get("keep_V", (0,))[0]
  if real >= cfg.real_vocabulary:
    raise ValueError(f"plan: keep_V keeps padding alone, rows from {cfg.real_vocabulary} on")
