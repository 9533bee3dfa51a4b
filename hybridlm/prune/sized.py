"""The config that targets leave, from sizes alone: thousands of candidates in seconds."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridlm.config import Block, ModelConfig, block_name
from hybridlm.prune import sizes, stay
from hybridlm.prune.plan import Plan


@functools.lru_cache(maxsize=1 << 16)
def _left(block: Block, own: tuple[tuple[str, int], ...]) -> Block:
  """Returns what is left of a block, by a plan of the first entries of each axis."""
  size = dict(own)
  keep = {}
  for letter, rows in (("G", None), ("H", "G"), ("P", None), ("N", "G"), ("F", None), ("K", None),
                       ("J", "K")):
    if letter in size and size[letter] < getattr(block, letter):
      row = range(size[letter])
      keep[f"keep_{rows or ''}{letter}"] = [row] * getattr(block, rows) if rows else row
  if size.get("E", 0) < getattr(block, "E", 0):
    keep["keep_E"] = sizes.keep_width(block, size["E"], range(block.E))
  keep = {name: np.asarray(rows, np.int32) for name, rows in keep.items()}
  alone = ModelConfig(V=1, D=1, blocks=(block,))
  return Plan(alone, "sizes alone", {block_name(0): keep}).small_config().blocks[0]


def sized(
  cfg: ModelConfig,
  targets: sizes.Targets,
  *,
  order_X: Any = None,
  order_ssm_X: Any = None,
) -> ModelConfig:
  """Returns the config that a plan of these targets leaves, from sizes alone.

  Of an attention head that loses rotary pairs it cannot say which frequencies stay, only how many:
  it has those of the first pairs.

  Args:
    cfg: the parent.
    targets: as `select.plan` takes them.
    order_X: all blocks, best first, for a count of `blocks`; all layers for a count of `layers`.
      None: blocks go from the middle, an equal share of every kind.
    order_ssm_X: blocks, those that need their SSM most first, for a count of `noop`. None: those
      in the middle lose it.

  Raises:
    ValueError: what `select.plan` would refuse.

  >>> hybridlm.prune.select.sized(cfg, {"D": 8, "blocks": 3}).pattern
  'M-*'
  """
  sizes.check(cfg, targets)
  small = sizes.width(cfg, targets)
  left = stay.staying(cfg, targets, order_X)
  noop = stay.silent(cfg, targets, left, order_ssm_X)
  by_block = [v for name, v in targets.items() if isinstance(v, Mapping) and name != "floors"]
  made: dict[Any, Block] = {}
  keys: list[Any] = []
  for index, block in enumerate(cfg.blocks):
    key = (id(block), index in noop, *(repr(sizes.at(value, index)) for value in by_block))
    keys.append(key)
    if key not in made:
      made[key] = _left(block, tuple(sizes.inside(cfg, targets, index, index in noop).items()))
  return cfg.replace(D=small, blocks=tuple(made[keys[index]] for index in left))
