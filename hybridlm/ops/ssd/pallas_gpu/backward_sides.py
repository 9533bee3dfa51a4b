"""What each warpgroup does with the heads of one chunk and group on the way back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm.ops.ssd.pallas_gpu import lowering
from hybridlm.ops.ssd.pallas_gpu.backward_tiles import (
  BY_COLUMN,
  BY_ROW,
  HALVES,
  ROWS,
  SQ,
  SUMS,
  Q,
  row_tiles,
)


class Ring(NamedTuple):
  """Buffers that hold a few heads' arrays, with a barrier each for loaded and freed."""

  buffers: tuple[Any, ...]
  loaded: Any
  freed: Any
  depth: int

  def wait(self, h):
    """Waits for head `h` and returns its buffers."""
    slot = jax.lax.rem(h, self.depth)
    plgpu.barrier_wait(self.loaded.at[slot])
    return tuple(buffer.at[slot] for buffer in self.buffers)

  def free(self, h):
    """Gives back the buffers of head `h`."""
    plgpu.barrier_arrive(self.freed.at[jax.lax.rem(h, self.depth)])

  def load(self, h, sources):
    """Begins to load head `h` from its `sources` in global memory."""
    slot = jax.lax.rem(h, self.depth)
    for source, buffer in zip(sources, self.buffers, strict=True):
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.loaded.at[slot])

  def reload(self, h, heads, sources):
    """Loads the head that takes the buffers of head `h`, if there is one, once they are free."""

    @pl.when(h + self.depth < heads)
    def _():
      plgpu.barrier_wait(self.freed.at[jax.lax.rem(h, self.depth)])
      self.load(h + self.depth, sources(h + self.depth))


def query_side(rings, c_smem, sums_smem, out, plan):
  """Returns the part of c_bar_QN through the states before; writes the sums "first"."""
  x_ring, state_ring, _ = rings

  def step(h, c_bar_QN):
    _, y_bar_smem, rows_smem = x_ring.wait(h)
    first_Q = _row(rows_smem, "first")
    (state_smem,) = state_ring.wait(h)
    for part in plan.parts:
      first_QP = _scaled(y_bar_smem.at[:, part], first_Q)
      c_bar_QN = add_product(c_bar_QN, first_QP, state_smem.at[part])
    if not plan.wide:
      _write_sums([_outer(c_smem, state_smem, y_bar_smem, first_Q)], sums_smem, out(h))
    state_ring.free(h)
    x_ring.free(h)
    return c_bar_QN

  c_bar_QN = jax.lax.fori_loop(0, plan.heads, step, _zeros((Q, plan.N)))
  plgpu.wait_smem_to_gmem(0)
  return c_bar_QN


def source_side(rings, sources, sums_smem, out, plan):
  """Returns the part of b_bar_SN through the states after; writes "whole"; keeps rings full."""
  x_ring, state_ring, bar_ring = rings

  def step(h, b_bar_SN):
    x_smem, _, rows_smem = x_ring.wait(h)
    dt_S = _row(rows_smem, "dt")
    last_S = _row(rows_smem, "last")
    (bar_smem,) = bar_ring.wait(h)
    for part in plan.parts:
      last_SP = _scaled(x_smem.at[:, part], dt_S * last_S)
      b_bar_SN = add_product(b_bar_SN, last_SP, bar_smem.at[part])
    x_ring.free(h)
    if not plan.wide:
      (state_smem,) = state_ring.wait(h)
      _write_sums([_inner(state_smem, bar_smem, plan)], sums_smem, out(h))
      state_ring.free(h)
    bar_ring.free(h)
    for ring, source in zip(reversed(rings), reversed(sources), strict=True):
      ring.reload(h, plan.heads, source)
    return b_bar_SN

  b_bar_SN = jax.lax.fori_loop(0, plan.heads, step, _zeros((Q, plan.N)))
  plgpu.wait_smem_to_gmem(0)
  return b_bar_SN


