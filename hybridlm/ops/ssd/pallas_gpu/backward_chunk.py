"""The cotangents inside one chunk of a group: what is left once the states' are known.

One block of threads per chunk and group, three warpgroups, each walking the group's heads:
the *query* side adds up the cotangent of C through the states, the *source* side that of B, and
the *pair* side does all that is Q x Q and the cotangent of x. Heads stream through rings of
buffers that the source side, which has least to do, refills.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Tokens of a chunk: the rows of one wgmma.
Q = 64
# What a head has per position: the sum of dt a from the chunk's start to it, in powers of two; dt;
# what survives of the state before the chunk; what of the position reaches the chunk's end; skip.
ROWS = ("sum", "dt", "first", "last", "skip")
# What a head leaves per position: sums over M = mix mix_bar by target and by source, over
# u_bar x, over y_bar x; the terms through the states after and before; state_bar state.
SUMS = ("from", "into", "share", "skip", "last", "first", "whole")
PAIR_SUMS = SUMS[:5]
QUERY, SOURCE, PAIR = range(3)
SHARED_BYTES = 227 * 1024
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


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


class Plan(NamedTuple):
  """Sizes of a call, and how many heads' arrays are held at once."""

  heads: int
  P: int
  N: int
  x_depth: int
  state_depth: int
  bar_depth: int


def run(
  x_BLGHP, rows_BGHCRQ, b_BLGN, c_BLGN, run_BCQ, y_bar_BLGHP, state_CBGHPN, state_bar_CBGHPN
):
  """Returns x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN and the `SUMS` of every head, sums_BGHCRQ."""
  B, L, G, H, P = x_BLGHP.shape
  N, C = b_BLGN.shape[3], L // Q
  plan = make_plan(H, P, N)
  kernel = plgpu.kernel(
    functools.partial(_kernel, plan=plan),
    out_type=(
      jax.ShapeDtypeStruct((B, L, G * H, P), x_BLGHP.dtype),
      jax.ShapeDtypeStruct((B, L, G, N), b_BLGN.dtype),
      jax.ShapeDtypeStruct((B, L, G, N), c_BLGN.dtype),
      jax.ShapeDtypeStruct((B, G * H, C, len(SUMS), Q), jnp.float32),
    ),
    scratch_types=_scratch(plan, x_BLGHP.dtype),
    grid=(C, G, B),
    grid_names=("chunk", "group", "batch"),
    num_threads=3,
    thread_name="side",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )
  x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, sums_BGHCRQ = kernel(
    x_BLGHP.reshape(B, L, G * H, P), y_bar_BLGHP.reshape(B, L, G * H, P),
    rows_BGHCRQ.reshape(B, G * H, C, len(ROWS), Q), state_CBGHPN.reshape(C, B, G * H, P, N),
    state_bar_CBGHPN.reshape(C, B, G * H, P, N), b_BLGN, c_BLGN, run_BCQ,
  )
  sums_BGHCRQ = sums_BGHCRQ.reshape(B, G, H, C, len(SUMS), Q)
  return x_bar_BLGHP.reshape(x_BLGHP.shape), b_bar_BLGN, c_bar_BLGN, sums_BGHCRQ


def make_plan(H, P, N) -> Plan:
  """Returns the deepest buffering that fits into shared memory."""
  for depths in ((4, 4, 4), (3, 3, 3), (2, 2, 2), (2, 2, 1)):
    plan = Plan(H, P, N, *depths)
    if shared_bytes(plan) <= SHARED_BYTES:
      return plan
  raise ValueError(f"P = {P} and N = {N} need over {SHARED_BYTES} bytes of shared memory")


def shared_bytes(plan: Plan) -> int:
  """Returns the shared memory that `plan` asks for, in bytes, with 4 KiB for small things."""
  states = (plan.state_depth + plan.bar_depth) * plan.P * plan.N * 2
  heads = plan.x_depth * (2 * Q * plan.P * 2 + len(ROWS) * Q * 4) + states
  return heads + 2 * Q * plan.N * 2 + Q * plan.P * 2 + Q * Q * 2 + len(SUMS) * Q * 4 + 4096


