"""Makes a pair of forward and backward passes into one differentiable scan."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Passes(NamedTuple):
  """One implementation of the scan, of whole chunks, wide sums and one y.

  `forward(x, dt, a, b, c, skip, fresh_BL, state, *, chunk, keep)` returns y in x's dtype, the
  state after the last token, and `kept`: the arrays that `backward` wants, or () without `keep`.
  `backward(x, dt, a, b, c, skip, fresh_BL, kept, y_bar, state_bar, *, chunk)` returns the
  cotangents of x, dt, a, b, c, skip and the first state. dt, a, skip and states are float32
  (float64 when x is); `fresh_BL` tells where the state is dropped, and None is nowhere.
  `least` is the smallest number of chunks they may be given; `fixed` tells that a short sequence
  is padded to a whole chunk, where others take a shorter chunk.
  """

  forward: Callable
  backward: Callable
  least: int = 1
  fixed: bool = False


def ssd(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  *,
  skip_GH: Float[Array, "G H"] | None = None,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BGHPN: Float[Array, "B G H P N"] | None = None,
  passes: Passes,
  chunk: int,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BLGHP in x's dtype and the float32 state after the last token, chunk by chunk.

  Same contract as `reference.ssd`; reverse-mode differentiable only. L is padded to whole
  chunks, `passes.least` or more, with dt = 0, which leaves the state as it is.
  """
  B, L, G, H, P = x_BLGHP.shape
  dtype = jnp.promote_types(x_BLGHP.dtype, jnp.float32)
  if state_BGHPN is None:
    state_BGHPN = jnp.zeros((B, G, H, P, b_BLGN.shape[-1]), dtype)
  if skip_GH is None:
    skip_GH = jnp.zeros((G, H), dtype)
  fresh_BL = None
  if segment_BL is not None:
    fresh_BL = jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0
  chunk = chunk if passes.fixed else min(chunk, -(-L // passes.least))
  chunks = max(passes.least, -(-L // chunk))

  def padded(v_BL):
    if v_BL is None or chunks * chunk == L:
      return v_BL
    return jnp.pad(v_BL, [(0, 0), (0, chunks * chunk - L)] + [(0, 0)] * (v_BL.ndim - 2))

  y_BLGHP, state_BGHPN = _scan(
    passes, chunk, padded(x_BLGHP), padded(dt_BLGH.astype(dtype)), a_GH.astype(dtype),
    padded(b_BLGN), padded(c_BLGN), skip_GH.astype(dtype), padded(fresh_BL),
    state_BGHPN.astype(dtype),
  )
  return y_BLGHP[:, :L], state_BGHPN


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(passes, chunk, *arrays):
  y_BLGHP, state_BGHPN, _ = passes.forward(*arrays, chunk=chunk, keep=False)
  return y_BLGHP, state_BGHPN


def _scan_forward(passes, chunk, *arrays):
  """Returns the outputs, and the arguments but the state with what the way back wants."""
  y_BLGHP, state_BGHPN, kept = passes.forward(*arrays, chunk=chunk, keep=True)
  return (y_BLGHP, state_BGHPN), (*arrays[:-1], kept)


def _scan_backward(passes, chunk, kept, cotangents):
  """Returns one cotangent an argument, in its dtype; none for the resets."""
  x_BLGHP, _, _, b_BLGN, c_BLGN, *_ = kept
  x_bar, dt_bar, a_bar, b_bar, c_bar, skip_bar, state_bar = passes.backward(
    *kept, *cotangents, chunk=chunk
  )
  x_bar = x_bar.astype(x_BLGHP.dtype)
  b_bar, c_bar = b_bar.astype(b_BLGN.dtype), c_bar.astype(c_BLGN.dtype)
  return x_bar, dt_bar, a_bar, b_bar, c_bar, skip_bar, None, state_bar


_scan.defvjp(_scan_forward, _scan_backward)
