"""The scan's forward kernel for Hopper GPUs: what the threads of one block do.

One block walks the chunks of one head; its warpgroups share the work by role. One fetches x, B
and C by TMA, one carries the float32 state from chunk to chunk in registers and hands a bfloat16
copy of it on, and the readers make y, each of them every other chunk: nothing but the state goes
from chunk to chunk in order. No Q x Q array leaves the registers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from hybridlm.ops.ssd.pallas_gpu import lowering, table

# How a product's accumulator lies in a warpgroup's registers, and a vector along its axes.
MATRIX = plgpu.Layout.WGMMA
DOWN, ACROSS = MATRIX.reduce(1), MATRIX.reduce(0)


class Shared(NamedTuple):
  """One block's shared memory; a ring has one entry a stage."""

  x_ring: Any
  b_ring: Any
  c_ring: Any
  line_ring: Any
  state_ring: Any  # bfloat16 copies of the state before a chunk
  input: Any  # x, scaled by what of it reaches the chunk's end
  output: Any  # y, one entry a reader; None: y takes the place of a state
  fetched: Any  # barriers: x, B, C and the lines of a chunk are there
  consumed: Any  # nobody needs them any more
  copied: Any  # the copy of the state is there
  read: Any  # its reader no longer needs it


class Sizes(NamedTuple):
  """What all blocks know: `segments` cut a row's chunks into parts that are walked side by side."""

  L: int
  G: int
  H: int
  P: int
  N: int
  segments: int

  @property
  def chunks(self) -> int:
    """Returns the chunks in a segment."""
    return self.L // table.CHUNK // self.segments


class Head(NamedTuple):
  """Which head a block works on, and in which segment of which row."""

  sizes: Sizes
  row: Array
  segment: Array
  group: Array
  head: Array  # among the heads of all groups

  @property
  def block(self) -> Array:
    """Returns the head's place among those of all rows."""
    return self.row * (self.sizes.G * self.sizes.H) + self.head

  def chunk(self, i):
    """Returns the place of the segment's chunk `i` in its row."""
    return self.segment * self.sizes.chunks + i

  def tokens(self, i):
    """Returns where the tokens of chunk `i` are among those of all rows."""
    return pl.ds(self.row * self.sizes.L + self.chunk(i) * table.CHUNK, table.CHUNK)

  def channels(self):
    """Returns where the head's channels are among those of all heads."""
    return pl.ds(self.head * self.sizes.P, self.sizes.P)


def scratch(tiles, count, sizes):
  """Returns one block's shared memory and barriers as the keyword arguments of `walk`."""
  Q, P, N, readers = table.CHUNK, sizes.P, sizes.N, tiles.readers
  side, tile = (P, N) if table.upright(P) else (N, P), table.swizzle(P, N)

  def smem(*shape, swizzle):
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

  def barrier(arrivals, size):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=size)

  return Shared(
    x_ring=smem(tiles.stages, Q, P, swizzle=table.width(P)),
    b_ring=smem(tiles.stages, Q, N, swizzle=tile),
    c_ring=smem(tiles.stages, Q, N, swizzle=tile) if readers else None,
    line_ring=plgpu.SMEM((tiles.stages, count, Q), jnp.float32),
    state_ring=smem(tiles.copies, *side, swizzle=tile) if readers else None,
    input=smem(Q, P, swizzle=tile),
    output=smem(readers, Q, P, swizzle=table.width(P)) if readers and tiles.apart else None,
    fetched=barrier(4 if readers else 3, tiles.stages),
    consumed=barrier(2 if readers else 1, tiles.stages),
    copied=barrier(1, tiles.copies) if readers else None,
    read=barrier(1, tiles.copies) if readers else None,
  )._asdict()


def walk(
  x_hbm, b_hbm, c_hbm, line_hbm, skip_hbm, first_hbm, last_hbm, *out_hbm, sizes, tiles, **shared
):
  """Runs a segment's chunks of one head, without readers for the state alone: the kernel's body."""
  part, parts = jax.lax.axis_index("part"), jnp.int32(first_hbm.shape[0])
  group, role = jax.lax.axis_index("group"), jax.lax.axis_index("role")
  head = group * sizes.H + jax.lax.axis_index("head")
  place = Head(sizes, jax.lax.div(part, parts), jax.lax.rem(part, parts), group, head)
  shared = Shared(**shared)
  y_hbm, *kept_hbm = out_hbm or (None,)

  if tiles.readers:

    @pl.when(role < tiles.readers)
    def _():
      plgpu.set_max_registers(tiles.reader_registers, action="increase")
      _read(y_hbm, skip_hbm[head], role, shared, place, tiles)

  @pl.when(role == tiles.readers)
  def _():
    if tiles.readers:
      plgpu.set_max_registers(tiles.state_registers, action="increase")
    _carry(first_hbm, last_hbm, kept_hbm, shared, place, tiles)

  @pl.when(role == tiles.readers + 1)
  def _():
    if tiles.readers:
      plgpu.set_max_registers(table.FETCH_REGISTERS, action="decrease")
    _fetch(x_hbm, b_hbm, c_hbm, line_hbm, shared, place, tiles)


