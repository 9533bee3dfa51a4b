"""What a training run is watched for, from a config, and where its time went, from its records."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

import hybridlm
from experiments.mistakes import about
from hybridlm.config import ModelConfig
from hybridlm.prune import devices
from hybridlm.train import metrics, observe

# Forward, and a backward of two products for each of its products.
TRAINING = 3
# Parts of a run's wall time, in the order of the report, and what they are called there.
PARTS = {
  "device": "device", "idle": "waiting for data", "other": "other", "compile": "compilation",
  "validate": "validation", "checkpoint": "checkpoints",
}


def steps_of(text: str) -> tuple[int, int]:
  """Returns the steps that `START:STOP` names.

  Raises:
    ValueError: other text, or no step in between.
  """
  if not re.fullmatch(r"\d+:\d+", text):
    raise ValueError(f"profile {text!r}: give START:STOP, two numbers of steps such as 10:13")
  start, stop = map(int, text.split(":"))
  observe.check_profile((start, stop))
  return start, stop


def traced(c: ConfigDict, profile: tuple[int, int] | None, names: Sequence[str]) -> ConfigDict:
  """Returns the config whose distillation, or teacher if that is all, leaves a trace.

  Args:
    c: the config, which stays as it is.
    profile: steps, as `observe.Watch` has them; None: the config's own.
    names: the stages that the command runs; none means all of them.

  Raises:
    ValueError: steps that the run does not have.
  """
  if profile is None:
    return c
  c = c.copy_and_resolve_references()
  key = "teacher" if tuple(names) == ("teacher",) else "distil"
  run = c[key]
  if profile[1] > run.steps:
    raise ValueError(f"profile {profile[0]}:{profile[1]} goes beyond {key}.steps={run.steps}")
  run.profile = profile
  return c


def missed(profile: tuple[int, int] | None, folders: Mapping[str, pathlib.Path]) -> list[str]:
  """Returns a line if steps were to be traced and no stage has a trace."""
  if profile is None or any((folder / observe.TRACE).is_dir() for folder in folders.values()):
    return []
  return [f"profile {profile[0]}:{profile[1]}: no trace; the run was done before, or is no part of "
          "this command"]


def check(c: ConfigDict) -> None:
  """Raises unless every run's `profile` is empty or names steps.

  Raises:
    ValueError: another value; the key is named.
  """
  for key in ("teacher", "correct", "distil"):
    value = tuple(c[key].profile)
    if value:
      if len(value) != 2 or not all(type(number) is int for number in value):
        raise ValueError(f"{key}.profile={value}: two numbers of steps, such as (10, 13), or ()")
      with about(f"{key}.profile={value}"):
        observe.check_profile(value)


def watch(
  cfg: ModelConfig, teacher: ModelConfig | None, profile: Sequence[int]
) -> observe.Watch:
  """Returns what to measure of a run.

  Args:
    cfg: the model that is trained.
    teacher: the model whose forward pass every step makes; None: there is none.
    profile: the steps to trace, or empty.
  """

  def flops(length: int) -> dict[str, float]:
    found = {"model": TRAINING * float(hybridlm.cost(cfg, context=length).prefill_flops)}
    if teacher is not None:
      found["teacher"] = float(hybridlm.cost(teacher, context=length).prefill_flops)
    return found

  return observe.Watch(flops, peak(cfg.dtype), tuple(profile) or None)


def peak(dtype: str) -> float | None:
  """Returns the FLOP/s in a compute dtype of all devices here; None: nobody published them."""
  chips = [devices.of_kind(device.device_kind) for device in jax.devices()]
  rates = [None if chip is None else chip.flops.get(dtype) for chip in chips]
  return None if None in rates else sum(rates)


def split(history: Sequence[metrics.Record]) -> dict[str, Any]:
  """Returns where the time of a run went: seconds by the names of `PARTS`, and their sum `seconds`.

  Beside them the `steps` that were timed, `data` (seconds the host waited for batches, also while
  the device was busy), means of what `observe.utilisation` gives, and the most memory.
  """
  trains = [record for record in history if record["split"] == "train"]

  def total(name: str) -> float:
    return sum(record[name] * record["steps"] for record in trains)

  stepping, device, idle = (total(f"{name}_seconds") for name in ("step", "device", "idle"))
  parts = {
    "device": device, "idle": idle, "other": max(0.0, stepping - device - idle),
  } | {
    name: sum(record[f"{name}_seconds"] for record in history if f"{name}_seconds" in record)
    for name in ("compile", "validate", "checkpoint")
  }
  found = parts | {
    "seconds": sum(parts.values()), "steps": sum(record["steps"] for record in trains),
    "data": total("data_seconds"), "stepping": stepping,
  }
  for name in ("mfu", "teacher_mfu", "model_flops_per_second", "teacher_flops_per_second"):
    if trains and all(name in record for record in trains):
      found[name] = sum(r[name] * r["step_seconds"] * r["steps"] for r in trains) / stepping
  for name in ("device_memory_bytes", "process_memory_bytes"):
    known = [record[name] for record in trains if name in record]
    found |= {name: max(known)} if known else {}
  return found


HEADER = (
  "training", "step (ms)", "MFU", "MFU with the teacher's forward", "most memory (GB)",
  "wall time (s)", *PARTS.values(),
)


def row(name: str, found: Mapping[str, Any]) -> list[str]:
  """Returns one run's cells of the report's table of times, as `HEADER` orders them."""
  memory = found.get("device_memory_bytes", found.get("process_memory_bytes"))
  mfu = found.get("mfu")
  whole = None if mfu is None else mfu + found.get("teacher_mfu", 0.0)
  return [
    name,
    f"{1e3 * found['stepping'] / max(1, found['steps']):,.1f}",
    *("–" if share is None else f"{share:.1%}" for share in (mfu, whole)),
    "–" if memory is None else f"{memory / 1e9:.2f}",
    f"{found['seconds']:,.1f}",
    *(f"{found[part] / found['seconds']:.1%}" for part in PARTS),
  ]
