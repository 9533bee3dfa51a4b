"""The scan's forward pass on Hopper GPUs: one Pallas Mosaic GPU kernel.

One block walks the chunks of one head; its warpgroups share the work by role. One fetches x, B
and C by TMA, one carries the float32 state from chunk to chunk in registers and hands a bfloat16
copy of it on, and the readers make y, each of them every other chunk: nothing but the state goes
from chunk to chunk in order. No Q x Q array leaves the registers.
Source: Mamba-2 (arXiv 2405.21060), section 6, the block decomposition.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from hybridlm.ops.ssd.pallas_gpu import table

LOG2_E = 1.4426950408889634
# A step's dt a from which on nothing of the state is left in float32: less would only drown the
# small steps after it in the chunk's sums.
LEAST = -104.0
# How a product's accumulator lies in a warpgroup's registers, and a vector along its axes.
MATRIX = plgpu.Layout.WGMMA
DOWN, ACROSS = MATRIX.reduce(1), MATRIX.reduce(0)
# One array each: x, B, C and the lines.
COPIES = 4


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


class Head(NamedTuple):
  """Which head of which row a block works on, and the sizes of all."""

  L: int
  P: int
  N: int
  row: Array
  group: Array
  head: Array  # among the heads of all groups
  block: Array  # among the heads of all rows

  def tokens(self, i):
    """Returns where the tokens of chunk `i` are among those of all rows."""
    return pl.ds(self.row * self.L + i * table.CHUNK, table.CHUNK)

  def channels(self):
    """Returns where the head's channels are among those of all heads."""
    return pl.ds(self.head * self.P, self.P)


