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
  dtype = jnp.promote_types(x_BL.dtype, jnp.float32)
  if state is None:
    state = jnp.zeros((x_BL.shape[0], taps_W.shape[0] - 1, *x_BL.shape[2:]), x_BL.dtype)
  if segment_BL is None:
    segment_BL = jnp.zeros(x_BL.shape[:2], jnp.int32)
  fresh_BL = jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0
  run_BL = jnp.cumsum(fresh_BL, axis=1, dtype=jnp.int32)
  padded = jnp.concatenate([state.astype(dtype), x_BL.astype(dtype)], axis=1)
  y_BL = _convolve(padded, taps_W.astype(dtype), run_BL)
  return (y_BL if bias is None else y_BL + bias).astype(x_BL.dtype)


def causal_conv_step(
  x_B: Float[Array, "B *channels"],
  taps_W: Float[Array, "W *channels"],
  bias: Float[Array, "*channels"] | None,
  state: Float[Array, "B _ *channels"],
) -> tuple[Float[Array, "B *channels"], Float[Array, "B _ *channels"]]:
  """Returns y of one more position in x's dtype, and its state: the last W - 1 inputs.

  The same as `causal_conv` with L = 1; every channel axis follows B (and W).
  """
  dtype = jnp.promote_types(x_B.dtype, jnp.float32)
  seen_BW = jnp.concatenate([state.astype(x_B.dtype), x_B[:, None]], axis=1)
  # One sum, not W terms: XLA on CPU keeps its result, and computes terms again for every reader.
  y_B = jnp.sum(seen_BW.astype(dtype) * taps_W.astype(dtype), axis=1)
  return (y_B if bias is None else y_B + bias).astype(x_B.dtype), seen_BW[:, 1:]


@jax.custom_vjp
def _convolve(padded, taps_W, run_BL):
  """Returns y of x behind its W - 1 earlier inputs.

  The backward is written out because XLA on CPU turns the one it derives into scattered sums:
  twenty times slower at one row of 2048 tokens and 1280 channels.
  """
  L = run_BL.shape[1]
  same = _same_run(run_BL, taps_W.shape[0], padded.ndim)
  return sum(
    jnp.where(same[i], taps_W[i] * padded[:, i : i + L], 0) for i in range(taps_W.shape[0])
  )


def _convolve_forward(padded, taps_W, run_BL):
  return _convolve(padded, taps_W, run_BL), (padded, taps_W, run_BL)


def _convolve_backward(kept, y_bar_BL):
  """Returns the cotangents of the padded input and of the taps; none for the runs."""
  padded, taps_W, run_BL = kept
  L, W = run_BL.shape[1], taps_W.shape[0]
  same = _same_run(run_BL, W, padded.ndim)
  taps_bar = [
    jnp.sum(jnp.where(same[i], padded[:, i : i + L] * y_bar_BL, 0), axis=(0, 1)) for i in range(W)
  ]
  padded_bar = sum(
    taps_W[i] * _pad_positions(jnp.where(same[i], y_bar_BL, 0), i, W - 1 - i) for i in range(W)
  )
  return padded_bar, jnp.stack(taps_bar), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _same_run(run_BL, W, ndim):
  """Returns, per tap, where the input it multiplies is of the position's own run."""
  B, L = run_BL.shape
  earlier = jnp.concatenate([jnp.repeat(run_BL[:, :1], W - 1, axis=1), run_BL], axis=1)
  same = [earlier[:, i : i + L] == run_BL for i in range(W)]
  return [v_BL.reshape(B, L, *[1] * (ndim - 2)) for v_BL in same]


def _pad_positions(v_BL, before, after):
  return jnp.pad(v_BL, [(0, 0), (before, after)] + [(0, 0)] * (v_BL.ndim - 2))


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
