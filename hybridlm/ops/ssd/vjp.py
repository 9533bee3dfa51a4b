"""Makes a pair of forward and backward passes into one differentiable scan."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops.ssd import chunked

# Stands in for dt = 0, so that x_bar x / dt, a cotangent of dt, is right there too.
TINY = 1e-30


def ssd(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BGHPN: Float[Array, "B G H P N"] | None = None,
  chunk: int,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BLGHP in x's dtype and the float32 state after the last token, chunk by chunk.

  Same contract as `reference.ssd`; reverse-mode differentiable only. L is padded to two
  chunks or more with dt = 0, which leaves the state as it is.
  """
  B, L, G, H, P = x_BLGHP.shape
  dtype = jnp.promote_types(x_BLGHP.dtype, jnp.float32)
  if state_BGHPN is None:
    state_BGHPN = jnp.zeros((B, G, H, P, b_BLGN.shape[-1]), dtype)
  if segment_BL is None:
    segment_BL = jnp.zeros((B, L), jnp.int32)
  fresh_BL = jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0
  # At least two chunks: a loop of one is inlined, and jaxlib 0.10.2 on CPU then reads memory it
  # never wrote when a product with the state's constant zeros is fused into a sum.
  chunk = min(chunk, -(-L // 2))
  chunks = max(2, -(-L // chunk))

  def padded(v_BL):
    return jnp.pad(v_BL, [(0, 0), (0, chunks * chunk - L)] + [(0, 0)] * (v_BL.ndim - 2))

  dt_BLGH = dt_BLGH.astype(dtype)
  y_BLGHP, state_BGHPN = _scan(
    chunk, padded(x_BLGHP), padded(dt_BLGH), a_GH.astype(dtype), padded(b_BLGN), padded(c_BLGN),
    padded(fresh_BL), state_BGHPN.astype(dtype),
  )
  return y_BLGHP[:, :L].astype(x_BLGHP.dtype), state_BGHPN


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, *arrays):
  y_BLGHP, state_BGHPN, _ = chunked.forward(*arrays, chunk=chunk)
  return y_BLGHP, state_BGHPN


def _scan_forward(chunk, x_BLGHP, dt_BLGH, *arrays):
  """Returns the outputs, and the arguments with y and the chunks' states for the way back."""
  kept = (x_BLGHP, jnp.where(dt_BLGH == 0, TINY, dt_BLGH), *arrays)
  y_BLGHP, state_BGHPN, state_CBGHPN = chunked.forward(*kept, chunk=chunk)
  return (y_BLGHP, state_BGHPN), (*kept[:-1], y_BLGHP, state_CBGHPN)


def _scan_backward(chunk, kept, cotangents):
  """Returns one cotangent an argument, in its dtype; none for the resets."""
  x_BLGHP, _, _, b_BLGN, c_BLGN, *_ = kept
  x_bar, dt_bar, a_bar, b_bar, c_bar, state_bar = chunked.backward(
    *kept, *cotangents, chunk=chunk
  )
  x_bar = x_bar.astype(x_BLGHP.dtype)
  b_bar, c_bar = b_bar.astype(b_BLGN.dtype), c_bar.astype(c_BLGN.dtype)
  return x_bar, dt_bar, a_bar, b_bar, c_bar, None, state_bar


_scan.defvjp(_scan_forward, _scan_backward)
