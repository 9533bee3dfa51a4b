"""Norms that average over the surviving entries only, so that a masked model equals a cut one.

Backward passes are written out where XLA on CPU is slow in what JAX derives: it computes a sum
over rows of a product forty times slower than the same product with a vector of ones.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def rms_norm(
  x_D: Float[Array, "*batch D"],
  gain_D: Float[Array, "D"],
  *,
  eps: float,
  count: ArrayLike | None = None,
) -> Float[Array, "*batch D"]:
  """Returns gain x / sqrt(sum(x^2) / count + eps), float32 inside, in x's dtype.

  `count` is the number of entries the mean is over (D by default): with it, entries that are
  zero on input because they are masked do not change the others. Reverse-mode differentiable
  only, as all norms here.
  Source: RMSNorm (arXiv 1910.07467), equation 4.
  """
  wide_D = x_D.astype(jnp.promote_types(x_D.dtype, jnp.float32))
  count = x_D.shape[-1] if count is None else count
  power = jnp.sum(wide_D * wide_D, axis=-1, keepdims=True) / count
  return _scaled(wide_D * jax.lax.rsqrt(power + eps), gain_D.astype(wide_D.dtype)).astype(x_D.dtype)


def layer_norm(
  x_D: Float[Array, "*batch D"],
  gain_D: Float[Array, "D"],
  bias_D: Float[Array, "D"],
  *,
  eps: float,
  count: ArrayLike | None = None,
) -> Float[Array, "*batch D"]:
  """Returns gain (x - mean) / sqrt(variance + eps) + bias, float32 inside, in x's dtype.

  `gain_D` is the whole factor (1 + w for LayerNorm1P). `count` is the number of surviving
  entries (D by default); the others are zero on input, and their gain and bias are zero. The
  variance leaves out as many zeros as were masked, so it is the cut model's without cancellation.
  Source: Layer Normalization (arXiv 1607.06450), equation 3.
  """
  wide_D = x_D.astype(jnp.promote_types(x_D.dtype, jnp.float32))
  size = x_D.shape[-1]
  mean = jnp.sum(wide_D, axis=-1, keepdims=True) / (size if count is None else count)
  square_D = (wide_D - mean) ** 2
  if count is None:
    variance = jnp.mean(square_D, axis=-1, keepdims=True)
  else:
    # Each zero adds mean^2. Weighing them by the share that survived leaves out as many as were
    # masked, and keeps the gradient where nothing was.
    zero_D = wide_D == 0
    zeros = jnp.sum(zero_D, axis=-1, keepdims=True)
    share = (zeros - (size - count)) / jnp.maximum(zeros, 1)
    variance = jnp.sum(jnp.where(zero_D, share, 1.0) * square_D, axis=-1, keepdims=True) / count
  normal_D = (wide_D - mean) * jax.lax.rsqrt(variance + eps)
  return (_scaled(normal_D, gain_D.astype(normal_D.dtype)) + bias_D).astype(x_D.dtype)


def gated_rms_norm(
  y_BLGHP: Float[Array, "*batch G H P"],
  z_BLGHP: Float[Array, "*batch G H P"],
  gain_GHP: Float[Array, "G H P"],
  *,
  eps: float,
  count_G: Float[Array, "G"] | None = None,
) -> Float[Array, "*batch G H P"]:
  """Returns gain u / sqrt(sum(u^2) / count + eps) with u = y silu(z), in y's dtype.

  The mean is over H and P of each group, float32 inside. `count_G` is the number of surviving
  entries of each group (H P by default), which gets no gradient; masked entries are zero in y.
  Source: Mamba-2 (arXiv 2405.21060), section 7, with the gate before the norm.
  """
  dtype = jnp.promote_types(y_BLGHP.dtype, jnp.float32)
  H, P = y_BLGHP.shape[-2:]
  count_G = jnp.full(y_BLGHP.shape[-3], H * P, dtype) if count_G is None else count_G
  wide = (y_BLGHP.astype(dtype), z_BLGHP.astype(dtype), gain_GHP.astype(dtype))
  return _gated(eps, *wide, jnp.asarray(count_G, dtype)).astype(y_BLGHP.dtype)


def rms_norm_then_gate(
  y_BLGHP: Float[Array, "*batch G H P"],
  z_BLGHP: Float[Array, "*batch G H P"],
  gain_GHP: Float[Array, "G H P"],
  *,
  eps: float,
  count_G: Float[Array, "G"] | None = None,
) -> Float[Array, "*batch G H P"]:
  """Returns gain y / sqrt(sum(y^2) / count + eps) silu(z), in y's dtype.

  As `gated_rms_norm`, with the gate after the norm: what the norm divides by does not see z.
  Source: Mamba-2 (arXiv 2405.21060), the `norm_before_gate` of its public code, and Falcon-H1
  (arXiv 2507.22448).
  """
  dtype = jnp.promote_types(y_BLGHP.dtype, jnp.float32)
  H, P = y_BLGHP.shape[-2:]
  count_G = jnp.full(y_BLGHP.shape[-3], H * P, dtype) if count_G is None else count_G
  wide_BLGHP = y_BLGHP.astype(dtype)
  counted_G = jax.lax.stop_gradient(jnp.asarray(count_G, dtype))
  normal_BLGHP = wide_BLGHP * _inverse(wide_BLGHP, counted_G, eps)
  scaled_BLGHP = _scaled(normal_BLGHP, gain_GHP.astype(dtype))
  return (scaled_BLGHP * jax.nn.silu(z_BLGHP.astype(dtype))).astype(y_BLGHP.dtype)


def gate(
  y_BLGHP: Float[Array, "*batch G H P"], z_BLGHP: Float[Array, "*batch G H P"]
) -> Float[Array, "*batch G H P"]:
  """Returns y silu(z), float32 inside, in y's dtype."""
  dtype = jnp.promote_types(y_BLGHP.dtype, jnp.float32)
  return (y_BLGHP.astype(dtype) * jax.nn.silu(z_BLGHP.astype(dtype))).astype(y_BLGHP.dtype)