def _outer(c_smem, state_smem, y_bar_smem, first_Q):
  """Returns y_bar times what the state before gives to y, summed over P, by position."""
  outer_QP = _over_states(_only(c_smem), state_smem)
  return first_Q * jnp.sum(_matrix(y_bar_smem) * outer_QP, axis=1)


def _inner(state_smem, bar_smem, plan):
  """Returns 64 numbers whose sum is that of state times state_bar."""
  whole_P = jnp.zeros((64,), jnp.float32)
  width = plan.N if plan.N % 32 else 32
  for column in range(0, plan.N, width):
    if plan.wide and column % 32 == 0:
      # All blocks of columns at once would take more registers than there are.
      plgpu.commit_smem()
    for start, seen in row_tiles(plan.P):
      at = pl.ds(start, 64), pl.ds(column, width)
      part_P = jnp.sum(_matrix(state_smem.at[at]) * _matrix(bar_smem.at[at]), axis=1)
      if seen:
        row_P = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=BY_ROW)
        part_P = jnp.where(row_P < seen, 0.0, part_P)
      whole_P += part_P
  return whole_P


def pair_side(rings, group, smem, out, plan):
  """Leaves cb_bar_SQ in shared memory; writes x_bar and the other `SUMS` of every head."""
  x_ring, state_ring, bar_ring = rings
  b_smem, c_smem, run_smem = group
  x_bar_smem, sums_smem, cb_bar_smem = smem
  x_bar_out, sums_out = out
  dtype = x_bar_smem.dtype
  cb_halves = tuple(
    jnp.where(_seen(run_smem, half), _over_states(_only(b_smem), _only(c_smem).at[half]), 0.0)
    for half in HALVES
  )

  def step(h, cb_bar_halves):
    (x_smem, y_bar_smem, rows_smem), (bar_smem,) = x_ring.wait(h), bar_ring.wait(h)

    def row(name):
      return _row(rows_smem, name)

    def put(name, sum_S):
      sums_smem[SUMS.index(name)] = sum_S

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    mixes, cb_bars, into_S = [], [], jnp.zeros((Q,), jnp.float32)
    for i, half in enumerate(HALVES):
      cb_SQ = cb_halves[i]
      sum_Q = plgpu.layout_cast(rows_smem[ROWS.index("sum"), half], BY_COLUMN)
      # Pairs out of order decay by 1 here; cb has zeros there, and cb_bar gets them at the end.
      log_SQ = jax.lax.broadcast_in_dim(sum_Q, SQ, [1]) - _rows(row("sum"), SQ[1])
      decay_SQ = jnp.exp2(jnp.minimum(log_SQ, 0.0))
      mixes.append((cb_SQ * decay_SQ).astype(dtype))
      dot_SQ = _product(SQ, x_smem, transposed(y_bar_smem.at[half]))
      part_SQ = dot_SQ * _rows(row("dt"), SQ[1]) * decay_SQ
      cb_bars.append(cb_bar_halves[i] + part_SQ)
      both_SQ = cb_SQ * part_SQ
      sums_smem[SUMS.index("from"), half] = jnp.sum(both_SQ, axis=0)
      into_S += jnp.sum(both_SQ, axis=1)
    put("into", into_S)
    if plan.wide:
      (state_smem,) = state_ring.wait(h)
      put("first", _outer(c_smem, state_smem, y_bar_smem, row("first")))
      put("whole", _inner(state_smem, bar_smem, plan))
      state_ring.free(h)
    outer_SP = _over_states(_only(b_smem), bar_smem)
    bar_ring.free(h)
    outer_SP *= _rows(row("last"), plan.P)
    put("last", row("dt") * jnp.sum(_matrix(x_smem) * outer_SP, axis=1))
    u_bar_SP = outer_SP
    for half, mix_SQ in zip(HALVES, mixes, strict=True):
      u_bar_SP = add_product(u_bar_SP, mix_SQ, y_bar_smem.at[half])
    put("share", jnp.sum(_matrix(x_smem) * u_bar_SP, axis=1))
    put("skip", jnp.sum(_matrix(y_bar_smem) * _matrix(x_smem), axis=1))
    x_bar_SP = u_bar_SP * _rows(row("dt"), plan.P)
    x_bar_SP += _matrix(y_bar_smem) * _rows(row("skip"), plan.P)
    x_ring.free(h)
    x_bar_smem[...] = x_bar_SP.astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_bar_smem, x_bar_out(h))
    plgpu.copy_smem_to_gmem(sums_smem, sums_out(h))
    return tuple(cb_bars)

  cb_bar_halves = jax.lax.fori_loop(0, plan.heads, step, (_zeros(SQ),) * len(HALVES))
  for half, cb_bar_SQ in zip(HALVES, cb_bar_halves, strict=True):
    cb_bar_smem[:, half] = jnp.where(_seen(run_smem, half), cb_bar_SQ, 0.0).astype(dtype)


