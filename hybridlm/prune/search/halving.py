"""Successive halving: everyone trains a little, the better half goes on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Rung(NamedTuple):
  """One rung: steps trained in all, and (name, loss) of those that took part, best first."""

  steps: int
  places: tuple[tuple[str, float], ...]


def survivors(places: Sequence[tuple[str, float]]) -> list[str]:
  """Returns the better half by loss, rounded up."""
  return [name for name, _ in places[: -(-len(places) // 2)]]


def run(
  names: Sequence[str], rungs: Sequence[int], train: Callable[[str, int], float]
) -> list[Rung]:
  """Returns the rungs in order; the first of the last one is the winner.

  Args:
    names: who takes part, best first: of equal losses the earlier one wins.
    rungs: steps trained in all at each rung, rising.
    train: `(name, steps) -> loss`; goes on from where the name stopped before.

  Raises:
    ValueError: nobody, no rung, or rungs that do not rise from 1.
  """
  if not names or not rungs:
    raise ValueError(f"halving: {len(names)} candidates on rungs {tuple(rungs)}; it needs both")
  if list(rungs) != sorted(set(rungs)) or rungs[0] < 1:
    raise ValueError(f"halving: rungs {tuple(rungs)} must rise, from at least 1 step")
  done, left = [], list(names)
  for steps in rungs:
    losses = {name: train(name, steps) for name in left}
    places = sorted(losses.items(), key=lambda place: (place[1], names.index(place[0])))
    done.append(Rung(steps, tuple(places)))
    left = survivors(places)
  return done
