"""Target sizes: which there are, and what they ask of every block. Nothing here reads a score."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hybridlm.config import KINDS as SYMBOLS
from hybridlm.config import (
  Attention,
  Block,
  GatedConv,
  Mamba,
  Mamba1,
  Mlp,
  ModelConfig,
  Parallel,
  attention_of,
  ssm_of,
)
from hybridlm.prune.plan import ALIKE, pairs

MIXERS = (Mamba, GatedConv)
# Target -> the kinds of blocks, or of branches, whose size it is. "heads" counts all heads of a
# block, in all groups.
KINDS: Mapping[str, tuple[type, ...]] = {
  "H": (*MIXERS, Mamba1), "heads": (*MIXERS, Mamba1), "P": MIXERS, "G": MIXERS,
  "N": (Mamba, Mamba1), "R": (Mamba1,), "F": (Mlp,),
  "J": (Attention,), "K": (Attention,), "E": (Attention,), "U": (Attention,),
}
# Targets of whole branches: which blocks lose one, or how many.
OFF = ("attention_off", "ssm_off")
KNOWN = ("D", "M", *KINDS, "noop", *OFF, "blocks", "layers", "floors")
Targets = Mapping[str, Any]


def part(block: Block, name: str) -> Any:
  """Returns what a target is a size of: a block or its branch; None where the block has none."""
  for piece in (attention_of(block), ssm_of(block), block):
    if isinstance(piece, KINDS[name]) and (name != "U" or piece.U is not None):
      return piece
  return None


def whole(value: Any) -> bool:
  """Whether a value is a whole number, which True is not."""
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def at(value: Any, index: int | None, absent: Any = None) -> Any:
  """Returns what a target says of one block: a mapping's entry (keys may be strings), or itself."""
  if isinstance(value, Mapping):
    return value.get(index, value.get(str(index), absent))
  return value


def wanted(
  targets: Targets, name: str, index: int | None, parent: int, *, least: int = 1, per: int = 1,
  rule: str = "", whose: str = "the parent's",
) -> int:
  """Returns the size a block shall have: its own where targets differ by block.

  Args:
    targets: sizes by letter; a mapping from block index to size where they differ.
    name: a key of `targets`; where it is absent the parent's size stays.
    index: the block; None: it is a size of the whole model.
    parent: the size the parent has, in the unit of `name`.
    least: the smallest size there is.
    per: a size other than the parent's must be a multiple of this.
    rule: why, for the message.
    whose: the parent's size is, for the message.

  Raises:
    ValueError: not a whole number, too small, larger than the parent, or not a multiple of `per`.
  """
  value = at(targets.get(name, parent), index, parent)
  place = f"target {name}={value!r} of {'the model' if index is None else f'block {index}'}"
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
  for name, value in targets.items():
    if name not in KNOWN:
      raise ValueError(f"target {name!r} is not one of {', '.join(KNOWN)}")
    if name in KINDS and not any(part(block, name) for block in cfg.blocks):
      raise ValueError(f"target {name}={value}: no block of {cfg.pattern!r} has this axis")
    if isinstance(value, Mapping) and name != "floors":
      _check_mapping(cfg, name, value)
  for pair in (("H", "heads"), ("blocks", "layers")):
    if set(pair) <= set(targets):
      raise ValueError(f"targets {' and '.join(pair)} both given: they are one size in two units")
  if "M" in targets and not cfg.meta:
    raise ValueError(f"target M={targets['M']!r}: the parent has no meta tokens")
  if "noop" in targets:
    _check_noop(cfg, targets)
  _check_off(cfg, targets)
  if "floors" in targets:
    _check_floors(cfg, targets["floors"])


def _check_mapping(cfg, name, value) -> None:
  if name not in KINDS:
    raise ValueError(f"target {name}={value!r}: one size for the whole model, not one a block")
  seen = set()
  for index in value:
    number = int(index) if str(index).isdigit() else -1
    if not 0 <= number < len(cfg.blocks) or part(cfg.blocks[number], name) is None:
      raise ValueError(f"target {name}: block {index} of {cfg.pattern!r} has no such axis")
    if number in seen:
      raise ValueError(f"target {name}: block {number} is named twice")
    seen.add(number)


def _check_noop(cfg: ModelConfig, targets: Targets) -> None:
  value = targets["noop"]
  mixers = [i for i, block in enumerate(cfg.blocks) if isinstance(ssm_of(block), Mamba)]
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


def forked(block: Block) -> bool:
  """Whether a block has two branches, so that one may go."""
  return isinstance(block, Parallel) and None not in (block.attention, block.ssm)


def _check_off(cfg: ModelConfig, targets: Targets) -> None:
  """Raises unless whole branches that go are counted or named, and no block loses both."""
  able = [index for index, block in enumerate(cfg.blocks) if forked(block)]
  named: dict[int, str] = {}
  for name in OFF:
    value = targets.get(name, 0)
    if whole(value):
      if not 0 <= value <= len(able):
        raise ValueError(f"target {name}={value}: {cfg.pattern!r} has {len(able)} blocks with two "
                         "branches")
      continue
    for index in value if isinstance(value, (list, tuple)) else [None]:
      if not whole(index) or index not in able:
        raise ValueError(f"target {name}={value!r}: {index!r} is no block of {cfg.pattern!r} with "
                         "two branches")
      if index in named:
        other = named[index]
        raise ValueError(f"target {name}={value!r}: block {index} is named twice" if other == name
                         else f"targets {other} and {name}: block {index} would lose both branches")
      named[index] = name
  noop = targets.get("noop", 0)
  for index in () if whole(noop) else noop:
    if named.get(index) == "ssm_off":
      raise ValueError(f"targets noop and ssm_off: block {index} has no SSM left to be a no-op")
  _check_sizes_of(cfg, targets, named)


