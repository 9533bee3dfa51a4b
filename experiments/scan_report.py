"""The benchmark's results as a Markdown page, CSV tables, JSON and a picture."""

import csv
import io
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from experiments import artefacts
from experiments.roofline import PASSES

MIB = 2**20
CONVENTION = (
  "FLOP/s count the useful matrix products, L (G 2QN + G H (2QP + 4NP)), with whole Q x Q blocks "
  "of the contender's own chunk Q and C B^T once a group; a forward with its backward counts three "
  "times. Bytes are those that must move: arguments once in each direction, results once. Shares "
  "are of rates measured in the same run; the roofline is the longer of both times. Error: the "
  "largest of y and five gradients against the token-by-token recurrence, ||got - want|| / "
  "||want||. Temporary: the program's peak beside arguments and results, as compiled."
)


def markdown(results: Mapping[str, Any], *, command: str, machine: str) -> str:
  """Returns the whole page."""
  parts = [["# The SSD scan", "", f"    {command}", "", f"Made on {machine}."]]
  if results["times"]:
    parts += [rates(results["peaks"]), times(results["times"]), left_out(results["times"])]
  if results["ratios"]:
    parts.append(compared(results["ratios"]))
  if results["memory"]:
    parts.append(memory(results["memory"]))
  if results["ahead"]:
    parts.append(ahead(results["ahead"]))
  return "\n".join(line for part in parts if part for line in (*part, ""))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Returns the lines of a Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return [f"| {' | '.join(line)} |" for line in lines]


def rates(peaks: Mapping[str, Mapping[str, float]]) -> list[str]:
  """Returns the measured rates by dtype."""
  rows = [
    [dtype, *(f"{found[key] / 1e9:.0f}" for key in ("matmul", "batched", "memory"))]
    for dtype, found in peaks.items()
  ]
  header = ["dtype", "one large product, GFLOP/s", "batched products, GFLOP/s", "memory, GB/s"]
  return ["## Measured rates", "", *table(header, rows)]


