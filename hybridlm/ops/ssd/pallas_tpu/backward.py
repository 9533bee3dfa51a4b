"""The backward kernel: chunks and tiles in reverse, with the state's cotangent in VMEM."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from hybridlm.ops.ssd.pallas_tpu import layout, table, tile
from hybridlm.ops.ssd.pallas_tpu.table import TILE


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
  sums = jax.ShapeDtypeStruct((B, K, cut.heads, TILE), jnp.float32)
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
        table.matmul_flops(positions, G * H, G, cut)[1], positions * G * H * TILE,
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
  """Returns the kernel's scratch, in the order of `_Scratch`."""
  states, heads = (cut.splits, cut.rows, cut.N), (cut.splits, cut.heads, TILE)
  shapes = [states, (cut.tiles, *states[1:]), heads, heads, *[(TILE, cut.chunk)] * 2,
            *[(cut.N, cut.chunk)] * 2, (TILE, cut.heads)]
  return [
    *(pltpu.VMEM(shape, jnp.float32) for shape in shapes),
    *[pltpu.VMEM((cut.rows, TILE), dtype)] * 2, tile.decay_scratch(cut, dtype),
  ]


class _Scratch(NamedTuple):
  """The kernel's scratch."""

  state_bar: Any  # after the tile at hand, for every block of the group's heads
  state: Any  # before every tile of the chunk
  a_bar: Any  # sums over positions: what is left of them are the lanes
  skip_bar: Any
  cb: Any  # C B^T of every tile, sources in rows
  cb_bar: Any  # summed over the group's heads
  b_bar: Any  # what comes through the states, summed over the group's heads
  c_bar: Any
  earlier_SH: Any  # what a tile's sources give later positions
  fed: Any  # dt x of one tile as it reaches the state after it
  fed_bar: Any  # y_bar of one tile as it reaches the state before it
  decay: tile.Decay


def _kernel(x, dt, b, c, a, skip, kept, y_bar, first, *rest, cut, resets):
  """One chunk of one block of heads: refs of the arrays in the order of `backward`, and scratch."""
  run, rest = (rest[0], rest[1:]) if resets else (None, rest)
  x_bar, dt_bar, b_bar, c_bar, a_last, skip_last, last = rest[:7]
  own = _Scratch(*rest[7:])
  i, k = pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def _():
    own.state_bar[k] = first[...]
    own.a_bar[k] = jnp.zeros_like(own.a_bar[k])
    own.skip_bar[k] = jnp.zeros_like(own.skip_bar[k])

  @pl.when(k == 0)
  def _():
    for v in (own.cb_bar, own.b_bar, own.c_bar):
      v[...] = jnp.zeros_like(v)
    for m in range(cut.tiles):
      at = slice(m * TILE, (m + 1) * TILE)
      own.cb[:, at] = tile.dot(b[:, at], c[:, at], (0, 0), x.dtype)

  tile.fill(own.decay, dt, a, run, cut)
  own.state[0] = kept[...].T if cut.N % table.LANES else kept[...]

  @pl.loop(0, cut.tiles - 1)
  def _(m):
    b_SN = b[:, tile.at(m)].T
    for h in range(cut.heads):
      rows, row = slice(h * cut.P, (h + 1) * cut.P), slice(h, h + 1)
      added_PN = tile.dot(_fed(m, rows, row, x, dt, own.decay), b_SN, (1, 0), x.dtype)
      whole_11 = own.decay.first_MHQ[m, row, TILE - 1 :]
      own.state[m + 1, rows] = own.state[m, rows] * whole_11 + added_PN

  @pl.loop(0, cut.tiles)
  def _(n):
    m = cut.tiles - 1 - n
    at = tile.at(m)
    _tile(m, k, x, dt, b, c, a, skip, y_bar, x_bar, dt_bar, own, cut)

    @pl.when(k == cut.splits - 1)
    def _():
      b_bar_NS = own.b_bar[:, at] + tile.dot(c[:, at], own.cb_bar[:, at], (1, 1), x.dtype)
      c_bar_NQ = own.c_bar[:, at] + tile.dot(b[:, at], own.cb_bar[:, at], (1, 0), x.dtype)
      b_bar[:, at], c_bar[:, at] = b_bar_NS.astype(b_bar.dtype), c_bar_NQ.astype(c_bar.dtype)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    last[...], a_last[...], skip_last[...] = own.state_bar[k], own.a_bar[k], own.skip_bar[k]


def _fed(m, rows, row, x, dt, decay):
  """Returns dt x of a head as it reaches the state after tile `m`, in float32."""
  at = tile.at(m)
  return x[rows, at].astype(jnp.float32) * (dt[row, at] * decay.last_MHQ[m, row])


