"""SSM states by controllability and observability, from one forward pass (GHOST, arXiv 2602.11408).

State n of a head follows h_t = exp(dt_t a) h_(t-1) + dt_t b_t u_t and writes c_t h_t. What h_t
holds is worth what it goes on to write: |h_t|^2 (how far inputs drive it: controllability) times
o_t = sum over s >= t of exp(2 a (dt_(t+1) + ... + dt_s)) c_s^2 (how much of it is seen from then
on: observability). The score of a state of a group is the root of the mean over tokens t of the sum
over heads of |h_t|^2 o_t, |.| over channels, estimated at every Q-th position.
"""

import jax
import jax.numpy as jnp

from hybridlm.config import Mamba1, ssm_of
from hybridlm.prune.estimators.base import Estimator, Seen, Statistic

POSITIONS = 16  # of a row where the state is looked at; all of a shorter one


def _chunks(v, size: int):
  """Returns [B, L, ...] as [C, B, Q, ...], filled up with zeros."""
  v = jnp.pad(v, [(0, 0), (0, -v.shape[1] % size)] + [(0, 0)] * (v.ndim - 2))
  return jnp.moveaxis(v.reshape(v.shape[0], -1, size, *v.shape[2:]), 1, 0)


def _inputs(seen: Seen, size: int):
  """Returns log decay (Mamba-1: dt), u, dt, b, c, weight and document of each chunk.

  Padding has weight 0.
  """
  alike = not isinstance(ssm_of(seen.block), Mamba1)
  a_GH = -jnp.exp(seen.leaves["a_log_GH"].astype(jnp.float32)) if alike else 1.0
  u, b, c, dt = (
    seen.taps[tap].astype(jnp.float32) for tap in ("u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH")
  )
  segment_BL = seen.segment_BL
  if segment_BL is None:
    segment_BL = jnp.zeros(seen.weight_BL.shape, jnp.int32)
  # Filled-up positions belong to no document, and look at none.
  arrays = (dt * a_GH, u, dt, b, c, seen.weight_BL, segment_BL + 1)
  return tuple(_chunks(v, size) for v in arrays)


def _held(chunks) -> jax.Array:
  """Returns |h|^2 over P at the last position of every chunk, [C, B, G, H, N]."""
  log_CBQGH, u, dt, b, _, _, segment_CBQ = chunks
  _, B, _, G, H, P = u.shape

  def step(carry, chunk):
    state_BGHPN, before_B = carry
    log_BQGH, u, dt, b, segment_BQ = chunk
    sum_BQGH = jnp.cumsum(log_BQGH, axis=1)
    last_B = segment_BQ[:, -1]
    same_BQ = (segment_BQ == last_B[:, None]).astype(jnp.float32)
    decay_BQGH = jnp.exp(sum_BQGH[:, -1:] - sum_BQGH) * same_BQ[..., None, None]
    kept_BGH = jnp.exp(sum_BQGH[:, -1]) * (before_B == last_B)[:, None, None]
    new = jnp.einsum("BQGH,BQGHP,BQGN->BGHPN", decay_BQGH * dt, u, b, precision="highest")
    state_BGHPN = kept_BGH[..., None, None] * state_BGHPN + new
    return (state_BGHPN, last_B), jnp.square(state_BGHPN).sum(3)

  start = (jnp.zeros((B, G, H, P, b.shape[-1]), jnp.float32), segment_CBQ[0, :, 0])
  return jax.lax.scan(step, start, (log_CBQGH, u, dt, b, segment_CBQ))[1]


def _read(chunks) -> jax.Array:
  """Returns o at the last position of every chunk, [C, B, G, H, N]."""
  log_CBQGH, _, _, _, c, weight_CBQ, segment_CBQ = chunks
  C, B, Q, G, H = log_CBQGH.shape
  square_CBQGN = jnp.square(c) * weight_CBQ[..., None, None]
  last_CBGN = square_CBQGN[:, :, -1]

  def step(carry, chunk):
    # `later` is o at the last position of the chunk after this one, `segment` its document there.
    later_BGHN, segment_B = carry
    log_BQGH, square_BQGN, segment_BQ, own_BGN, own_B = chunk
    sum_BQGH = jnp.cumsum(log_BQGH, axis=1)
    same_BQ = (segment_BQ[:, :-1] == own_B[:, None]).astype(jnp.float32)
    decay_BQGH = jnp.exp(2 * sum_BQGH[:, :-1]) * same_BQ[..., None, None]
    within = jnp.einsum("BQGH,BQGN->BGHN", decay_BQGH, square_BQGN[:, :-1], precision="highest")
    through_BGH = jnp.exp(2 * sum_BQGH[:, -1]) * (segment_B == own_B)[:, None, None]
    seen_BGHN = own_BGN[:, :, None] + within + through_BGH[..., None] * later_BGHN
    return (seen_BGHN, own_B), seen_BGHN

  def following(v):
    return jnp.concatenate([v[1:], jnp.zeros_like(v[:1])])

  own_CB = segment_CBQ[:, :, -1]
  start = (jnp.zeros((B, G, H, c.shape[-1]), jnp.float32), jnp.zeros_like(own_CB[0]))
  rest = (following(log_CBQGH), following(square_CBQGN), following(segment_CBQ), last_CBGN, own_CB)
  return jax.lax.scan(step, start, rest, reverse=True)[1]


