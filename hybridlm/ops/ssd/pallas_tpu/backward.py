"""The backward kernel: chunks and tiles in reverse, with the state's cotangent in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from hybridlm.ops.ssd.pallas_tpu import layout, table, tile


def backward(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  skip_GH: Float[Array, "G H"],
  fresh_BL: Bool[Array, "B L"] | None,
  kept: tuple[Array, ...],
  y_bar_BLGHP: Float[Array, "B L G H P"],
  state_bar_BGHPN: Float[Array, "B G H P N"],
  *,
  chunk: int,
  interpret: bool = False,
) -> tuple[
  Float[Array, "B L G H P"], Float[Array, "B L G H"], Float[Array, "G H"],
  Float[Array, "B L G N"], Float[Array, "B L G N"], Float[Array, "G H"],
  Float[Array, "B G H P N"],
]:
  """Returns the cotangents of x, dt, a, b, c, skip and the first state.

  `kept` and `chunk` are those of `forward`. The states before the tiles of a chunk are made
  again from the one before the chunk: that costs one product in nine, and a quarter of the states
  are kept.
  """
  (_, _, G, H, P), N, dtype = x_BLGHP.shape, b_BLGN.shape[3], x_BLGHP.dtype
  cut = table.blocks(H, P, N, dtype, chunk)
  B, C, K = kept[0].shape[:3]
  specs = layout.specs(cut, C, reverse=True)
  given = [
    ("channels", layout.channels(x_BLGHP, cut)), ("heads", layout.heads(dt_BLGH, cut)),
    ("group", layout.group(b_BLGN, cut)), ("group", layout.group(c_BLGN, cut)),
    ("head", a_GH.reshape(K, cut.heads, 1)), ("head", skip_GH.reshape(K, cut.heads, 1)),
    ("kept", kept[0]), ("channels", layout.channels(y_bar_BLGHP, cut)),
    ("first state", layout.state(state_bar_BGHPN, cut)),
  ]
  if fresh_BL is not None:
    given.append(("runs", layout.runs(fresh_BL, cut)))
  sums = jax.ShapeDtypeStruct((B, K, cut.heads, table.TILE), jnp.float32)
  shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for _, v in given]
  made = [
    ("channels", shapes[0]), ("heads", shapes[1]), ("group", shapes[2]), ("group", shapes[3]),
    ("last heads", sums), ("last heads", sums), ("last state", shapes[8]),
  ]
  positions = B * C * cut.chunk
  x_bar_BKHPL, dt_bar_BKHL, b_bar_BGNL, c_bar_BGNL, a_bar_BKHQ, skip_bar_BKHQ, state_bar_BKHPN = (
    pl.pallas_call(
      functools.partial(_kernel, cut=cut, resets=fresh_BL is not None),
      grid=(B, G, C, cut.splits),
      in_specs=[specs[kind] for kind, _ in given],
      out_specs=[specs[kind] for kind, _ in made],
      out_shape=[v for _, v in made],
      scratch_shapes=_scratch(cut, dtype),
      compiler_params=tile.compiler_params(),
      cost_estimate=tile.cost(
        table.matmul_flops(positions, G * H, G, cut)[1], positions * G * H * table.TILE,
        [v for _, v in given + made]),
      interpret=interpret,
      name="ssd_backward",
    )(*(v for _, v in given))
  )
  return (
    layout.channels_back(x_bar_BKHPL, x_BLGHP, cut), layout.heads_back(dt_bar_BKHL, dt_BLGH),
    a_bar_BKHQ.sum((0, 3)).reshape(G, H),
    layout.group_back(b_bar_BGNL, b_BLGN), layout.group_back(c_bar_BGNL, c_BLGN),
    skip_bar_BKHQ.sum((0, 3)).reshape(G, H), layout.state_back(state_bar_BKHPN, G, P, N, cut),
  )


def _scratch(cut, dtype):
  """Returns the kernel's scratch, in the order of its arguments."""
  heads, square = (cut.splits, cut.heads, table.TILE), (table.TILE, cut.chunk)
  return [
    pltpu.VMEM((cut.splits, cut.rows, cut.N), jnp.float32),
    pltpu.VMEM((cut.tiles, cut.rows, cut.N), jnp.float32),
    pltpu.VMEM(heads, jnp.float32), pltpu.VMEM(heads, jnp.float32),
    pltpu.VMEM(square, jnp.float32), pltpu.VMEM(square, jnp.float32),
    pltpu.VMEM((cut.N, cut.chunk), jnp.float32), pltpu.VMEM((cut.N, cut.chunk), jnp.float32),
    pltpu.VMEM((cut.rows, cut.chunk), dtype), pltpu.VMEM((cut.rows, table.TILE), dtype),
  ]


