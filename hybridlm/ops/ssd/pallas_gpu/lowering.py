"""How all kernels are lowered, and a load that is spelt alike in two versions of JAX."""

import inspect

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# Named, since the default changes from JAX 0.10 to 0.11. By LANE a scalar goes through
# `jax.lax.optimization_barrier`, which the way back needs to stay within its registers.
WARPGROUP, LANE = (
  plgpu.CompilerParams(approx_math=True, lowering_semantics=semantics)
  for semantics in (plgpu.LoweringSemantics.Warpgroup, plgpu.LoweringSemantics.Lane)
)


def load(ref) -> Array:
  """Returns a matrix of memory in registers, as a product's accumulator lies there."""
  # JAX 0.10 demands an index, 0.11 deprecates it.
  index = inspect.signature(plgpu.load).parameters["idx"]
  options = {"idx": ()} if index.default is inspect.Parameter.empty else {}
  return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False, **options)
