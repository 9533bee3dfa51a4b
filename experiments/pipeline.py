"""The main job: teacher, scores, plan, cut, distillation, baselines, evaluation, as stages."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from experiments import (
  calibration,
  census,
  cli,
  lessons,
  observing,
  outcome,
  processes,
  pruning,
  report,
  rounds,
  searching,
  settings,
  stages,
  storing,
  teaching,
)
from experiments.settings import Setup
from experiments.stages import Stage
from hybridlm.train import mesh as meshes


def build(s: Setup) -> list[Stage]:
  """Returns the stages of the main job, in order.

  Makers of stages know plain names alone ("teacher", "cut"). Where a corrected teacher, the student
  of the round before or a repaired cut takes that place, `stages.rewired` hands it to them. What
  trains does so on the devices of all processes, all else on those of the process that runs it.
  """
  alone = _alone(s)
  made = [teaching.teacher(s), teaching.correct(s)]
  source = "correct" if s.c.correct.run == "before" else "teacher"  # what is scored and cut
  taught = "teacher" if s.c.correct.run == "none" else "correct"  # what is distilled from
  studied = source
  before = {"teacher": "teacher"} | ({} if taught == "teacher" else {"corrected": taught})
  plans: list[str] = []  # of every cut so far
  for number, each in enumerate(s.rounds, 1):
    name = rounds.label(number)
    cutting, left = _shrink(_alone(each), source, f"{name}_")
    plans.append(f"{name}_plan")
    made += [*cutting, *_distil(each, taught, left, f"{name}_", plans)]
    before |= {f"{name}_{key}": f"{name}_{stage}" for key, stage in _stops(each).items()}
    before[f"{name}_distilled"] = source = f"{name}_distil"
  cutting, left = _shrink(alone, source, "")
  before |= _stops(s)
  made += [
    *cutting, outcome.ngrams(alone), outcome.evaluate(alone, "evaluate_cut", before),
    *_distil(s, taught, left, "", [*plans, "plan"]),
    stages.rewired(outcome.export(alone), {"teacher": taught}),
  ]
  trained = {"distilled": "distil"}
  made += _scratch(s)
  if s.c.scratch.run == "same":
    trained["scratch"] = "scratch"
  made.append(stages.rewired(outcome.study(alone), {"teacher": studied}))
  made = [stage for stage in made if stage is not None]
  made.append(outcome.evaluate(alone, "evaluate_end", trained, timed=before | trained))
  return [*made, outcome.write_report(alone, made, before | trained)]


def _alone(s: Setup) -> Setup:
  """Returns the same on the devices of this process only."""
  return dataclasses.replace(s, grid=meshes.own(s.grid))


def _shrink(s: Setup, source: str, prefix: str) -> tuple[list[Stage | None], str]:
  """Returns the stages of one cut, their names prefixed, and the name of what they leave.

  Args:
    s: what is cut, and how.
    source: the stage whose model is scored and cut.
    prefix: of a round, such as "round1_".
  """
  scored, planned = calibration.stage(s), pruning.plan(s)
  # A manifest that is replayed needs no scores: a wrong one is found before they are computed.
  replayed = s.c.plan.path and s.c.plan.path != settings.SEARCH
  first = [planned, scored] if replayed else [scored, *_search(s), planned]
  made = [*first, pruning.cut(s), pruning.repair(s)]
  names = {stage.name: f"{prefix}{stage.name}" for stage in made if stage is not None}
  left = names.get("repair", names["cut"])
  return [stages.rewired(each, names | {"teacher": source}) for each in made], left


def _search(s: Setup) -> list[Stage]:
  """Returns the stages of the search, where its best is the plan."""
  return searching.stages(s) if s.c.plan.path == settings.SEARCH else []


def _distil(
  s: Setup, teacher: str, small: str, prefix: str, plans: Sequence[str]
) -> list[Stage]:
  """Returns the stages of a distillation, one a run, their names prefixed."""
  runs = lessons.setups(s)
  brought, who = lessons.teachers(runs, s, prefix, teacher, teaching.teacher)
  made = [teaching.distil(each, tuple(plans)) for each in runs]
  wiring = [{"teacher": name, "cut": small} for name in who]
  return [*brought, *lessons.chained(made, prefix, wiring, start="cut")]


def _scratch(s: Setup) -> list[Stage]:
  """Returns the stages of the baseline, one for each of the distillation's runs."""
  runs = lessons.setups(s)
  made = [teaching.scratch(each, goes_on=number > 0) for number, each in enumerate(runs)]
  made = [stage for stage in made if stage is not None]
  return lessons.chained(made, "", [{}] * len(made), start="before") if made else []


