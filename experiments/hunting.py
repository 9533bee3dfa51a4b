"""How a search proposes candidates: a grid, random ones, a programme over blocks, evolution."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import ledger
from experiments.candidates import Candidates, Judge, by_rule
from experiments.ledger import Ledger
from hybridlm.config import ModelConfig
from hybridlm.prune import space
from hybridlm.prune.search import evolve, milp
from hybridlm.prune.space import Blockwise, Genes, Uniform

METHODS = ("grid", "random", "milp")
DRAWS = 1000  # a random search gives up after so many draws for each candidate it is to find
Space = Uniform | Blockwise


def spread(cfg: ModelConfig, run: ConfigDict) -> Space:
  """Returns the space of a search: `run` is the section `search` of a config.

  Raises:
    ValueError: an unknown method, an empty space, or choices that the model has not.
  """
  if run.method not in METHODS:
    raise ValueError(f"search.method={run.method!r} is not one of {', '.join(METHODS)}")
  choices = space.check(cfg, run.space.to_dict())
  if run.method == "milp":
    return space.blockwise(cfg, choices)
  sizes = Uniform(choices)
  if run.method == "grid" and sizes.size > run.candidates:
    raise ValueError(
      f"search.space holds {sizes.size:,} combinations, more than search.candidates="
      f"{run.candidates}: take method 'random', or fewer choices"
    )
  return sizes


def first(judge: Judge, sizes: Uniform, run: ConfigDict, seed: int) -> list[dict[str, Any]]:
  """Returns the targets that a grid or a random search looks at, those that do not fit included.

  A random search stops when as many as asked for fit.

  Raises:
    ValueError: none fits; says what was nearest.
  """
  order = space.grid(sizes) if run.method == "grid" else space.draws(sizes, seed)
  found, fitting = [], 0
  for genes in order:
    targets = sizes.targets(genes)
    found.append(targets)
    fitting += not judge.reasons(targets)
    if run.method == "random" and (
      fitting == run.candidates or len(found) == DRAWS * run.candidates):
      break
  if not fitting:
    raise ValueError(nothing(judge, found))
  return found


def nothing(judge: Judge, looked: list[dict[str, Any]]) -> str:
  """Returns one line: that no candidate fits, the rules in the way, and the nearest budget."""
  legal = [judge.small(each) for each in looked if not judge.reasons(each, budget=False)]
  return (f"search: none of {len(looked):,} candidates fits; "
          f"{said(map(judge.reasons, looked))}; "
          + judge.limits.refusal(judge.cfg, legal))


def said(reasons: Iterable[Iterable[str]]) -> str:
  """Returns how many candidates each rule refused, in words."""
  counts = by_rule(reasons).items()
  return "rejected by rule: " + (", ".join(f"{rule} {n:,}" for rule, n in counts) or "none")


class Blocks:
  """A programme over the options of every block, one for each width D.

  Args:
    judge: of feasibility and costs.
    sizes: the options; those that a rule forbids whatever the other blocks do are left out here.

  Raises:
    ValueError: no budget, a divisor of the number of blocks, a block without an option, or a budget
      that no choice fits; the nearest possible is said.
  """

  def __init__(self, judge: Judge, sizes: Blockwise):
    if not judge.limits.bounds:
      raise ValueError("search.method='milp': the budget has no bound, so no block has to change")
    if sizes.blocks[0] < len(sizes.options) and judge.limits.rules.divisors.get("blocks", 1) > 1:
      raise ValueError("search.method='milp': rules.divisors.blocks is not linear in the blocks; "
                       "unset it, or take method 'grid' or 'random'")
    self.judge, self.sizes = judge, sizes
    self._legal = [self._options(index) for index in range(len(sizes.options))]
    self._rows = {gene: self._demands(gene) for gene in range(len(sizes.widths))}
    zeros = [[0.0] * len(legal) for legal in self._legal]
    fitting = [milp.solve(milp.Problem(zeros, rows)) for rows in self._rows.values()]
    if all(choice is None for choice in fitting):
      raise ValueError(self._nearest(zeros))

  def options(self) -> list[tuple[int, int]]:
    """Returns (block, option) of everything a block may become."""
    return [(index, gene) for index, legal in enumerate(self._legal) for gene in legal]

  def solutions(
    self, losses: Mapping[tuple[int, int], float], run: ConfigDict,
    fits: Callable[[Genes], bool],
  ) -> list[Genes]:
    """Returns up to `run.solutions` candidates of each width, best first by the sum of losses.

    Costs add up over blocks but for rounding, and some rules are about several blocks: what the
    programme gives and `fits` refuses is forbidden, and the next best taken.
    """
    found = []
    values = [[losses[index, gene] for gene in legal] for index, legal in enumerate(self._legal)]
    for width, rows in self._rows.items():
      mine: list[tuple[int, ...]] = []
      refused: list[milp.Row] = []
      while len(mine) < run.solutions and len(refused) <= 8 * run.solutions:
        plain = milp.Problem(values, rows)
        apart = [milp.away(plain, choice, run.diversity) for choice in mine]
        choice = milp.solve(milp.Problem(values, [*rows, *apart, *refused]))
        if choice is None:
          break
        if fits(self._genes(width, choice)):
          mine.append(choice)
        else:
          refused.append(milp.away(plain, choice, 1))
      found += [self._genes(width, choice) for choice in mine]
    return found

  def _genes(self, width: int, choice: tuple[int, ...]) -> Genes:
    return (width, *(legal[at] for legal, at in zip(self._legal, choice, strict=True)))

  def _options(self, index: int) -> list[int]:
    """Returns the options of a block that break no rule by themselves."""
    legal, broken = [], []
    for gene in range(self.sizes.counts[index + 1]):
      targets = self.sizes.alone(index, gene)
      reasons = self.judge.reasons(targets, budget=False)
      legal += [] if reasons else [gene]
      broken += reasons
    if not legal:
      raise ValueError(f"search: block {index} has no option that a rule allows: {broken[0]}")
    return legal

  def _demands(self, width: int) -> list[milp.Row]:
    """Returns budgets, floors and numbers of blocks as rows, for one choice of D."""
    cfg, options = self.judge.cfg, self.sizes.options
    fates = [[options[i][gene].fate for gene in legal] for i, legal in enumerate(self._legal)]

    def count(name, test, low, high):
      weights = [[int(test(i, fate)) for fate in each] for i, each in enumerate(fates)]
      return milp.Row(name, weights, low, high)

    rows = [
      count("blocks", lambda i, fate: fate != "gone", *self.sizes.blocks),
      *(count(name, lambda i, fate, name=name: fate == name, *bounds)
        for name, bounds in self.sizes.bounds.items()),
    ]
    for kind, floor in self.judge.limits.floors.items():
      rows.append(count(
        f"floor of {kind}", lambda i, fate, kind=kind: cfg.blocks[i].symbol == kind
        and fate not in ("gone", *(("noop",) if kind == "M" else ())), floor, np.inf))
    costs = [
      [self._share(width, index, gene) for gene in legal] for index, legal in enumerate(self._legal)
    ]
    base = self.judge.limits.outside(cfg.replace(D=self.sizes.widths[width]))
    for name, bound in self.judge.limits.bounds.items():
      weights = [[share[name] for share in each] for each in costs]
      rows.append(milp.Row(name, weights, high=bound - base[name], scale=bound))
    return rows

  def _share(self, width: int, index: int, gene: int) -> dict[str, float]:
    """Returns what one option of a block costs in a model of a width."""
    option = self.sizes.options[index][gene]
    if option.fate == "gone":
      return dict.fromkeys(self.judge.limits.bounds, 0)
    small = self.judge.small(self.sizes.alone(index, gene, width))
    return self.judge.limits.block(small, index)

  def _nearest(self, zeros: list[list[float]]) -> str:
    """Returns one line: the budget nearest to the one asked for that something fits."""
    bounds, best = self.judge.limits.bounds, None
    for width, rows in self._rows.items():
      choice = milp.nearest(milp.Problem(zeros, rows), tuple(bounds))
      if choice is not None:
        costs = self.judge.costs(self.sizes.targets(self._genes(width, choice)))
        excess = max(costs[name] / bound for name, bound in bounds.items())
        best = min(best or (excess, width, costs), (excess, width, costs), key=lambda x: x[:2])
    if best is None:
      return "search: no choice of blocks meets the floors and the numbers of blocks that may stay"
    said = ", ".join(f"{name} {best[2][name]:,.10g} of {bounds[name]:,.10g}" for name in bounds)
    return f"search: no choice of blocks fits the budget; the nearest possible needs {said}"


def replacements(
  blocks: Blocks, book: Ledger, measure: Callable[[Mapping[str, Any]], Mapping[str, float]],
  ranked: str,
) -> dict[tuple[int, int], float]:
  """Returns the loss of the model with only one block changed, for every (block, option).

  What no block is changed in counts as 0. Puzzle, arXiv 2411.19146, section 4.2.

  Args:
    blocks: the options.
    book: takes the losses, one line each.
    measure: targets -> losses.
    ranked: the loss that counts.
  """
  found = {}
  base = book.once("parent", lambda: {"targets": {}, **measure({})})[ranked]
  for index, gene in blocks.options():
    targets = blocks.sizes.alone(index, gene)

    def make(targets=targets, index=index):
      return {"block": index, "targets": targets, **measure(targets)}

    loss = book.once(ledger.name(targets), make)[ranked] if targets else base
    found[index, gene] = loss - base
  return found


def evolved(candidates: Candidates, sizes: Space, start: list[Genes], run: ConfigDict, seed: int):
  """Refines scored candidates: mutations and crossings inside the space and the budget.

  Args:
    candidates: takes what is looked at.
    sizes: the space.
    start: where it begins; those that do not fit are left out.
    run: rounds and population.
    seed: decides what is drawn.
  """
  def fits(genes: Genes) -> bool:
    inside = not isinstance(sizes, Blockwise) or sizes.allowed(genes)
    return inside and candidates.fits(sizes.targets(genes), "evolve")

  def score(genes: Genes) -> float:
    return candidates.loss(sizes.targets(genes), "evolve")

  known = {genes: score(genes) for genes in start if fits(genes)}
  evolve.run(
    known, sizes.counts, fits=fits, score=score, rounds=run.evolve, population=run.population,
    seed=seed,
  )


def largest(judge: Judge, sizes: Uniform) -> dict[str, Any] | None:
  """Returns the targets with the most parameters that fit: the rule of the public tool.

  Of equal ones the first of the grid; None: nothing fits.
  """
  best: tuple[float, dict[str, Any]] | None = None
  for genes in space.grid(sizes):
    targets = sizes.targets(genes)
    if not judge.reasons(targets):
      count = judge.costs(targets)["parameters"]
      if best is None or count > best[0]:
        best = count, targets
  return None if best is None else best[1]
