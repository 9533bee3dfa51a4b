"""Projections by a weight, as one product of two matrices."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


def project(
  x: Float[Array, "*rows_and_inputs"],
  w: Float[Array, "*inputs_and_outputs"],
  *,
  inputs: int = 1,
  dtype: DTypeLike | None = None,
) -> Float[Array, "*rows_and_outputs"]:
  """Returns x w summed over the last `inputs` axes of x, which are the first of w.

  `project(x_BLD, w_DGHP)` is `einsum("BLD,DGHP->BLGHP")`, `project(y_BLGHP, w_GHPD, inputs=3)`
  is `einsum("BLGHP,GHPD->BLD")`, in `dtype` (x's by default). Both sides are matrices, rows of x
  as one axis too: of a product with more axes JAX derives a weight's cotangent that XLA on CPU
  computes in transposed order (a Mamba block trained in 121 ms instead of 86). With a mesh of
  several devices in force the axes stay apart: XLA does not divide an axis that it cannot see.
  Raises ValueError where the axes do not match.
  """
  if not 1 <= inputs <= min(x.ndim, w.ndim):
    raise ValueError(f"inputs {inputs} is not from 1 to the axes of x {x.shape} and w {w.shape}")
  rows = x.ndim - inputs
  if x.shape[rows:] != w.shape[:inputs]:
    raise ValueError(
      f"the last {inputs} axes of x {x.shape} are not the first of w {w.shape} in project"
    )
  dtype = x.dtype if dtype is None else dtype
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    axes = (tuple(range(rows, x.ndim)), tuple(range(inputs)))
    return jax.lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=dtype)
  size, outputs = math.prod(w.shape[:inputs]), w.shape[inputs:]
  y = jnp.matmul(
    x.reshape(math.prod(x.shape[:rows]), size),
    w.reshape(size, math.prod(outputs)),
    preferred_element_type=dtype,
  )
  return y.reshape(*x.shape[:rows], *outputs)
