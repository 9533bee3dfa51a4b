"""The scan's forward pass on Hopper GPUs: what surrounds the kernel of `forward_body`.

Where a model has few heads, the chunks of a row are cut into segments that are walked side by
side: a first walk makes what state each segment leaves, a second one, which begins in the right
states, makes y.
Source: Mamba-2 (arXiv 2405.21060), section 6, the block decomposition.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from hybridlm.ops.ssd.pallas_gpu import forward_body, lowering, table

LOG2_E = 1.4426950408889634


def forward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  state_BGHPN: Float[Array, "B G H P N"],
  *,
  chunk: int,
  keep: bool = True,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"], tuple]:
  """Returns y, the state after the last token and (state_CBGHPN,): the states before every chunk.

  L is a multiple of `chunk`; the state is dropped before tokens where `fresh_BL`, nowhere when it
  is None. x, B, C, y and the kept states, which meet the tensor cores only, are bfloat16, the
  rest is float32. Without `keep` no state but the last is written, and the third result is ().
  Raises ValueError, with the reason of `table.refusal`, for what the kernel cannot run.
  """
  reason = table.refusal(x_BLGHP, b_BLGN, chunk=chunk)
  if reason is not None:
    raise ValueError(reason)
  B, L, G, H, P = x_BLGHP.shape
  N = b_BLGN.shape[-1]
  if L % chunk:
    raise ValueError(f"sequence {L} is not a multiple of the chunk {chunk} in pallas_gpu")
  sizes = forward_body.Sizes(L, G, H, P, N, table.segments(B * G * H, L // chunk))
  line_BGHCRQ = lines(dt_BLGH, a_GH, fresh_BL, chunk)
  upright = table.upright(P)
  first_BGHPN = state_BGHPN if upright else jnp.swapaxes(state_BGHPN, 3, 4)
  side = first_BGHPN.shape[3:]
  arrays = (
    x_BLGHP.reshape(B * L, G * H * P), b_BLGN.reshape(B * L, G * N), c_BLGN.reshape(B * L, G * N),
    line_BGHCRQ.reshape(B * G * H, L // chunk, -1, chunk), skip_GH.reshape(G * H),
  )
  firsts = first_BGHPN.reshape(1, B * G * H, *side)
  if sizes.segments > 1:
    firsts = _enter(arrays, firsts, sizes)
  tiles = table.tiles(G, H, P, N)
  lasts, y, *kept = _call(arrays, firsts, sizes, tiles, keep)
  states = [v.reshape(*v.shape[:-3], B, G, H, *side) for v in (lasts[-1], *kept)]
  last, *kept = states if upright else [jnp.swapaxes(v, -1, -2) for v in states]
  return y.reshape(x_BLGHP.shape), last, tuple(kept)


def _enter(arrays, firsts, sizes):
  """Returns the states before every segment, [segment, head of a row, P, N].

  Segments but the last are walked from nothing, the first from its state; what each leaves then
  passes through those behind it, which only shrink it.
  """
  line, count = arrays[3], sizes.segments - 1
  nothing = jnp.zeros((count - 1, *firsts.shape[1:]), jnp.float32)
  (lasts,) = _call(arrays, jnp.concatenate([firsts, nothing]), sizes, table.CARRY, False)
  # [head of a row, segment]: the sums at the ends of a segment's chunks, and their resets.
  end = jnp.sum(line[:, :, 0, -1].reshape(line.shape[0], sizes.segments, -1), axis=-1)
  whole = jnp.exp2(end)
  if line.shape[2] == 3:
    run = jnp.sum(line[:, :, 2, -1].reshape(end.shape[0], sizes.segments, -1), axis=-1)
    whole = jnp.where(run == 0, whole, 0)
  entered = [firsts[0], lasts[0]]
  for i in range(1, count):
    entered.append(lasts[i] + whole[:, i, None, None] * entered[-1])
  return jnp.stack(entered)


def _call(arrays, firsts, sizes, tiles, keep):
  """Returns the states after the segments that `firsts` begin, y unless there are no readers, and
  the states before every chunk, if they are kept.
  """
  line, (parts, heads, *side) = arrays[3], firsts.shape
  outputs = [jax.ShapeDtypeStruct(firsts.shape, jnp.float32)]
  if tiles.readers:
    outputs += [jax.ShapeDtypeStruct(arrays[0].shape, jnp.bfloat16)]
  if keep:
    outputs += [jax.ShapeDtypeStruct((line.shape[1], heads, *side), jnp.bfloat16)]
  kernel = plgpu.kernel(
    functools.partial(forward_body.walk, sizes=sizes, tiles=tiles),
    out_type=outputs,
    scratch_types=forward_body.scratch(tiles, line.shape[2], sizes),
    grid=(parts * heads // (sizes.G * sizes.H), sizes.G, sizes.H),
    grid_names=("part", "group", "head"),
    num_threads=tiles.readers + 2,
    thread_name="role",
    kernel_name="ssd_forward",
    compiler_params=lowering.WARPGROUP,
  )
  return kernel(*arrays, firsts)


def lines(dt_BLGH, a_GH, fresh_BL, chunk):
  """Returns what the kernel knows of every position, float32 [B, G, H, C, R, Q].

  R: the sum of dt a, in units of log 2, from the chunk's start up to the position; dt; and, where
  `fresh_BL` is given, the count of resets since the chunk's start.
  """
  B, L, G, H = dt_BLGH.shape
  dt_BGHCQ = jnp.moveaxis(dt_BLGH, 1, 3).reshape(B, G, H, L // chunk, chunk)
  log_BGHCQ = jnp.maximum(dt_BGHCQ * a_GH[..., None, None], table.LEAST_LOG)
  sum_BGHCQ = jnp.cumsum(log_BGHCQ * LOG2_E, axis=-1)
  lines = [sum_BGHCQ, dt_BGHCQ]
  if fresh_BL is not None:
    run_BCQ = jnp.cumsum(fresh_BL.reshape(B, L // chunk, chunk), axis=-1, dtype=jnp.float32)
    lines.append(jnp.broadcast_to(run_BCQ[:, None, None], dt_BGHCQ.shape))
  return jnp.stack(lines, axis=4)
