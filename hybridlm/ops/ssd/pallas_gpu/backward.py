"""The scan's way back on Hopper GPUs: the states' cotangents first, then every chunk by itself.

Two kernels. The first walks a head's chunks from the last to the first and writes the cotangent
of the state after each of them. With those and the kept states no chunk waits for another, so the
second kernel gives one block of threads to each chunk of a group, loops over the group's heads
there, and forms C B^T once and the cotangents of B and C without atomics.
Source: Mamba-2 (arXiv 2405.21060), section 6, differentiated by hand.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybridlm.ops.ssd.pallas_gpu import backward_chunk, backward_state, table
from hybridlm.ops.ssd.pallas_gpu.backward_tiles import ROWS, SUMS, Q, make_plan


def backward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  kept: tuple[Float[Array, "C B G H P N"]],
  y_bar_BLGHP: Float[Array, "B L G H P"],
  state_bar_BGHPN: Float[Array, "B G H P N"],
  *,
  chunk: int,
) -> tuple[
  Float[Array, "B L G H P"], Float[Array, "B L G H"], Float[Array, "G H"],
  Float[Array, "B L G N"], Float[Array, "B L G N"], Float[Array, "G H"],
  Float[Array, "B G H P N"],
]:
  """Returns the cotangents of x, dt, a, b, c, skip and the first state.

  `kept` holds the states before every chunk, which meet the tensor cores in bfloat16; keeping
  them in it halves their traffic. Raises ValueError where `refusal` names a reason.
  """
  reason = refusal(x_BLGHP, b_BLGN, chunk=chunk)
  if reason is not None:
    raise ValueError(reason)
  rows_BGHCRQ, run_BCQ = make_rows(dt_BLGH, a_GH, skip_GH, fresh_BL, chunk=chunk)
  state_CBGHPN = kept[0].astype(x_BLGHP.dtype)
  state_bar_CBGHPN, first_bar_BGHPN = backward_state.run(
    rows_BGHCRQ, c_BLGN, y_bar_BLGHP, state_bar_BGHPN
  )
  x_bar_BLGHP, b_bar_BLGN, c_bar_BLGN, sums_BGHCRQ = backward_chunk.run(
    x_BLGHP, rows_BGHCRQ, b_BLGN, c_BLGN, run_BCQ, y_bar_BLGHP, state_CBGHPN, state_bar_CBGHPN
  )
  dt_bar_BLGH, a_bar_GH, skip_bar_GH = gather(sums_BGHCRQ, rows_BGHCRQ, dt_BLGH, a_GH)
  return (
    x_bar_BLGHP, dt_bar_BLGH, a_bar_GH, b_bar_BLGN, c_bar_BLGN, skip_bar_GH, first_bar_BGHPN
  )


def refusal(
  x_BLGHP: Float[Array, "B L G H P"], b_BLGN: Float[Array, "B L G N"], *, chunk: int
) -> str | None:
  """Returns why the way back cannot run these arrays, or None."""
  P, N = x_BLGHP.shape[4], b_BLGN.shape[3]
  if x_BLGHP.dtype != jnp.bfloat16 or b_BLGN.dtype != jnp.bfloat16:
    return f"dtypes {x_BLGHP.dtype} of x and {b_BLGN.dtype} of b are not bfloat16 in pallas_gpu"
  if chunk != Q:
    return f"chunk {chunk} is not {Q} in pallas_gpu's way back"
  if P < 64 or P % 16 or P > 128:
    return f"P = {P} is not a multiple of 16 from 64 to 128 in pallas_gpu's way back"
  if N % 16 or N > 256 or (N > 64 and N % 64):
    return f"N = {N} is not a multiple of 16 up to 64 or of 64 up to 256 in pallas_gpu's way back"
  if make_plan(x_BLGHP.shape[3], P, N) is None:
    need = f"P = {P} and N = {N} need more than the {table.SHARED_BYTES} bytes of shared memory"
    return f"{need} that pallas_gpu's way back has"
  return None


def make_rows(dt_BLGH, a_GH, skip_GH, fresh_BL, *, chunk):
  """Returns what a head has per position, `ROWS` of it, and the run of each token.

  A run is counted from 0, the one that continues the state before the chunk.
  """
  B, L, G, H = dt_BLGH.shape
  C = L // chunk
  dt_BGHCQ = jnp.moveaxis(dt_BLGH, 1, 3).reshape(B, G, H, C, chunk)
  log_BGHCQ = jnp.maximum(dt_BGHCQ * a_GH[:, :, None, None], table.LEAST_LOG)
  sum_BGHCQ = jnp.cumsum(log_BGHCQ, axis=-1)
  run_BCQ = jnp.zeros((B, C, chunk), jnp.float32)
  if fresh_BL is not None:
    run_BCQ = jnp.cumsum(fresh_BL.reshape(B, C, chunk), axis=-1).astype(jnp.float32)
  goes_on_BGHCQ = (run_BCQ == 0)[:, None, None]
  ends_BGHCQ = (run_BCQ == run_BCQ[..., -1:])[:, None, None]
  left_BGHCQ = jnp.minimum(sum_BGHCQ[..., -1:] - sum_BGHCQ, 0)
  rows = {
    "sum": sum_BGHCQ * math.log2(math.e),
    "dt": dt_BGHCQ,
    "first": jnp.where(goes_on_BGHCQ, jnp.exp(jnp.minimum(sum_BGHCQ, 0)), 0),
    "last": jnp.where(ends_BGHCQ, jnp.exp(left_BGHCQ), 0),
    "skip": jnp.broadcast_to(skip_GH[:, :, None, None], sum_BGHCQ.shape),
  }
  rows_BGHCRQ = jnp.stack([rows[name] for name in ROWS], axis=4)
  return rows_BGHCRQ, run_BCQ


def gather(sums_BGHCRQ, rows_BGHCRQ, dt_BLGH, a_GH):
  """Returns the cotangents of dt, a and skip from the sums that every chunk left.

  A step's logarithm gets what crosses it: pairs with a source before it and a target from it on,
  readers of the state before from it on, sources before it that the state after has, and what
  goes through the whole chunk. Pairs are a difference of sums, as the kernel leaves them.
  """
  sums = dict(zip(SUMS, jnp.moveaxis(sums_BGHCRQ, 4, 0), strict=True))
  first_BGHCQ = rows_BGHCRQ[..., ROWS.index("first"), :]
  readers_BGHCQ = sums["from"] - sums["into"] + sums["first"]
  through_BGHC = first_BGHCQ[..., -1] * jnp.sum(sums["whole"], axis=-1)
  log_bar_BGHCQ = jax.lax.cumsum(readers_BGHCQ, axis=4, reverse=True) + through_BGHC[..., None]
  sources_BGHCQ = jnp.cumsum(sums["last"], axis=4)[..., :-1]
  log_bar_BGHCQ = log_bar_BGHCQ.at[..., 1:].add(sources_BGHCQ)
  B, L, G, H = dt_BLGH.shape
  log_bar_BLGH, share_BLGH = (
    jnp.moveaxis(v.reshape(B, G, H, L), 3, 1) for v in (log_bar_BGHCQ, sums["share"])
  )
  log_bar_BLGH = jnp.where(dt_BLGH * a_GH < table.LEAST_LOG, 0, log_bar_BLGH)
  dt_bar_BLGH = a_GH * log_bar_BLGH + share_BLGH
  a_bar_GH = jnp.sum(dt_BLGH * log_bar_BLGH, axis=(0, 1))
  return dt_bar_BLGH, a_bar_GH, jnp.sum(sums["skip"], axis=(0, 3, 4))
