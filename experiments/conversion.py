"""Models from one format to another, whole or cut by a plan, without ever being in memory."""

import contextlib
import os
import pathlib
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax import numpy as jnp

from experiments import comparison
from hybridlm import axes, config, lazy
from hybridlm.config import ModelConfig
from hybridlm.interop import beside, dispatch, folders, huggingface, native
from hybridlm.prune import stream
from hybridlm.prune.plan import Plan

DTYPES = ("float32", "bfloat16")
# Stems of what is multiplied beside the projections `w_*`; all else of a folder of ours stays as
# it is, gains and what a scan reads in float32.
TAPS = ("conv_x", "conv_b", "conv_c")


class Job(NamedTuple):
  """What a conversion is asked for; the fields are the command's flags."""

  source: str
  target: str
  format: str = "hf"
  family: str | None = None
  plan: str | None = None
  dtype: str | None = None


class Report(NamedTuple):
  """What a conversion did: seconds of each part, bytes of the leaves, and the error seen.

  `hash_s` is 0 without a plan; `error` is the largest difference of outputs, as a share of the
  largest (`comparison.compare`).
  """

  hash_s: float
  write_s: float
  verify_s: float
  read_bytes: int
  written_bytes: int
  error: float


def convert(job: Job, *, say: Callable[[str], None]) -> Report:
  """Writes the target, verifies it, puts it in place, and returns what that took.

  It is the sibling `NAME.unverified` until then, which does not load while it is verified.

  Raises:
    ValueError: the source, the plan or the target cannot be used as asked; nothing is written.
    FileNotFoundError: the source or the plan is not there.
    RuntimeError: what was written is not what was read; it is removed.
  """
  target = pathlib.Path(os.path.abspath(job.target))
  written = target.with_name(f"{target.name}.unverified")
  for place in (target, written):
    folders.check_target(place)
  plan = None if job.plan is None else Plan.load(job.plan)
  cfg, leaves = dispatch.open(job.source)
  say(f"source: {_describe(cfg, leaves)}")
  small_cfg, small = (cfg, leaves) if plan is None else stream.cut(cfg, leaves, plan)
  _check_format(job, small_cfg)
  beside.check(beside.gather(job.source), small_cfg.real_vocabulary)
  seconds = _check_plan(job, leaves, plan)
  if plan is None:
    small = {path: comparison.finite(path, leaf, job.source) for path, leaf in small.items()}
  else:
    say(f"plan: made for this source; hashing it took {seconds:.1f} s")
  begin = time.monotonic()
  _write(job, written, small_cfg, small)
  middle = time.monotonic()
  try:
    # Opened: reading its leaves needs no config. A run that dies here leaves no model.
    got_cfg, got = dispatch.open(written)
    made = comparison.Side(got_cfg, got)
    with folders.hiding(written, huggingface.CONFIG if job.format == "hf" else native.FILE):
      error = comparison.compare(
        comparison.Side(cfg, leaves), made, plan, dtype=job.dtype, published=job.format == "hf"
      )
    folders.put(written, target)
  except BaseException:
    with contextlib.suppress(OSError):
      folders.remove(written)
    raise
  end = time.monotonic()
  report = Report(seconds, middle - begin, end - middle, _bytes(leaves), _bytes(got), error)
  _tell(job, report, got_cfg, got, say)
  return report


def _describe(cfg: ModelConfig, leaves: lazy.Leaves) -> str:
  dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))
  return (
    f"{config.parameters(cfg) / 1e6:,.1f} M parameters, {_bytes(leaves) / 1e9:.2f} GB of {dtypes}, "
    f"D={cfg.D}, {len(cfg.blocks)} blocks {cfg.pattern}"
  )


def _bytes(leaves: lazy.Leaves) -> int:
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves.values())


def _tell(job: Job, report: Report, cfg: ModelConfig, leaves: lazy.Leaves, say) -> None:
  say(f"target: {_describe(cfg, leaves)}; written in {report.write_s:.1f} s")
  say(
    f"verified in {report.verify_s:.1f} s: every leaf is the source's, largest difference of "
    f"outputs {report.error:.1e}"
  )
  if job.format == "hf":
    for note in huggingface.serving_notes(cfg):
      say(f"note: {note}")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  say(f"{job.target}: done; peak resident memory {peak:.2f} GB")


def _check_format(job: Job, cfg: ModelConfig) -> None:
  """Raises unless the format asked for can hold the model."""
  if job.format == "hf":
    huggingface.describe(cfg, job.family)
  elif job.family is not None:
    raise ValueError(f"--family={job.family} needs --format=hf: our own folders hold any model")


def _check_plan(job: Job, leaves: lazy.Leaves, plan: Plan | None) -> float:
  """Returns the seconds that hashing the source took; every leaf is seen to be finite on the way.

  Raises:
    ValueError: the plan was made for other parameters, or a leaf is not finite.
  """
  if plan is None:
    return 0.0
  begin = time.monotonic()
  seen = {path: comparison.finite(path, leaf, job.source) for path, leaf in leaves.items()}
  stream.check_source(seen, plan)
  return time.monotonic() - begin


def _write(job: Job, target: pathlib.Path, cfg: ModelConfig, leaves: lazy.Leaves) -> None:
  if job.format == "hf":
    huggingface.write(
      target, cfg, leaves, family=job.family, like=job.source, dtype=job.dtype
    )
    return
  if job.dtype is not None:
    cfg = cfg.replace(dtype=job.dtype)
    leaves = {path: _cast(path, leaf, job.dtype) for path, leaf in leaves.items()}
  native.write(target, cfg, leaves, like=job.source)


def _cast(path: str, leaf: lazy.Leaf, dtype: str) -> lazy.Leaf:
  """Returns a leaf in another dtype, unless digits would be lost where sums need them."""
  stem = axes.stem(path.rpartition("/")[2])
  chosen = np.dtype(jnp.dtype(dtype))
  multiplied = stem.startswith("w_") or stem in TAPS
  if chosen == leaf.dtype or (dtype == "bfloat16" and not multiplied):
    return leaf
  return lazy.Leaf(leaf.shape, chosen, lambda: leaf.read().astype(chosen))
