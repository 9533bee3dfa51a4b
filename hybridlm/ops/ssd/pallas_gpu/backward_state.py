"""The cotangent of the state after every chunk, from the last chunk to the first."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm.ops.ssd.pallas_gpu import lowering
from hybridlm.ops.ssd.pallas_gpu.backward_tiles import BY_ROW, ROWS, Q, row_tiles, swizzle, tiles

# Columns of the state that one block of threads carries, and chunks it reads ahead.
COLUMNS, AHEAD = 64, 4
FIRST = ROWS.index("first")


def run(rows_BGHCRQ, c_BLGN, y_bar_BLGHP, state_bar_BGHPN):
  """Returns state_bar_CBGHPN after every chunk, in y_bar's dtype, and the first state's."""
  B, L, G, H, P = y_bar_BLGHP.shape
  N, C, K = c_BLGN.shape[3], L // Q, min(COLUMNS, c_BLGN.shape[3])
  dtype = y_bar_BLGHP.dtype
  width = min(swizzle(P, dtype), swizzle(K, dtype))
  kernel = plgpu.kernel(
    functools.partial(_kernel, width=width, K=K, ahead=min(AHEAD, C)),
    out_type=(
      jax.ShapeDtypeStruct((C, B, G * H, P, N), dtype),
      jax.ShapeDtypeStruct((B, G * H, P, N), jnp.float32),
    ),
    scratch_types={
      "carry_smem": plgpu.SMEM((P, K), jnp.float32),
      "scaled_smem": plgpu.SMEM((Q, P), dtype, transforms=tiles(width, dtype)),
      "out_smem": plgpu.SMEM((2, P, K), dtype, transforms=tiles(width, dtype)),
      "loaded": plgpu.Barrier(),
    },
    grid=(N // K, G * H, B),
    grid_names=("columns", "head", "batch"),
    kernel_name="ssd_backward_state",
    compiler_params=lowering.LANE,
  )
  state_bar_CBGHPN, first_bar_BGHPN = kernel(
    rows_BGHCRQ.reshape(B, G * H, C, len(ROWS), Q), c_BLGN, y_bar_BLGHP.reshape(B, L, G * H, P),
    state_bar_BGHPN.astype(jnp.float32).reshape(B, G * H, P, N),
  )
  shape = (B, G, H, P, N)
  return state_bar_CBGHPN.reshape(C, *shape), first_bar_BGHPN.reshape(shape)


def _kernel(
  rows_ref, c_ref, y_bar_ref, last_ref, out_ref, first_ref,
  *, carry_smem, scaled_smem, out_smem, loaded, width, K, ahead,
):
  """Carries K columns of one head's state through its chunks."""
  C, _, heads, P, _ = out_ref.shape
  G = c_ref.shape[2]
  columns = pl.ds(jax.lax.axis_index("columns") * K, K)
  head, batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
  group = jax.lax.div(head, heads // G)
  dtype = out_smem.dtype
  plgpu.copy_gmem_to_smem(last_ref.at[batch, head, :, columns], carry_smem, loaded)
  plgpu.barrier_wait(loaded)
  carry = tuple(
    lowering.load(carry_smem.at[pl.ds(start, 64)]) for start, _ in row_tiles(P)
  )

  def step(index, y_bar_smem, c_smem, rows_smem, carry):
    (k,) = index
    out = out_smem.at[jax.lax.rem(k, 2)]
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    for (start, _), state_bar_PN in zip(row_tiles(P), carry, strict=True):
      out[pl.ds(start, 64)] = state_bar_PN.astype(dtype)
    first_Q = plgpu.layout_cast(rows_smem[FIRST], BY_ROW)
    y_bar_QP = lowering.load(y_bar_smem).astype(jnp.float32)
    first_QP = jax.lax.broadcast_in_dim(first_Q, y_bar_QP.shape, [0])
    scaled_smem[...] = (y_bar_QP * first_QP).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, out_ref.at[C - 1 - k, batch, head, :, columns])
    whole = rows_smem[FIRST, Q - 1]

    def add(accs):
      for (start, _), acc in zip(row_tiles(P), accs, strict=True):
        scaled_PQ = scaled_smem.at[:, pl.ds(start, 64)].transpose((1, 0))
        plgpu.wgmma(acc, scaled_PQ, c_smem)

    return tuple(
      pl.run_state(add)(tuple(plgpu.ACC.init(state_bar_PN * whole) for state_bar_PN in carry))
    )

  pipeline = plgpu.emit_pipeline(
    step,
    grid=(C,),
    in_specs=[
      plgpu.BlockSpec(
        (Q, P), lambda k: (C - 1 - k, 0), transforms=tiles(swizzle(P, dtype), dtype)
      ),
      plgpu.BlockSpec((Q, K), lambda k: (C - 1 - k, 0), transforms=tiles(width, dtype)),
      plgpu.BlockSpec((None, len(ROWS), Q), lambda k: (C - 1 - k, 0, 0)),
    ],
    max_concurrent_steps=ahead,
    init_carry=carry,
  )
  carry = pipeline(
    y_bar_ref.at[batch, :, head], c_ref.at[batch, :, group, columns], rows_ref.at[batch, head]
  )
  for (start, _), state_bar_PN in zip(row_tiles(P), carry, strict=True):
    carry_smem[pl.ds(start, 64)] = state_bar_PN
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(carry_smem, first_ref.at[batch, head, :, columns])
  plgpu.wait_smem_to_gmem(0)
