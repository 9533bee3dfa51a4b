"""The config that targets leave, from sizes alone: thousands of candidates in seconds."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from hybridlm.config import Block, Fusion, ModelConfig, Parallel, attention_of
from hybridlm.prune import sizes, stay
from hybridlm.prune.plan import left


@functools.lru_cache(maxsize=1 << 16)
def _left(block: Block, own: tuple[tuple[str, int], ...]) -> Block:
  """Returns what is left of a block, by a plan of the first entries of each axis."""
  size = dict(own)
  keep: dict[str, Any] = {}
  for letter, rows in (("G", None), ("H", "G"), ("P", None), ("N", "G"), ("R", None), ("F", None),
                       ("K", None), ("J", "K"), ("U", None)):
    if letter in size and size[letter] < getattr(block, letter):
      row = tuple(range(size[letter]))
      keep[f"keep_{rows or ''}{letter}"] = (row,) * getattr(block, rows) if rows else row
  if "E" in size and size["E"] < block.E:
    keep["keep_E"] = tuple(sizes.keep_width(attention_of(block), size["E"], range(block.E)))
  small = left(block, keep)
  if isinstance(small, Parallel) and small.fusion != block.fusion:
    return dataclasses.replace(small, fusion=_apart(block.fusion.Y, small.width, small.inner))
  return small


def _apart(Y: int, width: int, inner: int) -> Fusion:
  """Returns a mean of branches with so many channels of Y, as few of them in common as can be."""
  left = min(Y, width + inner)
  first, last = ((0, width),), ((left - inner, left),)
  return Fusion("mean", left, first if 0 < width < left else None,
                last if 0 < inner < left else None)


def sized(
  cfg: ModelConfig,
  targets: sizes.Targets,
  *,
  order_X: Any = None,
  order_ssm_X: Any = None,
  order_attention_X: Any = None,
  order_ssm_branch_X: Any = None,
) -> ModelConfig:
  """Returns the config that a plan of these targets leaves, from sizes alone.

  Of an attention head that loses rotary pairs it cannot say which frequencies stay, only how many:
  it has those of the first pairs. Nor which channels branches of a parallel block keep: where they
  meet in a mean, it counts the most (Y) that there can be.

  Args:
    cfg: the parent.
    targets: as `select.plan` takes them.
    order_X: all blocks, best first, for a count of `blocks`; all layers for a count of `layers`.
      None: blocks go from the middle, an equal share of every kind.
    order_ssm_X: blocks, those that need their SSM most first, for a count of `noop`. None: those
      in the middle lose it.
    order_attention_X: the same for a count of `attention_off`.
    order_ssm_branch_X: the same for a count of `ssm_off`.

  Raises:
    ValueError: what `select.plan` would refuse.

  >>> hybridlm.prune.select.sized(cfg, {"D": 8, "blocks": 3}).pattern
  'M-*'
  """
  sizes.check(cfg, targets)
  targets = sizes.shared(cfg, targets)
  small = {"D": sizes.width(cfg, targets)}
  small |= {"meta": sizes.width(cfg, targets, "M")} if cfg.meta else {}
  blocks = stay.staying(cfg, targets, order_X)
  gone = stay.fates(
    cfg, targets, blocks, order_ssm_X=order_ssm_X, order_attention_X=order_attention_X,
    order_ssm_branch_X=order_ssm_branch_X)
  by_block = [v for name, v in targets.items() if isinstance(v, Mapping) and name != "floors"]
  made: dict[Any, Block] = {}
  keys: list[Any] = []
  for index, block in enumerate(cfg.blocks):
    off = gone.get(index, frozenset())
    key = (id(block), off, *(repr(sizes.at(value, index)) for value in by_block))
    keys.append(key)
    if key not in made:
      made[key] = _left(block, tuple(sizes.inside(cfg, targets, index, off).items()))
  return cfg.replace(blocks=tuple(made[keys[index]] for index in blocks), **small)
