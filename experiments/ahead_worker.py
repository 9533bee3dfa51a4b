"""The process that compiles for one target: reads jobs, writes a report a line.

python -m experiments.ahead_worker JOBS REPORTS

Only `experiments.ahead` starts it, with the variables of its target: plugins register once.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from experiments import ahead_reports
from experiments.ahead import TARGETS, Target


def main(jobs: str, reports: str) -> None:
  """Compiles every job of the file `jobs` and appends its report to the file `reports`."""
  order = json.loads(pathlib.Path(jobs).read_text("utf-8"))
  target = TARGETS[order["target"]]
  sharding = _device(target)
  known: dict[str, dict] = {}
  for job in order["jobs"]:
    report, known = compile_one(job, target, sharding, known)
    with open(reports, "a", encoding="utf-8") as file:
      file.write(json.dumps(report) + "\n")


def _device(target: Target) -> jax.sharding.Sharding:
  """Returns the sharding that puts everything on one chip of the target."""
  options = {}
  if target.description:
    path = pathlib.Path(__file__).with_name("targets") / target.description
    options = {"topology": "1x1x1", "target_config": path.read_text("utf-8")}
  described = topologies.get_topology_desc(
    topology_name=target.topology, platform=target.platform, **options
  )
  mesh = jax.sharding.Mesh(described.devices[:1], ("one",))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_one(job, target: Target, sharding, known: dict[str, dict]) -> tuple[dict, dict]:
  """Returns the report of one job, and `known` with the GPU kernels it brought, by their hash.

  A report has seconds, bytes and kernels, or `error`: why the program does not compile. Of equal
  GPU kernels a process compiles, and prints, only the first.
  """
  module, _, name = job["make"].partition(":")
  fn, arguments = getattr(importlib.import_module(module), name)(**job["options"])
  arguments = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), arguments
  )
  start = time.perf_counter()
  with tempfile.TemporaryFile() as printed:
    try:
      with _captured(printed):
        compiled = jax.jit(fn).lower(*arguments).compile()
    except (ValueError, RuntimeError, NotImplementedError) as error:
      # Whoever says it, JAX, a compiler or the scan itself, it is the result for this program.
      return {"error": " ".join(str(error).split())[:500]}, known
    seconds = time.perf_counter() - start
    printed.seek(0)
    text = printed.read().decode("utf-8", "replace")
  if target.platform == "tpu":
    kernels, products = ahead_reports.tpu_kernels(compiled.as_text()), {}
  else:
    calls = ahead_reports.gpu_calls(compiled.as_text())
    known = ahead_reports.known_kernels(calls, ahead_reports.gpu_kernels(text), known)
    kernels = [known[key] for _, key in calls]
    products = {"products": ahead_reports.products(compiled.as_text())}
  memory = compiled.memory_analysis()
  return {
    "seconds": seconds,
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "kernels": kernels,
    **products,
  }, known


@contextlib.contextmanager
def _captured(file) -> Iterator[None]:
  """Sends what the process prints, compilers in C++ included, into a file while the block runs."""
  libc = ctypes.CDLL(None)
  kept = [os.dup(number) for number in (1, 2)]
  sys.stdout.flush()
  sys.stderr.flush()
  try:
    for number in (1, 2):
      os.dup2(file.fileno(), number)
    yield
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    libc.fflush(None)
    for number, copy in zip((1, 2), kept, strict=True):
      os.dup2(copy, number)
      os.close(copy)


if __name__ == "__main__":
  main(*sys.argv[1:])
