"""Spaces of targets: every combination of sizes a search may choose, as tuples of small numbers.

A candidate is a tuple of genes, one whole number a decision. `Uniform` decides a size once for the
whole model; `Blockwise` decides D once and then, for every block, one of that block's options.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybridlm.config import Mamba, ModelConfig, attention_of, ssm_of
from hybridlm.prune import select, sizes

Genes = tuple[int, ...]
# Decisions about the whole model; the others name a size inside blocks.
WHOLE = ("D", "M", "blocks", "layers", "noop", "attention_off", "ssm_off")
# What may become of a block that stays, other than other sizes: its name, and the target's.
LOSSES = ("noop", "attention_off", "ssm_off")
# Sizes on which blocks that share keys and values must agree.
SHARED = ("K", "E", "U")
# Spaces up to this size are drawn from by permutation, larger ones by throwing out repeats.
PERMUTED = 1 << 20


def check(cfg: ModelConfig, choices: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
  """Returns the choices of the names that have any, each in ascending order.

  Raises:
    ValueError: none has; a repeated choice; a name, an axis or a size that the model has not.
  """
  found = {}
  for name, given in choices.items():
    if len(set(given)) != len(given):
      raise ValueError(f"search space {name}={tuple(given)}: a choice is listed twice")
    for size in given:
      try:
        select.sized(cfg, {name: size})
      except ValueError as error:
        raise ValueError(f"search space {name}={tuple(given)}: {error}") from error
    if given:
      found[name] = tuple(sorted(given))
  if not found:
    raise ValueError("search space: empty, no target has a choice")
  for pair in (("H", "heads"), ("blocks", "layers")):
    if set(pair) <= set(found):
      raise ValueError(f"search space: {' and '.join(pair)} are one size in two units; give one")
  return found


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Sizes of the whole model: the product of the choices, in the order they are given.

  Attributes:
    choices: target name -> its sizes, ascending.
  """

  choices: Mapping[str, tuple[int, ...]]

  @property
  def counts(self) -> Genes:
    """Choices a gene."""
    return tuple(len(sizes) for sizes in self.choices.values())

  @property
  def size(self) -> int:
    """Candidates, counted without listing them."""
    return math.prod(self.counts)

  def targets(self, genes: Genes) -> dict[str, Any]:
    """Returns the targets of a candidate."""
    pairs = zip(self.choices.items(), genes, strict=True)
    return {name: sizes[gene] for (name, sizes), gene in pairs}

  def genes(self, targets: Mapping[str, int]) -> Genes | None:
    """Returns the candidate of these targets; None where it is not in the space."""
    if set(targets) != set(self.choices):
      return None
    if any(targets[name] not in sizes for name, sizes in self.choices.items()):
      return None
    return tuple(sizes.index(targets[name]) for name, sizes in self.choices.items())


@dataclasses.dataclass(frozen=True)
class Option:
  """What can become of one block: other sizes, no SSM any more, one branch, or nothing at all.

  Attributes:
    sizes: (target name, size) where it differs from the parent's.
    fate: "stays", "noop" (a Mamba mixer without its SSM), "attention_off" or "ssm_off" (a parallel
      block without this branch), or "gone".
  """

  sizes: tuple[tuple[str, int], ...] = ()
  fate: str = "stays"


@dataclasses.dataclass(frozen=True)
class Blockwise:
  """One choice of D, and one option for every block; sizes may differ from block to block.

  Attributes:
    widths: choices of D; the parent's alone where D is not searched.
    options: for each block of the parent its options, the largest sizes first.
    blocks: (fewest, most) blocks that may stay.
    noops: (fewest, most) blocks without SSM.
    parent: the parent's D.
    offs: (fewest, most) parallel blocks without attention, and without their SSM branch.
  """

  widths: tuple[int, ...]
  options: tuple[tuple[Option, ...], ...]
  blocks: tuple[int, int]
  noops: tuple[int, int]
  parent: int
  offs: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

  @property
  def bounds(self) -> dict[str, tuple[int, int]]:
    """(fewest, most) blocks of each fate of `LOSSES`."""
    return dict(zip(LOSSES, (self.noops, *self.offs), strict=True))

  @property
  def counts(self) -> Genes:
    """Choices a gene: D first, then the blocks."""
    return (len(self.widths), *map(len, self.options))

  @property
  def size(self) -> int:
    """Candidates, limits on numbers of blocks left out."""
    return math.prod(self.counts)

  def allowed(self, genes: Genes) -> bool:
    """Whether as many blocks stay, and go without SSM or a branch, as may."""
    fates = [self.options[index][gene].fate for index, gene in enumerate(genes[1:])]
    stay = len(fates) - fates.count("gone")
    return self.blocks[0] <= stay <= self.blocks[1] and all(
      low <= fates.count(name) <= high for name, (low, high) in self.bounds.items())

  def targets(self, genes: Genes) -> dict[str, Any]:
    """Returns the targets of a candidate; sizes by block, under names that JSON keeps."""
    chosen = [self.options[index][gene] for index, gene in enumerate(genes[1:])]
    return self._targets(self.widths[genes[0]], chosen)

  def alone(self, index: int, gene: int, width: int | None = None) -> dict[str, Any]:
    """Returns the targets of the parent with one option in one block, and perhaps another D."""
    chosen = [Option()] * len(self.options)
    chosen[index] = self.options[index][gene]
    return self._targets(self.parent if width is None else self.widths[width], chosen)

  def _targets(self, width: int, chosen: Sequence[Option]) -> dict[str, Any]:
    found: dict[str, Any] = {} if width == self.parent else {"D": width}
    for index, option in enumerate(chosen):
      for name, size in option.sizes:
        found.setdefault(name, {})[str(index)] = size
    if any(option.fate == "gone" for option in chosen):
      found["blocks"] = [index for index, option in enumerate(chosen) if option.fate != "gone"]
    for name in LOSSES:
      lost = [index for index, option in enumerate(chosen) if option.fate == name]
      found |= {name: lost} if lost else {}
    return found


