"""Target sizes: which there are, and what they ask of every block. Nothing here reads a score."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm.config import KINDS as SYMBOLS
from hybridlm.config import Attention, GatedConv, Mamba, Mlp, ModelConfig
from hybridlm.prune.plan import pairs

MIXERS = (Mamba, GatedConv)
# Target -> the block kinds whose size it is. "heads" counts all heads of a block, in all groups.
KINDS: Mapping[str, tuple[type, ...]] = {
  "H": MIXERS, "heads": MIXERS, "P": MIXERS, "G": MIXERS, "N": (Mamba,), "F": (Mlp,),
  "J": (Attention,), "K": (Attention,), "E": (Attention,),
}
KNOWN = ("D", *KINDS, "noop", "blocks", "layers", "floors")
Targets = Mapping[str, Any]


def whole(value: Any) -> bool:
  """Whether a value is a whole number, which True is not."""
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def at(value: Any, index: int, absent: Any = None) -> Any:
  """Returns what a target says of one block: a mapping's entry (keys may be strings), or itself."""
  if isinstance(value, Mapping):
    return value.get(index, value.get(str(index), absent))
  return value


def wanted(
  targets: Targets, name: str, index: int, parent: int, *, least: int = 1, per: int = 1,
  rule: str = "", whose: str = "the parent's",
) -> int:
  """Returns the size a block shall have: its own where targets differ by block.

  Args:
    targets: sizes by letter; a mapping from block index to size where they differ.
    name: a key of `targets`; where it is absent the parent's size stays.
    index: the block.
    parent: the size the parent has, in the unit of `name`.
    least: the smallest size there is.
    per: a size other than the parent's must be a multiple of this.
    rule: why, for the message.
    whose: the parent's size is, for the message.

  Raises:
    ValueError: not a whole number, too small, larger than the parent, or not a multiple of `per`.
  """
  value = at(targets.get(name, parent), index, parent)
  place = f"target {name}={value!r} of block {index}"
  if not whole(value) or value < least:
    raise ValueError(f"{place}: not a whole number of at least {least}")
  if value > parent:
    raise ValueError(f"{place}: larger than {whose} {parent}")
  if value % per and value != parent:
    raise ValueError(f"{place}: not a multiple of {rule}")
  return int(value)


def check(cfg: ModelConfig, targets: Targets) -> None:
  """Raises unless every target is known, has a block, and says one thing once.

  Raises:
    ValueError: names the target, its value and the rule.
  """
  present = {type(block) for block in cfg.blocks}
  for name, value in targets.items():
    if name not in KNOWN:
      raise ValueError(f"target {name!r} is not one of {', '.join(KNOWN)}")
    kinds = KINDS.get(name, ())
    if kinds and not present & set(kinds):
      raise ValueError(f"target {name}={value}: no block of {cfg.pattern!r} has this axis")
    if isinstance(value, Mapping) and name != "floors":
      _check_mapping(cfg, name, value, kinds)
  for pair in (("H", "heads"), ("blocks", "layers")):
    if set(pair) <= set(targets):
      raise ValueError(f"targets {' and '.join(pair)} both given: they are one size in two units")
  if "noop" in targets:
    _check_noop(cfg, targets)
  if "floors" in targets:
    _check_floors(cfg, targets["floors"])


def _check_mapping(cfg, name, value, kinds) -> None:
  if not kinds:
    raise ValueError(f"target {name}={value!r}: one size for the whole model, not one a block")
  seen = set()
  for index in value:
    number = int(index) if str(index).isdigit() else -1
    if not 0 <= number < len(cfg.blocks) or not isinstance(cfg.blocks[number], kinds):
      raise ValueError(f"target {name}: block {index} of {cfg.pattern!r} has no such axis")
    if number in seen:
      raise ValueError(f"target {name}: block {number} is named twice")
    seen.add(number)