def forward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  state_BGHPN: Float[Array, "B G H P N"],
  *,
  chunk: int,
  keep: bool = True,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"], tuple]:
  """Returns y, the state after the last token and (state_CBGHPN,): the states before every chunk.

  L is a multiple of `chunk`; the state is dropped before tokens where `fresh_BL`, nowhere when it
  is None. x, B, C, y and the kept states, which meet the tensor cores only, are bfloat16, the
  rest is float32. Without `keep` no state but the last is written, and the third result is ().
  Raises ValueError, with the reason of `table.refusal`, for what the kernel cannot run.
  """
  reason = table.refusal(x_BLGHP, b_BLGN, chunk=chunk)
  if reason is not None:
    raise ValueError(reason)
  B, L, G, H, P = x_BLGHP.shape
  N = b_BLGN.shape[-1]
  if L % chunk:
    raise ValueError(f"sequence {L} is not a multiple of the chunk {chunk} in pallas_gpu")
  tiles = table.tiles(G, H, P, N)
  line_BGHCRQ = lines(dt_BLGH, a_GH, fresh_BL, chunk)
  first_BGHPN = state_BGHPN if table.upright(P) else jnp.swapaxes(state_BGHPN, 3, 4)
  side = first_BGHPN.shape[3:]
  kernel = plgpu.kernel(
    functools.partial(_walk, sizes=(L, G, H, P, N), tiles=tiles),
    out_type=[
      jax.ShapeDtypeStruct((B * L, G * H * P), jnp.bfloat16),
      jax.ShapeDtypeStruct((B * G * H, *side), jnp.float32),
      *([jax.ShapeDtypeStruct((L // chunk, B * G * H, *side), jnp.bfloat16)] if keep else []),
    ],
    scratch_types=_scratch(tiles, line_BGHCRQ.shape[4], P, N),
    grid=(B, G, H),
    grid_names=("row", "group", "head"),
    num_threads=tiles.readers + 2,
    thread_name="role",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )
  y, *states = kernel(
    x_BLGHP.reshape(B * L, G * H * P), b_BLGN.reshape(B * L, G * N), c_BLGN.reshape(B * L, G * N),
    line_BGHCRQ.reshape(B * G * H, L // chunk, -1, chunk), skip_GH.reshape(G * H),
    first_BGHPN.reshape(B * G * H, *side),
  )
  states = [v.reshape(*v.shape[:-3], B, G, H, *side) for v in states]
  last, *kept = states if table.upright(P) else [jnp.swapaxes(v, -1, -2) for v in states]
  return y.reshape(x_BLGHP.shape), last, tuple(kept)


def lines(dt_BLGH, a_GH, fresh_BL, chunk):
  """Returns what the kernel knows of every position, float32 [B, G, H, C, R, Q].

  R: the sum of dt a, in units of log 2, from the chunk's start up to the position; dt; and, where
  `fresh_BL` is given, the count of resets since the chunk's start.
  """
  B, L, G, H = dt_BLGH.shape
  dt_BGHCQ = jnp.moveaxis(dt_BLGH, 1, 3).reshape(B, G, H, L // chunk, chunk)
  log_BGHCQ = jnp.maximum(dt_BGHCQ * a_GH[..., None, None], LEAST)
  sum_BGHCQ = jnp.cumsum(log_BGHCQ * LOG2_E, axis=-1)
  lines = [sum_BGHCQ, dt_BGHCQ]
  if fresh_BL is not None:
    run_BCQ = jnp.cumsum(fresh_BL.reshape(B, L // chunk, chunk), axis=-1, dtype=jnp.float32)
    lines.append(jnp.broadcast_to(run_BCQ[:, None, None], dt_BGHCQ.shape))
  return jnp.stack(lines, axis=4)


def _scratch(tiles, count, P, N):
  """Returns one block's shared memory and barriers as the keyword arguments of `_walk`."""
  Q, side = table.CHUNK, (P, N) if table.upright(P) else (N, P)
  tile = table.swizzle(P, N)

  def smem(*shape, swizzle):
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

  return Shared(
    x_ring=smem(tiles.stages, Q, P, swizzle=table.width(P)),
    b_ring=smem(tiles.stages, Q, N, swizzle=tile),
    c_ring=smem(tiles.stages, Q, N, swizzle=tile),
    line_ring=plgpu.SMEM((tiles.stages, count, Q), jnp.float32),
    state_ring=smem(tiles.copies, *side, swizzle=tile),
    input=smem(Q, P, swizzle=tile),
    output=smem(tiles.readers, Q, P, swizzle=table.width(P)) if tiles.apart else None,
    fetched=plgpu.Barrier(num_arrivals=COPIES, num_barriers=tiles.stages),
    consumed=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    copied=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.copies),
    read=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.copies),
  )._asdict()


def _walk(
  x_hbm, b_hbm, c_hbm, line_hbm, skip_hbm, first_hbm, y_hbm, last_hbm, *kept_hbm,
  sizes, tiles, **shared,
):
  """Runs the chunks of one head: the kernel's body."""
  L, G, H, P, N = sizes
  row, group = jax.lax.axis_index("row"), jax.lax.axis_index("group")
  head = group * H + jax.lax.axis_index("head")
  place = Head(L, P, N, row, group, head, row * (G * H) + head)
  shared, role = Shared(**shared), jax.lax.axis_index("role")

  @pl.when(role < tiles.readers)
  def _():
    plgpu.set_max_registers(tiles.reader_registers, action="increase")
    _read(y_hbm, skip_hbm[head], role, shared, place, tiles)

  @pl.when(role == tiles.readers)
  def _():
    plgpu.set_max_registers(tiles.state_registers, action="increase")
    _carry(first_hbm, last_hbm, kept_hbm, shared, place, tiles)

  @pl.when(role == tiles.readers + 1)
  def _():
    plgpu.set_max_registers(table.FETCH_REGISTERS, action="decrease")
    _fetch(x_hbm, b_hbm, c_hbm, line_hbm, shared, place, tiles)


def _fetch(x_hbm, b_hbm, c_hbm, line_hbm, shared, place, tiles):
  """Copies every chunk of x, B, C and the lines into the rings as soon as there is room."""
  states = pl.ds(place.group * place.N, place.N)

  @pl.loop(0, place.L // table.CHUNK)
  def _(i):
    at, slot = place.tokens(i), jax.lax.rem(i, jnp.int32(tiles.stages))
    fetched = shared.fetched.at[slot]
    pl.when(i >= tiles.stages)(lambda: plgpu.barrier_wait(shared.consumed.at[slot]))
    plgpu.copy_gmem_to_smem(x_hbm.at[at, place.channels()], shared.x_ring.at[slot], fetched)
    plgpu.copy_gmem_to_smem(b_hbm.at[at, states], shared.b_ring.at[slot], fetched)
    plgpu.copy_gmem_to_smem(c_hbm.at[at, states], shared.c_ring.at[slot], fetched)
    plgpu.copy_gmem_to_smem(line_hbm.at[place.block, i], shared.line_ring.at[slot], fetched)

  _drain(shared.consumed, place.L // table.CHUNK, tiles.stages)


def _carry(first_hbm, last_hbm, kept_hbm, shared, place, tiles):
  """Takes the state through the chunks: state <- whole state + (last dt x)^T B.

  `state_PN` lies transposed, as [N, P], unless `table.upright`.
  """

  def step(i, state_PN):
    slot, copy = (jax.lax.rem(i, jnp.int32(n)) for n in (tiles.stages, tiles.copies))
    state = shared.state_ring.at[copy]
    pl.when(i >= tiles.copies)(lambda: plgpu.barrier_wait(shared.read.at[copy]))
    plgpu.wait_smem_to_gmem(tiles.copies - 1, wait_read_only=True)
    state[...] = state_PN.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for kept in kept_hbm:
      plgpu.copy_smem_to_gmem(state, kept.at[i, place.block])
      if not tiles.apart:  # the reader will write over it
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(shared.copied.at[copy])
    plgpu.barrier_wait(shared.fetched.at[slot])
    x, b, line = shared.x_ring.at[slot], shared.b_ring.at[slot], shared.line_ring.at[slot]
    last_Q, whole = _ends(line)
    x_QP = plgpu.layout_cast(x[...], MATRIX).astype(jnp.float32)
    shared.input[...] = (x_QP * _down(last_Q, x.shape)).astype(jnp.bfloat16)
    plgpu.commit_smem()

    def add(state_PN):
      if table.upright(place.P):
        plgpu.wgmma(state_PN, shared.input.transpose((1, 0)), b)
      else:
        plgpu.wgmma(state_PN, b.transpose((1, 0)), shared.input)

    state_PN = pl.run_state(add)(plgpu.ACC.init(state_PN * whole))
    plgpu.barrier_arrive(shared.consumed.at[slot])
    return state_PN

  state_PN = _load(first_hbm.at[place.block])
  state_PN = jax.lax.fori_loop(0, place.L // table.CHUNK, step, state_PN)
  last_hbm.at[place.block][...] = state_PN
  plgpu.wait_smem_to_gmem(0)
  _drain(shared.read, place.L // table.CHUNK, tiles.copies)


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
  readers, chunks = tiles.readers, place.L // table.CHUNK

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


def _load(ref):
  """Returns a matrix of global memory in registers, as a product's accumulator lies there."""
  # JAX 0.10 demands an index, 0.11 deprecates it.
  index = inspect.signature(plgpu.load).parameters["idx"]
  options = {"idx": ()} if index.default is inspect.Parameter.empty else {}
  return plgpu.load(ref, layout=MATRIX, optimized=False, **options)
