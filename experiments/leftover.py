"""What is left of a model that targets or a manifest cut, known before anything is computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

import hybridlm
from experiments.mistakes import about
from hybridlm import axes
from hybridlm.config import Block, ModelConfig, Parallel, attention_of, block_name
from hybridlm.patterns import with_attention
from hybridlm.prune import depth as depths
from hybridlm.prune import scores as scoring
from hybridlm.prune import select
from hybridlm.prune.plan import Plan

UNSET = "targets are all unset: name at least one size to prune to"
# What the model loses with a block's SSM a no-op, and with one branch of a block off.
WITHOUT = ("score_ssm_X", *depths.BRANCHES)


def small(
  cfg: ModelConfig, wanted: Mapping[str, Any], *, letters: str, depth: str | None,
  noop: str | None = None,
) -> ModelConfig:
  """Returns the config that a plan of these targets leaves.

  Where scores decide which blocks stay it is one of those that may be left.

  Args:
    cfg: the parent.
    wanted: target sizes.
    letters: axes that calibration scores.
    depth: how it scores blocks; None: not.
    noop: how it scores blocks without their SSM, or without one of their branches; None: not.

  Raises:
    ValueError: no target, targets that no plan of this parent can meet, or an axis without scores.
  """
  if not wanted:
    raise ValueError(UNSET)
  asked = {"score_X": depth} | dict.fromkeys(WITHOUT, noop)
  shapes = {name: (len(cfg.blocks),) for name, how in asked.items() if how}
  names = {scoring.SCORE_OF[letter] for letter in letters if letter in scoring.SCORE_OF}
  for index, block in enumerate(cfg.blocks):
    for name in names:
      if set(axes.of(name)) <= {"D", *block.axes}:
        shapes[f"{block_name(index)}/{name}"] = axes.shape(name, cfg.sizes(index))
  if "M" in letters and cfg.meta:
    shapes[scoring.SCORE_OF["M"]] = (cfg.meta,)
  sums = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
  even = scoring.Scores(sums, 1.0, {"parameters": "none"})
  hybridlm.plan(cfg, even, wanted)  # every score is there
  return select.sized(cfg, wanted)


def replayed(cfg: ModelConfig, path: str, expected: ModelConfig | None) -> ModelConfig:
  """Returns the config that the plan in a manifest leaves.

  Args:
    cfg: the parent.
    path: of the manifest.
    expected: what the targets leave; None: there are none.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a plan, one of a model of other sizes, or of other sizes than the targets.
  """
  with about(f"plan {path}"):
    plan = Plan.load(path)
  theirs, ours = ((each.blocks, each.V, each.D, each.meta) for each in (plan.config, cfg))
  if theirs != ours:
    meta = f", M={plan.config.meta}" if plan.config.meta != cfg.meta else ""
    raise ValueError(f"plan {path} was made for another model: {plan.config.pattern!r}, "
                     f"V={plan.config.V}, D={plan.config.D}{meta}")
  left = plan.small_config()
  if expected is not None and _sizes(left) != _sizes(expected):
    raise ValueError(f"plan {path} leaves other sizes than the targets: D={left.D} and "
                     f"{left.pattern!r}, not D={expected.D} and {expected.pattern!r}")
  return left


def _sizes(cfg: ModelConfig) -> tuple[Any, ...]:
  """Returns what targets say of a model: no rotary frequency, nor where branches meet."""
  return cfg.D, cfg.meta, tuple(map(_size, cfg.blocks))


def _size(block: Block) -> Any:
  attention = attention_of(block)
  if attention is not None and attention.rope is not None:
    rope = dataclasses.replace(attention.rope, frequency=None)
    block = with_attention(block, dataclasses.replace(attention, rope=rope))
  if not isinstance(block, Parallel):
    return block
  return block.attention, block.ssm, block.fusion.kind