def _check_sizes_of(cfg: ModelConfig, targets: Targets, gone: Mapping[int, str]) -> None:
  """Raises where a target gives one block a size of a branch that another target turns off."""
  for name in KINDS:
    own = targets.get(name)
    for index, off in gone.items() if isinstance(own, Mapping) else ():
      branch = {"attention_off": attention_of, "ssm_off": ssm_of}[off](cfg.blocks[index])
      if at(own, index) is not None and part(cfg.blocks[index], name) is branch:
        raise ValueError(f"targets {name} and {off}: block {index} has no branch left that could "
                         f"keep {name}={at(own, index)!r}")


def shared(cfg: ModelConfig, targets: Targets) -> Targets:
  """Returns targets by block in which blocks that share keys ask for the same K, E and U.

  What is said of the block that has the keys holds for those that read them.

  Raises:
    ValueError: a block that reads them is to have another size.
  """
  found = dict(targets)
  for name in (letters.removeprefix("keep_") for letters in ALIKE):
    if not isinstance(targets.get(name), Mapping) or not cfg.kv_groups:
      continue
    sizes = {int(index): size for index, size in targets[name].items()}
    for owner, *readers in cfg.kv_groups:
      theirs = sizes.get(owner, getattr(cfg.blocks[owner], name, None))
      for index in readers:
        if sizes.get(index, theirs) != theirs:
          raise ValueError(f"target {name}={sizes[index]!r} of block {index}: it reads the keys "
                           f"and values of block {owner}, which keeps {name}={theirs!r}")
      sizes |= dict.fromkeys((index for index in readers if owner in sizes), theirs)
    found[name] = sizes
  return found


def _check_floors(cfg: ModelConfig, floors: Any) -> None:
  if not isinstance(floors, Mapping):
    raise ValueError(f"target floors={floors!r}: not a table from block kind to a number of blocks")
  for symbol, floor in floors.items():
    if symbol not in SYMBOLS:
      raise ValueError(f"target floors: {symbol!r} is not one of {' '.join(SYMBOLS)}")
    have = cfg.pattern.count(symbol)
    if not whole(floor) or not 0 <= floor <= have:
      raise ValueError(f"target floors: {symbol}={floor!r}, the parent has {have} such blocks")


def inside(
  cfg: ModelConfig, targets: Targets, index: int, off: Collection[str] = ()
) -> dict[str, int]:
  """Returns the size of every prunable axis of a block.

  `off` names what of it goes whole: "state" (the SSM becomes a no-op, N = 0), "attention" (K = 0
  and no other size of it) or "ssm" (G = 0, the same) of a parallel block.

  Raises:
    ValueError: names target, value, block and rule.
  """
  block, found = cfg.blocks[index], {}
  if isinstance(block, Mlp):
    return {"F": wanted(targets, "F", index, block.F)}
  attention, mixer = attention_of(block), ssm_of(block)
  if attention is not None:
    found |= {"K": 0} if "attention" in off else _heads(targets, index, attention)
  if mixer is not None:
    found |= {"G": 0} if "ssm" in off else _mixer(targets, index, mixer, "state" in off)
  return found


def _heads(targets: Targets, index: int, part: Attention) -> dict[str, int]:
  letters = "KJ" if part.U is None else "KJU"
  turned = {"per": 2, "least": 2, "rule": "2: under rotary positions channels stay in pairs"}
  found = {letter: wanted(targets, letter, index, getattr(part, letter)) for letter in letters}
  return found | {"E": wanted(targets, "E", index, part.E, **(turned if part.rope else {}))}


def _mixer(targets: Targets, index: int, part: Any, noop: bool) -> dict[str, int]:
  fixed = isinstance(part, Mamba1)
  G, P = (getattr(part, x) if fixed else wanted(targets, x, index, getattr(part, x)) for x in "GP")
  H = wanted(targets, "H", index, part.H)
  if "heads" in targets:
    rule = f"its {G} groups; every group keeps as many heads"
    whose = "the parent's" if G == part.G else f"what the parent's {G} groups that stay have:"
    H = wanted(targets, "heads", index, G * part.H, per=G, rule=rule, whose=whose) // G
  found = {"G": G, "H": H, "P": P}
  if isinstance(part, Mamba):
    found["N"] = 0 if noop else wanted(targets, "N", index, part.N, least=0)
  if fixed:
    found |= {letter: wanted(targets, letter, index, getattr(part, letter)) for letter in "NR"}
  return found


def rotary(block: Attention, width: int) -> int:
  """Returns how many rotary pairs a head of `width` channels keeps: the parent's share, 1 at least.

  Rounded to the nearest; so there are always channels enough without rotation for the rest.
  """
  return max(1, (2 * pairs(block) * width + block.E) // (2 * block.E))


def width(cfg: ModelConfig, targets: Targets, letter: str = "D") -> int:
  """Returns a size of the whole model that targets ask for: D, or M meta tokens.

  Raises:
    ValueError: not a whole number, none of D, or larger than the parent's.
  """
  parent, least = {"D": (cfg.D, 1), "M": (cfg.meta, 0)}[letter]
  return wanted({letter: targets.get(letter, parent)}, letter, None, parent, least=least)


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
