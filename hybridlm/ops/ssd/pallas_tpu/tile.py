"""What both kernels do with one tile in VMEM: decays, products, and what the compiler is told."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from hybridlm.ops.ssd.pallas_tpu import table
from hybridlm.ops.ssd.pallas_tpu.table import TILE

# Decays are powers of two: the unit that forms them knows no others.
LOG2E = 1.4426950408889634
# 2 to it is 0 in float32: a step that forgets all may forget no more than this.
LOWEST = -150.0
# Sums of a tile's steps on this grid are exact: 128 * 150 times 2**9 is below 2**24.
GRID = 2.0**9


class Decay(NamedTuple):
  """The decays inside the tiles of a chunk, in VMEM: two to numbers that are not positive.

  The sums are in parts, which add up. In lists of axes M counts tiles.
  """

  sums_MHQ: Any  # sum of dt a log2(e) up to and with a position: [parts, M, H, Q]
  sums_MSH: Any  # the same, turned
  first_MHQ: Any  # from the state before a tile to a position
  last_MHQ: Any  # from a position to the state after its tile
  cap_SQ: Any  # 0 where position Q sees S, else -inf, tiles side by side: [Q, M * Q]


def decay_scratch(cut: table.Blocks, dtype: jax.typing.DTypeLike) -> Decay:
  """Returns the scratch that `fill` fills."""
  rows, columns = (cut.tiles, cut.heads, TILE), (cut.tiles, TILE, cut.heads)
  parts = table.parts(dtype)
  shapes = Decay((parts, *rows), (parts, *columns), rows, rows, (TILE, cut.chunk))
  return Decay(*(pltpu.VMEM(shape, jnp.float32) for shape in shapes))


def fill(decay: Decay, dt: Any, a: Any, run: Any | None, cut: table.Blocks) -> None:
  """Fills `decay` for all tiles of a chunk at once, because each step of it waits for the last.

  `dt` and `a` are refs of the block's steps and decays, `run` of the resets counted in each tile,
  or None. A difference of long sums loses what they round: where x is float32 there are two
  parts, the first exact, the second small.
  """
  rows = [slice(m * cut.heads, (m + 1) * cut.heads) for m in range(cut.tiles)]
  lanes = [slice(m * TILE, (m + 1) * TILE) for m in range(cut.tiles)]
  a_H1 = a[...] * LOG2E
  step_HQ = jnp.concatenate([jnp.maximum(dt[:, at] * a_H1, LOWEST) for at in lanes])
  parts = [step_HQ]
  if decay.sums_MHQ.shape[0] == 2:
    coarse_HQ = jnp.round(step_HQ * GRID) / GRID
    parts = [coarse_HQ, step_HQ - coarse_HQ]
  sums_HQ = [dot(part_HQ, triangle(TILE, 0), (1, 0), jnp.float32) for part_HQ in parts]
  first_HQ = jnp.exp2(jnp.minimum(sum(sums_HQ), 0))
  last_HQ = jnp.exp2(jnp.minimum(sum(v_HQ[:, TILE - 1 :] - v_HQ for v_HQ in sums_HQ), 0))
  for part, v_HQ in enumerate(sums_HQ):
    v_SH = v_HQ.T
    for m, tile in enumerate(rows):
      decay.sums_MHQ[part, m], decay.sums_MSH[part, m] = v_HQ[tile], v_SH[:, tile]
  for m, (tile, at) in enumerate(zip(rows, lanes, strict=True)):
    seen_SQ, first_1Q, last_1Q = triangle(TILE, 0) > 0, True, True
    if run is not None:
      run_1Q = run[:, at]
      run_S1 = jnp.broadcast_to(run_1Q, (table.SUBLANES, TILE)).T[:, :1]
      seen_SQ, first_1Q = seen_SQ & (run_S1 == run_1Q), run_1Q == 0
      last_1Q = run_1Q == run_1Q[:, TILE - 1 :]
    decay.first_MHQ[m] = jnp.where(first_1Q, first_HQ[tile], 0)
    decay.last_MHQ[m] = jnp.where(last_1Q, last_HQ[tile], 0)
    decay.cap_SQ[:, at] = jnp.where(seen_SQ, 0.0, -jnp.inf)


def within(decay: Decay, m: Array | int, h: int) -> Array:
  """Returns within_SQ of tile `m` and head `h`: from source S to position Q."""
  log_SQ = 0
  for part in range(decay.sums_MHQ.shape[0]):
    log_SQ += decay.sums_MHQ[part, m, h : h + 1] - decay.sums_MSH[part, m, :, h : h + 1]
  return jnp.exp2(jnp.minimum(log_SQ, decay.cap_SQ[:, at(m)]))


def triangle(Q: int, above: int) -> Array:
  """Returns a float32 Q x Q matrix of ones `above` diagonals over the main one and up, else 0."""
  row_QQ = jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 0)
  column_QQ = jax.lax.broadcasted_iota(jnp.int32, (Q, Q), 1)
  return (row_QQ + above <= column_QQ).astype(jnp.float32)


def dot(left: Array, right: Array, axes: tuple[int, int], dtype: jax.typing.DTypeLike) -> Array:
  """Returns the float32 product over one axis of each, of operands in `dtype`.

  float32 operands are multiplied in full: by itself the matrix unit rounds them to bfloat16.
  """
  full = jnp.dtype(dtype) == jnp.float32
  return jax.lax.dot_general(
    left.astype(dtype), right.astype(dtype), (((axes[0],), (axes[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def at(m: Array | int) -> pl.Slice:
  """Returns the lanes of tile `m` in a chunk."""
  return pl.ds(pl.multiple_of(m * TILE, TILE), TILE)


def compiler_params() -> pltpu.CompilerParams:
  """Returns what both kernels ask of the compiler: rows and groups are independent."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=table.VMEM_LIMIT,
  )


def cost(flops: int, exps: int, arrays: Iterable[Array | jax.ShapeDtypeStruct]) -> pl.CostEstimate:
  """Returns what XLA is told of a kernel: it reads or writes each of `arrays` once."""
  moved = sum(v.size * v.dtype.itemsize for v in arrays)
  return pl.CostEstimate(flops=flops, transcendentals=exps, bytes_accessed=moved)
