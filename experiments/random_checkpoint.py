"""A folder with random bfloat16 weights of a preset's shape, and a random plan to another's sizes.

python -m experiments.random_checkpoint --preset=nemotron_h_8b --target=FOLDER
    [--format=hf|hybridlm] [--plan=plan.json --targets=nemotron_h_4b] [--seed=0]

What conversions are tried and measured on at sizes that nobody trains for a test.
"""

import functools
import math
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import console
from hybridlm import axes, config, lazy
from hybridlm.config import ModelConfig, block_name
from hybridlm.interop import dispatch
from hybridlm.prune import stream
from hybridlm.prune.plan import Plan

BFLOAT16 = np.dtype(jnp.bfloat16)
# Projections are this many normal numbers, repeated from a place of their own: drawing eight
# billion takes minutes. A prime, so that rows of a matrix differ.
DRAWN = 8_388_593
STD = 0.02


@functools.cache
def _normal(seed: int) -> np.ndarray:
  drawn = STD * np.random.default_rng(seed).standard_normal(DRAWN, np.float32)
  return drawn.astype(BFLOAT16)


def _small(stem: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a leaf that is no projection, in the range that training starts from or leaves."""
  if "gain" in stem or stem == "skip":
    return rng.uniform(0.5, 1.5, shape)
  if stem == "a_log":
    return np.log(rng.uniform(1.0, 16.0, shape))
  if stem == "dt_bias":
    dt = np.exp(rng.uniform(math.log(1e-3), math.log(0.1), shape))
    return dt + np.log(-np.expm1(-dt))
  return rng.uniform(-0.5, 0.5, shape) if stem.startswith("conv") else rng.normal(0, 0.1, shape)


def _read(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  name, place = path.rpartition("/")[2], zlib.crc32(path.encode())
  if not name.startswith("w_"):
    rng = np.random.default_rng([seed, place])
    return _small(axes.stem(name), rng, shape).astype(BFLOAT16)
  made = np.empty(math.prod(shape), BFLOAT16)
  drawn, at, start = _normal(seed), 0, place % DRAWN
  while at < made.size:
    part = drawn[start : start + made.size - at]
    made[at : at + part.size] = part
    at, start = at + part.size, 0
  # Laid out as published folders are, [out, in]: nothing is turned when it is written.
  letters = axes.of(name)
  axis = 0 if letters[0] == "D" else len(letters) - 1
  other = len(letters) - 1 - axis if letters != "VD" else axis
  moved = [n for i, n in enumerate(shape) if i != axis]
  moved.insert(other, shape[axis])
  return np.moveaxis(made.reshape(moved), other, axis)


def leaves(cfg: ModelConfig, *, seed: int = 0) -> dict[str, lazy.Leaf]:
  """Returns random bfloat16 leaves of a model, each drawn when it is read, equal for a seed."""
  return {
    path: lazy.Leaf(shape, BFLOAT16, functools.partial(_read, path, shape, seed))
    for path, shape in axes.leaves(config.shapes(cfg))
  }


def random_plan(cfg: ModelConfig, small: ModelConfig, source: str, *, seed: int = 0) -> Plan:
  """Returns a plan that keeps random entries of a model, as many as a smaller one has.

  Args:
    cfg: the parent.
    small: a model of the same pattern and no larger sizes.
    source: SHA-256 of the parent's parameters.
    seed: of the choice.

  Raises:
    ValueError: the two differ in more than sizes that a plan can cut.
  """
  rng = np.random.default_rng(seed)

  def choose(size: int, count: int) -> np.ndarray:
    return np.sort(rng.permutation(size)[:count])

  keep: dict[str, Any] = {"keep_D": choose(cfg.D, small.D)} if small.D < cfg.D else {}
  for index, (old, new) in enumerate(zip(cfg.blocks, small.blocks, strict=False)):
    found = {}
    for name in ("keep_GH", "keep_P", "keep_F", "keep_KJ"):
      letters = axes.of(name)
      if set(letters) <= set(old.axes) and type(old) is type(new):
        size, count = getattr(old, letters[-1]), getattr(new, letters[-1])
        rows = 1 if len(letters) == 1 else getattr(old, letters[0])
        chosen = [choose(size, count) for _ in range(rows)]
        found |= {name: chosen[0] if len(letters) == 1 else chosen} if count < size else {}
    keep |= {block_name(index): found} if found else {}
  plan = Plan(cfg, source, keep)
  if (plan.small_config().D, plan.small_config().blocks, cfg.V) != (small.D, small.blocks, small.V):
    raise ValueError(
      f"targets: no plan cuts {cfg.pattern} with D={cfg.D} to {small.pattern} with D={small.D}: "
      "patterns must be equal, and sizes other than D, F, H, P, J too"
    )
  return plan


def _preset(flag: str, name: str | None) -> ModelConfig:
  if name not in config.PRESETS:
    raise ValueError(f"--{flag}={name}: not one of {', '.join(config.PRESETS)}")
  return config.PRESETS[name]


def main(argv: Sequence[str]) -> None:
  """Writes the folder, and the plan if one is asked for.

  Raises:
    ValueError: a flag is wrong, or the target holds files that we did not write.
  """
  values = flags.FlagValues()
  for name in ("preset", "target", "plan", "targets"):
    flags.DEFINE_string(name, None, "See above.", flag_values=values)
  flags.DEFINE_enum("format", "hf", dispatch.FORMATS, "Of the folder.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Equal seeds give equal weights.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  cfg = _preset("preset", values.preset)
  if not values.target or bool(values.plan) != bool(values.targets):
    raise ValueError("give --target=FOLDER, and --plan=FILE with --targets=PRESET or neither")
  small = _preset("targets", values.targets) if values.targets else None
  if small is not None:
    random_plan(cfg, small, "", seed=values.seed)
  begin, made = time.monotonic(), leaves(cfg, seed=values.seed)
  dispatch.write(values.target, cfg, made, format=values.format)
  print(f"{values.target}: {values.preset}, {time.monotonic() - begin:.1f} s")
  if small is not None:
    source = dispatch.open(values.target)[1]
    random_plan(cfg, small, stream.tree_hash(source), seed=values.seed).save(values.plan)
    print(f"{values.plan}: cuts it to {values.targets}")


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
