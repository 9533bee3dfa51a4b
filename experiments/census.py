"""What a search would choose from, counted before anything is computed or allocated."""

from collections.abc import Mapping
from typing import Any

from experiments import hunting, limits, report, search_report
from experiments.candidates import Judge
from experiments.limits import rule
from experiments.settings import Setup
from hybridlm.prune import space

WINNER = "search.winner"


def text(s: Setup) -> str:
  """Returns the size of the space, what fits, what is refused by which rule, and costs.

  Which blocks go is not known before there are scores: where a number of blocks is chosen, an equal
  share of every kind goes from the middle. Seconds are those of `budget.device`; nothing is timed.

  Raises:
    ValueError: an empty space, choices that the model has not, or a named candidate outside it.
  """
  run = s.c.search
  hunting.spread(s.cfg, run)
  judge = Judge(s.cfg, limits.of(s, s.cfg, measured=False))
  sizes = space.Uniform(space.check(s.cfg, run.space.to_dict()))
  found = count(judge, sizes)
  spans = ", ".join(f"{name} {c[0]}..{c[-1]} ({len(c)})" for name, c in sizes.choices.items())
  refused = ", ".join(f"{name} {n:,}" for name, n in found["by_rule"].items()) or "none"
  lines = [
    f"search space: {sizes.size:,} uniform candidates: {spans}",
    f"budget: {judge.limits.budget}",
    f"feasible: {found['feasible']:,}; rejected by rule: {refused}",
  ]
  if run.method == "milp":
    blocks = space.blockwise(s.cfg, sizes.choices)
    lines.append(f"block by block: about 10^{len(str(blocks.size)) - 1} candidates, "
                 f"{sum(map(len, blocks.options)):,} options to score")
  return "\n".join([*lines, table(judge, sizes, found, named(s))])


def count(judge: Judge, sizes: space.Uniform) -> dict[str, Any]:
  """Returns how many candidates fit, the largest of them, and how many each rule refuses."""
  feasible, by_rule, largest = 0, {}, (0, None)
  for genes in space.grid(sizes):
    targets = sizes.targets(genes)
    reasons = judge.look(targets)
    for name in {rule(reason) for reason in reasons}:
      by_rule[name] = by_rule.get(name, 0) + 1
    if not reasons:
      feasible += 1
      parameters = judge.costs(targets)["parameters"]
      largest = max(largest, (parameters, targets), key=lambda pair: pair[0])
  order = sorted(by_rule.items(), key=lambda item: (-item[1], item[0]))
  return {"feasible": feasible, "by_rule": dict(order), "largest": largest[1]}


def named(s: Setup) -> dict[str, int]:
  """Returns the candidate that the config names, empty where it names none."""
  return {name: value for name, value in s.c.search.winner.items() if value is not None}


def table(
  judge: Judge, sizes: space.Uniform, found: Mapping[str, Any], winner: Mapping[str, int]
) -> str:
  """Returns the costs of the parent, the largest candidate that fits, and the named one.

  Raises:
    ValueError: a named candidate that the space does not hold.
  """
  rows = [["parent", "", *_costs(judge, {}), "–"]]
  if found["largest"]:
    rows.append(_row(judge, "largest that fits", found["largest"]))
  if winner:
    # A size that is not named is the parent's, where the space has it.
    whole = {name: winner.get(name, choices[-1]) for name, choices in sizes.choices.items()}
    if sizes.genes(whole | winner) is None:
      raise ValueError(f"{WINNER}: {search_report.targets(winner)} is not in the search space")
    rows.append(_row(judge, WINNER, whole))
  header = ["candidate", "sizes", *search_report.costs_header(), "feasible"]
  return report.table(header, rows)


def _costs(judge: Judge, targets: Mapping[str, Any]) -> list[str]:
  costs = judge.costs(targets)
  return [search_report.cost(costs, name) for name in search_report.AXES]


def _row(judge: Judge, name: str, targets: Mapping[str, Any]) -> list[str]:
  said = "; ".join(judge.look(targets)) or "yes"
  return [name, search_report.targets(targets), *_costs(judge, targets), said]
