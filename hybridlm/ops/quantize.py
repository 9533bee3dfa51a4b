"""Eight-bit numbers with scales: FP8 products for training, and weights that are held small.

FP8 training is that of Nemotron-H (arXiv 2504.03624, section 2.3): both operands of the forward
product in E4M3, gradients in E5M2, and one scale a tensor, from the largest magnitude it has at
this moment. The products are taken of eight-bit operands, summed in float32 and scaled after:
XLA has FP8 instructions where the chip does, and widens the operands, exactly, where it does not.
A scale of a whole batch lets every token touch all others, later ones too, within rounding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Shaped

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
# Smaller scales are subnormal, which chips flush to zero.
LEAST = float(jnp.finfo(jnp.float32).tiny)


class Scaled(NamedTuple):
  """Eight-bit values, and the float32 scales that they are multiplied by.

  values: of the array's shape.  scale: the same without the axes that share one.
  """

  values: Shaped[Array, "..."]
  scale: Float[Array, "..."]


def scaled(
  x: Float[Array, "..."], dtype: DTypeLike, *, over: tuple[int, ...] | None = None
) -> Scaled:
  """Returns an array in an eight-bit dtype, its largest magnitude the largest that the dtype has.

  What is too small for the dtype becomes zero. One value that is not finite leaves none finite.

  Args:
    x: any float array.
    dtype: float8_e4m3fn, float8_e5m2 or int8.
    over: axes whose entries share a scale; None: all of them.
  """
  whole = jnp.issubdtype(dtype, jnp.integer)
  most = float((jnp.iinfo if whole else jnp.finfo)(dtype).max)
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=over, keepdims=True) / most
  scale = jnp.maximum(scale, LEAST)
  values = jnp.clip(x / scale, -most, most)
  values = (jnp.round(values) if whole else values).astype(dtype)
  return Scaled(values, jnp.squeeze(scale, axis=over))


def restored(
  small: Scaled, dtype: DTypeLike, *, over: tuple[int, ...] | None = None
) -> Float[Array, "..."]:
  """Returns values times scales, rounded once: what `scaled` was given, but for rounding.

  over: axes whose entries share a scale; None: all of them.
  """
  axes = tuple(range(small.values.ndim)) if over is None else over
  scale = jnp.expand_dims(small.scale, axes)
  return (small.values.astype(jnp.float32) * scale).astype(dtype)


class _Kinds(NamedTuple):
  """Dtypes of a product's operands and of what comes out."""

  x: jnp.dtype
  w: jnp.dtype
  y: jnp.dtype


def fp8_dot(
  x: Float[Array, "*rows_and_inputs"],
  w: Float[Array, "*inputs_and_outputs"],
  *,
  inputs: int,
  dtype: DTypeLike,
) -> Float[Array, "*rows_and_outputs"]:
  """Returns x w over the last `inputs` axes of x and the first of w, of operands in E4M3.

  Its gradients are products with the incoming one in E5M2, of the operands as the forward product
  had them, in the dtypes of x and w. The backward pass keeps those eight bits and nothing wider.
  """
  return _dot(x, w, inputs, _Kinds(x.dtype, w.dtype, jnp.dtype(dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x, w, inputs, kinds):
  return _forward(x, w, inputs, kinds)[0]


def _forward(x, w, inputs, kinds):
  small_x, small_w = scaled(x, FORWARD), scaled(w, FORWARD)
  rows = x.ndim - inputs
  y = _product(small_x, small_w, range(rows, x.ndim), range(inputs))
  return y.astype(kinds.y), (small_x, small_w)


def _backward(inputs, kinds, kept, y_bar):
  small_x, small_w = kept
  small_y_bar = scaled(y_bar, GRADIENT)
  rows = small_x.values.ndim - inputs
  x_bar = _product(
    small_y_bar, small_w, range(rows, y_bar.ndim), range(inputs, small_w.values.ndim)
  )
  w_bar = _product(small_x, small_y_bar, range(rows), range(rows))
  return x_bar.astype(kinds.x), w_bar.astype(kinds.w)


_dot.defvjp(_forward, _backward)


def _product(a, b, a_axes, b_axes):
  """Returns the float32 product over these axes; eight-bit factors are exact, the sum is scaled."""
  axes = ((tuple(a_axes), tuple(b_axes)), ((), ()))
  sums = jax.lax.dot_general(a.values, b.values, axes, preferred_element_type=jnp.float32)
  return sums * (a.scale * b.scale)
