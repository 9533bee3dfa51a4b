"""What a family of published models is: tables of tensors, and what its class can express."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hybridlm import axes, config
from hybridlm.blocks import Block, Parallel, attention_of, ssm_of
from hybridlm.config import GatedConv, Mamba, Mamba1, ModelConfig
from hybridlm.interop.families.fields import Fields
from hybridlm.interop.layout import Piece

Table = Mapping[str, tuple[Piece, ...]]
# A leaf's path within its folder -> what its published values are multiplied by; 1 elsewhere.
Scales = Mapping[str, float]
MODEL = "model"
# What every class can express alone where its family does not say more.
USUAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {"M": {"gate": ("gated",)}}


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
    scales: `(fields, cfg) -> Scales`, where a class multiplies activations by numbers that its
      config.json states: they are folded into the leaves.
    per_layer: blocks of ours in one published layer.
    pattern: regular expression of the block letters a whole model may have, and that in words.
    fixed: "model" or a block letter -> field -> the values the class can express; a field of a
      branch of `=` is `attention.rope` or `ssm.N`.
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
  scales: Callable[[Fields, ModelConfig], Scales] = lambda fields, cfg: {}
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
  for index, each in enumerate(cfg.blocks):
    for what in _unpublished(each):
      return [f"block {index} {what}"]
  if cfg.meta:
    return [f"{cfg.meta} meta tokens stand before every document, no published class has them"]
  found = []
  if family.describe is None:
    found.append("this layout is only read")
  rule, words = family.pattern
  if not re.fullmatch(rule, cfg.pattern):
    found.append(f"pattern {cfg.pattern!r} is not {words}")
  whole = family.fixed.get(MODEL, {})
  found += _fixed("", {field: getattr(cfg, field) for field in whole}, whole)
  for symbol in sorted(set(cfg.pattern)):
    where = [i for i, block in enumerate(cfg.blocks) if block.symbol == symbol]
    rules = {**USUAL.get(symbol, {}), **family.fixed.get(symbol, {})}
    for index in where:
      found += _fixed(f"block {index} ", _fields(cfg.blocks[index]), rules)
    found += _differences(cfg, where)
  return found + family.limits(cfg)


def _unpublished(block: Block) -> Iterator[str]:
  """Yields what a block has that nothing here is written to: one reason, not one a family."""
  attention, ssm = attention_of(block), ssm_of(block)
  if isinstance(block, Parallel) and block.fusion.kind == "mean":
    yield (
      "joins attention and SSM heads by the mean of their normed channels (Hymba), no published "
      "class has such a block; our own format holds it"
    )
  if isinstance(block, Parallel) and None in (attention, ssm):
    off = "attention" if attention is None else "SSM"
    yield f"has its {off} branch off, no published class has such a block"
  if isinstance(ssm, GatedConv):
    yield (
      "is a Mamba mixer without its state (a gated convolution), no published class has such a "
      "block"
    )
  if isinstance(ssm, Mamba1):
    yield "is a Mamba-1 mixer, which no class that we write has; our own format holds it"
  if attention is not None and attention.shared:
    yield "reads the keys and values of a block before it, no published class has such a block"
  if attention is not None and attention.U is not None:
    yield f"has values of another width than keys, U={attention.U}, no published class has such"


def _fields(block: Any) -> dict[str, Any]:
  """Returns the fields of a block, or of a part of one, by name; a part has its own in front."""
  found = {field.name: getattr(block, field.name) for field in dataclasses.fields(block)}
  if not isinstance(block, Parallel):
    return found
  parts = {name: _fields(part) for name, part in found.items()}
  return {f"{name}.{field}": part[field] for name, part in parts.items() for field in part}


def _fixed(
  place: str, found: Mapping[str, Any], rules: Mapping[str, tuple[Any, ...]]
) -> list[str]:
  return [
    f"{place}has {field}={found[field]!r}, the class only knows "
    f"{' or '.join(repr(value) for value in allowed)}"
    for field, allowed in rules.items()
    if found[field] not in allowed
  ]


def _differences(cfg: ModelConfig, where: list[int]) -> list[str]:
  """One reason a field in which blocks of one kind differ: published classes have one size each."""
  fields = {index: _fields(cfg.blocks[index]) for index in where}
  first, found = fields[where[0]], []
  for name, value in first.items():
    odd = [index for index in where if fields[index][name] != value]
    if odd:
      found.append(
        f"blocks {where[0]} and {odd[0]} differ in {name}: {value!r} against "
        f"{fields[odd[0]][name]!r}"
      )
  return found


def block(cfg: ModelConfig, symbol: str, default: Block | None) -> Block | None:
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
