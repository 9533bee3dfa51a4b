"""Compiles a config's step for several slices and in several ways, and writes the tables.

python -m experiments.bench_aot --config=configs/nemotron_h_8b_to_4b.py [--only=v5p,h200]
    [--folder=docs/results]

What was compiled is kept in FOLDER/aot.json, case by case: TPUs and GPUs may be compiled from two
environments, one after the other. FOLDER/aot.md is written from all that is there.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from configs import base
from experiments import aot, aot_plan, artefacts, cli, console
from hybridlm.prune import devices

GIB = 2**30
HEADER = """# A step of 8B to 4B, compiled ahead of time

    python -m experiments.bench_aot --config=configs/nemotron_h_8b_to_4b.py

A step of distillation as `experiments.distill` runs it (student forward and backward, teacher
forward, divergence, AdamW) of 768 x 8192 tokens, in bfloat16 with float32 weights and moments,
compiled by the chip's own compiler on a CPU host without that chip. Nothing here has run. GiB are a
device's; FLOPs, of all devices and of products alone, are counted in the traced program, what is
computed again included; GB sent are a device's, counted in the compiled program, loops as often as
they turn, by rings; what a compiler writes as an all-reduce counts as one, also where it does no
more than gather, as on v5p: there up to twice what must be sent. The bound is the slowest of three:
products at the chip's bfloat16 peak, memory read for weights, moments and gradients, links at their
peak.
"""

CHOICE = """The config takes `block`, which fits all of these slices. Where the memory is there, as
on v5p, `--config.model.remat=dots` does fewer products twice. `unit` is for rows that do not fit.
`offload` gains nothing: this compiler keeps the inputs of nested loops on the device as well.
"""


class Case(NamedTuple):
  """One compilation: a slice, values that differ from the config's, and the first blocks it has."""

  slice: str
  values: Mapping[str, Any]
  blocks: int = 52


def _case(name: str, fsdp: int, accumulate: int, blocks: int = 52, **values: str) -> Case:
  fixed = {"mesh.fsdp": fsdp, "mesh.tensor": 1, "distil.accumulate": accumulate}
  return Case(name, fixed | {f"model.{key}": value for key, value in values.items()}, blocks)


CASES: Mapping[str, Case] = {
  "v5p": _case("v5p:4x4x4@memory", 64, 12),
  "v5e": _case("v5e:16x16@memory", 256, 3),
  "v6e": _case("v6e:16x16@memory", 256, 3),
  "h200": _case("h200:8", 8, 96),
  "unit": _case("v5p:4x4x4@memory", 64, 12, remat="unit"),
  "dots": _case("v5p:4x4x4@memory", 64, 12, remat="dots"),
  "offload": _case("v5p:4x4x4@memory", 64, 12, remat="offload"),
  "none": _case("v5p:4x4x4@memory", 64, 12, remat="none"),
  "stacked_10": _case("v5p:4x4x4@memory", 64, 12, 10),
  "unrolled_10": _case("v5p:4x4x4@memory", 64, 12, 10, stack="none"),
  "v5p_program": _case("v5p:4x4x4", 64, 12),
}


def main(argv: Sequence[str]) -> None:
  """Compiles the cases that are asked for and writes records and tables."""
  values = flags.FlagValues()
  flags.DEFINE_list("only", list(CASES), "Cases to compile.", flag_values=values)
  flags.DEFINE_string("folder", "docs/results", "Where tables go.", flag_values=values)
  if cli.read(values, argv, like=base.get_config()) is None:
    return
  folder = pathlib.Path(values.folder)
  path = folder / "aot.json"
  records = artefacts.read_json(path) if path.is_file() else {}
  for name in values.only:
    if name not in CASES:
      raise ValueError(f"case {name!r} is not one of {', '.join(CASES)}")
    given = order(values.config, CASES[name])
    report = aot.compiled(given)
    print(aot.text(given, report), flush=True)
    records[name] = {"order": short(given), "report": report}
    artefacts.write_json(path, records)
  artefacts.write_bytes(folder / "aot.md", page(records).encode())


