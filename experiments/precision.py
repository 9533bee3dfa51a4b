"""What a distillation computes in, and what its teacher's weights are held in, by name."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.mistakes import about
from hybridlm.config import ModelConfig
from hybridlm.nn import held

# `distil.precision` -> fields of the student's config while it is trained; "": as it says.
STUDENTS: Mapping[str, Mapping[str, str]] = {
  "": {},
  "float32": {"dtype": "float32"},
  "bfloat16": {"dtype": "bfloat16"},
  "fp8": {"dtype": "bfloat16", "quantize": "fp8"},
}
# `distil.teacher_precision`; "": as the teacher's artefact has them.
TEACHERS = ("", "bfloat16", "fp8", "int8")


def check(run: ConfigDict) -> None:
  """Raises unless a distillation's precisions are known by name.

  Raises:
    ValueError: names the key, its value and the choices.
  """
  for key, known in (("precision", tuple(STUDENTS)), ("teacher_precision", TEACHERS)):
    if run[key] not in known:
      choices = ", ".join(name or '""' for name in known)
      raise ValueError(f"distil.{key}={run[key]!r} is not one of {choices}")


def student(cfg: ModelConfig, run: ConfigDict) -> ModelConfig:
  """Returns the config that a student is trained by; the model stays the same.

  Raises:
    ValueError: FP8 would be left no block between the wide ends.
  """
  changes = STUDENTS[run.precision]
  with about(f"distil.precision={run.precision!r}, distil.wide_ends={run.wide_ends}"):
    return cfg.replace(**changes, **({"wide_ends": run.wide_ends} if changes else {}))


def teacher_config(cfg: ModelConfig, run: ConfigDict) -> ModelConfig:
  """Returns the config of the teacher that `teacher` returns."""
  return cfg.replace(held=run.teacher_precision) if run.teacher_precision else cfg


def teacher(
  cfg: ModelConfig, params: Mapping[str, Any], run: ConfigDict
) -> tuple[ModelConfig, Mapping[str, Any]]:
  """Returns a teacher whose weights are held as a distillation says; it computes as it did."""
  cfg = teacher_config(cfg, run)
  return cfg, held.hold(cfg, params)