def _seen(run_smem, half):
  """Returns where a source S reaches a target Q of the `half`: not after it, and in its run."""
  source_SQ, target_SQ = (
    plgpu.broadcasted_iota(jnp.int32, SQ, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
  )
  run_S = plgpu.layout_cast(run_smem[...], BY_ROW)
  run_Q = jax.lax.broadcast_in_dim(plgpu.layout_cast(run_smem[half], BY_COLUMN), SQ, [1])
  # Behind a barrier, the answer is worked out twice instead of kept through the loop over heads.
  start = jax.lax.optimization_barrier(jnp.int32(half.start))
  return (source_SQ <= target_SQ + start) & (_rows(run_S, SQ[1]) == run_Q)


def _row(rows_smem, name):
  """Returns one of `ROWS`, along the rows of a matrix."""
  return plgpu.layout_cast(rows_smem[ROWS.index(name)], BY_ROW)


def _matrix(smem):
  """Returns a buffer's values in float32, laid out as wgmma has them."""
  return lowering.load(smem).astype(jnp.float32)


def _scaled(smem, v_Q):
  """Returns a buffer's rows times `v_Q`, ready to multiply."""
  return (_matrix(smem) * _rows(v_Q, smem.shape[1])).astype(smem.dtype)


def _rows(v_Q, width):
  """Returns `v_Q` along the rows of a matrix of `width` columns."""
  return jax.lax.broadcast_in_dim(v_Q, (Q, width), [0])


def transposed(smem):
  """Returns a buffer with rows and columns changed round."""
  return smem.transpose((1, 0))


def _zeros(shape):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _product(shape, left, right):
  """Returns left @ right in float32."""

  def multiply(acc):
    plgpu.wgmma(acc, left, right)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _over_states(left, right):
  """Returns left @ right^T, summed over the N columns of both, at most 128 at a time."""
  (rows, N), sums = left.shape, None
  step = min(N, 64) if N % 128 else 128
  for i in range(0, N, step):
    # Behind a barrier, so that one step's addresses are made when the one before is done.
    at = slice(None), pl.ds(jax.lax.optimization_barrier(jnp.int32(i)) if N > step else i, step)
    pair = left.at[at], transposed(right.at[at])
    sums = _product((rows, right.shape[0]), *pair) if i == 0 else add_product(sums, *pair)
  return sums


def _only(smem):
  """Returns the one slot of a buffer, at an index that no compiler knows beforehand.

  So wgmma's addresses in it are made where they are used: kept in registers across the loop over
  heads they would be as many as N / 8.
  """
  return smem.at[jax.lax.optimization_barrier(jnp.int32(0))]


def add_product(acc, left, right):
  """Returns acc + left @ right."""
  return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(acc))


def _write_sums(sums, smem, out):
  """Writes one row per sum to global memory through `smem`, when the last ones have left it."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for i, sum_Q in enumerate(sums):
    smem[i] = sum_Q
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, out)