@jax.custom_vjp
def _scaled(x_D, gain_D):
  """Returns the product of every row with the gain."""
  return x_D * gain_D


def _scaled_forward(x_D, gain_D):
  return x_D * gain_D, (x_D, gain_D)


def _scaled_backward(kept, bar_D):
  """Returns the cotangents of the rows and of the gain."""
  x_D, gain_D = kept
  return bar_D * gain_D, _sum_rows(bar_D * x_D, gain_D.ndim).astype(gain_D.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(eps, y_BLGHP, z_BLGHP, gain_GHP, count_G):
  """Returns the gated norm of arrays of one dtype; its backward keeps nothing but them."""
  gated_BLGHP = y_BLGHP * jax.nn.silu(z_BLGHP)
  return gated_BLGHP * _inverse(gated_BLGHP, count_G, eps) * gain_GHP


def _inverse(gated_BLGHP, count_G, eps):
  """Returns 1 / sqrt(mean of squares + eps) of every group."""
  power = jnp.sum(gated_BLGHP * gated_BLGHP, axis=(-2, -1), keepdims=True)
  return jax.lax.rsqrt(power / count_G[:, None, None] + eps)


def _gated_forward(eps, *arrays):
  return _gated(eps, *arrays), arrays


def _gated_backward(eps, kept, bar_BLGHP):
  """Returns the cotangents of y, z and gain; none of the count."""
  y_BLGHP, z_BLGHP, gain_GHP, count_G = kept
  sigmoid_BLGHP = jax.nn.sigmoid(z_BLGHP)
  gate_BLGHP = z_BLGHP * sigmoid_BLGHP
  gated_BLGHP = y_BLGHP * gate_BLGHP
  inverse_BLG11 = _inverse(gated_BLGHP, count_G, eps)
  scaled_BLGHP = bar_BLGHP * gain_GHP
  shared_BLG = jnp.einsum(
    "...ghp,...ghp->...g", scaled_BLGHP, gated_BLGHP, precision="highest"
  )
  pull_BLG11 = inverse_BLG11**3 * (shared_BLG / count_G)[..., None, None]
  gated_bar_BLGHP = inverse_BLG11 * scaled_BLGHP - pull_BLG11 * gated_BLGHP
  slope_BLGHP = sigmoid_BLGHP * (1 + z_BLGHP * (1 - sigmoid_BLGHP))
  return (
    gated_bar_BLGHP * gate_BLGHP,
    gated_bar_BLGHP * y_BLGHP * slope_BLGHP,
    _sum_rows(bar_BLGHP * gated_BLGHP * inverse_BLG11, gain_GHP.ndim),
    None,
  )


_gated.defvjp(_gated_forward, _gated_backward)


def _sum_rows(v, last):
  """Returns the sum over all but the `last` axes, as a product with ones."""
  rows = tuple(range(v.ndim - last))
  ones = jnp.ones(v.shape[: len(rows)], v.dtype)
  return jax.lax.dot_general(ones, v, ((rows, rows), ((), ())), precision="highest")
