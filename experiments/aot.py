"""Compiles the distillation step of a config for a slice that is not here, and says if it fits.

python -m experiments.distill --config=... --aot=v5p:4x4x4

The chip's own compiler (extras `aheadtpu`, `aheadgpu`) runs in a process of its own on this host.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import ahead, aot_plan
from hybridlm.config import ModelConfig
from hybridlm.prune import cost, devices

# Bytes a second that a chip sends to its neighbours in all. "Inter-chip interconnect" of the TPUs'
# pages (Google Cloud TPU documentation), NVLink one way (NVIDIA H200 Tensor Core GPU data sheet).
LINKS = {"v5e": 200e9, "v5p": 600e9, "v6e": 448e9, "h200": 450e9}
GIB = 2**30


def tell(c: ConfigDict, name: str) -> str:
  """Returns the lines that say what the step of a config needs on a slice, and at most gives.

  Raises:
    ValueError: a slice or a config that cannot be, or a compiler that is not installed.
    FileNotFoundError: a teacher or a plan that is not there.
    RuntimeError: the compiling process died.
  """
  given = aot_plan.order(c, name)
  return text(given, compiled(given))


def compiled(given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the report on an order of `aot_plan.order`, see `aot_worker.measured`.

  Raises:
    ValueError: the chip's compiler is not installed.
    RuntimeError: the process died; its last words are in the message.
  """
  target = aot_plan.slice_of(given["slice"]).chip
  line = ahead.missing(target)
  if line is not None:
    raise ValueError(line)
  with tempfile.TemporaryDirectory() as folder:
    asked, found = pathlib.Path(folder, "order.json"), pathlib.Path(folder, "report.json")
    asked.write_text(json.dumps(given), "utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ahead.UNSET}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= ahead.FRESH | dict(ahead.TARGETS[target].environment)
    done = subprocess.run(
      [sys.executable, "-m", "experiments.aot_worker", str(asked), str(found)],
      env=environment, capture_output=True, text=True, errors="replace", check=False,
    )
    if done.returncode or not found.is_file():
      raise RuntimeError(f"the process that compiles for {given['slice']} ended with "
                         f"{done.returncode}: {done.stderr[-2000:]}")
    return json.loads(found.read_text("utf-8"))


def needs(report: Mapping[str, Any]) -> float:
  """Returns the bytes of a device's memory that a compiled step needs."""
  if "needs" in report:
    return report["needs"]
  return report["arguments"] + report["outputs"] + report["temporaries"]


def seconds(given: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, float]:
  """Returns the least that a step takes by each limit: "products", "memory" and "links".

  Memory is read for the parameters of both models once a micro-batch, and for the optimiser once.
  """
  chip = aot_plan.slice_of(given["slice"]).chip
  peak, run = devices.device(chip), given["run"]
  parts = report["parts"]
  moved = 2 * (parts["parameters"] + parts["moments"]) + run["accumulate"] * (
    2 * parts["parameters"] + parts["teacher"])
  limits = {
    "products": report["flops"] / report["devices"] / peak.peak(given["student"]["dtype"]),
    "memory": moved / peak.bandwidth,
  }
  if "sent" in report:
    limits["links"] = sum(report["sent"].values()) / LINKS[chip]
  return limits


def tokens(given: Mapping[str, Any]) -> int:
  """Returns the tokens of a step."""
  return given["run"]["batch"] * given["length"]


def useful(given: Mapping[str, Any]) -> float:
  """Returns the FLOPs of a step that nothing computes again: three forwards and the teacher's."""
  student, teacher = (
    cost.cost(ModelConfig.from_dict(given[key]), context=given["length"]).prefill_flops
    for key in ("student", "teacher")
  )
  return (3.0 * student + teacher) * tokens(given)


def text(given: Mapping[str, Any], report: Mapping[str, Any]) -> str:
  """Returns the lines that `tell` does, of a report."""
  chip = aot_plan.slice_of(given["slice"]).chip
  along = " × ".join(f"{name} {size}" for name, size in given["mesh"].items())
  student = given["student"]
  lines = [f"{given['slice']}: {report['devices']} devices, {along}; stack {student['stack']}, "
           f"recomputed {student['remat']}, {given['run']['accumulate']} micro-batches a step"]
  if "error" in report:
    return "\n".join([*lines, f"does not compile: {report['error']}"])
  parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["parts"].items())
  if "temporaries" in report:
    parts += f", activations and temporaries {report['temporaries'] / GIB:.2f}"
  memory, host = devices.device(chip).memory, report.get("host", 0) / GIB
  lines.append(f"GiB a device: {parts}; {needs(report) / GIB:.2f} of {memory / GIB:.2f} in all"
               + (f", {host:.2f} on the host" if host > 0.01 else ""))
  lines.append(fits(given, report))
  limits = seconds(given, report)
  lines.append(f"a step of {tokens(given):,} tokens: {report['flops']:.3g} FLOPs, of which "
               f"{useful(given):.3g} are not computed twice")
  if "sent" in report:
    sent = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in report["sent"].items())
    lines.append(f"GB that a device sends a step: {sent or 'none'}")
  bound = ", ".join(f"{name} {value:.3g} s" for name, value in limits.items())
  lines.append(f"at the chips' peaks: {bound}; at most "
               f"{tokens(given) / max(limits.values()):,.0f} tokens/s")
  if "compile_seconds" in report:
    what = "memory laid out" if given["until"] == "memory" else "compiled"
    lines.append(f"{what} in {report['compile_seconds']:.0f} s ({report['compile_cpu']:.0f} s of "
                 f"one core), traced in {report['trace_seconds']:.0f} s")
  return "\n".join(lines)


def fits(given: Mapping[str, Any], report: Mapping[str, Any]) -> str:
  """Returns whether a step fits its device, by how much, and else which value helps."""
  spare = devices.device(aot_plan.slice_of(given["slice"]).chip).memory - needs(report)
  if "needs" not in report and spare >= 0:
    return f"fits, with {spare / GIB:.2f} GiB to spare"
  return f"does not fit: {-spare / GIB:.2f} GiB over; {helps(given, report)}"


def helps(given: Mapping[str, Any], report: Mapping[str, Any]) -> str:
  """Returns the value that would make a step smaller, the cheapest first."""
  run, along, student = given["run"], given["mesh"], given["student"]
  parts = report["parts"]
  fixed = 2 * parts["parameters"] + parts["moments"] + parts["teacher"]  # and gradients
  rows = run["batch"] // (run["accumulate"] * along["data"] * along["fsdp"])
  if 2 * fixed > needs(report):
    if along["data"] > 1:
      return (f"most of it is parameters, moments and gradients: mesh.fsdp="
              f"{along['data'] * along['fsdp']} divides them")
    return "most of it is parameters, moments and gradients: take a larger slice"
  if rows > 1:
    return (f"most of it is activations: distil.accumulate={run['accumulate'] * rows} "
            "takes one row a device at a time")
  if student["remat"] in ("none", "dots"):
    return "most of it is activations: model.remat='block' keeps fewer"
  if student["remat"] == "block":
    return "most of it is activations: model.remat='unit' keeps fewer"
  return (f"most of it is activations: mesh.sequence={2 * along['sequence']} divides the positions "
          "of a row")