def swizzle(width: int, dtype) -> int:
  """Returns the widest swizzle, in bytes, that divides rows of `width` values."""
  row = width * jnp.dtype(dtype).itemsize
  return next(s for s in (128, 64, 32) if row % s == 0)


def tiles(width: int, dtype) -> tuple:
  """Returns the transforms of a buffer that wgmma reads with a swizzle of `width` bytes."""
  minor = width // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(width)


def row_tiles(rows: int) -> list[tuple[int, int]]:
  """Returns (start, rows seen before) of 64-row tiles over `rows`; the last may overlap."""
  starts = [min(i, rows - 64) for i in range(0, rows, 64)]
  return [(start, 64 * i - start) for i, start in enumerate(starts)]


def _scratch(plan: Plan, dtype) -> dict:
  """Returns the buffers and barriers of one block of threads, by name."""
  P, N = plan.P, plan.N
  # The states stand between arrays of rows P and of rows N in products, so both must divide.
  x_tiles, n_tiles = tiles(swizzle(P, dtype), dtype), tiles(state_swizzle(P, N, dtype), dtype)
  return {
    "x_smem": plgpu.SMEM((plan.x_depth, Q, P), dtype, transforms=x_tiles),
    "y_bar_smem": plgpu.SMEM((plan.x_depth, Q, P), dtype, transforms=x_tiles),
    "rows_smem": plgpu.SMEM((plan.x_depth, len(ROWS), Q), jnp.float32),
    "state_smem": plgpu.SMEM((plan.state_depth, P, N), dtype, transforms=n_tiles),
    "bar_smem": plgpu.SMEM((plan.bar_depth, P, N), dtype, transforms=n_tiles),
    "b_smem": plgpu.SMEM((Q, N), dtype, transforms=n_tiles),
    "c_smem": plgpu.SMEM((Q, N), dtype, transforms=n_tiles),
    "run_smem": plgpu.SMEM((Q,), jnp.float32),
    "cb_bar_smem": plgpu.SMEM((Q, Q), dtype, transforms=n_tiles),
    "x_bar_smem": plgpu.SMEM((Q, P), dtype, transforms=x_tiles),
    "sums_smem": plgpu.SMEM((len(SUMS), Q), jnp.float32),
    "x_loaded": plgpu.Barrier(num_arrivals=3, num_barriers=plan.x_depth),
    "x_freed": plgpu.Barrier(num_arrivals=3, num_barriers=plan.x_depth),
    "state_loaded": plgpu.Barrier(num_barriers=plan.state_depth),
    "state_freed": plgpu.Barrier(num_arrivals=2, num_barriers=plan.state_depth),
    "bar_loaded": plgpu.Barrier(num_barriers=plan.bar_depth),
    "bar_freed": plgpu.Barrier(num_arrivals=2, num_barriers=plan.bar_depth),
    "group_loaded": plgpu.Barrier(num_arrivals=3),
    "done": plgpu.Barrier(num_arrivals=3),
  }


def state_swizzle(P: int, N: int, dtype) -> int:
  """Returns the swizzle, in bytes, of buffers with rows of N that also multiply over P."""
  return min(swizzle(P, dtype), swizzle(N, dtype))


class Place(NamedTuple):
  """Where this block of threads works."""

  chunk: Any
  group: Any
  batch: Any
  heads: int

  def head(self, h):
    """Returns the number of head `h` of the group among all heads."""
    return self.group * self.heads + h

  def tokens(self):
    """Returns the slice of the chunk's tokens."""
    return pl.ds(self.chunk * Q, Q)


