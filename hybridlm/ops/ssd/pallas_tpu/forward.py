"""The forward kernel: chunk by chunk, tile by tile, with the state in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from hybridlm.ops.ssd.pallas_tpu import layout, table, tile


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
  keep: bool,
  interpret: bool = False,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"], tuple[Array, ...]]:
  """Returns y in x's dtype, the state after the last token, and with `keep` what backward wants.

  That are the float32 states before every chunk, state_BCKHPN with H and P merged (state_BCKNHP
  where N would not fill the lanes). `fresh_BL` tells where the state is dropped, None is nowhere.
  `chunk` is rounded up to whole tiles. `interpret` runs the kernel's body on any platform.
  Raises ValueError for sizes without blocks that fit in VMEM.
  Source: Mamba-2 (arXiv 2405.21060), section 6, the block decomposition.
  """
  (B, L, G, H, P), N, dtype = x_BLGHP.shape, b_BLGN.shape[3], x_BLGHP.dtype
  cut = table.blocks(H, P, N, dtype, chunk)
  C, K = -(-L // cut.chunk), G * cut.splits
  specs = layout.specs(cut, C, reverse=False)
  given = [
    ("channels", layout.channels(x_BLGHP, cut)), ("heads", layout.heads(dt_BLGH, cut)),
    ("group", layout.group(b_BLGN, cut)), ("group", layout.group(c_BLGN, cut)),
    ("head", a_GH.reshape(K, cut.heads, 1)), ("head", skip_GH.reshape(K, cut.heads, 1)),
    ("first state", layout.state(state_BGHPN, cut)),
  ]
  if fresh_BL is not None:
    given.append(("runs", layout.runs(fresh_BL, cut)))
  made = [
    ("channels", jax.ShapeDtypeStruct(given[0][1].shape, dtype)),
    ("last state", jax.ShapeDtypeStruct((B, K, cut.rows, cut.N), jnp.float32)),
  ]
  if keep:
    made.append(("kept", jax.ShapeDtypeStruct((B, C, K, *cut.kept), jnp.float32)))
  positions = B * C * cut.chunk
  y_BKHPL, state_BKHPN, *kept = pl.pallas_call(
    functools.partial(_kernel, cut=cut, resets=fresh_BL is not None, keep=keep),
    grid=(B, G, C, cut.splits),
    in_specs=[specs[kind] for kind, _ in given],
    out_specs=[specs[kind] for kind, _ in made],
    out_shape=[v for _, v in made],
    scratch_shapes=[
      pltpu.VMEM((cut.splits, cut.rows, cut.N), jnp.float32),
      pltpu.VMEM((table.TILE, cut.chunk), jnp.float32),
      tile.decay_scratch(cut, dtype),
    ],
    compiler_params=tile.compiler_params(),
    cost_estimate=tile.cost(
      table.matmul_flops(positions, G * H, G, cut)[0], positions * G * H * table.TILE,
      [v for _, v in given + made]),
    interpret=interpret,
    name="ssd_forward",
  )(*(v for _, v in given))
  y_BLGHP = layout.channels_back(y_BKHPL, x_BLGHP, cut)
  return y_BLGHP, layout.state_back(state_BKHPN, G, P, N, cut), tuple(kept)


def _kernel(x, dt, b, c, a, skip, first, *rest, cut, resets, keep):
  """One chunk of one block of heads: refs of the arrays in the order of `forward`, and scratch."""
  rest = list(rest)
  run = rest.pop(0) if resets else None
  y, last = rest.pop(0), rest.pop(0)
  kept = rest.pop(0) if keep else None
  state, cb, decay = rest
  i, k = pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def _():
    state[k] = first[...]

  if keep:
    kept[...] = state[k].T if cut.N % table.LANES else state[k]

  @pl.when(k == 0)
  def _():
    for m in range(cut.tiles):
      at = slice(m * table.TILE, (m + 1) * table.TILE)
      cb[:, at] = tile.dot(b[:, at], c[:, at], (0, 0), x.dtype)

  tile.fill(decay, dt, a, run, cut)

  @pl.loop(0, cut.tiles)
  def _(m):
    at = tile.at(m)
    cb_SQ, b_SN, c_NQ = cb[:, at], b[:, at].T, c[:, at]
    for h in range(cut.heads):
      rows, row = slice(h * cut.P, (h + 1) * cut.P), slice(h, h + 1)
      first_1Q, last_1Q = decay.first_MHQ[m, row], decay.last_MHQ[m, row]
      x_PQ, state_PN = x[rows, at].astype(jnp.float32), state[k, rows]
      u_PQ = x_PQ * dt[row, at]
      y_PQ = tile.dot(u_PQ, cb_SQ * tile.within(decay, m, h), (1, 0), x.dtype)
      y_PQ += tile.dot(state_PN, c_NQ, (1, 0), x.dtype) * first_1Q
      y[rows, at] = (y_PQ + x_PQ * skip[row]).astype(y.dtype)
      state_PN *= first_1Q[:, table.TILE - 1 :]
      state[k, rows] = state_PN + tile.dot(u_PQ * last_1Q, b_SN, (1, 0), x.dtype)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    last[...] = state[k]
