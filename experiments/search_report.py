"""What a search found, for a reader: finalists and rivals in tables, the front in pictures."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.figure

from experiments import artefacts, report
from experiments.candidates import Candidates
from experiments.limits import Limits

# Costs in the pictures and tables: name -> (words, unit size).
AXES = {
  "parameters": ("million parameters", 1e6), "memory_bytes": ("memory, MB", 1e6),
  "prefill_seconds": ("prefill, ms", 1e-3), "decode_seconds": ("a decoding step, ms", 1e-3),
}
PLAIN, FRONT, BEST = "#a0aec0", "#2b6cb0", "#dd6b20"
WORDS = {"kl": "KL", "ce": "cross-entropy"}
ORIGINS = {"milp": "programme", "evolve": "evolution"}


def targets(found: Mapping[str, Any], blocks: int | None = None) -> str:
  """Returns targets in one short line: `D=160 F=288..512 by block blocks=6`."""
  said = []
  for name, value in found.items():
    if isinstance(value, Mapping):
      sizes = sorted(set(value.values()))
      said.append(f"{name}={sizes[0]}" + (f"..{sizes[-1]}" if len(sizes) > 1 else "") + " by block")
    elif isinstance(value, list):
      said.append(f"{name}={len(value)}" + (f" of {blocks}" if blocks else ""))
    else:
      said.append(f"{name}={value}")
  return " ".join(said) or "the parent's sizes"


def cost(record: Mapping[str, Any], name: str) -> str:
  """Returns one cost of a candidate as a cell; a dash where it is not known."""
  if record[name] is None:
    return "–"
  if name == "parameters":
    return f"{record[name]:,}"
  value = record[name] / AXES[name][1]
  return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def costs_header() -> list[str]:
  """Returns the columns of `cost`, in order."""
  return ["parameters", *(words for words, _ in list(AXES.values())[1:])]


def write(
  folder: pathlib.Path, found: Mapping[str, Any], candidates: Candidates, *, name: str,
  limits: Limits,
) -> None:
  """Writes `search.md`, `picks.md` where there are rivals, and `pareto.png` into a folder.

  Args:
    folder: of the search.
    found: what `front.json` holds.
    candidates: everything that was looked at.
    name: of the config.
    limits: what was asked for.
  """
  records = {record["id"]: record for record in candidates.scored()}
  pareto(found, records, folder / "pareto.png")
  count = found["counts"]
  refused = ", ".join(f"{rule} {n:,}" for rule, n in count["by_rule"].items())
  lines = [
    f"# Search: {name}", "",
    f"Budget: {limits.budget}. {count['scored']:,} candidates scored, {count['rejected']:,} "
    f"rejected{f' (by rule: {refused})' if refused else ''}. The parent's cross-entropy on the "
    f"same tokens is {found['parent']['ce']:.3f} nats.", "",
    finalists(found, records), "", "![front](pareto.png)", "",
    "On the front are candidates that no other one matches in loss and every cost and beats in "
    "one: of all that were scored, "
    f"{len(found['front']['masked'])}; of the finalists after the last rung, "
    f"{len(found['front']['distilled'])}.", "",
  ]
  if found["rivals"]:
    text = picks(found, records)
    artefacts.write_bytes(folder / "picks.md", (text + "\n").encode())
    lines += ["## Against other rules", "", text, ""]
  artefacts.write_bytes(folder / "search.md", "\n".join(lines).encode())


def _rungs(found: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
  return {(rung["id"].partition("@")[0], rung["steps"]): rung for rung in found["rungs"]}


def finalists(found: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the table of finalists, the winner first, then by how far they came."""
  rungs = _rungs(found)
  steps = sorted({step for _, step in rungs})
  order = sorted(
    found["finalists"],
    key=lambda key: (key != found["winner"], -sum((key, step) in rungs for step in steps)),
  )
  rows = []
  for key in order:
    record = records[key]
    after = (f"{rungs[key, step]['valid_ce']:.3f}" if (key, step) in rungs else "–"
             for step in steps)
    front = [word for word in ("masked", "distilled") if key in found["front"][word]]
    rows.append([
      f"`{key}`" + (" (winner)" if key == found["winner"] else ""), targets(record["targets"]),
      ORIGINS.get(record["origin"], record["origin"]), *(cost(record, name) for name in AXES),
      f"{record['kl']:.3f}", f"{record['ce']:.3f}", *after, ", ".join(front) or "–",
    ])
  header = ["candidate", "sizes", "from", *costs_header(), "KL, masked", "loss, masked",
            *(f"loss after {step} steps" for step in steps), "on the front"]
  return report.table(header, rows)


