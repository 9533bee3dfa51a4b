"""Causal depthwise convolution over positions, by shifted slices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops import mesh


def causal_conv(
  x_BL: Float[Array, "B L *channels"],
  taps_W: Float[Array, "W *channels"],
  bias: Float[Array, "*channels"] | None,
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  state: Float[Array, "B _ *channels"] | None = None,
  restart_W: Float[Array, "_ *channels"] | None = None,
  channels: str | None = None,
  mesh_axes: mesh.MeshAxes = mesh.MESH_AXES,
) -> Float[Array, "B L *channels"]:
  """Returns y[t] = bias + sum over i of taps[W-1-i] x[t-i], each channel alone, in x's dtype.

  Any number of channel axes follows B L (and W). Taps never reach across a change of
  `segment_BL`; position 0 continues `state`, the W - 1 inputs before it, and all other segments,
  or without a state that too, `restart_W` (both zeros by default).
  Where `channels` says their letters, every device of a mesh in force works on its own rows,
  channels and positions, by `mesh_axes`; the last inputs before its own come from its neighbours.
  Raises ValueError where sizes disagree, for L = 0, and for inputs before divided positions.
  Source: the short convolution of Mamba-2 (arXiv 2405.21060), section 7.
  """
  _check_shapes(x_BL, taps_W, bias, segment_BL, state, restart_W)
  if channels is None:
    return _local(x_BL, taps_W, bias, segment_BL, state, restart_W)[0]
  axes = mesh.along("L", mesh_axes)
  if axes and (state is not None or restart_W is not None):
    raise ValueError(f"causal_conv takes no state where {axes[0]} divides the positions")
  arrays = {f"x_BL{channels}": x_BL, f"taps_W{channels}": taps_W, f"bias_{channels}": bias,
            "segment_BL": segment_BL, f"state_BW{channels}": state,
            f"restart_W{channels}": restart_W}

  def run(**given):
    return _local(*(given.get(name) for name in arrays), axis=axes[0] if axes else None)

  return mesh.over(run, arrays, (f"y_BL{channels}",), mesh_axes, "causal_conv")[0]


def _local(x_BL, taps_W, bias, segment_BL, state, restart_W, axis=None):
  """Returns y of one device's positions; others along mesh axis `axis` hold the rest."""
  dtype, reach = jnp.promote_types(x_BL.dtype, jnp.float32), taps_W.shape[0] - 1
  again = restart_W is not None and segment_BL is not None
  if segment_BL is None:
    segment_BL = jnp.zeros(x_BL.shape[:2], jnp.int32)
  if state is None and restart_W is not None:
    state = jnp.broadcast_to(restart_W, (x_BL.shape[0], *restart_W.shape))
  before_BW = jnp.repeat(segment_BL[:, :1], reach, axis=1)
  if state is None:
    state = jnp.zeros((x_BL.shape[0], reach, *x_BL.shape[2:]), x_BL.dtype)
  if axis is not None:
    state, before_BW = _halo(axis, x_BL, state), _halo(axis, segment_BL, before_BW)
  segment_BS = jnp.concatenate([before_BW, segment_BL], axis=1)
  fresh_BS = jnp.diff(segment_BS, axis=1, prepend=segment_BS[:, :1]) != 0
  run_BS = jnp.cumsum(fresh_BS, axis=1, dtype=jnp.int32)
  padded = jnp.concatenate([state.astype(dtype), x_BL.astype(dtype)], axis=1)
  y_BL = _convolve(padded, taps_W.astype(dtype), run_BS)
  if again:
    y_BL = y_BL + _restarted(taps_W.astype(dtype), restart_W.astype(dtype), run_BS)
  return ((y_BL if bias is None else y_BL + bias).astype(x_BL.dtype),)


def _restarted(taps_W, restart_W, run_BS):
  """Returns what the inputs before their segment add to the first W - 1 positions of each.

  By a product with ones, of which the way back is one too, and no scattered sum.
  """
  W = taps_W.shape[0]
  if W == 1:
    return jnp.zeros((), taps_W.dtype)
  table_W = jnp.stack([
    sum(taps_W[i] * restart_W[place + i] for i in range(W - 1 - place)) for place in range(W - 1)
  ])
  own_BL = sum(v_BL.astype(jnp.int32) for v_BL in _same_run(run_BS, W, 2)[:-1])
  first_BLW = (own_BL[..., None] == jnp.arange(W - 1)).astype(taps_W.dtype)
  return jnp.tensordot(first_BLW, table_W, 1, precision="highest")


def _halo(axis, x_BL, otherwise_BW):
  """Returns the inputs just before this device's own; `otherwise_BW` before the first of all."""
  L, reach = x_BL.shape[1], otherwise_BW.shape[1]
  places = range(-(-reach // L), 0, -1)
  # Before the first device stands `otherwise_BW`, which is the same at all of its positions.
  first = jnp.broadcast_to(otherwise_BW[:, :1], x_BL.shape) if reach else x_BL
  parts = [mesh.from_before(x_BL, place, axis, first) for place in places]
  return jnp.concatenate([otherwise_BW, *parts], axis=1)[:, -reach:] if reach else otherwise_BW


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
def _convolve(padded, taps_W, run_BS):
  """Returns y of x behind its W - 1 earlier inputs; `run_BS` numbers the runs of both.

  The backward is written out because XLA on CPU turns the one it derives into scattered sums:
  twenty times slower at one row of 2048 tokens and 1280 channels.
  """
  L = run_BS.shape[1] - taps_W.shape[0] + 1
  same = _same_run(run_BS, taps_W.shape[0], padded.ndim)
  return sum(
    jnp.where(same[i], taps_W[i] * padded[:, i : i + L], 0) for i in range(taps_W.shape[0])
  )


def _convolve_forward(padded, taps_W, run_BS):
  return _convolve(padded, taps_W, run_BS), (padded, taps_W, run_BS)


def _convolve_backward(kept, y_bar_BL):
  """Returns the cotangents of the padded input and of the taps; none for the runs."""
  padded, taps_W, run_BS = kept
  W = taps_W.shape[0]
  L = run_BS.shape[1] - W + 1
  same = _same_run(run_BS, W, padded.ndim)
  taps_bar = [
    jnp.sum(jnp.where(same[i], padded[:, i : i + L] * y_bar_BL, 0), axis=(0, 1)) for i in range(W)
  ]
  padded_bar = sum(
    taps_W[i] * _pad_positions(jnp.where(same[i], y_bar_BL, 0), i, W - 1 - i) for i in range(W)
  )
  return padded_bar, jnp.stack(taps_bar), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _same_run(run_BS, W, ndim):
  """Returns, per tap, where the input it multiplies is of the position's own run."""
  B, L = run_BS.shape[0], run_BS.shape[1] - W + 1
  same = [run_BS[:, i : i + L] == run_BS[:, W - 1 :] for i in range(W)]
  return [v_BL.reshape(B, L, *[1] * (ndim - 2)) for v_BL in same]


def _pad_positions(v_BL, before, after):
  return jnp.pad(v_BL, [(0, 0), (before, after)] + [(0, 0)] * (v_BL.ndim - 2))


def _check_shapes(x_BL, taps_W, bias, segment_BL, state, restart_W):
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
    "restart_W": (restart_W, (W - 1, *channels)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but x {x_BL.shape} and W = {W} ask for {shape} "
        "in causal_conv"
      )
