"""Projections by a weight, as one product of two matrices."""

import math

import jax
from jaxtyping import Array, DTypeLike, Float

from hybridlm.ops.quantize import fp8_dot


def _dot(x, w, *, inputs, dtype):
  rows = x.ndim - inputs
  axes = (tuple(range(rows, x.ndim)), tuple(range(inputs)))
  return jax.lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=dtype)


PRODUCTS = {"none": _dot, "fp8": fp8_dot}


def project(
  x: Float[Array, "*rows_and_inputs"],
  w: Float[Array, "*inputs_and_outputs"],
  *,
  inputs: int = 1,
  dtype: DTypeLike | None = None,
  quantize: str = "none",
) -> Float[Array, "*rows_and_outputs"]:
  """Returns x w summed over the last `inputs` axes of x, which are the first of w.

  `project(x_BLD, w_DGHP)` is `einsum("BLD,DGHP->BLGHP")`, `project(y_BLGHP, w_GHPD, inputs=3)`
  is `einsum("BLGHP,GHPD->BLD")`, in `dtype` (x's by default). Both sides are matrices, rows of x
  as one axis too: of a product with more axes JAX derives a weight's cotangent that XLA on CPU
  computes in transposed order (a Mamba block trained in 121 ms instead of 86). With a mesh of
  several devices in force the axes stay apart: XLA does not divide an axis that it cannot see.
  With `quantize="fp8"` operands and gradients have eight bits, see `ops.quantize.fp8_dot`.
  Raises ValueError where the axes do not match, or for another name.
  """
  if quantize not in PRODUCTS:
    raise ValueError(f"quantize={quantize!r} is not one of {', '.join(PRODUCTS)}")
  if not 1 <= inputs <= min(x.ndim, w.ndim):
    raise ValueError(f"inputs {inputs} is not from 1 to the axes of x {x.shape} and w {w.shape}")
  rows = x.ndim - inputs
  if x.shape[rows:] != w.shape[:inputs]:
    raise ValueError(
      f"the last {inputs} axes of x {x.shape} are not the first of w {w.shape} in project"
    )
  dtype = x.dtype if dtype is None else dtype
  product = PRODUCTS[quantize]
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    return product(x, w, inputs=inputs, dtype=dtype)
  size, outputs = math.prod(w.shape[:inputs]), w.shape[inputs:]
  y = product(
    x.reshape(math.prod(x.shape[:rows]), size), w.reshape(size, math.prod(outputs)),
    inputs=1, dtype=dtype,
  )
  return y.reshape(*x.shape[:rows], *outputs)