def blockwise(cfg: ModelConfig, choices: Mapping[str, tuple[int, ...]]) -> Blockwise:
  """Returns the space of one option a block that checked choices span.

  `blocks`, `noop`, `attention_off` and `ssm_off` bound how many blocks stay and go without SSM or
  a branch: from the smallest to the largest of their choices. A block whose keys others read keeps
  them, and K, E and U of all that read them stay as they are: one alone would not fit the others.

  Raises:
    ValueError: `layers`, which ties blocks together, meta tokens, which all blocks see, or a size
      that only blocks with keys in common have.
  """
  _check_blockwise(cfg, choices)
  count = len(cfg.blocks)
  kept = choices.get("blocks", (count,))
  lost = [choices.get(name, (0,)) for name in LOSSES]
  lends = {group[0] for group in cfg.kv_groups}
  options = []
  for index, block in enumerate(cfg.blocks):
    made = [Option(each) for each in _sizes(cfg, index, choices)]
    able = (
      isinstance(ssm_of(block), Mamba), sizes.forked(block) and index not in lends,
      sizes.forked(block),
    )
    made += [Option(fate=name) for name, most, can in zip(LOSSES, map(max, lost), able, strict=True)
             if most and can]
    if min(kept) < count and index not in lends:
      made.append(Option(fate="gone"))
    options.append(tuple(made))
  blocks, noops, *offs = [(min(numbers), max(numbers)) for numbers in (kept, *lost)]
  return Blockwise(
    choices.get("D", (cfg.D,)), tuple(options), blocks, noops, cfg.D, tuple(offs))


def _check_blockwise(cfg: ModelConfig, choices: Mapping[str, tuple[int, ...]]) -> None:
  for name, instead in (("layers", "name blocks"), ("M", "meta tokens are the whole model's; take "
                                                    "method 'grid' or 'random'")):
    if name in choices:
      raise ValueError(f"search space {name}={choices[name]}: block by block, {instead}")
  tied = {index for group in cfg.kv_groups for index in group}
  have = [i for i, block in enumerate(cfg.blocks) if attention_of(block) is not None]
  for name in SHARED:
    if name in choices and tied.issuperset(have):
      raise ValueError(f"search space {name}={choices[name]}: block by block, blocks that share "
                       "keys and values would differ; take method 'grid' or 'random'")


def _sizes(cfg: ModelConfig, index: int, choices) -> list[tuple[tuple[str, int], ...]]:
  """Returns the combinations of sizes one block can have, the largest first."""
  ssm, tied = ssm_of(cfg.blocks[index]), any(index in group for group in cfg.kv_groups)
  now = cfg.sizes(index) | ({"heads": ssm.G * ssm.H} if hasattr(ssm, "N") else {})
  fixed = ("D", "V", *(SHARED if tied else ()))
  own = [name for name in choices if name in now and name not in fixed]
  fitting = {name: [size for size in choices[name] if size <= now[name]] for name in own}
  sets = [[(name, size) for size in reversed(fitting[name] or [now[name]])] for name in own]
  return [
    tuple(pair for pair in combination if pair[1] != now[pair[0]])
    for combination in itertools.product(*sets)
  ]


def grid(space: Uniform | Blockwise) -> Iterator[Genes]:
  """Yields every candidate once, the last gene changing fastest."""
  return itertools.product(*map(range, space.counts))


def draws(space: Uniform | Blockwise, seed: int) -> Iterator[Genes]:
  """Yields every candidate once, in an order that the seed decides."""
  rng = np.random.default_rng(seed)
  if space.size <= PERMUTED:
    for number in rng.permutation(space.size):
      yield tuple(int(gene) for gene in np.unravel_index(number, space.counts))
    return
  seen: set[Genes] = set()
  while len(seen) < space.size:
    genes = tuple(int(gene) for gene in rng.integers(space.counts))
    if genes not in seen:
      seen.add(genes)
      yield genes
