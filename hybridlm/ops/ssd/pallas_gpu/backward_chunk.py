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

from hybridlm.ops.ssd.pallas_gpu import lowering
from hybridlm.ops.ssd.pallas_gpu.backward_sides import (
  Ring,
  add_product,
  pair_side,
  query_side,
  source_side,
  transposed,
)
from hybridlm.ops.ssd.pallas_gpu.backward_tiles import (
  PAIR,
  QUERY,
  REGISTERS,
  ROWS,
  SOURCE,
  SUMS,
  Plan,
  Q,
  make_plan,
  state_swizzle,
  swizzle,
  tiles,
)


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
    kernel_name="ssd_backward_chunk",
    compiler_params=lowering.LANE,
  )
  x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, sums_BGHCRQ = kernel(
    x_BLGHP.reshape(B, L, G * H, P), y_bar_BLGHP.reshape(B, L, G * H, P),
    rows_BGHCRQ.reshape(B, G * H, C, len(ROWS), Q), state_CBGHPN.reshape(C, B, G * H, P, N),
    state_bar_CBGHPN.reshape(C, B, G * H, P, N), b_BLGN, c_BLGN, run_BCQ,
  )
  sums_BGHCRQ = sums_BGHCRQ.reshape(B, G, H, C, len(SUMS), Q)
  return x_bar_BLGHP.reshape(x_BLGHP.shape), b_bar_BLGN, c_bar_BLGN, sums_BGHCRQ


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
    c_bar_QN = query_side(
      rings, c_smem, sums_smem.at[pl.ds(SUMS.index("first"), 1)], out, plan
    )
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    c_bar_QN = add_product(c_bar_QN, transposed(cb_bar_smem), b_smem.at[0])
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
    b_bar_SN = source_side(
      rings, sources, sums_smem.at[pl.ds(SUMS.index("whole"), 1)], out, plan
    )
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    b_bar_SN = add_product(b_bar_SN, cb_bar_smem, c_smem.at[0])
    _write(b_bar_SN, bar_smem.at[0, pl.ds(0, Q)], b_bar_ref.at[place.batch, tokens, place.group])

  def pair():
    _set_registers(plan, PAIR)
    plgpu.barrier_wait(group_loaded)

    def x_bar_out(h):
      return x_bar_ref.at[place.batch, tokens, place.head(h)]

    out = functools.partial(sums_out, first=0, count=plan.pair_sums)
    pair_smem = x_bar_smem, sums_smem.at[pl.ds(0, plan.pair_sums)], cb_bar_smem
    pair_side(rings, (b_smem, c_smem, run_smem), pair_smem, (x_bar_out, out), plan)
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


def _write(value, smem, out):
  """Writes `value` to global memory through `smem`."""
  smem[...] = value.astype(smem.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, out)
  plgpu.wait_smem_to_gmem(0)
