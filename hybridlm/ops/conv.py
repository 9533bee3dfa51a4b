"""Causal depthwise convolution over positions, by shifted slices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
  x_BL: Float[Array, "B L *channels"],
  taps_W: Float[Array, "W *channels"],
  bias: Float[Array, "*channels"] | None,
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  state: Float[Array, "B _ *channels"] | None = None,
) -> Float[Array, "B L *channels"]:
  """Returns y[t] = bias + sum over i of taps[W-1-i] x[t-i], each channel alone, in x's dtype.

  Any number of channel axes follows B L (and W). Taps never reach across a change of
  `segment_BL`; position 0 continues `state`, the W - 1 inputs before it (zeros by default).
  Raises ValueError where sizes disagree and for L = 0.
  Source: the short convolution of Mamba-2 (arXiv 2405.21060), section 7.
  """
  _check_shapes(x_BL, taps_W, bias, segment_BL, state)
  B, L = x_BL.shape[:2]
  W = taps_W.shape[0]
  if state is None:
    state = jnp.zeros((B, W - 1, *x_BL.shape[2:]), x_BL.dtype)
  padded = jnp.concatenate([state.astype(x_BL.dtype), x_BL], axis=1)
  if segment_BL is None:
    segment_BL = jnp.zeros((B, L), jnp.int32)
  run_BL = jnp.cumsum(jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0, axis=1)
  run_padded = jnp.pad(run_BL, [(0, 0), (W - 1, 0)])
  y = 0.0
  for i in range(W):
    same_BL = jax.lax.slice_in_dim(run_padded, i, i + L, axis=1) == run_BL
    same_BL = same_BL.reshape(B, L, *[1] * (x_BL.ndim - 2))
    y += jnp.where(same_BL, taps_W[i] * jax.lax.slice_in_dim(padded, i, i + L, axis=1), 0)
  return (y if bias is None else y + bias).astype(x_BL.dtype)


def _check_shapes(x_BL, taps_W, bias, segment_BL, state):
  """Raises ValueError naming the first array whose shape does not follow x's."""
  B, L, *channels = x_BL.shape
  if L == 0:
    raise ValueError(f"sequence of 0 tokens in causal_conv: x has shape {x_BL.shape}")
  W = taps_W.shape[0]
  expected = {
    "taps": (taps_W, (W, *channels)),
    "bias": (bias, tuple(channels)),
    "segment_BL": (segment_BL, (B, L)),
    "state": (state, (B, W - 1, *channels)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but x {x_BL.shape} and W = {W} ask for {shape} "
        "in causal_conv"
      )
