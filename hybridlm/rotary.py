"""Rotary positions of attention: which angle a position adds to each pair of channels."""

import dataclasses
import math
from collections.abc import Iterator

from hybridlm.fields import positive


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Stretched rotary positions (Llama 3.1): slow pairs are slowed down by `factor`.

  Pairs that turn less than `low` times in `context` positions are slowed down, those that turn
  more than `high` times are not, and those between are interpolated.
  """

  factor: float
  low: float
  high: float
  context: int

  def __post_init__(self):
    positive("Llama3Scaling", context=self.context)
    if not self.factor > 0 or not 0 < self.low < self.high:
      raise ValueError(f"Llama3Scaling: needs factor > 0 and 0 < low < high, not {self}")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions over the first `rotary` channels of a head (None: all of them).

  `frequency` is the angle a position adds to each pair, where pairs of another model were kept:
  `base` and `scaling` have no say then.
  """

  base: float = 10000.0
  rotary: int | None = None
  scaling: Llama3Scaling | None = None
  frequency: tuple[float, ...] | None = None

  def __post_init__(self):
    if not self.base > 0:
      raise ValueError(f"Rope: base={self.base!r} must be positive")
    if self.rotary is not None and (self.rotary < 2 or self.rotary % 2):
      raise ValueError(f"Rope: rotary={self.rotary!r} must be an even number of at least 2")
    if self.frequency is not None:
      self._check_frequency()

  def _check_frequency(self) -> None:
    given = self.frequency
    numbers = isinstance(given, tuple) and all(type(x) is float and x > 0 for x in given)
    if not numbers or not all(math.isfinite(x) for x in given):
      raise ValueError(f"Rope: frequency={given!r} must be a tuple of positive numbers")
    if self.rotary != 2 * len(given):
      raise ValueError(
        f"Rope: frequency has {len(given)} pairs, rotary={self.rotary!r} is not twice as many"
      )
    if self.scaling is not None:
      raise ValueError("Rope: frequency and scaling both given; frequencies are final angles")

  def frequencies(self, width: int) -> tuple[float, ...]:
    """Returns the angle a position adds to each pair of a head of this width, in radians."""
    if self.frequency is not None:
      return self.frequency
    rotary = self.rotary or width
    plain = [self.base ** (-2 * i / rotary) for i in range(rotary // 2)]
    return tuple(plain) if self.scaling is None else tuple(_stretched(self.scaling, plain))


def _stretched(scaling: Llama3Scaling, plain: list[float]) -> Iterator[float]:
  for frequency in plain:
    turns = scaling.context * frequency / (2 * math.pi)
    share = min(max((turns - scaling.low) / (scaling.high - scaling.low), 0.0), 1.0)
    yield (1 - share) * frequency / scaling.factor + share * frequency