def _kernel(x, dt, b, c, a, skip, kept, y_bar, first, *rest, cut, resets):
  """One chunk of one block of heads: refs of the arrays in the order of `backward`, and scratch."""
  run, rest = (rest[0], rest[1:]) if resets else (None, rest)
  x_bar, dt_bar, b_bar, c_bar, a_last, skip_last, last = rest[:7]
  state_bar, state, a_sum, skip_sum, cb, cb_bar, b_sum, c_sum, fed, _ = scratch = rest[7:]
  i, k = pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def _():
    state_bar[k] = first[...]
    a_sum[k] = jnp.zeros_like(a_sum[k])
    skip_sum[k] = jnp.zeros_like(skip_sum[k])

  @pl.when(k == 0)
  def _():
    for v in (cb_bar, b_sum, c_sum):
      v[...] = jnp.zeros_like(v)

  def decay_of(m):
    at = tile.at(m)
    return tile.decay(dt[:, at], a[...], None if run is None else run[:, at], x.dtype)

  state[0] = kept[...].T if cut.N % table.LANES else kept[...]

  @pl.loop(0, cut.tiles)
  def _(m):
    at, decay = tile.at(m), decay_of(m)

    @pl.when(k == 0)
    def _():
      cb[:, at] = tile.dot(b[:, at], c[:, at], (0, 0), x.dtype)

    feed_HQ = dt[:, at] * decay.last_HQ
    for h in range(cut.heads):
      rows = slice(h * cut.P, (h + 1) * cut.P)
      fed[rows, at] = (x[rows, at].astype(jnp.float32) * feed_HQ[h : h + 1]).astype(fed.dtype)

    @pl.when(m < cut.tiles - 1)
    def _():
      added_HPN = tile.dot(fed[:, at], b[:, at], (1, 1), x.dtype)
      for h in range(cut.heads):
        rows = slice(h * cut.P, (h + 1) * cut.P)
        whole_11 = decay.first_HQ[h : h + 1, table.TILE - 1 :]
        state[m + 1, rows] = state[m, rows] * whole_11 + added_HPN[rows]

  @pl.loop(0, cut.tiles)
  def _(n):
    m = cut.tiles - 1 - n
    _tile(m, k, decay_of(m), x, dt, b, c, a, skip, y_bar, x_bar, dt_bar, scratch, cut)

    @pl.when(k == cut.splits - 1)
    def _():
      at = tile.at(m)
      b_bar_NS = b_sum[:, at] + tile.dot(c[:, at], cb_bar[:, at], (1, 1), x.dtype)
      c_bar_NQ = c_sum[:, at] + tile.dot(b[:, at], cb_bar[:, at], (1, 0), x.dtype)
      b_bar[:, at], c_bar[:, at] = b_bar_NS.astype(b_bar.dtype), c_bar_NQ.astype(c_bar.dtype)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    last[...], a_last[...], skip_last[...] = state_bar[k], a_sum[k], skip_sum[k]


