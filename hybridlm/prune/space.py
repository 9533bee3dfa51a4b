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

from hybridlm.config import Mamba, ModelConfig
from hybridlm.prune import select

Genes = tuple[int, ...]
# Decisions about the whole model; the others name a size inside blocks.
WHOLE = ("D", "blocks", "layers", "noop")
# Spaces up to this size are drawn from by permutation, larger ones by throwing out repeats.
PERMUTED = 1 << 20


def check(cfg: ModelConfig, choices: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
  """Returns the choices of the names that have any, each in ascending order.

  Raises:
    ValueError: none has; a repeated choice; a name, an axis or a size that the model has not.
  """
  found = {}
  for name, sizes in choices.items():
    if len(set(sizes)) != len(sizes):
      raise ValueError(f"search space {name}={tuple(sizes)}: a choice is listed twice")
    for size in sizes:
      try:
        select.sized(cfg, {name: size})
      except ValueError as error:
        raise ValueError(f"search space {name}={tuple(sizes)}: {error}") from error
    if sizes:
      found[name] = tuple(sorted(sizes))
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
  """What can become of one block: other sizes, no SSM any more, or nothing at all.

  Attributes:
    sizes: (target name, size) where it differs from the parent's.
    fate: "stays", "noop" (a Mamba block without its SSM) or "gone".
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
  """

  widths: tuple[int, ...]
  options: tuple[tuple[Option, ...], ...]
  blocks: tuple[int, int]
  noops: tuple[int, int]
  parent: int

  @property
  def counts(self) -> Genes:
    """Choices a gene: D first, then the blocks."""
    return (len(self.widths), *map(len, self.options))

  @property
  def size(self) -> int:
    """Candidates, limits on numbers of blocks left out."""
    return math.prod(self.counts)

  def allowed(self, genes: Genes) -> bool:
    """Whether as many blocks stay, and go without SSM, as may."""
    fates = [self.options[index][gene].fate for index, gene in enumerate(genes[1:])]
    stay, noop = len(fates) - fates.count("gone"), fates.count("noop")
    return self.blocks[0] <= stay <= self.blocks[1] and self.noops[0] <= noop <= self.noops[1]

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
    if any(option.fate == "noop" for option in chosen):
      found["noop"] = [index for index, option in enumerate(chosen) if option.fate == "noop"]
    return found


def blockwise(cfg: ModelConfig, choices: Mapping[str, tuple[int, ...]]) -> Blockwise:
  """Returns the space of one option a block that checked choices span.

  `blocks` and `noop` bound how many blocks stay and go without SSM: from the smallest to the
  largest of their choices.

  Raises:
    ValueError: `layers`, which ties blocks together.
  """
  if "layers" in choices:
    raise ValueError(f"search space layers={choices['layers']}: block by block, name blocks")
  count, none = len(cfg.blocks), (0,)
  kept, noops = choices.get("blocks", (count,)), choices.get("noop", none)
  options = []
  for index, block in enumerate(cfg.blocks):
    made = [Option(sizes) for sizes in _sizes(cfg, index, choices)]
    if max(noops) and isinstance(block, Mamba):
      made.append(Option(fate="noop"))
    if min(kept) < count:
      made.append(Option(fate="gone"))
    options.append(tuple(made))
  bounds = [(min(sizes), max(sizes)) for sizes in (kept, noops)]
  return Blockwise(choices.get("D", (cfg.D,)), tuple(options), *bounds, cfg.D)


def _sizes(cfg: ModelConfig, index: int, choices) -> list[tuple[tuple[str, int], ...]]:
  """Returns the combinations of sizes one block can have, the largest first."""
  now = cfg.sizes(index) | ({"heads": cfg.blocks[index].G * cfg.blocks[index].H}
                            if isinstance(cfg.blocks[index], Mamba) else {})
  own = [name for name in choices if name in now and name not in ("D", "V")]
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
