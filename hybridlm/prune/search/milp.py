"""One choice for every block at the least sum of losses: a mixed-integer programme.

Every demand is a row: a number for each option of each block, whose sum over the chosen options
must lie between two bounds. Budgets, floors per kind, numbers of blocks and distance to earlier
solutions all are. The solver works in floating point with tolerances; its answers are checked in
exact arithmetic here, and one that breaks a row is forbidden and the programme solved again.

Source: Puzzle, arXiv 2411.19146, section 4.3 (one choice a layer, sums of scores, diversity).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, sparse

# Losses are scaled to this size, so that the solver's absolute gap of 1e-6 is a share of 1e-10.
SCALE = 1e4


class Row(NamedTuple):
  """A linear demand: low <= sum of the chosen options' weights <= high.

  name: for messages.  weights: for every block one number an option; whole numbers stay exact.
  scale: what an excess over `high` is a share of; None: `high` itself, which then is positive.
  """

  name: str
  weights: Sequence[Sequence[Any]]
  low: float = -math.inf
  high: float = math.inf
  scale: float | None = None

  def total(self, choice: Sequence[int]) -> Any:
    """Returns the sum over the chosen options, exact where the weights are whole numbers."""
    each = [weights[option] for weights, option in zip(self.weights, choice, strict=True)]
    whole = all(isinstance(weight, (int, np.integer)) for weight in each)
    return sum(map(int, each)) if whole else math.fsum(each)

  def holds(self, choice: Sequence[int]) -> bool:
    """Whether the demand is met."""
    return self.low <= self.total(choice) <= self.high


@dataclasses.dataclass(frozen=True)
class Problem:
  """Blocks with options: their losses, and the demands on what is chosen.

  Attributes:
    losses: for every block one finite number an option.
    rows: the demands.
  """

  losses: Sequence[Sequence[float]]
  rows: Sequence[Row] = ()

  def __post_init__(self):
    shape = [len(losses) for losses in self.losses]
    if not shape or 0 in shape:
      raise ValueError(f"programme: {shape} options of its blocks; every block needs one")
    if not all(math.isfinite(loss) for losses in self.losses for loss in losses):
      raise ValueError("programme: a loss is not finite")
    for row in self.rows:
      if [len(weights) for weights in row.weights] != shape:
        raise ValueError(f"programme: row {row.name!r} does not have one weight an option")

  def loss(self, choice: Sequence[int]) -> float:
    """Returns the sum of losses of one option a block."""
    return math.fsum(each[option] for each, option in zip(self.losses, choice, strict=True))

  def fits(self, choice: Sequence[int]) -> bool:
    """Whether a choice meets every demand."""
    return all(row.holds(choice) for row in self.rows)


def solve(problem: Problem) -> tuple[int, ...] | None:
  """Returns one option a block with the least sum of losses, or None where nothing fits."""
  forbidden: list[Row] = []
  while True:
    rows = [*problem.rows, *forbidden]
    found = _solve(problem.losses, rows)
    if found is None or problem.fits(found):
      return found
    forbidden.append(away(problem, found, 1))


def away(problem: Problem, choice: Sequence[int], distance: int) -> Row:
  """Returns the demand to differ from a choice in at least `distance` blocks."""
  same = [
    [int(option == taken) for option in range(len(losses))]
    for losses, taken in zip(problem.losses, choice, strict=True)
  ]
  return Row("distance to an earlier solution", same, high=len(choice) - distance)


def solutions(problem: Problem, count: int, distance: int) -> list[tuple[int, ...]]:
  """Returns up to `count` choices, best first, any two different in at least `distance` blocks.

  Each is the best that is far enough from those before it.
  """
  found: list[tuple[int, ...]] = []
  while len(found) < count:
    rows = [*problem.rows, *(away(problem, choice, distance) for choice in found)]
    choice = solve(dataclasses.replace(problem, rows=rows))
    if choice is None:
      break
    found.append(choice)
  return found


def nearest(problem: Problem, names: Sequence[str]) -> tuple[int, ...] | None:
  """Returns the choice that exceeds the upper bounds of the named rows by the least share.

  The largest share by which one of them is exceeded is minimised. Of several such choices any may
  come. None where the other rows alone cannot be met.
  """
  soft = [row for row in problem.rows if row.name in names]
  hard = [row for row in problem.rows if row.name not in names]
  return _solve([[0.0] * len(each) for each in problem.losses], hard, soft)


def _matrix(rows: Sequence[Row], extra: int) -> Any:
  """Returns one line a row over all options of all blocks, laid flat, and `extra` zero columns."""
  lines = [np.concatenate([np.asarray(w, np.float64) for w in row.weights]) for row in rows]
  return np.pad(np.stack(lines), [(0, 0), (0, extra)])


def _solve(
  losses: Sequence[Sequence[float]], rows: Sequence[Row], soft: Sequence[Row] = ()
) -> tuple[int, ...] | None:
  """Solves one programme; `soft` rows may exceed their upper bound, by the least share."""
  shape = [len(each) for each in losses]
  total, ends = sum(shape), np.cumsum(shape)
  extra = 1 if soft else 0
  one = np.zeros((len(shape), total + extra))
  for block, (end, size) in enumerate(zip(ends, shape, strict=True)):
    one[block, end - size : end] = 1.0
  demands = [optimize.LinearConstraint(sparse.csr_array(one), 1.0, 1.0)]
  if rows:
    matrix = _matrix(rows, extra)
    largest = np.maximum(np.abs(matrix).max(axis=1), 1e-300)
    low, high = (np.array([float(getattr(row, key)) for row in rows]) for key in ("low", "high"))
    demands.append(optimize.LinearConstraint(
      sparse.csr_array(matrix / largest[:, None]), low / largest, high / largest))
  if soft:
    scale = np.array([float(row.high if row.scale is None else row.scale) for row in soft])
    high = np.array([float(row.high) for row in soft])
    matrix = _matrix(soft, extra) / scale[:, None]
    matrix[:, -1] = -1.0
    demands.append(optimize.LinearConstraint(sparse.csr_array(matrix), -np.inf, high / scale))
  flat = np.concatenate([np.asarray(each, np.float64) for each in losses])
  objective = np.append(flat / max(np.abs(flat).max(), 1e-300) * SCALE, [SCALE] * extra)
  result = optimize.milp(
    objective, constraints=demands, options={"mip_rel_gap": 0.0},
    integrality=np.append(np.ones(total), np.zeros(extra)),
    bounds=optimize.Bounds(0.0, np.append(np.ones(total), [np.inf] * extra)),
  )
  if result.x is None:
    return None
  parts = np.split(result.x[:total], ends[:-1])
  return tuple(int(part.argmax()) for part in parts)
