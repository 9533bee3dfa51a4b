"""The table of a sweep: chosen numbers of every member, and their mean and spread over seeds.

A column is `STAGE.KEY`, a number in the results of a stage (`evaluate_end.distilled.kl`): the part
after the stage may begin with the name of a JSON file in its folder; `results` may be left out, and
so may parts in the middle where only one number fits. `STAGE.parameters` counts its model.
"""

import difflib
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import artefacts, report, stages
from experiments.members import Outcome
from experiments.sweeping import SEED, Member
from hybridlm import config

COLUMNS = {
  "distill": (
    "evaluate_end.distilled.parameters", "evaluate_cut.teacher.inside.bits_per_byte",
    "evaluate_cut.pruned.inside.bits_per_byte", "evaluate_end.distilled.inside.bits_per_byte",
    "evaluate_end.distilled.outside.bits_per_byte", "evaluate_end.distilled.inside.kl",
  ),
  "evaluate": (
    "evaluate_cut.pruned.parameters", "evaluate_cut.teacher.inside.bits_per_byte",
    "evaluate_cut.pruned.inside.bits_per_byte", "evaluate_cut.pruned.outside.bits_per_byte",
    "evaluate_cut.pruned.inside.kl",
  ),
  "search": (
    "search.front.counts.scored", "search.winner.parameters", "search.winner.memory_bytes",
    "search.winner.kl", "search.winner.valid_kl", "search.winner.valid_ce",
  ),
  "prune": ("teacher.parameters", "cut.parameters", "cut.verified.masked_against_cut"),
  "calibrate": ("teacher.parameters",),
  "assess": (
    "teacher.parameters", "assess.text.bits_per_byte", "assess.recall.accuracy",
    "assess.state.state_bytes",
  ),
}
# Of every artefact: how it was made, and what its model is.
_APART = ("inputs.json", "done.json")
_FRONT = "front.json"  # of a search: its winner, and what short distillations came to


