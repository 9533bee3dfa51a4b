"""Which blocks stay, given what ranks them: listed or counted, with floors by kind."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybridlm.config import Mamba, ModelConfig
from hybridlm.prune import sizes


def listed(cfg: ModelConfig, target: Sequence[Any]) -> list[int]:
  """Returns the blocks that a list names, ascending.

  Raises:
    ValueError: not distinct indices of the parent's blocks, or none.
  """
  count = len(cfg.blocks)
  found = sorted(target) if all(sizes.whole(index) for index in target) else []
  if not found or found[0] < 0 or found[-1] >= count or len(set(found)) != len(found):
    raise ValueError(f"target blocks={target!r}: not distinct indices of the {count} blocks")
  return [int(index) for index in found]


def counted(target: Any, name: str, have: int) -> int:
  """Returns a number of blocks or layers that stay.

  Raises:
    ValueError: not a whole number from 1 to what the parent has.
  """
  if not sizes.whole(target) or not 1 <= target <= have:
    raise ValueError(f"target {name}={target!r}: the parent has {have}, keep 1 to {have}")
  return int(target)


def layers(cfg: ModelConfig, target: Any) -> str:
  """Returns the kinds of the mixers of all layers: pairs of a mixer and the MLP after it.

  Raises:
    ValueError: the model is not made of such pairs.
  """
  count, symbols = len(cfg.blocks), cfg.pattern
  if count % 2 or set(symbols[1::2]) != {"-"} or "-" in symbols[::2]:
    raise ValueError(f"target layers={target!r}: {symbols!r} is not made of layers, a mixer "
                     "and an MLP each; name blocks")
  return symbols[::2]


def best(order: Any, kinds: str, count: int, floors: Mapping[str, int]) -> list[int]:
  """Returns the `count` best items of which at least `floors` of each kind stay, ascending.

  The best choice by the sum of any score that `order` sorts: floors are filled first, with the
  best of their kind, and the rest is whatever is best.

  Args:
    order: all items, best first.
    kinds: the kind of each item.
    count: how many stay.
    floors: kind -> the least that stay.

  Raises:
    ValueError: floors that need more than `count`.
  """
  order = [int(item) for item in order]
  if sorted(order) != list(range(len(kinds))):
    raise ValueError(f"order of {len(kinds)} blocks: not each of them once: {order}")
  if sum(floors.values()) > count:
    need = " + ".join(f"{floor} of kind {kind}" for kind, floor in sorted(floors.items()))
    raise ValueError(f"target floors: {need} are more than the {count} that stay")
  chosen: list[int] = []
  for kind, floor in floors.items():
    chosen += [item for item in order if kinds[item] == kind][:floor]
  rest = [item for item in order if item not in set(chosen)]
  return sorted(chosen + rest[: count - len(chosen)])


def from_middle(kinds: str) -> list[int]:
  """Returns all items, best first, as they are where nothing is known: ends before the middle.

  Any number of the first items holds an equal share of every kind, as nearly as whole ones can.
  """
  ranked = []
  for kind in set(kinds):
    mine = [item for item, each in enumerate(kinds) if each == kind]
    last = len(mine) - 1
    outward = sorted(range(len(mine)), key=lambda rank: (min(rank, last - rank), rank))
    ranked += [((place + 0.5) / len(mine), mine[rank]) for place, rank in enumerate(outward)]
  return [item for _, item in sorted(ranked)]


def depth_floors(targets: sizes.Targets, count: int, *, paired: bool = False) -> dict[str, int]:
  """Returns the floors that a choice of `count` blocks, or of layers, must respect.

  Raises:
    ValueError: more MLPs than layers that stay.
  """
  floors = {kind: int(floor) for kind, floor in targets.get("floors", {}).items() if floor}
  if paired and floors.pop("-", 0) > count:
    raise ValueError(f"target floors: {targets['floors']['-']} MLPs are more than the {count} "
                     "layers that stay")
  return floors


def check_listed(cfg: ModelConfig, targets: sizes.Targets, stay: Iterable[int]) -> None:
  """Raises unless blocks that are named, not counted, respect the floors.

  Raises:
    ValueError: names the kind, how many stay and the floor.
  """
  kinds = "".join(cfg.blocks[index].symbol for index in stay)
  for kind, floor in targets.get("floors", {}).items():
    if kinds.count(kind) < floor:
      raise ValueError(f"target floors: {kinds.count(kind)} blocks of kind {kind} stay, fewer "
                       f"than {floor}")


def staying(cfg: ModelConfig, targets: sizes.Targets, order: Any) -> list[int]:
  """Returns the blocks that stay, ascending; `order` ranks all blocks, or layers, best first.

  Raises:
    ValueError: blocks or layers that the parent has not, or floors that cannot be met.
  """
  if "layers" in targets:
    kinds = layers(cfg, targets["layers"])
    count = counted(targets["layers"], "layers", len(kinds))
    order = from_middle(kinds) if order is None else order
    first = best(order, kinds, count, depth_floors(targets, count, paired=True))
    return [block for pair in first for block in (2 * pair, 2 * pair + 1)]
  target = targets.get("blocks", list(range(len(cfg.blocks))))
  if isinstance(target, (list, tuple)):
    stay = listed(cfg, target)
    check_listed(cfg, targets, stay)
    return stay
  count = counted(target, "blocks", len(cfg.blocks))
  order = from_middle(cfg.pattern) if order is None else order
  return best(order, cfg.pattern, count, depth_floors(targets, count))


def silent(
  cfg: ModelConfig, targets: sizes.Targets, stay: Iterable[int], order: Any
) -> frozenset[int]:
  """Returns the blocks whose SSM becomes a no-op because `noop` names or counts them.

  Args:
    cfg: the parent.
    targets: sizes; a count of `noop` is of the blocks that stay.
    stay: those blocks.
    order: blocks, those that need their SSM most first; None: the ends of the model do.

  Raises:
    ValueError: more no-ops than Mamba blocks that stay.
  """
  value = targets.get("noop", 0)
  if not sizes.whole(value):
    return frozenset(int(index) for index in value)
  mixers = [index for index in stay if isinstance(cfg.blocks[index], Mamba)]
  if value > len(mixers):
    raise ValueError(f"target noop={value}: only {len(mixers)} Mamba blocks stay")
  if order is None:
    order = [mixers[item] for item in from_middle("M" * len(mixers))]
  ranked = [int(index) for index in order if index in set(mixers)]
  return frozenset(ranked[len(ranked) - value :])
