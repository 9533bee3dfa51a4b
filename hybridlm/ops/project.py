"""Projections by a weight: a product whose way back is fast on CPU."""

import functools

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
  is `einsum("BLGHP,GHPD->BLD")`, in `dtype` (x's by default). The weight's cotangent is x^T y_bar.
  JAX derives y_bar^T x, and XLA on CPU then computes the elementwise work that leads to y_bar in
  transposed order: three Mamba blocks trained a quarter slower.
  Raises ValueError where the axes do not match.
  """
  if not 1 <= inputs <= min(x.ndim, w.ndim):
    raise ValueError(f"inputs {inputs} is not from 1 to the axes of x {x.shape} and w {w.shape}")
  if x.shape[x.ndim - inputs :] != w.shape[:inputs]:
    raise ValueError(
      f"the last {inputs} axes of x {x.shape} are not the first of w {w.shape} in project"
    )
  return _product(inputs, jnp.dtype(x.dtype if dtype is None else dtype), x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs, dtype, x, w):
  """Returns x w in `dtype`."""
  rows = x.ndim - inputs
  return _contract(x, w, range(rows, x.ndim), range(inputs), dtype)


def _product_forward(inputs, dtype, x, w):
  return _product(inputs, dtype, x, w), (x, w)


def _product_backward(inputs, dtype, kept, y_bar):
  """Returns the cotangents of x and w, each in its dtype."""
  del dtype
  x, w = kept
  rows = x.ndim - inputs
  x_bar = _contract(y_bar, w, range(rows, y_bar.ndim), range(inputs, w.ndim), x.dtype)
  return x_bar, _contract(x, y_bar, range(rows), range(rows), w.dtype)


_product.defvjp(_product_forward, _product_backward)


def _contract(left, right, left_axes, right_axes, dtype):
  """Returns the product over the given axes, summed in float32 at least."""
  axes = ((tuple(left_axes), tuple(right_axes)), ((), ()))
  wide = jnp.promote_types(dtype, jnp.float32)
  return jax.lax.dot_general(left, right, axes, preferred_element_type=wide).astype(dtype)
