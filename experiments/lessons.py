"""Distillation in several runs: what each says, and the stages of one after the other."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import artefacts, checks, exchange, rounds, settings, stages
from experiments.mistakes import about
from experiments.settings import Setup
from experiments.stages import Stage
from experiments.training import LOG
from hybridlm.train import together

# What a run may say beside the keys of `distil`: these of `data`, and who teaches instead.
TEXT = ("length", "phases")
TEACHER = "teacher"
# Seeds of runs lie so far apart that no other of the job's lies between two of one run.
_SEEDS = 100
# Means of a run's time are weighed by the time its steps took.
_MEANS = ("mfu", "teacher_mfu", "model_flops_per_second", "teacher_flops_per_second")


def setups(s: Setup) -> list[Setup]:
  """Returns the same job once for every run of its distillation: one, or those of `distil.stages`.

  What a run does not say is as the config has it; its batches are its own.

  Raises:
    ValueError: not a tuple of tables, an unknown key, or a value that cannot be; names the run.
  """
  given = s.c.distil.stages
  if isinstance(given, (str, Mapping, ConfigDict)):
    said = " ".join(str(given).split())
    raise ValueError(f"distil.stages={said} is not a tuple of runs")
  if not given:
    return [s]
  return [_setup(s, each, number) for number, each in enumerate(given, 1)]


def _setup(s: Setup, given: Any, number: int) -> Setup:
  place = f"distil.stages: stage {number}"
  said = rounds.table(given, place)
  with about(place):
    own = (key for key in s.c.distil if key != "stages")
    rounds.known(said, (*own, *TEXT, TEACHER), "")
    one = ConfigDict(s.c.to_dict())
    one.distil.stages = ()
    for key, value in said.items():
      if key == TEACHER:
        rounds.put(one.teacher, "path", value, "teacher")
      else:
        part = "data" if key in TEXT else "distil"
        rounds.put(one[part], key, value, part)
    one.seed = s.c.seed + _SEEDS * (number - 1)
    one.scratch.peak = s.c.scratch.peak * one.distil.peak / s.c.distil.peak
    checks.values(one, s.grid)
    settings.optimizer(one.distil)
    text = s.corpus.mixed(one.data.phases)
    checks.texts(one, text)
    made = dataclasses.replace(s, c=one, corpus=text)
    return _taught(made) if TEACHER in said else made


def _taught(s: Setup) -> Setup:
  """Returns a run with the teacher that its `teacher.path` names in the place of the job's.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, reads other ids, or cannot be compared as the run asks for.
  """
  source = exchange.located(TEACHER, s.c.teacher.path)
  name = s.c.data.tokenizer if s.source is None else str(s.source)
  cfg = settings.imported(s.c, source, s.corpus.tokenizer.V)
  checks.tokenizer(name, source, s.corpus)
  if cfg.real_vocabulary != s.cfg.real_vocabulary:
    raise ValueError(f"{TEACHER}={s.c.teacher.path!r} predicts {cfg.real_vocabulary} tokens, the "
                     f"job's teacher {s.cfg.real_vocabulary}: they must share a vocabulary")
  if s.c.distil.intermediate and (cfg.D, cfg.blocks) != (s.cfg.D, s.cfg.blocks):
    raise ValueError(f"{TEACHER}={s.c.teacher.path!r} has not the sizes of the job's teacher, by "
                     f"which distil.intermediate={tuple(s.c.distil.intermediate)} is aligned")
  names = (s.c.mesh.layout, s.c.mesh.teacher_layout or s.c.mesh.layout)
  checks.layout(cfg, s.grid, "the teacher", names)
  return dataclasses.replace(s, source=source, cfg=cfg)


def teachers(
  runs: Sequence[Setup], s: Setup, prefix: str, name: str, bring: Callable[[Setup], Stage]
) -> tuple[list[Stage], list[str]]:
  """Returns the stages of teachers that runs have of their own, and who teaches each run.

  Args:
    runs: as `setups` gives them.
    s: the job.
    prefix: of the stages' names.
    name: of the stage whose model teaches the other runs.
    bring: makes the stage of a setup's teacher.
  """
  made, who = [], []
  for number, each in enumerate(runs, 1):
    own = f"{prefix}teacher_stage{number}"
    if each.source != s.source:
      made.append(stages.rewired(bring(each), {TEACHER: own}))
    who.append(name if each.source == s.source else own)
  return made, who


def names(prefix: str, name: str, count: int) -> list[str]:
  """Returns what the stages of so many runs are called; the last has the plain name."""
  return [*(f"{prefix}{name}_stage{n}" for n in range(1, count)), f"{prefix}{name}"]


def chained(
  made: Sequence[Stage], prefix: str, wiring: Sequence[Mapping[str, str]], *, start: str
) -> list[Stage]:
  """Returns the stages of one run after the other.

  Args:
    made: a stage a run, of one name.
    prefix: of their names.
    wiring: of each: plain name -> the one in this pipeline.
    start: the plain name of what a run starts from; of every run but the first it is the run
      before.
  """
  found: list[Stage] = []
  called = names(prefix, made[0].name, len(made))
  for stage, name, known in zip(made, called, wiring, strict=True):
    before = {start: found[-1].name} if found else {}
    found.append(stages.rewired(stage, {**known, **before, stage.name: name}))
  return found


def go_on(folder: pathlib.Path, before: pathlib.Path) -> None:
  """Makes the log of a run go on where that of the run before it ended, if there is one.

  Process 0 writes it.
  """
  if not together.writes() or not (before / LOG).is_file():
    return
  old, new = (artefacts.read_json(place / LOG) for place in (before, folder))
  if "stages" in new["summary"]:
    return
  first, last = old["summary"], new["summary"]
  merged = {
    name: [*old[name], *({**each, "tokens": each["tokens"] + first["tokens"]} for each in points)]
    for name, points in new.items() if name != "summary"
  }
  summed = {name: first[name] + last[name] for name in ("steps", "tokens", "seconds")}
  merged["summary"] = last | summed | {
    "tokens_per_second": summed["tokens"] / summed["seconds"],
    "stages": [*first.get("stages", [first]), last],
  }
  if "time" in first and "time" in last:
    merged["summary"]["time"] = _times(first["time"], last["time"])
  artefacts.write_json(folder / LOG, merged)


def _times(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
  """Returns where the time of two runs went, see `observing.split`."""
  found = {}
  for name in one.keys() & other.keys():
    if name in _MEANS:
      whole = one["stepping"] + other["stepping"]
      found[name] = sum(each[name] * each["stepping"] for each in (one, other)) / whole
    elif name.endswith("memory_bytes"):
      found[name] = max(one[name], other[name])
    else:
      found[name] = one[name] + other[name]
  return found
