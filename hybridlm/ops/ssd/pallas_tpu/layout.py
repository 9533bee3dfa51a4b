"""The arguments as the kernels read them, and the blocks of a grid step.

Positions go last. XLA lays [B, L, G, H, P] out that way by itself where P is below 128, so that
for x, y and dt these transpositions move nothing.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from hybridlm.ops.ssd.pallas_tpu import table
from hybridlm.ops.ssd.pallas_tpu.table import TILE, Blocks


def channels(x_BLGHP: Array, cut: Blocks) -> Array:
  """Returns x_BKHPL of four dimensions, with zeros up to whole chunks and registers."""
  more = cut.P - x_BLGHP.shape[4]
  x_BGHPL = jnp.pad(x_BLGHP, [(0, 0), _more(x_BLGHP, cut), (0, 0), (0, 0), (0, more)])
  x_BGHPL = x_BGHPL.transpose(0, 2, 3, 4, 1)
  return x_BGHPL.reshape(x_BGHPL.shape[0], -1, cut.rows, x_BGHPL.shape[4])


def channels_back(x_BKHPL: Array, like: Array, cut: Blocks) -> Array:
  """Returns x_BLGHP in the shape of `like`: the inverse of `channels`."""
  B, L, G, H, P = like.shape
  return x_BKHPL.reshape(B, G, H, cut.P, -1).transpose(0, 4, 1, 2, 3)[:, :L, ..., :P]


def heads(dt_BLGH: Array, cut: Blocks) -> Array:
  """Returns dt_BKHL, with zeros up to whole chunks: dt = 0 leaves the state as it is."""
  dt_BGHL = jnp.pad(dt_BLGH, [(0, 0), _more(dt_BLGH, cut), (0, 0), (0, 0)]).transpose(0, 2, 3, 1)
  return dt_BGHL.reshape(dt_BGHL.shape[0], -1, cut.heads, dt_BGHL.shape[3])


def heads_back(dt_BKHL: Array, like: Array) -> Array:
  """Returns dt_BLGH in the shape of `like`: the inverse of `heads`."""
  B, L, G, H = like.shape
  return dt_BKHL.reshape(B, G, H, -1).transpose(0, 3, 1, 2)[:, :L]


def group(b_BLGN: Array, cut: Blocks) -> Array:
  """Returns b_BGNL, with zeros up to whole chunks and registers."""
  more = cut.N - b_BLGN.shape[3]
  return jnp.pad(b_BLGN, [(0, 0), _more(b_BLGN, cut), (0, 0), (0, more)]).transpose(0, 2, 3, 1)


def group_back(b_BGNL: Array, like: Array) -> Array:
  """Returns b_BLGN in the shape of `like`: the inverse of `group`."""
  return b_BGNL.transpose(0, 3, 1, 2)[:, : like.shape[1], :, : like.shape[3]]


def state(state_BGHPN: Array, cut: Blocks) -> Array:
  """Returns state_BKHPN of four dimensions, with zeros up to whole registers."""
  P, N = state_BGHPN.shape[3:]
  state_BGHPN = jnp.pad(state_BGHPN, [(0, 0)] * 3 + [(0, cut.P - P), (0, cut.N - N)])
  return state_BGHPN.reshape(state_BGHPN.shape[0], -1, cut.rows, cut.N)


def state_back(state_BKHPN: Array, G: int, P: int, N: int, cut: Blocks) -> Array:
  """Returns state_BGHPN: the inverse of `state`."""
  return state_BKHPN.reshape(len(state_BKHPN), G, -1, cut.P, cut.N)[..., :P, :N]


def runs(fresh_BL: Array, cut: Blocks) -> Array:
  """Returns run_B1L: how many resets there were in a tile up to and with a position."""
  fresh_BL = jnp.pad(fresh_BL, [(0, 0), _more(fresh_BL, cut)])
  run_BMQ = jnp.cumsum(fresh_BL.reshape(len(fresh_BL), -1, TILE).astype(jnp.float32), axis=2)
  return run_BMQ.reshape(len(fresh_BL), 1, -1)


def specs(cut: Blocks, C: int, *, reverse: bool) -> dict[str, pl.BlockSpec]:
  """Returns the block of a grid step for every kind of array; chunks run backwards if `reverse`.

  The grid is rows, groups, chunks in order, and innermost the blocks of a group's heads: B and C
  are copied, and their products formed, once for them all. What is read before the first chunk or
  written after the last moves on to the next heads in that chunk only.
  """
  Q = cut.chunk

  def chunk(c):
    return C - 1 - c if reverse else c

  def block(g, k):
    return g * cut.splits + k

  def first(b, g, c, k):
    return b, block(g, jnp.where(c == 0, k, cut.splits - 1)), 0, 0

  def last(b, g, c, k):
    return b, block(g, jnp.where(c == C - 1, k, 0)), 0, 0

  def spec(shape, at):
    return pl.BlockSpec(shape, at)

  return {
    "channels": spec((None, None, cut.rows, Q), lambda b, g, c, k: (b, block(g, k), 0, chunk(c))),
    "heads": spec((None, None, cut.heads, Q), lambda b, g, c, k: (b, block(g, k), 0, chunk(c))),
    "group": spec((None, None, cut.N, Q), lambda b, g, c, k: (b, g, 0, chunk(c))),
    "runs": spec((None, 1, Q), lambda b, g, c, k: (b, 0, chunk(c))),
    "kept": spec(
      (None, None, None, *cut.kept), lambda b, g, c, k: (b, chunk(c), block(g, k), 0, 0)),
    "head": spec((None, cut.heads, 1), lambda b, g, c, k: (block(g, k), 0, 0)),
    "first state": spec((None, None, cut.rows, cut.N), first),
    "last state": spec((None, None, cut.rows, cut.N), last),
    "last heads": spec((None, None, cut.heads, TILE), last),
  }


def _more(v_BL, cut):
  """Returns the padding of the positions up to whole chunks."""
  L = v_BL.shape[1]
  return 0, table.up(L, cut.chunk) - L
