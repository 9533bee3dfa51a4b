"""What a family of published models is: tables of tensors, and what its class can express."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from hybridlm import axes, config
from hybridlm.blocks import Block
from hybridlm.config import GatedConv, Mamba, ModelConfig
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.layout import Piece

Table = Mapping[str, tuple[Piece, ...]]
MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Family:
  """One published architecture.

  Attributes:
    name: its `model_type`, or our own word for a layout that has none.
    architecture: the class that transformers loads it with.
    outer: published name -> pieces, for tensors outside the blocks.
    blocks: block letter -> published name -> pieces, below `folder`.
    folder: published folder of a layer, with `{}` for its number.
    read: `(fields) -> ModelConfig`, from a config.json.
    describe: `(cfg) -> dict`, the family's own keys of a config.json, for a config it can express;
      None where we only read the family.
    per_layer: blocks of ours in one published layer.
    pattern: regular expression of the block letters a whole model may have, and that in words.
    fixed: "model" or a block letter -> field -> the values the class can express.
    ties: whether a tied head is expressed without a tensor.
    limits: `(cfg) -> reasons` for rules that are no table.
    renamed: prefixes of tensor names that other versions of the class write, and ours.
    ignored: regular expression of tensors that carry no parameter.
  """

  name: str
  architecture: str
  outer: Table
  blocks: Mapping[str, Table]
  folder: str
  read: Callable[[Fields], ModelConfig]
  describe: Callable[[ModelConfig], dict[str, Any]] | None
  pattern: tuple[str, str]
  fixed: Mapping[str, Mapping[str, tuple[Any, ...]]]
  per_layer: int = 1
  ties: bool = True
  limits: Callable[[ModelConfig], list[str]] = lambda cfg: []
  renamed: tuple[tuple[str, str], ...] = ()
  ignored: str = r"$^"


def entries(family: Family, cfg: ModelConfig) -> dict[str, tuple[str, tuple[Piece, ...]]]:
  """Returns published name -> (our folder, pieces) of every tensor of a model.

  Raises:
    ValueError: the family's table does not hold every leaf of the model exactly once.
  """
  expected = {path for path, _ in axes.leaves(config.leaf_names(cfg))}
  found, leaves = {}, []
  places = [("", "", family.outer)]
  for index, block in enumerate(cfg.blocks):
    theirs = family.folder.format(index // family.per_layer)
    places.append((f"blocks/{config.block_name(index)}/", theirs, family.blocks[block.symbol]))
  for ours, theirs, table in places:
    for name, pieces in table.items():
      paths = [ours + piece.leaf for piece in pieces]
      if expected.issuperset(paths):
        found[theirs + name] = (ours, pieces)
        leaves += paths
  if sorted(leaves) != sorted(expected):
    odd = min(set(leaves) ^ expected)
    raise ValueError(f"family {family.name}: its table does not hold the leaf {odd!r} once")
  return found


def sizes(cfg: ModelConfig, ours: str) -> dict[str, int]:
  """Returns letter -> size for one of our folders: "" or `blocks/07/`."""
  return cfg.sizes(int(ours.split("/")[1])) if ours else {"V": cfg.V, "D": cfg.D}


def reasons(family: Family, cfg: ModelConfig) -> list[str]:
  """Returns every reason why a family's class cannot express a model; nothing if it can."""
  stateless = [index for index, each in enumerate(cfg.blocks) if isinstance(each, GatedConv)]
  if stateless:
    return [
      f"block {stateless[0]} is a Mamba mixer without its state (a gated convolution), no "
      "published class has such a block"
    ]
  found = []
  if family.describe is None:
    found.append("this layout is only read")
  rule, words = family.pattern
  if not re.fullmatch(rule, cfg.pattern):
    found.append(f"pattern {cfg.pattern!r} is not {words}")
  found += _fixed("", cfg, family.fixed.get(MODEL, {}))
  for symbol in sorted(set(cfg.pattern)):
    where = [i for i, block in enumerate(cfg.blocks) if block.symbol == symbol]
    for index in where:
      rules = family.fixed.get(symbol, {})
      found += _fixed(f"block {index} ", cfg.blocks[index], rules)
    found += _differences(cfg, where)
  return found + family.limits(cfg)


def _fixed(place: str, owner: Any, rules: Mapping[str, tuple[Any, ...]]) -> list[str]:
  return [
    f"{place}has {field}={getattr(owner, field)!r}, the class only knows "
    f"{' or '.join(repr(value) for value in allowed)}"
    for field, allowed in rules.items()
    if getattr(owner, field) not in allowed
  ]


def _differences(cfg: ModelConfig, where: list[int]) -> list[str]:
  """One reason a field in which blocks of one kind differ: published classes have one size each."""
  first = cfg.blocks[where[0]]
  found = []
  for field in dataclasses.fields(first):
    values = {index: getattr(cfg.blocks[index], field.name) for index in where}
    odd = [index for index in where if values[index] != values[where[0]]]
    if odd:
      found.append(
        f"blocks {where[0]} and {odd[0]} differ in {field.name}: {values[where[0]]!r} against "
        f"{values[odd[0]]!r}"
      )
  return found


def block(cfg: ModelConfig, symbol: str, default: Block) -> Block:
  """Returns the first block of a kind; `default` where a model has none of it."""
  return next((each for each in cfg.blocks if each.symbol == symbol), default)


def whole_expansion(cfg: ModelConfig) -> list[str]:
  """Returns the reason where heads times channels is not a whole multiple of D, as some need."""
  wide = {mamba.G * mamba.H * mamba.P for mamba in cfg.blocks if isinstance(mamba, Mamba)}
  return [
    f"{width} Mamba channels are not a whole multiple of D={cfg.D}, as the class needs (expand)"
    for width in sorted(wide)
    if width % cfg.D
  ]


def expansion(cfg: ModelConfig, default: Mamba) -> int:
  """Returns Mamba channels divided by D, rounded up."""
  mamba = block(cfg, "M", default)
  return math.ceil(mamba.G * mamba.H * mamba.P / cfg.D)