def times(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the table of everything that was timed."""
  header = ["shape", "L", "dtype", "pass", "contender", "Q", "ms", "tokens/s", "GFLOP/s",
            "of large product", "of batched", "of memory", "of roofline", "temporary MiB", "error"]
  lines = []
  for row in rows:
    if row["status"] != "ok":
      continue
    temporary = "" if row["temporary"] is None else f"{row['temporary'] / MIB:.1f}"
    shares = (f"{row[key]:.0%}" for key in ("of_matmul", "of_batched", "of_memory", "of_roofline"))
    lines.append([
      row["shape"], str(row["L"]), row["dtype"], row["pass"], row["contender"], str(row["chunk"]),
      f"{1e3 * row['seconds']:.2f}", f"{row['tokens_a_second']:.0f}",
      f"{row['flops_a_second'] / 1e9:.1f}", *shares, temporary, f"{row['error']:.0e}",
    ])
  return ["## Times", "", CONVENTION, "", *table(header, lines)]


def left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns a line for each contender that was not timed somewhere, with its reason."""
  found: dict[tuple[str, str], dict[str, None]] = {}
  for row in rows:
    if row["status"] != "ok":
      where = f"{row['shape']} L={row['L']} {row['dtype']}"
      found.setdefault((row["contender"], row["status"]), {})[where] = None
  every = len({(row["shape"], row["L"], row["dtype"]) for row in rows})
  lines = []
  for (label, reason), where in found.items():
    places = "everywhere" if len(where) == every else ", ".join(where)
    lines.append(f"* `{label}`, {places}: {reason}")
  return ["Not measured:", "", *lines] if lines else []


def compared(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns how many times faster each of ours is than each peer."""
  header = ["ours", "peer", "dtype", "pass", "cases", "times faster", "smallest", "where"]
  lines = [
    [row["ours"], row["peer"], row["dtype"], row["pass"], str(row["cases"]), f"{row['mean']:.2f}",
     f"{row['smallest']:.2f}", row["where"]]
    for row in rows
  ]
  about = "Geometric means over the cases above; medians of calls that took turns."
  return ["## Against peers", "", about, "", *table(header, lines)]


def memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns peak temporary bytes beside those of an uncontracted scan."""
  header = ["shape", "L", "dtype", "pass", "contender", "temporary MiB", "[b,c,l,s,h,n] GiB",
            "share"]
  lines = [
    [row["shape"], str(row["L"]), row["dtype"], row["pass"], row["contender"],
     f"{row['temporary'] / MIB:.1f}", f"{row['formula'] / 2**30:.0f}", f"1/{row['times']:.0f}"]
    for row in rows
  ]
  about = (
    "Peak bytes beside arguments and results, as this device's compiler gives them, and the "
    "float32 array [b, c, l, s, h, n] that an uncontracted scan holds."
  )
  return ["## Peak temporary memory", "", about, "", *table(header, lines)]


def ahead(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns what the compilers of chips that are not here report, a line for all lengths."""
  groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
  lines, notes = [], []
  for row in rows:
    if "missing" in row:
      notes.append(f"* {row['target']}: {row['missing']}")
    elif "error" in row:
      notes.append(f"* {row['target']} `{row['name']}` {row['shape']} L={row['L']} {row['dtype']} "
                   f"{row['passes']} does not compile: {row['error']}")
    else:
      key = (row["target"], row["name"], row["shape"], row["dtype"], row["passes"])
      groups.setdefault(key, []).append(row)
  for (target, name, shape, dtype, passes), found in groups.items():
    largest = max(found, key=lambda row: row["L"])
    lengths = ", ".join(str(row["L"]) for row in found)
    sizes = [f"{largest[key] / MIB:.0f}" for key in
             ("arguments", "outputs", "temporaries", "algorithm")]
    lines.append([target, name, shape, dtype, passes, lengths, *sizes, kernels(found),
                  f"{sum(row['seconds'] for row in found) / len(found):.1f}", "not measured"])
  header = ["target", "implementation", "shape", "dtype", "pass", "compiles at L",
            "arguments MiB", "outputs MiB", "temporaries MiB", "algorithm MiB", "kernels",
            "seconds to compile", "time"]
  about = (
    "Compiled on a CPU host by the chips' own compilers, for one chip. MiB at the largest L. "
    "Algorithm: the bytes that any implementation must move. Kernels, the largest over all L: VMEM "
    "on a TPU; registers a thread, bytes spilled and shared memory a block on a GPU."
  )
  made = table(header, lines) if lines else []
  return ["## Compiled for chips that are not here", "", about, "", *made, "", *notes]


def kernels(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns each kernel of a program with the most that it takes at any length.

  Lengths may order them differently: one of a name, threads and shared memory is the same one.
  """
  most: dict[tuple, dict[str, int]] = {}
  for row in rows:
    seen = []
    for kernel in row["kernels"]:
      same = (kernel["name"], kernel.get("threads"), kernel.get("shared"))
      key = (*same, seen.count(same))
      seen.append(same)
      numbers = {name: value for name, value in kernel.items() if name != "name"}
      before = most.setdefault(key, numbers)
      most[key] = {name: max(value, before[name]) for name, value in numbers.items()}
  return "; ".join(f"{key[0]} {_words(numbers)}" for key, numbers in most.items()) or "none"


def _words(numbers: Mapping[str, int]) -> str:
  if "vmem" in numbers:
    return f"{numbers['vmem'] / MIB:.2f} MiB"
  return (
    f"{numbers['registers']} registers, {numbers['spills']} spilled, "
    f"{numbers['shared'] / 1024:.0f} KiB"
  )


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """Returns rows as CSV, a column for each key that occurs; kernels as JSON."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(
    {key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows
  )
  return text.getvalue().encode()


def write(folder: pathlib.Path, results: Mapping[str, Any], page: str) -> None:
  """Writes `report.md`, `results.json`, a CSV a table, and `times.png` of what was timed."""
  folder.mkdir(parents=True, exist_ok=True)
  timed = [row for row in results["times"] if row["status"] == "ok"]
  if timed:
    artefacts.write_bytes(folder / "times.png", plot(timed))
    page += "\n![times](times.png)\n"
  for name in ("times", "ratios", "memory", "ahead"):
    if results[name]:
      artefacts.write_bytes(folder / f"{name}.csv", as_csv(results[name]))
  artefacts.write_json(folder / "results.json", results)
  artefacts.write_bytes(folder / "report.md", page.encode())


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """Returns a PNG of milliseconds over tokens: a column a shape, a row a pass, a line a contender.
  """
  shapes = list(dict.fromkeys(row["shape"] for row in rows))
  labels = list(dict.fromkeys((row["contender"], row["dtype"]) for row in rows))
  many = len({dtype for _, dtype in labels}) > 1
  size = (3.4 * len(shapes) + 2.2, 6.4)
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  grid = figure.subplots(len(PASSES), len(shapes), squeeze=False)
  for line, passes in zip(grid, PASSES, strict=True):
    for ax, shape in zip(line, shapes, strict=True):
      for number, (contender, dtype) in enumerate(labels):
        points = sorted(
          (row["L"], 1e3 * row["seconds"]) for row in rows
          if (row["shape"], row["pass"], row["contender"], row["dtype"])
          == (shape, passes, contender, dtype)
        )
        if points:
          ours = "@" not in contender
          ax.plot(
            *zip(*points, strict=True), marker="o" if ours else ".", lw=2.5 if ours else 1,
            color=f"C{number % 10}", ls="-" if number < 10 else "--",
            label=f"{contender} {dtype}" if many else contender,
          )
      ax.set_xscale("log", base=2)
      ax.set_yscale("log")
      ticks = sorted({row["L"] for row in rows if row["shape"] == shape})
      ax.set_xticks(ticks, [str(tick) for tick in ticks])
      ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
      for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
      ax.set_title(f"{shape}, {passes}", fontsize=9)
      ax.grid(alpha=0.3, which="both")
      ax.set_xlabel("tokens L")
    line[0].set_ylabel("ms")
  handles, names = grid[0][0].get_legend_handles_labels()
  figure.legend(handles, names, loc="outside right upper", fontsize=8)
  picture = io.BytesIO()
  figure.savefig(picture, dpi=110, format="png")
  return picture.getvalue()
