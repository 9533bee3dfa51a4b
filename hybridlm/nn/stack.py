"""Repeated units of blocks: found in the block list, stacked into one tree, run by one scan.

The canonical tree has a folder a block. The running tree has a folder for each block of a
*program*, named after the first block it stands for; where that is several, its leaves have X on
the left, blocks in order: of `M-M-M-*`, `00` holds the three Mamba blocks. Loops lie inside loops,
and X runs over all turns of all of them.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Union

import jax
import jax.numpy as jnp

from hybridlm import axes
from hybridlm.config import ModelConfig, block_name

DEPTH = 2  # loops inside loops
# A loop must save more blocks than this to be worth it: it is a program of its own to compile.
LOOP = 1


class Loop(NamedTuple):
  """Blocks that repeat: `body` has the indices of the first turn, and further loops."""

  count: int
  body: tuple[Union[int, "Loop"], ...]


Program = tuple[int | Loop, ...]
Step = Callable[[int, Any, Any], tuple[Any, Any]]


def program(cfg: ModelConfig) -> Program:
  """Returns the blocks of a model with repeated units as loops, few blocks in all to compile."""
  return _program(alike(cfg), crossed(cfg))


def crossed(cfg: ModelConfig) -> frozenset[int]:
  """Returns the blocks that keys of one before go into, or pass on their way to one behind.

  No loop begins with one, nor ends before one: keys do not go from turn to turn.
  """
  return frozenset(index for group in cfg.kv_groups for index in range(group[0] + 1, group[-1] + 1))


def alike(cfg: ModelConfig) -> tuple[Hashable, ...]:
  """Returns what must be equal of two blocks for one program to run both, for each block."""
  return tuple((block, cfg.at(index).quantize) for index, block in enumerate(cfg.blocks))


@functools.lru_cache(maxsize=256)
def _program(keys: tuple[Hashable, ...], crossed: frozenset[int]) -> Program:
  numbers: dict[Hashable, int] = {}
  word = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
  word = tuple(~each if index in crossed else each for index, each in enumerate(word))
  return _shifted(_shortest(word, DEPTH)[1], 0)


@functools.lru_cache(maxsize=1 << 12)
def _shortest(word: tuple[int, ...], depth: int) -> tuple[int, Program]:
  """Returns the least that blocks of these kinds cost to compile, and how they are written then.

  Kinds below 0 are of blocks that no loop may begin with or end before.
  """
  best: list[tuple[int, Program]] = [(0, ())]
  for end in range(1, len(word) + 1):
    cost, items = best[end - 1]
    found = (cost + 1, (*items, end - 1))
    apart = end == len(word) or word[end] >= 0
    for width in range(1, end // 2 + 1 if depth and apart else 1):
      if word[end - width] < 0:
        continue
      turns = 1
      while word[end - (turns + 1) * width : end - turns * width] == word[end - width : end]:
        turns += 1
        start = end - turns * width
        inner, body = _shortest(word[start : start + width], depth - 1)
        whole = best[start][0] + inner + LOOP
        if whole < found[0]:
          found = (whole, (*best[start][1], Loop(turns, _shifted(body, start))))
    best.append(found)
  return best[-1]


def _shifted(items: Program, by: int) -> Program:
  """Returns the same blocks `by` places further on."""
  return tuple(
    Loop(item.count, _shifted(item.body, by)) if isinstance(item, Loop) else item + by
    for item in items
  )


def _width(items: Program) -> int:
  """Returns how many blocks a program stands for."""
  return sum(i.count * _width(i.body) if isinstance(i, Loop) else 1 for i in items)


def members(items: Program) -> dict[int, tuple[int, ...]]:
  """Returns each block of a program with all those it stands for, in order."""
  found: dict[int, tuple[int, ...]] = {}
  for item in items:
    if isinstance(item, Loop):
      width = _width(item.body)
      for first, own in members(item.body).items():
        found[first] = tuple(i + turn * width for turn in range(item.count) for i in own)
    else:
      found[item] = (item,)
  return found


def is_stacked(cfg: ModelConfig, params: Mapping[str, Any]) -> bool:
  """Returns whether a tree of this model is the running one, with fewer folders than blocks."""
  return len(params["blocks"]) < len(cfg.blocks)


def stacked(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the running tree of a canonical one: stacks where `cfg.stack` asks for them.

  A tree that runs already comes back as it is. Leaves may be arrays, or tracers under `jax.jit`.
  """
  if cfg.stack == "none" or is_stacked(cfg, params):
    return dict(params)
  return {**params, "blocks": stacked_blocks(cfg, params["blocks"])}


