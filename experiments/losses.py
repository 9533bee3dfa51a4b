"""What a distillation minimises: from a config's values to losses of the library."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import hybridlm
from experiments.mistakes import about
from hybridlm import bind
from hybridlm.config import ModelConfig
from hybridlm.distill import divergences, intermediate
from hybridlm.prune import align
from hybridlm.prune.plan import Plan

# Keys of `distil` that say how logits are compared, and how what lies below them is.
LOGITS = ("temperature", "kl", "ce", "divergence", "skew")
BELOW = ("intermediate", "intermediate_loss", "intermediate_weight")
KEYS = (*LOGITS, "top_k", *BELOW)


def check(run: ConfigDict) -> None:
  """Raises unless a distillation's loss can be what it says; what a vocabulary decides waits.

  Raises:
    ValueError: names the key, its value and the rule.
  """
  if not 0 < run.temperature < math.inf:
    raise ValueError(f"distil.temperature={run.temperature} must be positive")
  if not (0 <= run.kl < math.inf and 0 <= run.ce < math.inf and run.kl + run.ce > 0):
    raise ValueError(
      f"distil.kl={run.kl} and distil.ce={run.ce} must not be negative, nor both zero"
    )
  if run.divergence not in divergences.TABLE:
    known = ", ".join(divergences.TABLE)
    raise ValueError(f"distil.divergence={run.divergence!r} is not one of {known}")
  if not 0 < run.skew < 1:
    raise ValueError(f"distil.skew={run.skew} must lie between 0 and 1")
  if run.top_k < 0:
    raise ValueError(f"distil.top_k={run.top_k} must not be negative; 0 takes all tokens")
  for kind in run.intermediate:
    if kind not in align.TAPS:
      raise ValueError(
        f"distil.intermediate={tuple(run.intermediate)}: {kind!r} is not one of "
        f"{', '.join(align.TAPS)}"
      )
  with about("distil"):
    intermediate.check(
      run.intermediate, run.intermediate_loss, run.intermediate_weight, run.kl)
  if run.intermediate and run.store:
    raise ValueError(
      f"distil.intermediate={tuple(run.intermediate)} needs the teacher itself, and "
      f"distil.store={run.store!r} stands for it")


def plans(cfg: ModelConfig, run: ConfigDict, names: Sequence[str]) -> tuple[str, ...]:
  """Returns the stages of plans that a distillation reads: `names`, where it needs any.

  Raises:
    ValueError: the teacher, `cfg`, has not what is to be compared.
  """
  if not run.intermediate:
    return ()
  with about("distil"):
    align.pairs(cfg, cfg, None, run.intermediate)
  return tuple(names)


def online(
  cfg: ModelConfig,
  teacher: ModelConfig,
  run: Mapping[str, Any],
  folders: Sequence[pathlib.Path] = (),
) -> Callable[..., dict[str, Any]]:
  """Returns the loss of a student whose teacher is at hand.

  Args:
    cfg: the student.
    teacher: its teacher.
    run: the distillation, as `distil` has it.
    folders: with the plans that lead from the teacher to the student, in order; without one, logits
      alone are compared.
  """
  below: dict[str, Any] = {}
  if folders and run["intermediate"]:
    below = {key: run[key] for key in BELOW} | {"intermediate": tuple(run["intermediate"])}
    below["plan"] = [Plan.load(folder / "plan.json") for folder in folders]
  logits = {key: run[key] for key in LOGITS}
  return hybridlm.distillation_loss(cfg, teacher, **logits, top_k=run["top_k"] or None, **below)


def stored(cfg: ModelConfig, run: ConfigDict) -> Callable[..., dict[str, Any]]:
  """Returns the loss of a student that learns from a store."""
  return bind.stored_loss(cfg, **{key: run[key] for key in LOGITS})