def _tile(m, k, x, dt, b, c, a, skip, y_bar, x_bar, dt_bar, own, cut):
  """Takes the cotangents of one tile, and `state_bar` from after it to before it."""
  at, decay = tile.at(m), own.decay
  b_NS, c_NQ, c_QN = b[:, at], c[:, at], c[:, at].T
  skip_bar, later, share, through, whole = [], [], [], [], []
  for h in range(cut.heads):
    rows, row = slice(h * cut.P, (h + 1) * cut.P), slice(h, h + 1)
    x_PQ, y_bar_PQ = x[rows, at].astype(jnp.float32), y_bar[rows, at].astype(jnp.float32)
    first_1Q, last_1S, dt_1Q = decay.first_MHQ[m, row], decay.last_MHQ[m, row], dt[row, at]
    state_PN, state_bar_PN = own.state[m, rows], own.state_bar[k, rows]
    within_SQ = tile.within(decay, m, h)
    mix_SQ = own.cb[:, at] * within_SQ
    mix_bar_SQ = tile.dot(x_PQ * dt_1Q, y_bar_PQ, (0, 0), x.dtype)
    own.cb_bar[:, at] += mix_bar_SQ * within_SQ
    # What a source gives a position counts for all decays between the two; for its own there is
    # none, and beside that large number float32 would lose the others.
    both_SQ = mix_bar_SQ * mix_SQ
    if x.dtype == jnp.float32:
      both_SQ *= tile.triangle(TILE, 1)
    own.earlier_SH[:, row] = both_SQ.sum(1, keepdims=True)
    fed_bar_PQ = y_bar_PQ * first_1Q
    outer_PQ = tile.dot(state_PN, c_NQ, (1, 0), x.dtype)
    later.append(both_SQ.sum(0, keepdims=True) + (fed_bar_PQ * outer_PQ).sum(0, keepdims=True))
    outer_bar_PS = tile.dot(state_bar_PN, b_NS, (1, 0), x.dtype) * last_1S
    u_bar_PS = tile.dot(y_bar_PQ, mix_SQ, (1, 1), x.dtype) + outer_bar_PS
    x_bar[rows, at] = (u_bar_PS * dt_1Q + y_bar_PQ * skip[row]).astype(x_bar.dtype)
    share.append((u_bar_PS * x_PQ).sum(0, keepdims=True))
    through.append((outer_bar_PS * x_PQ).sum(0, keepdims=True) * dt_1Q)
    skip_bar.append((y_bar_PQ * x_PQ).sum(0, keepdims=True))
    own.fed[rows] = _fed(m, rows, row, x, dt, decay).astype(x.dtype)
    own.fed_bar[rows] = fed_bar_PQ.astype(x.dtype)
    whole.append((state_bar_PN * state_PN).sum(0, keepdims=True) * first_1Q[:, TILE - 1 :])
  own.c_bar[:, at] += tile.dot(own.state[m], own.fed_bar[...], (0, 0), x.dtype)
  own.b_bar[:, at] += tile.dot(own.state_bar[k], own.fed[...], (0, 0), x.dtype)
  for h in range(cut.heads):
    rows = slice(h * cut.P, (h + 1) * cut.P)
    decayed_PN = own.state_bar[k, rows] * decay.first_MHQ[m, h : h + 1, TILE - 1 :]
    own.state_bar[k, rows] = decayed_PN + tile.dot(own.fed_bar[rows], c_QN, (1, 0), x.dtype)
  own.skip_bar[k] += jnp.concatenate(skip_bar)
  # A step's decay is in what reaches its position or a later one, in what leaves an earlier one
  # for the state behind the tile, and in what passes through the tile.
  step_bar_HQ = tile.dot(
    jnp.concatenate(later) - own.earlier_SH[...].T, tile.triangle(TILE, 0), (1, 1), jnp.float32)
  step_bar_HQ += tile.dot(jnp.concatenate(through), tile.triangle(TILE, 1), (1, 0), jnp.float32)
  step_bar_HQ += jnp.concatenate(whole).sum(1, keepdims=True)
  # A step that forgets all passes on nothing: what is there is rounding, and dt may be huge.
  step_bar_HQ = jnp.where(dt[:, at] * (a[...] * tile.LOG2E) < tile.LOWEST, 0, step_bar_HQ)
  own.a_bar[k] += step_bar_HQ * dt[:, at]
  dt_bar[:, at] = step_bar_HQ * a[...] + jnp.concatenate(share)