def _kernel(
  x_ref, y_bar_ref, rows_ref, state_ref, bar_ref, b_ref, c_ref, run_ref,
  x_bar_ref, b_bar_ref, c_bar_ref, sums_ref,
  *, x_smem, y_bar_smem, rows_smem, state_smem, bar_smem, b_smem, c_smem, run_smem, cb_bar_smem,
  x_bar_smem, sums_smem, x_loaded, x_freed, state_loaded, state_freed, bar_loaded, bar_freed,
  group_loaded, done, plan,
):
  """Gives each warpgroup its side."""
  place = Place(*(jax.lax.axis_index(name) for name in ("chunk", "group", "batch")), plan.heads)
  rings = (
    Ring((x_smem, y_bar_smem, rows_smem), x_loaded, x_freed, plan.x_depth),
    Ring((state_smem,), state_loaded, state_freed, plan.state_depth),
    Ring((bar_smem,), bar_loaded, bar_freed, plan.bar_depth),
  )
  side, tokens = jax.lax.axis_index("side"), place.tokens()

  def sums_out(h, first, count):
    return sums_ref.at[place.batch, place.head(h), place.chunk, pl.ds(first, count)]

  @pl.when(side == QUERY)
  def _():
    plgpu.barrier_wait(group_loaded)
    out = functools.partial(sums_out, first=SUMS.index("first"), count=1)
    c_bar_QN = _query_side(
      rings, c_smem, sums_smem.at[pl.ds(SUMS.index("first"), 1)], out, plan
    )
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    cb_bar_QS = plgpu.transpose_ref(cb_bar_smem, (1, 0))
    c_bar_QN = _add_product(c_bar_QN, cb_bar_QS, b_smem)
    _write(c_bar_QN, state_smem.at[0, pl.ds(0, Q)], c_bar_ref.at[place.batch, tokens, place.group])

  @pl.when(side == SOURCE)
  def _():
    def sources(ring, h):
      head = place.head(h)
      at = (place.batch, tokens, head)
      rows = rows_ref.at[place.batch, head, place.chunk]
      states = (place.chunk, place.batch, head)
      return ((x_ref.at[at], y_bar_ref.at[at], rows), (state_ref.at[states],),
              (bar_ref.at[states],))[ring]

    plgpu.copy_gmem_to_smem(b_ref.at[place.batch, tokens, place.group], b_smem, group_loaded)
    plgpu.copy_gmem_to_smem(c_ref.at[place.batch, tokens, place.group], c_smem, group_loaded)
    plgpu.copy_gmem_to_smem(run_ref.at[place.batch, place.chunk], run_smem, group_loaded)
    sources = [functools.partial(sources, i) for i in range(len(rings))]
    for ring, source in zip(rings, sources, strict=True):
      for h in range(min(ring.depth, plan.heads)):
        ring.load(jnp.int32(h), source(h))
    plgpu.barrier_wait(group_loaded)
    out = functools.partial(sums_out, first=SUMS.index("whole"), count=1)
    b_bar_SN = _source_side(
      rings, sources, sums_smem.at[pl.ds(SUMS.index("whole"), 1)], out, plan
    )
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    b_bar_SN = _add_product(b_bar_SN, cb_bar_smem, c_smem)
    _write(b_bar_SN, bar_smem.at[0, pl.ds(0, Q)], b_bar_ref.at[place.batch, tokens, place.group])

  @pl.when(side == PAIR)
  def _():
    plgpu.barrier_wait(group_loaded)

    def x_bar_out(h):
      return x_bar_ref.at[place.batch, tokens, place.head(h)]

    out = functools.partial(sums_out, first=0, count=len(PAIR_SUMS))
    cb_bar_SQ = _pair_side(
      rings, (b_smem, c_smem, run_smem), (x_bar_smem, sums_smem.at[pl.ds(0, len(PAIR_SUMS))]),
      (x_bar_out, out), plan,
    )
    cb_bar_smem[...] = cb_bar_SQ.astype(cb_bar_smem.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    plgpu.wait_smem_to_gmem(0)


def _query_side(rings, c_smem, sums_smem, out, plan):
  """Returns the part of c_bar_QN through the states before; writes the sums "first"."""
  x_ring, state_ring, _ = rings

  def step(h, c_bar_QN):
    _, y_bar_smem, rows_smem = x_ring.wait(h)
    first_Q = plgpu.load(rows_smem, (ROWS.index("first"),), layout=BY_ROW)
    first_QP = _matrix(y_bar_smem) * _rows(first_Q, plan.P)
    x_ring.free(h)
    (state_smem,) = state_ring.wait(h)
    outer_QP = _product((Q, plan.P), c_smem, plgpu.transpose_ref(state_smem, (1, 0)))
    c_bar_QN = _add_product(c_bar_QN, first_QP.astype(c_smem.dtype), state_smem)
    state_ring.free(h)
    _write_sums([jnp.sum(first_QP * outer_QP, axis=1)], sums_smem, out(h))
    return c_bar_QN

  c_bar_QN = jax.lax.fori_loop(0, plan.heads, step, _zeros((Q, plan.N)))
  plgpu.wait_smem_to_gmem(0)
  return c_bar_QN


def _source_side(rings, sources, sums_smem, out, plan):
  """Returns the part of b_bar_SN through the states after; writes "whole"; keeps rings full."""
  x_ring, state_ring, bar_ring = rings

  def step(h, b_bar_SN):
    x_smem, _, rows_smem = x_ring.wait(h)
    dt_S = plgpu.load(rows_smem, (ROWS.index("dt"),), layout=BY_ROW)
    last_S = plgpu.load(rows_smem, (ROWS.index("last"),), layout=BY_ROW)
    last_SP = (_matrix(x_smem) * _rows(dt_S * last_S, plan.P)).astype(x_smem.dtype)
    x_ring.free(h)
    (bar_smem,), (state_smem,) = bar_ring.wait(h), state_ring.wait(h)
    whole_P = _inner(state_smem, bar_smem, plan)
    state_ring.free(h)
    b_bar_SN = _add_product(b_bar_SN, last_SP, bar_smem)
    bar_ring.free(h)
    _write_sums([whole_P], sums_smem, out(h))
    for ring, source in zip(reversed(rings), reversed(sources), strict=True):
      ring.reload(h, plan.heads, source)
    return b_bar_SN

  b_bar_SN = jax.lax.fori_loop(0, plan.heads, step, _zeros((Q, plan.N)))
  plgpu.wait_smem_to_gmem(0)
  return b_bar_SN


def _inner(state_smem, bar_smem, plan):
  """Returns 64 numbers whose sum is that of state times state_bar."""
  whole_P = jnp.zeros((64,), jnp.float32)
  width = min(64, plan.N)
  for start, seen in row_tiles(plan.P):
    for column in range(0, plan.N, width):
      at = (pl.ds(start, 64), pl.ds(column, width))
      part_P = jnp.sum(_matrix(state_smem.at[at]) * _matrix(bar_smem.at[at]), axis=1)
      if seen:
        row_P = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=BY_ROW)
        part_P = jnp.where(row_P < seen, 0.0, part_P)
      whole_P += part_P
  return whole_P