def _check_noop(cfg: ModelConfig, targets: Targets) -> None:
  value = targets["noop"]
  mixers = [i for i, block in enumerate(cfg.blocks) if isinstance(block, Mamba)]
  if whole(value):
    if not 0 <= value <= len(mixers):
      raise ValueError(f"target noop={value}: {cfg.pattern!r} has {len(mixers)} Mamba blocks")
    named = targets.get("N")
    sizes = named.values() if isinstance(named, Mapping) else [named]
    if value and any(whole(size) and size == 0 for size in sizes):
      raise ValueError(f"targets noop={value} and N=0 both given: name the blocks, or count them")
    return
  listed = list(value) if isinstance(value, (list, tuple)) else [None]
  for index in listed:
    if not whole(index) or index not in mixers:
      raise ValueError(f"target noop={value!r}: {index!r} is no Mamba block of {cfg.pattern!r}")
    if isinstance(targets.get("N"), Mapping) and at(targets["N"], index, 0):
      raise ValueError(f"target noop: block {index} keeps N={at(targets['N'], index)} too")
  if len(set(listed)) != len(listed):
    raise ValueError(f"target noop={value!r}: a block is named twice")


def _check_floors(cfg: ModelConfig, floors: Any) -> None:
  if not isinstance(floors, Mapping):
    raise ValueError(f"target floors={floors!r}: not a table from block kind to a number of blocks")
  for symbol, floor in floors.items():
    if symbol not in SYMBOLS:
      raise ValueError(f"target floors: {symbol!r} is not one of {' '.join(SYMBOLS)}")
    have = cfg.pattern.count(symbol)
    if not whole(floor) or not 0 <= floor <= have:
      raise ValueError(f"target floors: {symbol}={floor!r}, the parent has {have} such blocks")


def inside(cfg: ModelConfig, targets: Targets, index: int, noop: bool = False) -> dict[str, int]:
  """Returns the size of every prunable axis of a block; N = 0 where its SSM becomes a no-op.

  Raises:
    ValueError: names target, value, block and rule.
  """
  block = cfg.blocks[index]
  if isinstance(block, Mlp):
    return {"F": wanted(targets, "F", index, block.F)}
  if isinstance(block, Attention):
    found = {letter: wanted(targets, letter, index, getattr(block, letter)) for letter in "KJ"}
    turned = {"per": 2, "least": 2, "rule": "2: under rotary positions channels stay in pairs"}
    return found | {"E": wanted(targets, "E", index, block.E, **(turned if block.rope else {}))}
  G = wanted(targets, "G", index, block.G)
  P = wanted(targets, "P", index, block.P)
  H = wanted(targets, "H", index, block.H)
  if "heads" in targets:
    rule = f"its {G} groups; every group keeps as many heads"
    whose = "the parent's" if G == block.G else f"what the parent's {G} groups that stay have:"
    H = wanted(targets, "heads", index, G * block.H, per=G, rule=rule, whose=whose) // G
  found = {"G": G, "H": H, "P": P}
  if isinstance(block, Mamba):
    found["N"] = 0 if noop else wanted(targets, "N", index, block.N, least=0)
  return found


def rotary(block: Attention, width: int) -> int:
  """Returns how many rotary pairs a head of `width` channels keeps: the parent's share, 1 at least.

  Rounded to the nearest; so there are always channels enough without rotation for the rest.
  """
  return max(1, (2 * pairs(block) * width + block.E) // (2 * block.E))


def width(cfg: ModelConfig, targets: Targets) -> int:
  """Returns the residual width that targets ask for.

  Raises:
    ValueError: not a whole number of at least 1, or larger than the parent's.
  """
  return wanted({"D": targets.get("D", cfg.D)}, "D", 0, cfg.D)


def keep_width(block: Attention, width: int, order: Any) -> list[int]:
  """Returns the channels of a head that stay, ascending; under rotary positions in pairs.

  Args:
    block: the attention block.
    width: how many stay.
    order: all its channels, best first; of a pair the first channel's place counts.
  """
  order = [int(channel) for channel in order]
  if block.rope is None:
    return sorted(order[:width])
  half, count = pairs(block), rotary(block, width)
  turned = [channel for channel in order if channel < half][:count]
  plain = [channel for channel in order if channel >= 2 * half][: width - 2 * count]
  return sorted([*turned, *(channel + half for channel in turned), *plain])
