"""Sizes, tiles and buffers that the kernels of the way back agree on."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm.ops.ssd.pallas_gpu.table import SHARED_BYTES

# Tokens of a chunk: the rows of one wgmma.
Q = 64
# What a head has per position: the sum of dt a from the chunk's start to it, in powers of two; dt;
# what survives of the state before the chunk; what of the position reaches the chunk's end; skip.
ROWS = ("sum", "dt", "first", "last", "skip")
# What a head leaves per position: sums over M = mix mix_bar by target and by source, over
# u_bar x, over y_bar x; the terms through the states after and before; state_bar state.
SUMS = ("from", "into", "share", "skip", "last", "first", "whole")
# The pair side takes the targets in halves, whose matrices fit its registers.
SQ = Q, Q // 2
HALVES = pl.ds(0, Q // 2), pl.ds(Q // 2, Q // 2)
QUERY, SOURCE, PAIR = range(3)
# Registers of a thread by side, for a `Plan` that is not and that is wide.
REGISTERS = {False: (152, 168, 184), True: (168, 168, 168)}
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Plan(NamedTuple):
  """Sizes of a call, and how many heads' arrays are held at once."""

  heads: int
  P: int
  N: int
  x_depth: int
  state_depth: int
  bar_depth: int

  @property
  def wide(self) -> bool:
    """Whether [64, N] sums fill their sides' registers, so that the pair side does the rest."""
    return self.N > 128

  @property
  def parts(self) -> list:
    """Slices of P that one step of a side takes: all of it unless registers are short."""
    width = 32 if self.wide else self.P
    return [pl.ds(i, min(width, self.P - i)) for i in range(0, self.P, width)]

  @property
  def pair_sums(self) -> int:
    """How many of `SUMS` the pair side makes."""
    return len(SUMS) if self.wide else SUMS.index("first")


def make_plan(H, P, N) -> Plan | None:
  """Returns the deepest buffering that fits into shared memory, None where none does."""
  for depths in ((4, 4, 4), (3, 3, 3), (2, 2, 2), (2, 2, 1)):
    plan = Plan(H, P, N, *depths)
    if shared_bytes(plan) <= SHARED_BYTES:
      return plan
  return None


def shared_bytes(plan: Plan) -> int:
  """Returns the shared memory that `plan` asks for, in bytes, with 4 KiB for small things."""
  states = (plan.state_depth + plan.bar_depth) * plan.P * plan.N * 2
  heads = plan.x_depth * (2 * Q * plan.P * 2 + len(ROWS) * Q * 4) + states
  return heads + 2 * Q * plan.N * 2 + Q * plan.P * 2 + Q * Q * 2 + len(SUMS) * Q * 4 + 4096


def swizzle(width: int, dtype) -> int:
  """Returns the widest swizzle, in bytes and up to half a chunk, for rows of `width` values."""
  row = width * jnp.dtype(dtype).itemsize
  return next(s for s in (64, 32) if row % s == 0)


def tiles(width: int, dtype) -> tuple:
  """Returns the transforms of a buffer that wgmma reads with a swizzle of `width` bytes."""
  minor = width // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(width)


def row_tiles(rows: int, size: int = 64) -> list[tuple[int, int]]:
  """Returns (start, rows seen before) of tiles of `size` over `rows`; the last may overlap."""
  starts = [min(i, rows - size) for i in range(0, rows, size)]
  return [(start, size * i - start) for i, start in enumerate(starts)]


def state_swizzle(P: int, N: int, dtype) -> int:
  """Returns the swizzle, in bytes, of buffers with rows of N that also multiply over P."""
  return min(swizzle(P, dtype), swizzle(N, dtype))
