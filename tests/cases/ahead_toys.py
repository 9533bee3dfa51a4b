"""Small programs with one kernel each, for the compilers of chips that are not here."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

BLOCK, COLUMNS = 64, 1024


def tpu(scratch_rows: int):
  """Returns a program that sums blocks in the first of `scratch_rows` x COLUMNS floats of VMEM."""

  def body(x_ref, y_ref, scratch_ref):
    @pl.when(pl.program_id(0) == 0)
    def _():
      scratch_ref[...] = jnp.zeros_like(scratch_ref)

    scratch_ref[pl.ds(0, BLOCK)] += x_ref[...]
    y_ref[...] = scratch_ref[pl.ds(0, BLOCK)]

  def program(x):
    block = pl.BlockSpec((BLOCK, COLUMNS), lambda i: (i, 0))
    return pl.pallas_call(
      body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(x.shape[0] // BLOCK,),
      in_specs=[block], out_specs=block, name="toy",
      scratch_shapes=[pltpu.VMEM((scratch_rows, COLUMNS), jnp.float32)],
    )(x)

  return program, [jax.ShapeDtypeStruct((128 * BLOCK, COLUMNS), jnp.float32)]


def gpu(rows: int):
  """Returns a program that doubles `rows` x 64 floats in shared memory."""

  def body(x_ref, y_ref, shared_ref):
    shared_ref[...] = x_ref[...] + x_ref[...]
    y_ref[...] = shared_ref[...]

  def program(x):
    return plgpu.kernel(
      body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), kernel_name="toy",
      scratch_types=[plgpu.SMEM((rows, 64), jnp.float32)],
    )(x)

  return program, [jax.ShapeDtypeStruct((rows, 64), jnp.float32)]