def numbers(job: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
  """Returns every number that the stages of a job left, by `STAGE.FILE.KEY`.

  Stages that workdirs share are read from the cache; `STAGE.parameters` counts a stage's model.
  """
  found: dict[str, float] = {}
  for name, stage in folders(job, cache).items():
    for path in sorted(stage.glob("*.json")):
      if path.name not in _APART:
        flat = stages.flat({name: {path.stem: artefacts.read_json(path)}})
        found |= {key: value for key, value in flat.items() if _number(value)}
    if (stage / artefacts.MODEL).is_dir():
      found[f"{name}.parameters"] = config.parameters(artefacts.load_model_config(stage))
    if (stage / _FRONT).is_file():
      flat = stages.flat({name: {"winner": _winner(stage)}})
      found |= {key: value for key, value in flat.items() if _number(value)}
  return found


def _winner(search: pathlib.Path) -> dict[str, Any]:
  """Returns what a search wrote about its winner: costs, masked loss, losses of its last rung."""
  front = artefacts.read_json(search / _FRONT)
  lines = (search / "candidates.jsonl").read_text(encoding="utf-8").splitlines()
  records = [record for record in map(json.loads, lines) if record["id"] == front["winner"]]
  rungs = [rung for rung in front["rungs"] if rung["id"].partition("@")[0] == front["winner"]]
  return (records[-1] if records else {}) | (rungs[-1] if rungs else {})


def folders(job: pathlib.Path, cache: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the folders of finished stages by name, those in the cache that others need too."""
  own = {path.parent.name: path.parent for path in sorted(job.glob("*/done.json"))}
  shared = {}
  for folder in own.values():
    needs = artefacts.read_record(folder / "inputs.json", {"needs": dict})["needs"]
    shared |= {name: cache / f"{name}-{made[:12]}" for name, made in needs.items()}
  return {name: path for name, path in shared.items() if (path / "done.json").is_file()} | own


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def pick(found: Mapping[str, float], column: str) -> float | None:
  """Returns the number that a column names; None where none, or more than one, fits."""
  stage, _, rest = column.partition(".")
  for key in (column, f"{stage}.results.{rest}"):
    if key in found:
      return found[key]
  parts = column.split(".")
  fitting = [key for key in found if _within(parts, key.split("."))]
  return found[fitting[0]] if len(fitting) == 1 else None


def _within(parts: Sequence[str], key: Sequence[str]) -> bool:
  """Whether a key has all parts in order, the first and the last at its ends."""
  rest = iter(key)
  return parts[0] == key[0] and parts[-1] == key[-1] and all(part in rest for part in parts)


def make(
  members: Sequence[Member], outcomes: Mapping[str, Outcome],
  found: Mapping[str, Mapping[str, float]], columns: Sequence[str],
) -> dict[str, Any]:
  """Returns the table as plain data: `members` one by one, `groups` over seeds, `unknown` columns.

  Args:
    members: the sweep, in order.
    outcomes: by name, of those that ended.
    found: by name, the numbers of those that are done.
    columns: what is shown of them.
  """
  rows, near = [], {}
  for member in members:
    outcome = outcomes.get(member.name, Outcome("not run", 0, 0.0))
    seen = found.get(member.name, {})
    values = {column: pick(seen, column) for column in columns}
    for column in columns if seen else ():
      if values[column] is None:
        near[column] = difflib.get_close_matches(column, seen, n=3, cutoff=0.0)
    rows.append({
      "name": member.name, "settings": dict(member.settings), "state": outcome.state,
      "attempts": outcome.attempts, "seconds": round(outcome.seconds, 1),
      "said": list(outcome.said), "values": values,
    })
  return {
    "columns": list(columns), "members": rows, "groups": _groups(rows, columns), "unknown": near,
  }


def _groups(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
  """Returns mean and spread of the members that differ in their seed alone."""
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for row in rows:
    if SEED in row["settings"]:
      key = tuple((name, value) for name, value in row["settings"].items() if name != SEED)
      groups.setdefault(key, []).append(row)
  made = []
  for key, held in groups.items():
    done = [row for row in held if row["state"] == "done"]
    if len(held) < 2:
      continue
    values = {}
    for column in columns:
      seen = [row["values"][column] for row in done if row["values"][column] is not None]
      values[column] = {
        "n": len(seen), "mean": statistics.fmean(seen) if seen else None,
        "spread": statistics.stdev(seen) if len(seen) > 1 else None,
      }
    made.append({
      "settings": dict(key), "seeds": [row["settings"][SEED] for row in held], "done": len(done),
      "values": values,
    })
  return made


def markdown(table: Mapping[str, Any], *, title: str, command: str) -> str:
  """Returns the table as a page: members, groups over seeds, and who failed with what words."""
  columns = table["columns"]
  keys = list(dict.fromkeys(key for row in table["members"] for key in row["settings"]))
  heads = ["member", *keys, *columns, "state", "seconds"]
  rows = [
    [row["name"], *(row["settings"].get(key, "") for key in keys),
     *(_cell(row["values"][column]) for column in columns), _state(row), f"{row['seconds']:.0f}"]
    for row in table["members"]
  ]
  lines = [f"# {title}", "", f"    {command}", "", report.table(_escaped(heads), _all(rows)), ""]
  if table["groups"]:
    keys = list(dict.fromkeys(key for group in table["groups"] for key in group["settings"]))
    rows = [
      [*(group["settings"].get(key, "") for key in keys), f"{group['done']}/{len(group['seeds'])}",
       *(_spread(group["values"][column]) for column in columns)]
      for group in table["groups"]
    ]
    heads = [*keys, "seeds done", *columns]
    lines += ["## Over seeds", "", "Mean ± standard deviation (n − 1).", "",
              report.table(_escaped(heads), _all(rows)), ""]
  failed = [row for row in table["members"] if row["state"] == "failed"]
  if failed:
    lines += ["## Failed", ""]
    for row in failed:
      lines += [f"* {row['name']}, after {row['attempts']} attempts:", ""]
      lines += [*(f"      {line}" for line in row["said"]), ""]
  for column, near in table["unknown"].items():
    lines += [f"No member has the column {column!r}; nearest: {', '.join(near)}.", ""]
  return "\n".join(lines)


def _state(row: Mapping[str, Any]) -> str:
  """Returns how a member ended, and that it crashed before where it did."""
  again = f", {row['attempts']} attempts" if row["attempts"] > 1 else ""
  return f"{row['state']}{again}"


def _all(rows: Sequence[Sequence[str]]) -> list[list[str]]:
  return [_escaped(row) for row in rows]


def _escaped(cells: Sequence[str]) -> list[str]:
  return [cell.replace("|", r"\|") for cell in cells]


def _cell(value: float | None) -> str:
  if value is None:
    return "–"
  return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:.4g}"


def _spread(value: Mapping[str, Any]) -> str:
  spread = value["spread"]
  return _cell(value["mean"]) + ("" if spread is None else f" ± {spread:.2g}")