def _fetch(x_hbm, b_hbm, c_hbm, line_hbm, shared, place, tiles):
  """Copies every chunk of x, B, C and the lines into the rings as soon as there is room."""
  states = pl.ds(place.group * place.sizes.N, place.sizes.N)

  @pl.loop(0, place.sizes.chunks)
  def _(i):
    at, slot = place.tokens(i), jax.lax.rem(i, jnp.int32(tiles.stages))
    fetched = shared.fetched.at[slot]
    pl.when(i >= tiles.stages)(lambda: plgpu.barrier_wait(shared.consumed.at[slot]))
    plgpu.copy_gmem_to_smem(x_hbm.at[at, place.channels()], shared.x_ring.at[slot], fetched)
    plgpu.copy_gmem_to_smem(b_hbm.at[at, states], shared.b_ring.at[slot], fetched)
    lines = line_hbm.at[place.block, place.chunk(i)]
    plgpu.copy_gmem_to_smem(lines, shared.line_ring.at[slot], fetched)
    if tiles.readers:
      plgpu.copy_gmem_to_smem(c_hbm.at[at, states], shared.c_ring.at[slot], fetched)

  _drain(shared.consumed, place.sizes.chunks, tiles.stages)


def _carry(first_hbm, last_hbm, kept_hbm, shared, place, tiles):
  """Takes the state through the chunks: state <- whole state + (last dt x)^T B.

  `state_PN` lies transposed, as [N, P], unless `table.upright`.
  """

  def hand_on(i, state_PN):
    copy = jax.lax.rem(i, jnp.int32(tiles.copies))
    state = shared.state_ring.at[copy]
    pl.when(i >= tiles.copies)(lambda: plgpu.barrier_wait(shared.read.at[copy]))
    plgpu.wait_smem_to_gmem(tiles.copies - 1, wait_read_only=True)
    state[...] = state_PN.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for kept in kept_hbm:
      plgpu.copy_smem_to_gmem(state, kept.at[place.chunk(i), place.block])
      if not tiles.apart:  # the reader will write over it
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(shared.copied.at[copy])

  def step(i, state_PN):
    if tiles.readers:
      hand_on(i, state_PN)
    slot = jax.lax.rem(i, jnp.int32(tiles.stages))
    plgpu.barrier_wait(shared.fetched.at[slot])
    x, b, line = shared.x_ring.at[slot], shared.b_ring.at[slot], shared.line_ring.at[slot]
    last_Q, whole = _ends(line)
    x_QP = plgpu.layout_cast(x[...], MATRIX).astype(jnp.float32)
    shared.input[...] = (x_QP * _down(last_Q, x.shape)).astype(jnp.bfloat16)
    plgpu.commit_smem()

    def add(state_PN):
      if table.upright(place.sizes.P):
        plgpu.wgmma(state_PN, shared.input.transpose((1, 0)), b)
      else:
        plgpu.wgmma(state_PN, b.transpose((1, 0)), shared.input)

    state_PN = pl.run_state(add)(plgpu.ACC.init(state_PN * whole))
    plgpu.barrier_arrive(shared.consumed.at[slot])
    return state_PN

  state_PN = lowering.load(first_hbm.at[place.segment, place.block])
  state_PN = jax.lax.fori_loop(0, place.sizes.chunks, step, state_PN)
  last_hbm.at[place.segment, place.block][...] = state_PN
  if tiles.readers:
    plgpu.wait_smem_to_gmem(0)
    _drain(shared.read, place.sizes.chunks, tiles.copies)


def _drain(barriers, chunks, size):
  """Waits for what nobody waited for: the last turns of a ring of `size` barriers."""

  @pl.loop(max(chunks, size), chunks + size)
  def _(i):
    plgpu.barrier_wait(barriers.at[jax.lax.rem(i, jnp.int32(size))])