def _pair_side(rings, group, smem, out, plan):
  """Returns cb_bar_SQ; writes x_bar and the `PAIR_SUMS` of every head."""
  x_ring, _, bar_ring = rings
  b_smem, c_smem, run_smem = group
  x_bar_smem, sums_smem = smem
  x_bar_out, sums_out = out
  dtype = x_bar_smem.dtype
  seen_SQ = _seen(run_smem)
  cb_SQ = _product((Q, Q), b_smem, plgpu.transpose_ref(c_smem, (1, 0)))
  cb_SQ = jnp.where(seen_SQ, cb_SQ, 0.0)

  def step(h, cb_bar_SQ):
    x_smem, y_bar_smem, rows_smem = x_ring.wait(h)

    def row(name, layout=BY_ROW):
      return plgpu.load(rows_smem, (ROWS.index(name),), layout=layout)

    # Pairs out of order decay by 1 here; cb_SQ has zeros there, and cb_bar_SQ gets them below.
    log_SQ = _columns(row("sum", BY_COLUMN), Q) - _rows(row("sum"), Q)
    decay_SQ = jnp.exp2(jnp.minimum(log_SQ, 0.0))
    mix_SQ = cb_SQ * decay_SQ
    dot_SQ = _product((Q, Q), x_smem, plgpu.transpose_ref(y_bar_smem, (1, 0)))
    mix_bar_SQ = dot_SQ * _rows(row("dt"), Q)
    cb_bar_SQ += mix_bar_SQ * decay_SQ
    both_SQ = mix_SQ * mix_bar_SQ
    sums = [jnp.sum(both_SQ, axis=0), jnp.sum(both_SQ, axis=1)]
    (bar_smem,) = bar_ring.wait(h)
    outer_SP = _product((Q, plan.P), b_smem, plgpu.transpose_ref(bar_smem, (1, 0)))
    bar_ring.free(h)
    outer_SP *= _rows(row("last"), plan.P)
    x_SP = _matrix(x_smem)
    last_S = row("dt") * jnp.sum(x_SP * outer_SP, axis=1)
    u_bar_SP = _add_product(outer_SP, mix_SQ.astype(dtype), y_bar_smem)
    y_bar_SP = _matrix(y_bar_smem)
    sums += [jnp.sum(u_bar_SP * x_SP, axis=1), jnp.sum(y_bar_SP * x_SP, axis=1), last_S]
    x_bar_SP = u_bar_SP * _rows(row("dt"), plan.P) + y_bar_SP * _rows(row("skip"), plan.P)
    x_ring.free(h)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    x_bar_smem[...] = x_bar_SP.astype(dtype)
    for i, sum_Q in enumerate(sums):
      sums_smem[i] = sum_Q
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_bar_smem, x_bar_out(h))
    plgpu.copy_smem_to_gmem(sums_smem, sums_out(h))
    return cb_bar_SQ

  cb_bar_SQ = jax.lax.fori_loop(0, plan.heads, step, _zeros((Q, Q)))
  return jnp.where(_seen(run_smem), cb_bar_SQ, 0.0)


