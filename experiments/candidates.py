"""A search's candidates: what each costs, why it may not be, what it loses; all written down."""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import hybridlm
from experiments import ledger
from experiments.ledger import Ledger
from experiments.limits import Limits, rule
from hybridlm.config import Block, ModelConfig, Parallel
from hybridlm.prune import select
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

COSTS = ("parameters", "memory_bytes", "prefill_seconds", "decode_seconds")
RANKED = ("kl", "ce")


class Judge:
  """Says of targets what they leave, what that costs, and which rules it breaks.

  Args:
    cfg: the parent.
    limits: rules, budget and how seconds are estimated.
    scores: decide which blocks stay where a count is given; None: they go from the middle.
  """

  def __init__(self, cfg: ModelConfig, limits: Limits, scores: Scores | None = None):
    self.cfg, self.limits, self._scores = cfg, limits, scores
    self._reasons: dict[str, list[str]] = {}

  def small(self, targets: Mapping[str, Any]) -> ModelConfig:
    """Returns the config that targets leave.

    Raises:
      ValueError: targets that no plan of this parent can meet.
    """
    ranks = {} if self._scores is None else select.orders(self.cfg, self._scores, targets)
    return select.sized(self.cfg, targets, **ranks)

  def reasons(self, targets: Mapping[str, Any], *, budget: bool = True) -> list[str]:
    """Returns the rules that targets break, each "rule: value and limit"; none: they are feasible.

    `budget` False leaves the budget out.
    """
    key = f"{budget}{ledger.name(targets)}"
    if key not in self._reasons:
      self._reasons[key] = self.look(targets, budget=budget)
    return self._reasons[key]

  def look(self, targets: Mapping[str, Any], *, budget: bool = True) -> list[str]:
    """Returns the same without remembering it: for spaces that are only counted."""
    try:
      small = self.small(targets)
    except ValueError as error:
      return [f"targets: {error}"]
    kept = targets.get("blocks")
    reasons = functools.partial(
      self.limits.reasons, self.cfg, budget=budget, kept=kept if isinstance(kept, list) else None)
    found = reasons(small)
    if found and self._scores is not None and any(map(_meets, small.blocks)):
      if all(each.startswith("budget") for each in found):
        return reasons(select.plan(self.cfg, self._scores, targets).small_config())
    return found

  def costs(self, targets: Mapping[str, Any]) -> dict[str, float]:
    """Returns parameters, bytes and seconds of what targets leave, under the names in `COSTS`."""
    return self.limits.costs(self.small(targets))


def _meets(block: Block) -> bool:
  """Whether a plan may leave less of a block than sizes alone say: see `select.sized`."""
  return isinstance(block, Parallel) and block.fusion.kind == "mean"


class Candidates:
  """Everything a search has looked at, in the order it did; a repeated search finds it again.

  Each line of `candidates.jsonl` has the targets and where they come from, and either "reasons" or
  costs, losses and the name of the plan in the folder `plans`.

  Args:
    folder: of the search.
    judge: of feasibility and costs.
    scores: decide what a plan keeps.
    score: the losses of a plan.
    ranked: the loss that candidates are ranked by.
  """

  def __init__(
    self, folder: pathlib.Path, judge: Judge, scores: Scores,
    score: Callable[[Plan], Mapping[str, float]], ranked: str,
  ):
    self._plans, self.judge, self._score = folder / "plans", judge, score
    self._book, self._scores, self.ranked = Ledger(folder / "candidates.jsonl"), scores, ranked

  def look(self, targets: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns the record of a candidate: its reasons, or its costs and losses.

    Args:
      targets: sizes, as plain values that JSON keeps.
      origin: what proposed it first.
    """
    key = ledger.name(targets)
    found = self._book.find(key)
    if found is None:
      reasons = self.judge.reasons(targets)
      head = {"targets": dict(targets), "origin": origin}
      make = (lambda: head | {"reasons": reasons}) if reasons else (
        lambda: head | self._measure(key, targets))
      found = self._book.once(key, make)
    return found

  def fits(self, targets: Mapping[str, Any], origin: str) -> bool:
    """Whether a candidate is feasible; one that is not is written down."""
    found = self._book.find(ledger.name(targets))
    if found is None and not self.judge.reasons(targets):
      return True
    return "reasons" not in (found or self.look(targets, origin))

  def loss(self, targets: Mapping[str, Any], origin: str) -> float:
    """Returns the loss that a feasible candidate is ranked by."""
    return self.look(targets, origin)[self.ranked]

  def scored(self) -> list[dict[str, Any]]:
    """Returns the records with losses, best first; of equal losses the smaller model, then id."""
    found = [record for record in self._book.records() if "reasons" not in record]
    return sorted(found, key=lambda r: (r[self.ranked], r["parameters"], r["id"]))

  def rejected(self) -> list[dict[str, Any]]:
    """Returns the records with reasons, oldest first."""
    return [record for record in self._book.records() if "reasons" in record]

  def plan(self, key: str) -> Plan:
    """Returns the plan of a scored candidate."""
    return Plan.load(self.path(key))

  def path(self, key: str) -> pathlib.Path:
    """Returns where the plan of a scored candidate is."""
    return self._plans / f"{key}.json"

  def _measure(self, key: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    plan = hybridlm.plan(self.judge.cfg, self._scores, targets)
    losses = self._score(plan)
    plan.save(self.path(key))
    costs = self.judge.limits.costs(plan.small_config())
    return {**costs, **losses, "plan": f"plans/{key}.json"}


def by_rule(reasons: Iterable[Iterable[str]]) -> dict[str, int]:
  """Returns how many candidates broke each rule, most first; one may break several."""
  found: dict[str, int] = {}
  for broken in reasons:
    for name in {rule(reason) for reason in broken}:
      found[name] = found.get(name, 0) + 1
  return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