def picks(found: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the table of the winner and its rivals after equal distillation, and who won."""
  rungs = _rungs(found)
  last = max(step for _, step in rungs)
  names = {"the search's pick": found["winner"]}
  names |= {RULES[name]: key for name, key in found["rivals"].items()}
  rows = [
    [rule, targets(records[key]["targets"]), *(cost(records[key], name) for name in AXES),
     f"{records[key]['ce']:.3f}", f"{rungs[key, last]['valid_ce']:.3f}",
     f"{rungs[key, last]['test_ce']:.3f}"]
    for rule, key in names.items()
  ]
  header = ["rule", "sizes", *costs_header(), "loss, masked", f"loss after {last} steps",
            "on the test split"]
  test = {rule: rungs[key, last]["test_ce"] for rule, key in names.items()}
  ours = test.pop("the search's pick")
  said = "; ".join(
    f"{'beats' if ours < loss else 'does not beat'} {rule} ({ours:.3f} against {loss:.3f} nats)"
    for rule, loss in test.items()
  )
  return report.table(header, rows) + f"\n\nOn the test split the search's pick {said}."


RULES = {"largest": "the largest that fits", "targets": "the uniform cut of the targets"}
MARKS = "x+"  # of rivals in the pictures, in their order


def pareto(
  found: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], path: pathlib.Path
) -> None:
  """Draws loss over every known cost: all candidates masked above, distilled finalists below."""
  rungs = _rungs(found)
  some = next(iter(records.values()))
  names = [name for name in AXES if some[name] is not None]
  rows: list[tuple[str, Mapping[str, float], Iterable[str]]] = [
    (f"{WORDS[found['ranked']]}, masked", {key: r[found["ranked"]] for key, r in records.items()},
     found["front"]["masked"]),
  ]
  if rungs:
    last = max(step for _, step in rungs)
    done = {key: rung["valid_ce"] for (key, step), rung in rungs.items() if step == last}
    rows.append((f"cross-entropy after {last} steps", done, found["front"]["distilled"]))
  size = (3.2 * len(names), 2.9 * len(rows))
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  grid = figure.subplots(len(rows), len(names), squeeze=False)
  rivals = {key: RULES[name] for name, key in found["rivals"].items()}
  for line, (label, losses, front) in zip(grid, rows, strict=True):
    for ax, name in zip(line, names, strict=True):
      _panel(ax, {key: (records[key][name] / AXES[name][1], loss) for key, loss in losses.items()},
             set(front), found["winner"], rivals)
      ax.set_xlabel(AXES[name][0])
      ax.ticklabel_format(useOffset=False)
      ax.locator_params(nbins=4)
    line[0].set_ylabel(f"{label}, nats")
  figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center",
                ncols=3 + len(rivals), frameon=False)
  figure.savefig(path, dpi=120, bbox_inches="tight")


def _panel(ax, points: Mapping[str, tuple[float, float]], front: set[str], winner: str,
           rivals: Mapping[str, str]) -> None:
  """Draws candidates as dots: all, those on the front, each rival, and the winner on top."""
  groups: list[tuple[str, set[str], dict[str, Any]]] = [
    ("scored", set(points) - front - set(rivals), {"color": PLAIN, "s": 12}),
    ("front", front - set(rivals), {"color": FRONT, "s": 16}),
    *((rule, {key}, {"color": "black", "s": 36, "marker": mark})
      for (key, rule), mark in zip(rivals.items(), MARKS, strict=False)),
    ("winner", {winner}, {"color": BEST, "s": 60, "marker": "*", "zorder": 3}),
  ]
  for label, keys, style in groups:
    shown = [points[key] for key in points if key in keys]
    if shown:
      ax.scatter(*zip(*shown, strict=True), label=label, **style)
