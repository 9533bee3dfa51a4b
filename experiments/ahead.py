"""Compiles for TPUs and GPUs that are not here, with their real compilers, on a CPU host.

Each target has a process of its own, because its plugin registers once, with its own environment
variables. A report has `seconds`; `arguments`, `outputs` and `temporaries`, bytes of the chip's
memory; and `kernels`, a record each: VMEM on a TPU; registers, spills, shared memory on a GPU.
Of a GPU also `products`: how often matrices of which dtypes are multiplied outside of kernels.
A program that does not compile has the compiler's `error` instead.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Target(NamedTuple):
  """One kind of chip: its platform, what describes it, and the packages that compile for it.

  compilers: the distributions whose versions decide what comes out.
  """

  platform: str
  topology: str
  environment: Mapping[str, str]
  packages: tuple[str, ...]
  compilers: tuple[str, ...]
  extra: str
  description: str = ""


def _tpu(topology: str, kind: str) -> Target:
  environment = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": kind, "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so two may compile at once
  }
  return Target("tpu", topology, environment, ("libtpu",), ("libtpu",), "aheadtpu")


# Dumps are how a kernel's registers, spills and shared memory come out of the compiler.
GPU_ENVIRONMENT = {
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1",
  "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
}
TARGETS: Mapping[str, Target] = {
  "v5e": _tpu("v5e:1x1", "v5litepod-1"),
  "v5p": _tpu("v5p:2x2x1", "v5p-8"),
  "v6e": _tpu("v6e:1x1", "v6e-1"),
  "h200": Target(
    "cuda", "h200", GPU_ENVIRONMENT, ("jax_cuda13_plugin", "nvidia"),
    ("jax_cuda13_plugin", "nvidia_cuda_nvcc"), "aheadgpu", "h200.textproto",
  ),
}
# Compiled anew and in full, whatever the caller asks of its own programs.
FRESH = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
UNSET = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Job(NamedTuple):
  """A program: `make` is `module:function`, which `options` turn into `(fn, argument shapes)`."""

  make: str
  options: Mapping[str, Any]


def missing(target: str) -> str | None:
  """Returns the line that names the package a target needs and the extra that brings it, or None.

  Raises:
    ValueError: no such target.
  """
  if target not in TARGETS:
    raise ValueError(f"ahead-of-time target {target!r} is not one of {', '.join(TARGETS)}")
  for package in TARGETS[target].packages:
    if importlib.util.find_spec(package) is None:
      return (
        f"ahead-of-time target {target!r} needs the package {package}: "
        f"pip install 'hybridlm[{TARGETS[target].extra}]'"
      )
  return None


def compile_jobs(target: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Returns a report for each job, compiled for one chip of the target in a process of its own.

  Raises:
    ValueError: no such target, or its package is not installed.
    RuntimeError: the process died; its last words are in the message.
  """
  line = missing(target)
  if line is not None:
    raise ValueError(line)
  with tempfile.TemporaryDirectory() as folder:
    order, found = pathlib.Path(folder, "jobs.json"), pathlib.Path(folder, "reports.jsonl")
    order.write_text(json.dumps({"target": target, "jobs": [job._asdict() for job in jobs]}))
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= FRESH | dict(TARGETS[target].environment)
    done = subprocess.run(
      [sys.executable, "-m", "experiments.ahead_worker", str(order), str(found)],
      env=environment, capture_output=True, text=True, errors="replace", check=False,
    )
    reports = [json.loads(text) for text in found.read_text().splitlines()] if (
      found.is_file()) else []
  if done.returncode or len(reports) != len(jobs):
    raise RuntimeError(
      f"the process that compiles for {target} ended with {done.returncode} after "
      f"{len(reports)} of {len(jobs)} programs: {done.stderr[-2000:]}"
    )
  return reports