def _ends(line):
  """Returns how much of dt x at a position, times dt, and of the state reaches the chunk's end."""
  sum_Q, dt_Q, end = _take(line, 0, DOWN), _take(line, 1, DOWN), line[0, table.CHUNK - 1]
  last_Q, whole = jnp.exp2(jnp.minimum(end - sum_Q, 0.0)), jnp.exp2(end)
  if line.shape[0] == 3:
    run = line[2, table.CHUNK - 1]
    last_Q = jnp.where(_take(line, 2, DOWN) == run, last_Q, 0.0)
    whole = jnp.where(run == 0.0, whole, 0.0)
  return last_Q * dt_Q, whole


def _read(y_hbm, skip, reader, shared, place, tiles):
  """Makes y = mix x + first (C state) + skip x of every chunk that is this reader's."""
  readers, chunks = tiles.readers, place.sizes.chunks

  @pl.loop(0, (chunks - reader + readers - 1) // readers)
  def _(turn):
    i = turn * readers + reader
    slot, copy = (jax.lax.rem(i, jnp.int32(n)) for n in (tiles.stages, tiles.copies))
    x, line = shared.x_ring.at[slot], shared.line_ring.at[slot]
    plgpu.barrier_wait(shared.fetched.at[slot])
    mix_QS, y_QP = pl.run_scoped(
      functools.partial(_products, slot, copy, shared, tiles),
      plgpu.ACC((table.CHUNK, table.CHUNK), jnp.float32), plgpu.ACC(x.shape, jnp.float32),
    )
    # The state has been read: where there is no room apart, y takes the place of its copy.
    output = shared.state_ring.at[copy, pl.ds(0, table.CHUNK)]
    if tiles.apart:
      output = shared.output.at[reader]
      plgpu.barrier_arrive(shared.read.at[copy])
    first_Q = jnp.exp2(_take(line, 0, DOWN))
    if line.shape[0] == 3:
      first_Q = jnp.where(_take(line, 2, DOWN) == 0.0, first_Q, 0.0)
    x_QP = plgpu.layout_cast(x[...], MATRIX).astype(jnp.float32)
    y_QP = y_QP * _down(first_Q, x.shape) + x_QP * skip
    y_QP = pl.run_state(lambda y_QP: plgpu.wgmma(y_QP, mix_QS, x))(plgpu.ACC.init(y_QP))
    plgpu.barrier_arrive(shared.consumed.at[slot])
    if tiles.apart:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    output[...] = y_QP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(output, y_hbm.at[place.tokens(i), place.channels()])
    if not tiles.apart:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.barrier_arrive(shared.read.at[copy])

  plgpu.wait_smem_to_gmem(0)


def _products(slot, copy, shared, tiles, score_QS, y_QP):
  """Returns mix = (C B^T) decay dt in bfloat16, and C state; the latter runs meanwhile."""
  b, c, state = shared.b_ring.at[slot], shared.c_ring.at[slot], shared.state_ring.at[copy]
  plgpu.wgmma(score_QS, c, b.transpose((1, 0)))
  plgpu.barrier_wait(shared.copied.at[copy])
  plgpu.wgmma(y_QP, c, state.transpose((1, 0)) if table.upright(y_QP.shape[1]) else state)
  mix_QS = _mix(plgpu.wgmma_accumulator_load(score_QS, wait_n=1), shared.line_ring.at[slot])
  return mix_QS, y_QP[...]


def _mix(score_QS, line):
  """Returns score decay dt where position S is seen from Q: not later, and of the same run."""
  shape = score_QS.shape
  later_QS = _down(_take(line, 0, DOWN), shape) - _across(_take(line, 0, ACROSS), shape)
  rows, columns = (
    plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX) for axis in (0, 1)
  )
  seen_QS = rows >= columns
  if line.shape[0] == 3:
    seen_QS &= _down(_take(line, 2, DOWN), shape) == _across(_take(line, 2, ACROSS), shape)
  decay_QS = jnp.exp2(jnp.minimum(later_QS, 0.0)) * _across(_take(line, 1, ACROSS), shape)
  return jnp.where(seen_QS, score_QS * decay_QS, 0.0).astype(jnp.bfloat16)


def _take(line, r, layout):
  """Returns line `r` of a chunk, along the rows (DOWN) or the columns (ACROSS) of a matrix."""
  return plgpu.layout_cast(line[r], layout)


def _down(v_Q, shape):
  """Returns a matrix whose columns all are `v_Q`."""
  return jax.lax.broadcast_in_dim(v_Q, shape, [0])


def _across(v_S, shape):
  """Returns a matrix whose rows all are `v_S`."""
  return jax.lax.broadcast_in_dim(v_S, shape, [1])
