"""A plan is data: which entries of which axis each block keeps, as a small JSON manifest.

Index arrays are named like parameters: `keep_GH` holds, for each group G, the heads H that stay,
`keep_P` one choice of channels for all heads, `keep_X` the blocks that stay. Rows belong to the
parent's groups, those that go included: inner choices are made before outer ones.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm import axes
from hybridlm.config import Attention, Block, GatedConv, ModelConfig, Rope, block_name

FORMAT = "hybridlm-plan-1"
# Index arrays a plan may hold: inside a block, by its axes. The last letter is the axis cut.
INSIDE = (
  "keep_GH", "keep_G", "keep_P", "keep_GN", "keep_F", "keep_KJ", "keep_K", "keep_E",
)
OUTSIDE = ("keep_D", "keep_X", "keep_V")
Index = tuple


@dataclasses.dataclass(frozen=True)
class Plan:
  """Kept indices of one parent.

  Attributes:
    config: the parent.
    source: SHA-256 of the parent's parameters (`trees.tree_hash`).
    keep: `keep_D`, `keep_X`, `keep_V` and, under a block's folder name, its own index arrays. What
      is not named is kept whole. Rows are ascending; `keep_GH`, `keep_GN` and `keep_KJ` have one
      row for every group of the parent, all equally long, and `keep_G` and `keep_K` then drop
      whole rows. `keep_GN` of empty rows makes a Mamba block a `GatedConv`.
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
    """Returns every index array that concerns a leaf of block `index`, `keep_D` included."""
    names = [*self.keep.get(block_name(index), {})]
    found = {name: self.array(name, index) for name in names}
    return found | ({"keep_D": self.array("keep_D")} if "keep_D" in self.keep else {})

  def outside(self) -> dict[str, np.ndarray]:
    """Returns the index arrays that concern leaves outside the blocks."""
    return {name: self.array(name) for name in ("keep_D", "keep_V") if name in self.keep}

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
        _left(parent.blocks[index], self.keep.get(block_name(index), {})) for index in self.blocks
      ),
    }
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


def _left(block: Block, keep: Mapping[str, Any]) -> Block:
  """Returns what index arrays leave of a block, which may be one of another kind."""
  sizes = {}
  for name, rows in keep.items():
    letters = axes.of(name)
    sizes[letters[-1]] = len(rows) if len(letters) == 1 else len(rows[0])
  if sizes.get("N") == 0:
    own = {field.name: getattr(block, field.name) for field in dataclasses.fields(GatedConv)}
    del sizes["N"]
    return GatedConv(**{**own, **sizes})
  if isinstance(block, Attention) and block.rope and "keep_E" in keep:
    return dataclasses.replace(block, rope=_turning(block, keep["keep_E"]), **sizes)
  return dataclasses.replace(block, **sizes)


def pairs(block: Attention) -> int:
  """Returns how many pairs of channels are turned: i and i + pairs, from channel 0 on."""
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


def _check_array(name: str, value: Any, sizes: Mapping[str, int], place: str) -> None:
  letters = axes.of(name)
  if len(letters) == 1:
    _check_row(value, sizes[letters], f"{place}{name}")
    return
  if not isinstance(value, tuple) or len(value) != sizes[letters[0]]:
    raise ValueError(f"plan: {place}{name} needs one row for each of {sizes[letters[0]]}")
  if name == "keep_GN" and all(row == () for row in value):
    return  # no state at all: what is left is a GatedConv
  for index, row in enumerate(value):
    _check_row(row, sizes[letters[1]], f"{place}{name} row {index}")
  counts = sorted({len(row) for row in value})
  if len(counts) > 1:
    raise ValueError(f"plan: {place}{name} keeps {counts} entries; every group keeps as many")


def _check_pairs(block: Attention, keep_E: tuple[int, ...], place: str) -> None:
  half, kept = pairs(block), set(keep_E)
  for one in range(half):
    if (one in kept) != (one + half in kept):
      stays, goes = (one, one + half) if one in kept else (one + half, one)
      raise ValueError(
        f"plan: {place}keep_E keeps channel {stays} without {goes}: under rotary positions the two "
        "channels of a pair stay or go together"
      )


def check(plan: Plan) -> None:
  """Raises unless every index array fits the plan's parent.

  Raises:
    ValueError: names the array, the block and the rule it breaks.
  """
  cfg = plan.config
  folders = {block_name(index): index for index in range(len(cfg.blocks))}
  for name, value in plan.keep.items():
    if name in OUTSIDE:
      _check_row(value, {"D": cfg.D, "V": cfg.V, "X": len(cfg.blocks)}[axes.of(name)], name)
      continue
    if name not in folders or not isinstance(value, Mapping):
      raise ValueError(f"plan: {name!r} is neither a block of the parent nor one of {OUTSIDE}")
    block = cfg.blocks[folders[name]]
    for inner, array in value.items():
      if inner not in INSIDE or not set(axes.of(inner)) <= set(block.axes):
        raise ValueError(f"plan: block {name} ({block.symbol}) has no axis for {inner!r}")
      _check_array(inner, array, cfg.sizes(folders[name]), f"block {name}: ")
    if "keep_E" in value:
      _check_pairs(block, value["keep_E"], f"block {name}: ")
  real = plan.keep.get("keep_V", (0,))[0]
  if real >= cfg.real_vocabulary:
    raise ValueError(f"plan: keep_V keeps padding alone, rows from {cfg.real_vocabulary} on")
