"""Which source each row comes from: weights that change by step."""

import bisect
import math
import operator
import sys
from collections.abc import Mapping, Sequence

import grain

# ((first step, ((source, weight), ..)), ..) in order of steps, sources in order of names.
Phases = tuple[tuple[int, tuple[tuple[str, float], ...]], ...]


def phases(wanted: Sequence, names: Sequence[str]) -> Phases:
  """Returns phases in their one normal form, checked against the names of the sources."""
  if not wanted:
    if len(names) > 1:
      raise ValueError(f"the data spec has {len(names)} sources and no phases to mix them by")
    return ((0, ((names[0], 1.0),)),)
  found = [_normal(phase) for phase in wanted]
  steps = [step for step, _ in found]
  if steps[0] != 0 or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
    raise ValueError(f"phases start at steps {steps}; they must start at 0 and rise")
  for step, pairs in found:
    _check(step, pairs, names)
  return tuple(found)


def _normal(phase) -> tuple[int, tuple[tuple[str, float], ...]]:
  """Returns one phase with its pairs in order of names."""
  try:
    step, weights = phase
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    return operator.index(step), tuple(sorted((name, float(weight)) for name, weight in pairs))
  except (TypeError, ValueError) as error:
    raise ValueError(f"phase {phase!r} is not (step, ((source, weight), ..))") from error


def _check(step: int, pairs, names: Sequence[str]) -> None:
  mixed = [name for name, _ in pairs]
  if not mixed or len(set(mixed)) < len(mixed):
    raise ValueError(f"the phase at step {step} must name sources, each once; it names {mixed}")
  for name, weight in pairs:
    if name not in names:
      raise ValueError(
        f"the phase at step {step} mixes source {name!r}; the data spec has {', '.join(names)}"
      )
    if not 0 < weight < math.inf:
      raise ValueError(
        f"the phase at step {step} gives source {name!r} the weight {weight}; weights are above 0"
      )


class Selection:
  """Maps a row's number in the global stream to (source, row of that source), for grain.

  Each phase is grain's deterministic mixture; a source goes on where the phase before left it.
  """

  def __init__(self, phases: Phases, *, names: Sequence[str], batch: int):
    self._first = [step * batch for step, _ in phases]
    self._mixes = []
    self._gone = []  # rows each source gave before the phase
    gone = [0] * len(names)
    for number, (_, pairs) in enumerate(phases):
      mix = _mix([(names.index(name), weight) for name, weight in pairs])
      self._mixes.append(mix)
      self._gone.append(tuple(gone))
      if number + 1 < len(phases):
        gone = _after(mix, self._first[number + 1] - self._first[number], gone, len(pairs))

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    phase = bisect.bisect_right(self._first, index) - 1
    source, row = self._mixes[phase][index - self._first[phase]]
    return source, self._gone[phase][source] + row


def _mix(weights: Sequence[tuple[int, float]]) -> grain.MapDataset:
  """Returns grain's mixture of the pairs (source, 0), (source, 1), ..."""
  return grain.MapDataset.mix(
    [
      grain.MapDataset.range(sys.maxsize).map(lambda row, source=source: (source, row))
      for source, _ in weights
    ],
    [weight for _, weight in weights],
  )


def _after(mix: grain.MapDataset, rows: int, gone: Sequence[int], sources: int) -> list[int]:
  """Returns how many rows each source has given once the mixture gave so many."""
  after, seen = list(gone), set()
  for index in range(rows - 1, -1, -1):
    source, row = mix[index]
    if source not in seen:
      seen.add(source)
      after[source] = gone[source] + row + 1
    if len(seen) == sources:
      return after
  return after