def _by_token(chunks):
  """Returns chunks with their tokens in front: [C, B, Q, ...] as [C, Q, B, ...]."""
  return tuple(jnp.moveaxis(v, 2, 1) for v in chunks)


def _each_held(chunks, a_GHN: jax.Array) -> jax.Array:
  """Returns h^2 of a Mamba-1 mixer at the last position of every chunk, [C, B, G, H, N]."""
  dt, u, _, b, _, _, segment = _by_token(chunks)
  start = (jnp.zeros((u.shape[2], *a_GHN.shape), jnp.float32), segment[0, 0])

  def token(carry, now):
    state_BGHN, before_B = carry
    dt_BGH, u_BGHP, b_BGN, segment_B = now
    kept_BGHN = jnp.exp(dt_BGH[..., None] * a_GHN) * state_BGHN
    kept_BGHN = jnp.where((segment_B == before_B)[:, None, None, None], kept_BGHN, 0.0)
    new_BGHN = (dt_BGH * u_BGHP[..., 0])[..., None] * b_BGN[:, :, None]
    return (kept_BGHN + new_BGHN, segment_B), None

  def step(carry, chunk):
    carry, _ = jax.lax.scan(token, carry, chunk)
    return carry, jnp.square(carry[0])

  return jax.lax.scan(step, start, (dt, u, b, segment))[1]


def _each_read(chunks, a_GHN: jax.Array) -> jax.Array:
  """Returns o of a Mamba-1 mixer at the last position of every chunk, [C, B, G, H, N]."""
  dt, _, _, _, c, weight, segment = _by_token(chunks)
  start = (jnp.zeros((c.shape[2], *a_GHN.shape), jnp.float32), dt[-1, -1], segment[-1, -1])

  def token(carry, now):
    later_BGHN, dt_BGH, segment_B = carry  # of the token after this one
    own_dt_BGH, c_BGN, weight_B, own_B = now
    through_BGHN = jnp.exp(2 * dt_BGH[..., None] * a_GHN) * later_BGHN
    through_BGHN = jnp.where((segment_B == own_B)[:, None, None, None], through_BGHN, 0.0)
    own_BGN = jnp.square(c_BGN) * weight_B[:, None, None]
    return (own_BGN[:, :, None] + through_BGHN, own_dt_BGH, own_B), None

  def step(carry, chunk):
    last, _ = token(carry, jax.tree.map(lambda v: v[-1], chunk))
    rest = jax.tree.map(lambda v: v[:-1], chunk)
    return jax.lax.scan(token, last, rest, reverse=True)[0], last[0]

  return jax.lax.scan(step, start, (dt, c, weight, segment), reverse=True)[1]


def _states(seen: Seen) -> jax.Array:
  length = seen.weight_BL.shape[1]
  size = -(-length // POSITIONS)
  chunks = _inputs(seen, size)
  if isinstance(ssm_of(seen.block), Mamba1):
    a_GHN = -jnp.exp(seen.leaves["a_log_GHN"].astype(jnp.float32))
    worth_CBGN = (_each_held(chunks, a_GHN) * _each_read(chunks, a_GHN)).sum(3)
  else:
    worth_CBGN = (_held(chunks) * _read(chunks)).sum(3)
  weight_CB = chunks[5][:, :, -1]
  total_BGN = jnp.einsum("CBGN,CB->BGN", worth_CBGN, weight_CB, precision="highest")
  return total_BGN * (size / length)


GHOST = Estimator(
  "taps", "root",
  {"score_GN": Statistic(_states, ("u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH"))},
  "SSM states by what inputs write into them and outputs go on to read",
)
