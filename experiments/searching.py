"""The search as a stage: candidates, their losses, short distillation of the best, the front.

The stage's folder is its memory. Everything a search decides follows from the config, the scores
and what is already written there, so that one that was stopped anywhere goes on to the same result.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import artefacts, hunting, limits, search_report, settings, teaching
from experiments.candidates import COSTS, RANKED, Candidates, Judge, by_rule
from experiments.course import Course
from experiments.ledger import Ledger
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm import bind
from hybridlm.config import ModelConfig
from hybridlm.prune import select, space
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores
from hybridlm.prune.search import halving, masked, pareto
from hybridlm.prune.trees import tree_hash
from hybridlm.train import mesh as meshes

NAME = "search"
RIVALS = ("largest", "targets")
VERSION = 1
LEAST = {
  "candidates": 1, "batch": 1, "batches": 1, "solutions": 1, "diversity": 1, "evolve": 0,
  "population": 1, "finalists": 1,
}


def stages(s: Setup) -> list[Stage]:
  """Returns the stage that searches; it needs "teacher" and "calibrate".

  Its folder holds `plan.json` (the best), `candidates.jsonl`, `plans`, `front.json`, `search.md`
  and `pareto.png`.

  Raises:
    ValueError: values of `search` that are out of range or cannot go together.
  """
  run = s.c.search
  check(s)
  last = s.c.evaluate
  trained = {
    "distil": teaching.recipe(s.c.distil), "data": s.train_data(s.c.distil, s.c.seed + 1),
    "test": s.held_out_data(s.inside, last.split, last, last.batches),
  }
  values = {
    "search": {k: v for k, v in settings.plain(run).items() if k != "winner"},
    "budget": settings.plain(s.c.budget), "rules": settings.plain(s.c.rules),
    "targets": settings.written(settings.targets(s.c)) if "targets" in run.rivals else None,
    "trained": trained if run.rungs else None, "seed": s.c.seed,
    "valid": s.held_out_data(s.inside, run.split, run, run.batches),
  }
  make = functools.partial(search, s)
  return [Stage(NAME, values, make, needs=("teacher", "calibrate"), version=VERSION)]


def check(s: Setup) -> None:
  """Raises where values of `search` are out of range or cannot go together.

  Raises:
    ValueError: names the key, its value and the rule.
  """
  run = s.c.search
  for key, least in LEAST.items():
    if run[key] < least:
      raise ValueError(f"search.{key}={run[key]} must be at least {least}")
  for key, known in (("score", RANKED), ("method", hunting.METHODS)):
    if run[key] not in known:
      raise ValueError(f"search.{key}={run[key]!r} is not one of {', '.join(known)}")
  rungs = tuple(run.rungs)
  if any(type(step) is not int or step < 1 for step in rungs) or list(rungs) != sorted(set(rungs)):
    raise ValueError(f"search.rungs={rungs}: steps must rise from at least 1")
  for rival in run.rivals:
    if rival not in RIVALS:
      raise ValueError(f"search.rivals: {rival!r} is not one of {', '.join(RIVALS)}")
  if run.rivals and not rungs:
    raise ValueError(f"search.rivals={tuple(run.rivals)}: without search.rungs they do not train")
  if run.batch % meshes.rows(s.grid):
    raise ValueError(f"search.batch={run.batch} is not a multiple of "
                     f"mesh.data × mesh.fsdp={meshes.rows(s.grid)}")


class Losses:
  """The losses of plans, on the job's devices; the first one asked for compiles the program."""

  def __init__(self, s: Setup, cfg: ModelConfig, params: Mapping[str, Any]):
    self._s, self._cfg, self._params = s, cfg, params
    self._scorer: masked.Scorer | None = None

  def __call__(self, plan: Plan) -> dict[str, float]:
    """Returns "kl", "ce" and "agree"."""
    with jax.set_mesh(self._s.grid):  # kernels divide their work over it
      self._scorer = self._scorer or self._make()
      return self._scorer(plan)

  def clear(self) -> None:
    """Gives back what the devices hold for it."""
    self._scorer = None

  def _make(self) -> masked.Scorer:
    s, run = self._s, self._s.c.search
    held = s.held_out(s.inside, run.split, run, run.batches)
    shards = meshes.shardings(s.grid, self._params, meshes.RULES)
    return masked.Scorer(
      self._cfg, bind.apply_hidden, jax.device_put(self._params, shards),
      [meshes.shard_batch(s.grid, batch) for batch in held])


def search(s: Setup, folder: pathlib.Path, inputs: Inputs) -> None:
  """Runs the stage: what is written in the folder already is not done again.

  Raises:
    ValueError: scores of another model, an empty space, a budget that nothing fits.
  """
  cfg, params = artefacts.load_model(inputs["teacher"])
  scores = Scores.load(inputs["calibrate"] / "scores.npz")
  own(params, scores)
  run = s.c.search
  judge = Judge(cfg, limits.of(s, cfg), scores)
  sizes = hunting.spread(cfg, run)
  losses = Losses(s, cfg, params)
  candidates = Candidates(folder, judge, scores, losses, run.score)
  others = _rivals(s, judge)  # one that does not fit is found before anything is scored
  hunt(s, folder, candidates, sizes, lambda targets: losses(select.plan(cfg, scores, targets)))
  rivals = {name: candidates.look(targets, name)["id"] for name, targets in others.items()}
  losses.clear()
  best = [r for r in candidates.scored() if r["origin"] not in RIVALS][: run.finalists]
  if not best:
    raise ValueError("search: no candidate fits the budget and the rules: "
                     + hunting.said(r["reasons"] for r in candidates.rejected()))
  course = _course(s, (cfg, params), folder) if run.rungs else None
  ranks = compete(course, candidates, [record["id"] for record in best], run.rungs)
  for name in rivals.values() if course else ():
    course.train(name, functools.partial(candidates.plan, name), run.rungs[-1])
  found = results(folder, candidates, ranks, rivals, run.rungs)
  candidates.plan(found["winner"]).save(folder / "plan.json")
  artefacts.write_json(folder / "front.json", found)
  search_report.write(folder, found, candidates, name=s.c.name, limits=judge.limits)
  if course:
    course.clear()