def order(c: ConfigDict, case: Case) -> dict[str, Any]:
  """Returns the order of a case of a config."""
  changed = ConfigDict(c.to_dict())
  changed.update_from_flattened_dict(case.values)
  given = aot_plan.order(changed, case.slice)
  for key in ("student", "teacher"):
    given[key]["blocks"] = given[key]["blocks"][: case.blocks]
  return given


def short(given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns an order without all that the tables do not read."""
  kept = {key: given[key] for key in ("slice", "until", "mesh", "length")}
  kept["run"] = {key: given["run"][key] for key in ("batch", "accumulate")}
  for key in ("student", "teacher"):
    kept[key] = {name: given[key][name] for name in ("stack", "remat", "dtype", "layout")}
    kept[key]["blocks"] = len(given[key]["blocks"])
  return kept


def page(records: Mapping[str, Any]) -> str:
  """Returns the page of all records."""
  whole = {name: each for name, each in records.items() if _blocks(each) == CASES["v5p"].blocks}
  slices = [name for name in ("v5p", "v5e", "v6e", "h200") if name in whole]
  kept = [name for name in ("none", "dots", "v5p", "unit", "offload") if name in whole]
  parts = [HEADER, "## Slices", "", *_table(whole, slices, "slice"), ""]
  parts += ["## What is computed again", "", *_table(whole, kept, "remat"), "", CHOICE]
  parts += ["## Stacked and unrolled", "", *_compile_table(records)]
  return "\n".join(parts) + "\n"


def _blocks(record: Mapping[str, Any]) -> int:
  return record["order"]["student"]["blocks"]


def _table(records: Mapping[str, Any], names: Sequence[str], first: str) -> list[str]:
  lines = [
    f"| {first} | devices | rows at once | weights | moments | teacher | temporaries | in all | of "
    "| fits | FLOPs | GB sent | bound, tokens/s | by |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---|",
  ]
  return lines + [_row(records[name], first) for name in names]


def _row(record: Mapping[str, Any], first: str) -> str:
  given, report = record["order"], record["report"]
  label = given["slice"] if first == "slice" else f"`{given['student']['remat']}`"
  rows = given["run"]["batch"] // (given["run"]["accumulate"] * report["devices"])
  if "error" in report:
    return f"| {label} | {report['devices']} | {rows} |" + " |" * 7 + f" {report['error'][:60]} |"
  parts = [report["parts"][key] / GIB for key in ("parameters", "moments", "teacher")]
  memory = devices.device(aot_plan.slice_of(given["slice"]).chip).memory
  limits = aot.seconds(given, report)
  slowest = max(limits, key=lambda name: limits[name])
  sent = f"{sum(report['sent'].values()) / 1e9:.0f}" if "sent" in report else "-"
  temporaries = f"{report['temporaries'] / GIB:.2f}" if "temporaries" in report else "-"
  if report.get("host", 0) > GIB / 100:
    temporaries += f" (host {report['host'] / GIB:.2f})"
  spare = (memory - aot.needs(report)) / GIB
  verdict = "yes" if spare >= 0 and "needs" not in report else f"no: {-spare:.2f} over"
  cells = [
    label, report["devices"], rows, *(f"{size:.2f}" for size in parts), temporaries,
    f"{aot.needs(report) / GIB:.2f}", f"{memory / GIB:.1f}", verdict, f"{report['flops']:.3g}",
    sent, f"{aot.tokens(given) / limits[slowest]:,.0f}", slowest,
  ]
  return f"| {' | '.join(map(str, cells))} |"


def _compile_table(records: Mapping[str, Any]) -> list[str]:
  lines = [
    "Seconds of the clock on two cores that others used at the same time, and seconds of one core,",
    "which are the machine's own. Memory is laid out first; machine code takes longer.", "",
    "| case | blocks | compiled | until | traced, s | then, s | of one core, s |",
    "|---|---:|---|---|---:|---:|---:|",
  ]
  for name, record in records.items():
    given, report = record["order"], record["report"]
    if "compile_seconds" in report:
      lines.append(
        f"| {name}: {given['slice']}, `{given['student']['remat']}` | {_blocks(record)} | "
        f"{'stacked' if given['student']['stack'] == 'units' else 'each'} | {given['until']} | "
        f"{report['trace_seconds']:.0f} | {report['compile_seconds']:.0f} | "
        f"{report['compile_cpu']:.0f} |")
  return lines


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
