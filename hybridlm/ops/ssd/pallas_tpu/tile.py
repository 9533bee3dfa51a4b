"""What both kernels do with one tile in VMEM: decays, products, and what the compiler is told."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from hybridlm.ops.ssd.pallas_tpu import table

# exp of it is 0 in float32: a step that forgets all may forget no more than this.
LOWEST = -128.0
# Sums of a tile's steps on this grid are exact: 128 * 128 = 2**14 times 2**10 is 2**24.
GRID = 2.0**10


class Decay(NamedTuple):
  """The decays inside one tile, of all heads of a block; all from exp of non-positive numbers."""

  sums_HQ: tuple[Array, ...]  # parts of the sum of dt a up to and with a position
  sums_SH: tuple[Array, ...]  # the same, turned
  first_HQ: Array  # from the state before the tile to a position
  last_HQ: Array  # from a position to the state after the tile
  cap_SQ: Array  # 0 where position Q sees S, else -inf


def decay(
  dt_HQ: Array, a_H1: Array, run_1Q: Array | None, dtype: jax.typing.DTypeLike
) -> Decay:
  """Returns the decays of a tile; `run_1Q` counts resets in it, None where there are none.

  A difference of long sums loses what they round. Where x is float32 the sums are therefore in
  two parts, one exact and one small.
  """
  Q = dt_HQ.shape[1]
  step_HQ = jnp.maximum(dt_HQ * a_H1, LOWEST)
  parts = (step_HQ,)
  if jnp.dtype(dtype) == jnp.float32:
    coarse_HQ = jnp.round(step_HQ * GRID) / GRID
    parts = (coarse_HQ, step_HQ - coarse_HQ)
  sums_HQ = tuple(dot(part_HQ, triangle(Q, 0), (1, 0), jnp.float32) for part_HQ in parts)
  first_HQ = jnp.exp(jnp.minimum(sum(sums_HQ), 0))
  last_HQ = jnp.exp(jnp.minimum(sum(v_HQ[:, Q - 1 :] - v_HQ for v_HQ in sums_HQ), 0))
  seen_SQ = triangle(Q, 0) > 0
  if run_1Q is not None:
    run_S1 = jnp.broadcast_to(run_1Q, (table.SUBLANES, Q)).T[:, :1]
    seen_SQ &= run_S1 == run_1Q
    first_HQ = jnp.where(run_1Q == 0, first_HQ, 0)
    last_HQ = jnp.where(run_1Q == run_1Q[:, Q - 1 :], last_HQ, 0)
  cap_SQ = jnp.where(seen_SQ, 0.0, -jnp.inf)
  return Decay(sums_HQ, tuple(v_HQ.T for v_HQ in sums_HQ), first_HQ, last_HQ, cap_SQ)


def within(decay: Decay, h: int) -> Array:
  """Returns within_SQ of head `h`: from source S to position Q."""
  parts = zip(decay.sums_HQ, decay.sums_SH, strict=True)
  log_SQ = sum(v_HQ[h : h + 1] - v_SH[:, h : h + 1] for v_HQ, v_SH in parts)
  return jnp.exp(jnp.minimum(log_SQ, decay.cap_SQ))


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


def at(m: Array) -> pl.Slice:
  """Returns the lanes of tile `m` in a chunk."""
  return pl.ds(pl.multiple_of(m * table.TILE, table.TILE), table.TILE)


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
