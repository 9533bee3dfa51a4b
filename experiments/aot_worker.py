"""The process that compiles one distillation step for a slice: reads an order, writes a report.

python -m experiments.aot_worker ORDER REPORT

Only `experiments.aot` starts it, with the variables of its chip: plugins register once.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from experiments import aot_hlo, aot_plan, losses, settings
from experiments.ahead import TARGETS
from experiments.artefacts import write_json
from hybridlm import config, layout
from hybridlm.config import ModelConfig
from hybridlm.nn import held as hold
from hybridlm.nn import stack
from hybridlm.train import mesh as meshes
from hybridlm.train import state, step

# What compilers say of a program that is larger than the memory.
OVER = re.compile(r"Used (?P<used>[\d.]+)(?P<unit>[KMGT]) of")
# Tiles of products are tried out on a device; without one, some that are taken do not fit.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
  "tpu": {}, "cuda": {"xla_gpu_enable_triton_gemm": False},
}
# What is written when buffers have their places; all that is read before was written before.
LAID_OUT = "after_optimizations_after_buffer_assignment.txt"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(order: str, report: str) -> None:
  """Compiles the step that the file `order` describes and writes the file `report`."""
  given = json.loads(pathlib.Path(order).read_text("utf-8"))
  chips = aot_plan.slice_of(given["slice"])
  # What the library chooses by the platform, it chooses for the chip.
  jax.default_backend = lambda: "gpu" if TARGETS[chips.chip].platform == "cuda" else "tpu"
  write_json(pathlib.Path(report), measured(given, devices(chips)))
  os._exit(0)  # a compiler may still be at work


def devices(chips: aot_plan.Slice) -> Sequence[Any]:
  """Returns the devices of a slice, none of which is here."""
  target = TARGETS[chips.chip]
  if target.platform == "tpu":
    name = f"{chips.chip}:{'x'.join(map(str, chips.shape))}"
    return topologies.get_topology_desc(topology_name=name, platform="tpu").devices
  text = pathlib.Path(__file__).with_name("targets") / target.description
  hosts = (1,) * (3 - len(chips.shape)) + chips.shape
  return topologies.get_topology_desc(
    topology_name=target.topology, platform=target.platform,
    topology="x".join(map(str, hosts)), target_config=text.read_text("utf-8"),
  ).devices


def measured(given: Mapping[str, Any], found: Sequence[Any]) -> dict[str, Any]:
  """Returns the report: bytes a device by kind, work, what is sent, seconds; or why it is none."""
  cfg, teacher = (ModelConfig.from_dict(given[key]) for key in ("student", "teacher"))
  run = ConfigDict(given["run"])
  grid = meshes.make(given["mesh"], found)
  optimizer = settings.optimizer(run)
  shapes = arguments(cfg, teacher, optimizer, given)
  rules = [layout.LAYOUTS[each.layout].parameters for each in (cfg, teacher)]
  where = (*map(lambda tree, rule: meshes.shardings(grid, tree, rule), shapes[:2], rules),
           meshes.batch_shardings(grid, shapes[2]))
  parts = {
    "parameters": held(shapes[0].params, where[0].params),
    "moments": held(shapes[0].opt_state, where[0].opt_state),
    "teacher": held(shapes[1], where[1]), "batch": held(shapes[2], where[2]),
  }
  placed = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes, where,
  )
  loss = losses.online(cfg, teacher, run)
  advance = step.make_step(loss, optimizer, accumulate=run.accumulate, shardings=where[0])
  report: dict[str, Any] = {"parts": parts, "devices": len(found)}
  with jax.set_mesh(grid), _Clock(report, "trace"):
    traced = advance.trace(*placed)
    lowered = traced.lower()
  report["flops"] = aot_hlo.flops(traced.jaxpr.jaxpr)
  with tempfile.TemporaryDirectory() as folder:
    # Some programs for TPUs have operations that their own text cannot be read back from.
    dumped = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": ""}
    dumped |= OPTIONS[TARGETS[given["slice"].partition(":")[0]].platform]
    try:
      with _Clock(report, "compile"):
        if given["until"] == "memory":
          planned = _planned(lowered, dumped, pathlib.Path(folder))
        else:
          compiled = lowered.compile(compiler_options=dumped)
    except (ValueError, RuntimeError) as error:
      return report | _refused(error)
    sent = aot_hlo.collectives(_dumped(folder, "after_optimizations.txt"), len(found))
    if given["until"] == "memory":
      inputs = sum(parts.values())
      return report | {
        "arguments": inputs, "outputs": 0, "temporaries": planned["default"] - inputs,
        "host": planned.get("host", 0), "sent": sent,
      }
  memory = compiled.memory_analysis()
  return report | {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "host": memory.host_temp_size_in_bytes,
    "sent": sent,
  }


def _dumped(folder: str | pathlib.Path, ending: str) -> str:
  """Returns the text that the compiler wrote of the step under a name that ends so."""
  return sorted(pathlib.Path(folder).glob(f"*jit_step*{ending}"))[-1].read_text("utf-8")


def _planned(lowered: Any, options: dict[str, Any], folder: pathlib.Path) -> dict[str, int]:
  """Returns the bytes of each memory as soon as a TPU's compiler has laid them out.

  Machine code, most of the time, is not waited for: the process must end by `os._exit`.
  """
  failed: list[Exception] = []

  def work() -> None:
    try:
      lowered.compile(compiler_options=options)
    except (ValueError, RuntimeError) as error:
      failed.append(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  while thread.is_alive() and not list(folder.glob(f"*jit_step*{LAID_OUT}")):
    thread.join(0.2)
  if failed:
    raise failed[0]
  return aot_hlo.memories(_dumped(folder, "memory-usage-report.txt"))


class _Clock:
  """Writes what a block takes into a report: `NAME_seconds`, and `NAME_cpu` of all threads."""

  def __init__(self, report: dict[str, Any], name: str):
    self._report, self._name = report, name

  def __enter__(self) -> "_Clock":
    self._start = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *error) -> None:
    now = time.perf_counter(), time.process_time()
    for key, end, start in zip(("seconds", "cpu"), now, self._start, strict=True):
      self._report[f"{self._name}_{key}"] = end - start


def _refused(error: Exception) -> dict[str, Any]:
  """Returns what a compiler said of a program that does not fit, or the error itself."""
  match = OVER.search(str(error))
  if match:
    return {"needs": float(match["used"]) * UNITS[match["unit"]]}
  return {"error": " ".join(str(error).split())[:2000]}


def arguments(cfg: ModelConfig, teacher: ModelConfig, optimizer, given) -> tuple[Any, Any, Any]:
  """Returns the shapes of a state, of the teacher's parameters and of a batch, as they run."""
  def running(cfg, dtype):
    tree = jax.tree.map(
      lambda shape: jax.ShapeDtypeStruct(shape, dtype),
      config.shapes(cfg.replace(held="float32")), is_leaf=lambda x: isinstance(x, tuple),
    )
    return jax.eval_shape(lambda tree: stack.stacked(cfg, hold.hold(cfg, tree)), tree)

  before = jax.eval_shape(
    lambda params: state.create(params, optimizer), running(cfg, jax.numpy.float32))
  frozen = running(teacher, given["teacher_dtype"])
  rows = (given["run"]["batch"], given["length"])
  names = {"token_BL": "int32", "segment_BL": "int32", "target_BL": "int32", "weight_BL": "float32"}
  batch = {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in names.items()}
  return before, frozen, batch


def held(tree: Any, where: Any) -> int:
  """Returns the bytes of a tree that lie on one device."""
  sizes = jax.tree.map(
    lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize,
    tree, where,
  )
  return sum(jax.tree.leaves(sizes))


if __name__ == "__main__":
  main(*sys.argv[1:])
