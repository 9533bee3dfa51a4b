"""The scan chunk by chunk in plain JAX: matrix products inside a chunk, a state between them."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 64


def ssd(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BGHPN: Float[Array, "B G H P N"] | None = None,
  chunk: int = CHUNK,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BLGHP in x's dtype and the float32 state after the last token.

  Same contract as `reference.ssd`. L is padded with dt = 0 to a multiple of `chunk`, which
  leaves the state as it is.
  Source: Mamba-2 (arXiv 2405.21060), section 6, the block decomposition.
  """
  B, L, G, H, P = x_BLGHP.shape
  dtype = jnp.promote_types(x_BLGHP.dtype, jnp.float32)
  if state_BGHPN is None:
    state_BGHPN = jnp.zeros((B, G, H, P, b_BLGN.shape[-1]), dtype)
  if segment_BL is None:
    segment_BL = jnp.zeros((B, L), jnp.int32)
  run_BL = jnp.cumsum(jnp.diff(segment_BL, axis=1, prepend=segment_BL[:, :1]) != 0, axis=1)
  chunk = min(chunk, L)
  pad = -L % chunk

  def split(v, mode="constant"):
    v = jnp.pad(v, [(0, 0), (0, pad)] + [(0, 0)] * (v.ndim - 2), mode=mode)
    v = v.reshape(B, (L + pad) // chunk, chunk, *v.shape[2:])
    return jnp.moveaxis(v, 1, 0)

  chunks = tuple(split(v) for v in (x_BLGHP, dt_BLGH.astype(dtype), b_BLGN, c_BLGN))
  body = jax.checkpoint(functools.partial(_chunk, a_GH.astype(dtype)))
  carry = (state_BGHPN.astype(dtype), run_BL[:, 0])
  (state_BGHPN, _), y_CBQGHP = jax.lax.scan(body, carry, (*chunks, split(run_BL, "edge")))
  y_BLGHP = jnp.moveaxis(y_CBQGHP, 0, 1).reshape(B, L + pad, G, H, P)[:, :L]
  return y_BLGHP.astype(x_BLGHP.dtype), state_BGHPN


def _chunk(a_GH, carry, chunk):
  """Returns (state after the chunk, its last run) and y of one chunk; S is Q as a source."""
  state_BGHPN, run_B = carry
  x_BQGHP, dt_BQGH, b_BQGN, c_BQGN, run_BQ = chunk
  dtype = state_BGHPN.dtype
  dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
  sum_BGHQ = jnp.cumsum(jnp.moveaxis(dt_BQGH * a_GH, 1, 3), axis=3)
  causal_BQS = run_BQ[:, :, None] == run_BQ[:, None, :]
  causal_BQS &= jnp.tril(jnp.ones(causal_BQS.shape[1:], bool))
  log_BGHQS = sum_BGHQ[..., :, None] - sum_BGHQ[..., None, :]
  decay_BGHQS = jnp.exp(jnp.where(causal_BQS[:, None, None], log_BGHQS, -jnp.inf))
  last_BGHS = decay_BGHQS[..., -1, :]
  first_BGHQ = jnp.exp(jnp.where((run_BQ == run_B[:, None])[:, None, None], sum_BGHQ, -jnp.inf))
  u_BQGHP = (x_BQGHP * dt_BQGH[..., None]).astype(x_BQGHP.dtype)
  cb_BGQS = dot("bqgn,bsgn->bgqs", c_BQGN, b_BQGN)
  mix_BGHQS = (cb_BGQS[:, :, None] * decay_BGHQS).astype(x_BQGHP.dtype)
  y_BQGHP = dot("bghqs,bsghp->bqghp", mix_BGHQS, u_BQGHP)
  carried_BQGHP = dot("bqgn,bghpn->bqghp", c_BQGN.astype(dtype), state_BGHPN)
  y_BQGHP += carried_BQGHP * jnp.moveaxis(first_BGHQ, 3, 1)[..., None]
  kept_BQGHP = u_BQGHP * jnp.moveaxis(last_BGHS, 3, 1)[..., None]
  added_BGHPN = dot("bsghp,bsgn->bghpn", kept_BQGHP.astype(dtype), b_BQGN.astype(dtype))
  state_BGHPN = state_BGHPN * first_BGHQ[..., -1, None, None] + added_BGHPN
  return (state_BGHPN, run_BQ[:, -1]), y_BQGHP