def _stops(s: Setup) -> dict[str, str]:
  """Returns the models between a cut and its distillation: name in the report -> stage."""
  return {"pruned": "cut"} | ({} if s.c.repair.run == "none" else {"repaired": "repair"})


def until(made: Sequence[Stage], *names: str) -> list[Stage]:
  """Returns the named stages and everything they need, in order."""
  wanted = set(names)
  for stage in reversed(made):
    if stage.name in wanted:
      wanted |= set(stage.needs)
  return [stage for stage in made if stage.name in wanted]


def dry_run(s: Setup, made: list[Stage], workdir: pathlib.Path) -> str:
  """Returns what a run would do: what a search chooses from, stages and why, sizes and memory.

  Computes nothing.
  """
  searched = any(stage.name == searching.NAME for stage in made)
  lines = [census.text(s)] if searched else []
  lines += ["stages:", *("  " + line for line in stages.describe(stages.survey(made, workdir)))]
  models = {"teacher": s.cfg}
  for number, each in enumerate(s.rounds, 1):
    models |= {} if each.small is None else {f"round {number}": each.small}
  models |= {} if s.small is None else {"small model": s.small}
  sizes = report.forecast(models, length=s.c.data.length, batch=s.c.evaluate.batch)
  return "\n".join([*lines, sizes])


def execute(
  job: cli.Job, *names: str, build: Callable[[Setup], list[Stage]] = build
) -> dict[str, pathlib.Path]:
  """Runs the named stages and what they need, or says what that would do; returns the folders.

  Args:
    job: what the command line asks for.
    *names: stages; none means all of them.
    build: makes the stages; the main job's by default.

  Raises:
    ValueError: bad input; the workdir is as it was. Or what several processes cannot do.
    FileNotFoundError: the same, where a file is missing.
  """
  if job.aot is not None:
    raise ValueError(f"--aot={job.aot} is for experiments.distill: its step is what is compiled")
  config = observing.traced(job.config, job.profile, names)
  s = settings.setup(config, settings.mesh(config), cache=job.cache)
  made = build(s)
  made = until(made, *names) if names else made
  owner = {"config": s.c.name, "file": cli.origin(job.file)}
  if job.team.leads:
    storing.check_teachers(made, job.workdir)
    stages.claim(job.workdir, owner)
    _check_team(stages.survey(made, job.workdir), s, job.team)
    if job.dry_run:
      print(dry_run(s, made, job.workdir))
  if job.dry_run:
    return {}
  folders = stages.run(made, job.workdir, owner=owner, say=_say, team=job.team)
  if job.team.leads:
    for line in observing.missed(job.profile, folders):
      _say(line)
  return folders


def _check_team(
  statuses: Sequence[stages.Status], s: Setup, team: processes.Team
) -> None:
  """Raises where several processes are asked for what only one alone can do."""
  left = {each.stage.name for each in statuses if each.state != "done"}
  if team.count > 1 and s.c.search.rungs and searching.NAME in left:
    raise ValueError(f"search.rungs={tuple(s.c.search.rungs)}: finalists are distilled by one "
                     f"process, not --processes={team.count}: search first, in one; a job of "
                     "several goes on from there")


def _say(line: str) -> None:
  print(f"[hybridlm] {line}", flush=True)