def own(params: Mapping[str, Any], scores: Scores) -> None:
  """Raises unless scores are of these parameters.

  Raises:
    ValueError: they are another model's.
  """
  hashes = tree_hash(params), scores.meta["parameters"]
  if hashes[0] != hashes[1]:
    raise ValueError(f"search: the scores are of parameters {hashes[1][:12]}, the teacher's are "
                     f"{hashes[0][:12]}: calibrate this teacher")


def hunt(s: Setup, folder: pathlib.Path, candidates: Candidates, sizes: hunting.Space, measure):
  """Proposes and scores candidates as the config says; afterwards `candidates` holds all of them.

  Args:
    s: the job.
    folder: takes what is measured on the way.
    candidates: takes the candidates.
    sizes: the space.
    measure: targets -> losses.
  """
  run, judge = s.c.search, candidates.judge
  book = Ledger(folder / "replacements.jsonl")
  if isinstance(sizes, space.Blockwise):
    blocks = hunting.Blocks(judge, sizes)
    alone = hunting.replacements(blocks, book, measure, run.score)
    start = blocks.solutions(
      alone, run, lambda genes: candidates.fits(sizes.targets(genes), "milp"))
    found = [sizes.targets(genes) for genes in start]
  else:
    found = hunting.first(judge, sizes, run, s.c.seed)
    book.once("parent", lambda: {"targets": {}, **measure({})})
    start = [sizes.genes(targets) for targets in found]
  for targets in found:
    candidates.look(targets, run.method)
  hunting.evolved(candidates, sizes, start, run, s.c.seed)


def _rivals(s: Setup, judge: Judge) -> dict[str, dict[str, Any]]:
  """Returns the targets of every rival.

  Raises:
    ValueError: one that does not fit.
  """
  found, run = {}, s.c.search
  for name in run.rivals:
    if name == "largest":
      targets = hunting.largest(judge, space.Uniform(space.check(judge.cfg, run.space.to_dict())))
    else:
      targets = settings.written(settings.targets(s.c))
    reasons = judge.reasons(targets) if targets else ["no uniform sizes fit"]
    if reasons:
      raise ValueError(f"search.rivals: {name!r} does not fit: {'; '.join(reasons)}")
    found[name] = targets
  return found


def _course(s: Setup, teacher: tuple[Any, Any], folder: pathlib.Path) -> Course:
  run, last = s.c.search, s.c.evaluate
  held = {
    "valid": s.held_out(s.inside, run.split, run, run.batches),
    "test": s.held_out(s.inside, last.split, last, last.batches),
  }
  return Course(s, teacher, folder / "course", Ledger(folder / "rungs.jsonl"), held)


def compete(
  course: Course | None, candidates: Candidates, names: list[str], rungs: tuple[int, ...]
) -> list[halving.Rung]:
  """Returns the rungs of successive halving by cross-entropy; without a course, none."""
  if course is None:
    return [halving.Rung(0, tuple((name, 0.0) for name in names))]

  def train(name: str, steps: int) -> float:
    return course.train(name, functools.partial(candidates.plan, name), steps)["valid_ce"]

  return halving.run(names, tuple(rungs), train)


def results(
  folder: pathlib.Path, candidates: Candidates, ranks: list[halving.Rung],
  rivals: Mapping[str, str], rungs: tuple[int, ...],
) -> dict[str, Any]:
  """Returns what `front.json` holds: winner, rungs, rivals, fronts and what was refused."""
  scored = candidates.scored()
  trained = {r["id"]: r for r in Ledger(folder / "rungs.jsonl").records()}
  by_id = {record["id"]: record for record in scored}
  last = ranks[-1]
  distilled = [(name, trained[f"{name}@{last.steps}"]["valid_ce"]) for name, _ in last.places
               if last.steps]
  rejected = by_rule(r["reasons"] for r in candidates.rejected())
  return {
    "winner": last.places[0][0],
    "ranked": candidates.ranked,
    "parent": Ledger(folder / "replacements.jsonl").find("parent"),
    "finalists": [name for name, _ in ranks[0].places],
    "rungs": [r for r in trained.values()],
    "rivals": dict(rivals),
    "front": {
      "masked": front([(r["id"], r[candidates.ranked]) for r in scored], by_id),
      "distilled": front(distilled, by_id),
    },
    "counts": {"scored": len(scored), "rejected": len(candidates.rejected()), "by_rule": rejected},
  }


def front(
  losses: list[tuple[str, float]], records: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """Returns the names of candidates that nothing beats in loss and every cost that is known."""
  if not losses:
    return []
  names = [name for name in COSTS if records[losses[0][0]][name] is not None]
  table = [[loss, *(records[key][name] for name in names)] for key, loss in losses]
  return [losses[index][0] for index in pareto.front(np.asarray(table, np.float64))]