def _tile(m, k, decay, x, dt, b, c, a, skip, y_bar, x_bar, dt_bar, scratch, cut):
  """Takes the cotangents of one tile, `state_bar` from after it to before it."""
  state_bar, state, a_sum, skip_sum, cb, cb_bar, b_sum, c_sum, fed, fed_bar = scratch
  at, P, Q = tile.at(m), cut.P, table.TILE
  dt_HQ, cb_SQ = dt[:, at], cb[:, at]
  outer_HPQ = tile.dot(state[m], c[:, at], (1, 0), x.dtype)
  outer_bar_HPS = tile.dot(state_bar[k], b[:, at], (1, 0), x.dtype)
  cb_bar_SQ, skip_bar, later, share, through, whole = jnp.zeros_like(cb_SQ), [], [], [], [], []
  earlier_SH = jnp.zeros((Q, cut.heads), jnp.float32)
  before_SQ = tile.triangle(Q, 1)
  head_SH = jax.lax.broadcasted_iota(jnp.int32, (Q, cut.heads), 1)
  for h in range(cut.heads):
    rows, row = slice(h * P, (h + 1) * P), slice(h, h + 1)
    x_PQ, y_bar_PQ = x[rows, at].astype(jnp.float32), y_bar[rows, at].astype(jnp.float32)
    first_1Q, last_1S, dt_1Q = decay.first_HQ[row], decay.last_HQ[row], dt_HQ[row]
    within_SQ = tile.within(decay, h)
    mix_SQ = cb_SQ * within_SQ
    mix_bar_SQ = tile.dot(x_PQ * dt_1Q, y_bar_PQ, (0, 0), x.dtype)
    cb_bar_SQ += mix_bar_SQ * within_SQ
    # What a source gives a position counts for all decays between the two; for its own there is
    # none, and beside that large number float32 would lose the others.
    both_SQ = before_SQ * mix_bar_SQ * mix_SQ
    earlier_SH = jnp.where(head_SH == h, both_SQ.sum(1, keepdims=True), earlier_SH)
    later.append(both_SQ.sum(0, keepdims=True)
                 + (y_bar_PQ * outer_HPQ[rows]).sum(0, keepdims=True) * first_1Q)
    outer_bar_PS = outer_bar_HPS[rows] * last_1S
    u_bar_PS = tile.dot(y_bar_PQ, mix_SQ, (1, 1), x.dtype) + outer_bar_PS
    x_bar[rows, at] = (u_bar_PS * dt_1Q + y_bar_PQ * skip[row]).astype(x_bar.dtype)
    share.append((u_bar_PS * x_PQ).sum(0, keepdims=True))
    through.append((outer_bar_PS * x_PQ).sum(0, keepdims=True) * dt_1Q)
    skip_bar.append((y_bar_PQ * x_PQ).sum(0, keepdims=True))
    fed_bar[rows] = (y_bar_PQ * first_1Q).astype(fed_bar.dtype)
    whole_11 = first_1Q[:, Q - 1 :]
    decayed_PN = state_bar[k, rows] * whole_11
    whole.append((decayed_PN * state[m, rows]).sum(0, keepdims=True))
  cb_bar[:, at] += cb_bar_SQ
  c_sum[:, at] += tile.dot(state[m], fed_bar[...], (0, 0), x.dtype)
  b_sum[:, at] += tile.dot(state_bar[k], fed[:, at], (0, 0), x.dtype)
  for h in range(cut.heads):
    rows = slice(h * P, (h + 1) * P)
    state_bar[k, rows] = state_bar[k, rows] * decay.first_HQ[h : h + 1, Q - 1 :]
  state_bar[k] += tile.dot(fed_bar[...], c[:, at], (1, 1), x.dtype)
  skip_sum[k] += jnp.concatenate(skip_bar)
  through_HQ = jnp.concatenate(through)
  # A step's decay is in what reaches its position or a later one, in what leaves an earlier one
  # for the state behind the tile, and in what passes through the tile.
  step_bar_HQ = tile.dot(
    jnp.concatenate(later) - earlier_SH.T, tile.triangle(Q, 0), (1, 1), jnp.float32)
  step_bar_HQ += tile.dot(through_HQ, before_SQ, (1, 0), jnp.float32)
  step_bar_HQ += jnp.concatenate(whole).sum(1, keepdims=True)
  a_sum[k] += step_bar_HQ * dt_HQ
  dt_bar[:, at] = step_bar_HQ * a[...] + jnp.concatenate(share)
