"""Which blocks and branches stay, given what ranks them: listed or counted, with floors by kind."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hybridlm.config import Mamba, ModelConfig, ssm_of
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


def readers(cfg: ModelConfig) -> dict[int, int]:
  """Returns, for each block that reads keys and values of another, that other block."""
  return {index: owner for owner, *others in cfg.kv_groups for index in others}


def torn(cfg: ModelConfig, stay: Iterable[int]) -> tuple[int, int] | None:
  """Returns a block that stays while the one whose keys and values it reads goes, and that one."""
  left, owners = set(stay), readers(cfg)
  return next(((i, owners[i]) for i in sorted(left) if owners.get(i, i) not in left), None)


def led(order: Iterable[int], owners: Mapping[int, int]) -> list[int]:
  """Returns an order, best first, in which no item stands before the one that it depends on.

  `owners` says which that is; it moves up as far as the best that needs it.
  """
  order = list(order)
  every, done = set(order), {}
  for item in order:
    if owners.get(item, item) in every:
      done.setdefault(owners.get(item, item))
    done.setdefault(item)
  return list(done)


def best(
  order: Any, kinds: str, count: int, floors: Mapping[str, int],
  owners: Mapping[int, int] | None = None,
) -> list[int]:
  """Returns the `count` best items of which at least `floors` of each kind stay, ascending.

  The best choice by the sum of any score that `order` sorts: floors are filled first, with the
  best of their kind, and the rest is whatever is best.

  Args:
    order: all items, best first.
    kinds: the kind of each item.
    count: how many stay.
    floors: kind -> the least that stay.
    owners: item -> the item without which it cannot stay.

  Raises:
    ValueError: floors that need more than `count`.
  """
  order = [int(item) for item in order]
  if sorted(order) != list(range(len(kinds))):
    raise ValueError(f"order of {len(kinds)} blocks: not each of them once: {order}")
  order, owners = led(order, owners or {}), owners or {}
  chosen: dict[int, None] = {}
  for kind, floor in floors.items():
    for item in (item for item in order if kinds[item] == kind):
      if sum(kinds[other] == kind for other in chosen) < floor:
        chosen |= dict.fromkeys((owners.get(item, item), item))
  if len(chosen) > count or sum(floors.values()) > count:
    need = " + ".join(f"{floor} of kind {kind}" for kind, floor in sorted(floors.items()))
    need += ", with blocks whose keys they read," if sum(floors.values()) <= count else ""
    raise ValueError(f"target floors: {need} are more than the {count} that stay")
  rest = [item for item in order if item not in chosen]
  return sorted([*chosen, *rest[: count - len(chosen)]])


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
  """Raises unless blocks that are named, not counted, respect the floors and shared keys.

  Raises:
    ValueError: names the kind, how many stay and the floor; or a block whose keys would go.
  """
  stay = list(stay)
  found = torn(cfg, stay)
  if found:
    raise ValueError(f"target blocks={targets['blocks']!r}: block {found[0]} reads the keys and "
                     f"values of block {found[1]}, which goes")
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
    first = best(order, kinds, count, depth_floors(targets, count, paired=True), by_layer(cfg))
    return [block for pair in first for block in (2 * pair, 2 * pair + 1)]
  target = targets.get("blocks", list(range(len(cfg.blocks))))
  if isinstance(target, (list, tuple)):
    stay = listed(cfg, target)
    check_listed(cfg, targets, stay)
    return stay
  count = counted(target, "blocks", len(cfg.blocks))
  order = from_middle(cfg.pattern) if order is None else order
  return best(order, cfg.pattern, count, depth_floors(targets, count), readers(cfg))


def by_layer(cfg: ModelConfig) -> dict[int, int]:
  """Returns `readers` counted in layers, pairs of a mixer and an MLP."""
  return {index // 2: owner // 2 for index, owner in readers(cfg).items()}


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
  mixers = [index for index in stay if isinstance(ssm_of(cfg.blocks[index]), Mamba)]
  if value > len(mixers):
    raise ValueError(f"target noop={value}: only {len(mixers)} Mamba blocks stay")
  if order is None:
    order = [mixers[item] for item in from_middle("M" * len(mixers))]
  ranked = [int(index) for index in order if index in set(mixers)]
  return frozenset(ranked[len(ranked) - value :])


def _without(
  cfg: ModelConfig, targets: sizes.Targets, name: str, stay: list[int], order: Any,
  taken: Collection[int],
) -> frozenset[int]:
  """Returns the blocks that lose a branch by a target; where it is a count, none of `taken`.

  Attention whose keys other blocks read goes with all of theirs, or not at all.
  """
  value, owners = targets.get(name, 0), readers(cfg) if name == "attention_off" else {}
  if not sizes.whole(value):
    found = frozenset(int(index) for index in value)
    for index, owner in owners.items():
      if owner in found and index in stay and index not in found:
        raise ValueError(f"target {name}={value!r}: block {index} reads the keys and values of "
                         f"block {owner}; its attention goes too, or neither")
    return found
  able = [i for i in stay if sizes.forked(cfg.blocks[i]) and i not in taken]
  bound = {owners[i] for i in stay if i in owners and i not in able}
  able = [i for i in able if i not in bound]
  if value > len(able):
    raise ValueError(f"target {name}={value}: only {len(able)} blocks that stay can lose that "
                     "branch")
  if order is None:
    order = [able[item] for item in from_middle("=" * len(able))]
  ranked = led((int(index) for index in order if index in set(able)), owners)
  return frozenset(ranked[len(ranked) - value :])


def fates(
  cfg: ModelConfig, targets: sizes.Targets, stay: Iterable[int], *, order_ssm_X: Any = None,
  order_attention_X: Any = None, order_ssm_branch_X: Any = None,
) -> dict[int, frozenset[str]]:
  """Returns what goes whole of each block that loses a branch or its state, for `sizes.inside`.

  Args:
    cfg: the parent.
    targets: sizes; counts are of the blocks that stay.
    stay: those blocks.
    order_ssm_X: blocks, those that need the state of their SSM most first; None: the ends do.
    order_attention_X: the same of a parallel block's attention.
    order_ssm_branch_X: the same of its SSM branch.

  Raises:
    ValueError: more than there are, or attention whose keys a block still reads.
  """
  stay = list(stay)
  named = targets.get("ssm_off", 0)
  taken = frozenset() if sizes.whole(named) else frozenset(named)
  gone = {"attention": _without(cfg, targets, "attention_off", stay, order_attention_X, taken)}
  noop = targets.get("noop", 0)
  rest = gone["attention"] | frozenset(() if sizes.whole(noop) else noop)
  gone["ssm"] = _without(cfg, targets, "ssm_off", stay, order_ssm_branch_X, rest)
  gone["state"] = silent(cfg, targets, [i for i in stay if i not in gone["ssm"]], order_ssm_X)
  found: dict[int, frozenset[str]] = {}
  for name, blocks in gone.items():
    for index in blocks:
      found[index] = found.get(index, frozenset()) | {name}
  return found
