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
# The pair side takes the targets in halves, whose matrices fit its registers.
SQ = Q, Q // 2
HALVES = pl.ds(0, Q // 2), pl.ds(Q // 2, Q // 2)
QUERY, SOURCE, PAIR = range(3)
SHARED_BYTES = 227 * 1024
# Registers of a thread by side, for a `Plan` that is not and that is wide.
REGISTERS = {False: (152, 168, 184), True: (176, 176, 152)}
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
    "b_smem": plgpu.SMEM((1, Q, N), dtype, transforms=n_tiles),
    "c_smem": plgpu.SMEM((1, Q, N), dtype, transforms=n_tiles),
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

  def query():
    _set_registers(plan, QUERY)
    plgpu.barrier_wait(group_loaded)
    out = functools.partial(sums_out, first=SUMS.index("first"), count=1)
    c_bar_QN = _query_side(
      rings, c_smem, sums_smem.at[pl.ds(SUMS.index("first"), 1)], out, plan
    )
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    c_bar_QN = _add_product(c_bar_QN, _transposed(cb_bar_smem), b_smem.at[0])
    _write(c_bar_QN, state_smem.at[0, pl.ds(0, Q)], c_bar_ref.at[place.batch, tokens, place.group])

  def source():
    _set_registers(plan, SOURCE)

    def sources(ring, h):
      head = place.head(h)
      at = (place.batch, tokens, head)
      rows = rows_ref.at[place.batch, head, place.chunk]
      states = (place.chunk, place.batch, head)
      return ((x_ref.at[at], y_bar_ref.at[at], rows), (state_ref.at[states],),
              (bar_ref.at[states],))[ring]

    plgpu.copy_gmem_to_smem(b_ref.at[place.batch, tokens, place.group], b_smem.at[0], group_loaded)
    plgpu.copy_gmem_to_smem(c_ref.at[place.batch, tokens, place.group], c_smem.at[0], group_loaded)
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
    b_bar_SN = _add_product(b_bar_SN, cb_bar_smem, c_smem.at[0])
    _write(b_bar_SN, bar_smem.at[0, pl.ds(0, Q)], b_bar_ref.at[place.batch, tokens, place.group])

  def pair():
    _set_registers(plan, PAIR)
    plgpu.barrier_wait(group_loaded)

    def x_bar_out(h):
      return x_bar_ref.at[place.batch, tokens, place.head(h)]

    out = functools.partial(sums_out, first=0, count=plan.pair_sums)
    pair_smem = x_bar_smem, sums_smem.at[pl.ds(0, plan.pair_sums)], cb_bar_smem
    _pair_side(rings, (b_smem, c_smem, run_smem), pair_smem, (x_bar_out, out), plan)
    plgpu.commit_smem()
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    plgpu.wait_smem_to_gmem(0)

  # One choice, not three in a row: else each side's registers hold what the later ones want.
  jax.lax.switch(side, (query, source, pair))


def _set_registers(plan, side):
  """Gives this warpgroup its share of the registers, of which each starts with a third."""
  count = REGISTERS[plan.wide][side]
  plgpu.set_max_registers(count, action="increase" if count > 168 else "decrease")


def _query_side(rings, c_smem, sums_smem, out, plan):
  """Returns the part of c_bar_QN through the states before; writes the sums "first"."""
  x_ring, state_ring, _ = rings

  def step(h, c_bar_QN):
    _, y_bar_smem, rows_smem = x_ring.wait(h)
    first_Q = plgpu.load(rows_smem, (ROWS.index("first"),), layout=BY_ROW)
    (state_smem,) = state_ring.wait(h)
    for part in plan.parts:
      c_bar_QN = _add_product(c_bar_QN, _scaled(y_bar_smem.at[:, part], first_Q), state_smem.at[part])
    if not plan.wide:
      _write_sums([_outer(c_smem, state_smem, y_bar_smem, first_Q)], sums_smem, out(h))
    state_ring.free(h)
    x_ring.free(h)
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
    (bar_smem,) = bar_ring.wait(h)
    for part in plan.parts:
      b_bar_SN = _add_product(b_bar_SN, _scaled(x_smem.at[:, part], dt_S * last_S), bar_smem.at[part])
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
  width = min(plan.N, max(32, state_swizzle(plan.P, plan.N, state_smem.dtype) // 2))
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
      return plgpu.load(rows_smem, (ROWS.index(name),), layout=BY_ROW)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    mixes, cb_bars, into_S = [], [], jnp.zeros((Q,), jnp.float32)
    for i, half in enumerate(HALVES):
      cb_SQ = cb_halves[i]
      sum_Q = plgpu.load(rows_smem, (ROWS.index("sum"), half), layout=BY_COLUMN)
      # Pairs out of order decay by 1 here; cb has zeros there, and cb_bar gets them at the end.
      log_SQ = jax.lax.broadcast_in_dim(sum_Q, SQ, [1]) - _rows(row("sum"), SQ[1])
      decay_SQ = jnp.exp2(jnp.minimum(log_SQ, 0.0))
      mixes.append((cb_SQ * decay_SQ).astype(dtype))
      dot_SQ = _product(SQ, x_smem, _transposed(y_bar_smem.at[half]))
      part_SQ = dot_SQ * _rows(row("dt"), SQ[1]) * decay_SQ
      cb_bars.append(cb_bar_halves[i] + part_SQ)
      both_SQ = cb_SQ * part_SQ
      sums_smem[SUMS.index("from"), half] = jnp.sum(both_SQ, axis=0)
      into_S += jnp.sum(both_SQ, axis=1)
    skip_S = jnp.sum(_matrix(y_bar_smem) * _matrix(x_smem), axis=1)
    if plan.wide:
      (state_smem,) = state_ring.wait(h)
      sum_Q = _outer(c_smem, state_smem, y_bar_smem, row("first"))
      sums_smem[SUMS.index("first")] = sum_Q
      sums_smem[SUMS.index("whole")] = _inner(state_smem, bar_smem, plan)
      state_ring.free(h)
    outer_SP = _over_states(_only(b_smem), bar_smem)
    bar_ring.free(h)
    outer_SP *= _rows(row("last"), plan.P)
    last_S = row("dt") * jnp.sum(_matrix(x_smem) * outer_SP, axis=1)
    u_bar_SP = outer_SP
    for half, mix_SQ in zip(HALVES, mixes, strict=True):
      u_bar_SP = _add_product(u_bar_SP, mix_SQ, y_bar_smem.at[half])
    share_S = jnp.sum(_matrix(x_smem) * u_bar_SP, axis=1)
    x_bar_SP = u_bar_SP * _rows(row("dt"), plan.P)
    x_bar_SP += _matrix(y_bar_smem) * _rows(row("skip"), plan.P)
    x_ring.free(h)
    x_bar_smem[...] = x_bar_SP.astype(dtype)
    sums = into_S, share_S, skip_S, last_S
    for i, sum_S in enumerate(sums):
      sums_smem[1 + i] = sum_S
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
  run_S, run_Q = plgpu.load(run_smem, (), layout=BY_ROW), run_smem.at[half]
  run_Q = jax.lax.broadcast_in_dim(plgpu.load(run_Q, (), layout=BY_COLUMN), SQ, [1])
  # Behind a barrier, the answer is worked out twice instead of kept through the loop over heads.
  start = jax.lax.optimization_barrier(jnp.int32(half.start))
  return (source_SQ <= target_SQ + start) & (_rows(run_S, SQ[1]) == run_Q)


def _matrix(smem):
  """Returns a buffer's values in float32, laid out as wgmma has them."""
  return plgpu.load(smem, (), layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def _scaled(smem, v_Q):
  """Returns a buffer's rows times `v_Q`, ready to multiply."""
  return (_matrix(smem) * _rows(v_Q, smem.shape[1])).astype(smem.dtype)


def _rows(v_Q, width):
  """Returns `v_Q` along the rows of a matrix of `width` columns."""
  return jax.lax.broadcast_in_dim(v_Q, (Q, width), [0])


def _transposed(smem):
  return plgpu.transpose_ref(smem, (1, 0))


def _zeros(shape):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _product(shape, left, right):
  """Returns left @ right in float32."""

  def multiply(acc):
    plgpu.wgmma(acc, left, right)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _over_states(left, right):
  """Returns left @ right^T, summed over the N columns of both."""
  return _product((left.shape[0], right.shape[0]), left, _transposed(right))


def _only(smem):
  """Returns the one slot of a buffer, at an index that no compiler knows beforehand.

  So wgmma's addresses in it are made where they are used: kept in registers across the loop over
  heads they would be as many as N / 8.
  """
  return smem.at[jax.lax.optimization_barrier(jnp.int32(0))]


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