def _seen(run_smem):
  """Returns where a source S reaches a target Q: not after it, and in its run."""
  source_SQ, target_SQ = (
    plgpu.broadcasted_iota(jnp.int32, (Q, Q), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
  )
  run_S, run_Q = (plgpu.load(run_smem, (), layout=layout) for layout in (BY_ROW, BY_COLUMN))
  return (source_SQ <= target_SQ) & (_rows(run_S, Q) == _columns(run_Q, Q))


def _matrix(smem):
  """Returns a buffer's values in float32, laid out as wgmma has them."""
  return plgpu.load(smem, (), layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _rows(v_Q, width):
  """Returns `v_Q` along the rows of a matrix of `width` columns."""
  return jax.lax.broadcast_in_dim(v_Q, (Q, width), [0])


def _columns(v_Q, height):
  """Returns `v_Q` along the columns of a matrix of `height` rows."""
  return jax.lax.broadcast_in_dim(v_Q, (height, Q), [1])


def _zeros(shape):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _product(shape, left, right):
  """Returns left @ right in float32."""

  def multiply(acc):
    plgpu.wgmma(acc, left, right)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _add_product(acc, left, right):
  """Returns acc + left @ right."""
  return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(acc))


def _write(value, smem, out):
  """Writes `value` to global memory through `smem`."""
  smem[...] = value.astype(smem.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, out)
  plgpu.wait_smem_to_gmem(0)


def _write_sums(sums, smem, out):
  """Writes one row per sum to global memory through `smem`, when the last ones have left it."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  for i, sum_Q in enumerate(sums):
    smem[i] = sum_Q
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, out)
