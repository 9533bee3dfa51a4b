"""Norms that average over the surviving entries only, so that a masked model equals a cut one."""

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
  zero on input because they are masked do not change the others.
  Source: RMSNorm (arXiv 1910.07467), equation 4.
  """
  wide_D = x_D.astype(jnp.promote_types(x_D.dtype, jnp.float32))
  count = x_D.shape[-1] if count is None else count
  power = jnp.sum(wide_D * wide_D, axis=-1, keepdims=True) / count
  return (wide_D * jax.lax.rsqrt(power + eps) * gain_D).astype(x_D.dtype)


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
  return (normal_D * gain_D + bias_D).astype(x_D.dtype)


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
  entries of each group (H P by default); masked entries are zero in y.
  Source: Mamba-2 (arXiv 2405.21060), section 7, with the gate before the norm.
  """
  dtype = jnp.promote_types(y_BLGHP.dtype, jnp.float32)
  gated_BLGHP = y_BLGHP.astype(dtype) * jax.nn.silu(z_BLGHP.astype(dtype))
  H, P = y_BLGHP.shape[-2:]
  count = H * P if count_G is None else count_G[:, None, None]
  power = jnp.sum(gated_BLGHP * gated_BLGHP, axis=(-2, -1), keepdims=True) / count
  return (gated_BLGHP * jax.lax.rsqrt(power + eps) * gain_GHP).astype(y_BLGHP.dtype)