def stacked_blocks(cfg: ModelConfig, blocks: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the folders of the running tree from those of the canonical one.

  Raises:
    ValueError: blocks that one program runs have not the same leaves.
  """
  made = {}
  for first, own in members(program(cfg)).items():
    folders = [blocks[block_name(index)] for index in own]
    made[block_name(first)] = axes.stack(folders) if len(own) > 1 else folders[0]
  return made


def unstacked(cfg: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the canonical tree of a running one: the inverse of `stacked`, exactly.

  The tree may be that of the same model in FP8 with wide ends, which repeats other units.

  Raises:
    ValueError: a tree of no such model.
  """
  if not is_stacked(cfg, tree):
    return dict(tree)
  made = {}
  for first, own in members(_ran(cfg, tree["blocks"])).items():
    folder = tree["blocks"][block_name(first)]
    folders = axes.unstack(folder) if len(own) > 1 else [folder]
    made |= {block_name(index): each for index, each in zip(own, folders, strict=True)}
  return {**tree, "blocks": dict(sorted(made.items()))}


def _ran(cfg: ModelConfig, blocks: Mapping[str, Any]) -> Program:
  """Returns the program whose blocks and numbers of turns are those of a running tree."""
  def height(folder):
    return max(
      leaf.shape[0] if axes.of(path).startswith("X") else 1 for path, leaf in axes.leaves(folder))

  found = {name: height(folder) for name, folder in blocks.items()}
  wide = (
    cfg.replace(quantize="fp8", wide_ends=ends) for ends in range((len(cfg.blocks) + 1) // 2))
  for each in (cfg, *wide):
    items = program(each)
    if {block_name(first): len(own) for first, own in members(items).items()} == found:
      return items
  raise ValueError(f"stacks of {sorted(found)} are not those of {cfg.pattern!r}")


def bare(folder: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a folder of the running tree under the names that its leaves have in one block."""
  return axes.rename(
    folder, lambda name: f"{axes.stem(name)}_{axes.of(name).removeprefix('X')}")


def counted(
  cfg: ModelConfig, blocks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any] | None]:
  """Returns the counts of `kept["blocks"]` as the running tree has its folders.

  Raises:
    ValueError: some of the blocks that one program runs have counts, others not.
  """
  made: dict[str, Mapping[str, Any] | None] = {}
  for first, own in members(program(cfg)).items():
    given = [blocks.get(block_name(index)) for index in own]
    bare = [index for index, each in zip(own, given, strict=True) if each is None]
    if bare and len(bare) < len(own):
      raise ValueError(f"kept: block {block_name(bare[0])} has no counts, others like it have")
    # These names keep their letters: nothing outside a step of the scan reads them.
    made[block_name(first)] = None if bare else (
      given[0] if len(own) == 1 else jax.tree.map(lambda *each: jnp.stack(each), *given))
  return made


def run(
  cfg: ModelConfig, x: Any, trees: Mapping[int, Any], step: Step,
  around: Callable[[Callable], Callable],
) -> tuple[Any, dict[int, Any]]:
  """Returns the last x and, for every block of the model, what its step returned beside x.

  Args:
    cfg: the model.
    x: what the first block takes.
    trees: what each block takes beside x, of every block or, to be scanned over, of those of the
      program with the blocks they stand for on the left.
    step: `(index, x, tree) -> (x, seen)` of one block.
    around: applied to `(x, trees) -> (x, seen)` of a turn of the outermost loops.
  """
  items = program(cfg)
  if len(trees) == len(cfg.blocks):
    return _one_by_one(items, x, trees, step, around)
  own = members(items)
  x, found = _scanned(items, x, _folded(items, trees), step, around)
  seen: dict[int, Any] = {}
  for first, each in found.items():
    if len(own[first]) == 1:
      seen[first] = each
      continue
    depth = _depth(items, first)
    flat = jax.tree.map(lambda leaf, depth=depth: leaf.reshape(-1, *leaf.shape[depth:]), each)
    for at, index in enumerate(own[first]):
      seen[index] = jax.tree.map(lambda leaf, at=at: leaf[at], flat)
  return x, seen


def _one_by_one(items, x, trees, step, around):
  """Runs every block of a program by itself; `around` has the turns that it has in a scan."""

  def turn(x, part):
    seen = {}
    for index in sorted(part):
      x, seen[index] = step(index, x, part[index])
    return x, seen

  seen: dict[int, Any] = {}
  for item in items:
    inner = item.body if isinstance(item, Loop) else (item,)
    wrapped = around(turn) if isinstance(item, Loop) else turn
    for number in range(item.count if isinstance(item, Loop) else 1):
      own = members(_shifted(inner, number * _width(inner))).values()
      x, found = wrapped(x, {index: trees[index] for index in sum(own, ())})
      seen |= found
  return x, seen


def _scanned(items, x, trees, step, around):
  """Runs a program whose trees have one axis on the left for each loop around their block."""
  seen: dict[int, Any] = {}
  for item in items:
    if not isinstance(item, Loop):
      x, seen[item] = step(item, x, trees[item])
      continue

    def turn(x, part, body=item.body):
      return _scanned(body, x, part, step, lambda inner: inner)

    x, found = jax.lax.scan(around(turn), x, {first: trees[first] for first in members(item.body)})
    seen |= found
  return x, seen


def _folded(items: Program, trees: Mapping[int, Any], turns: tuple[int, ...] = ()):
  """Returns trees whose axis X is split into one axis for each loop around their block."""
  made: dict[int, Any] = {}
  for item in items:
    if isinstance(item, Loop):
      made |= _folded(item.body, trees, (*turns, item.count))
    else:
      made[item] = trees[item] if len(turns) < 2 else jax.tree.map(
        lambda leaf: leaf.reshape(*turns, *leaf.shape[1:]), trees[item])
  return made


def _depth(items: Program, first: int) -> int:
  """Returns how many loops lie around a block."""
  inside = [i for i in items if isinstance(i, Loop) and first in members(i.body)]
  return 1 + _depth(inside[0].body, first) if inside else 0
