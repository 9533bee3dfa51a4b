"""Causal attention by blocks of queries, on any device, with its way back written out."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LANES = 128
SPANS = 4
# Stands in for minus infinity: a query without keys has no largest logit above it.
FLOOR = -1e30


class Prefix(NamedTuple):
  """Keys and values that all queries of all rows see; B = 1.

  `v_BMKE` is U wide where values have a width of their own. `stay_BM`: which of them are seen;
  None: all.
  """

  k_BMKE: Float[Array, "B M K E"]
  v_BMKE: Float[Array, "B M K _"]
  stay_BM: Bool[Array, "B M"] | None = None


class Form(NamedTuple):
  """What is fixed when the program is built; `last`: the queries are the last of the positions."""

  window: int | None
  scale: float
  block: int
  last: bool


class Span(NamedTuple):
  """Queries `start` to `stop`, in whole blocks that each read `size` keys."""

  start: int
  stop: int
  size: int


def attend(
  q_BLKJE: Float[Array, "B L K J E"],
  k_BSKE: Float[Array, "B S K E"],
  v_BSKU: Float[Array, "B S K U"],
  segment_BL: Int[Array, "B L"] | None,
  segment_BS: Int[Array, "B S"] | None,
  *,
  window: int | None,
  scale: float,
  block: int | None,
  first: Int[Array, ""] | None = None,
  prefix: Prefix | None = None,
) -> Float[Array, "B L K J U"]:
  """Returns the attention of every device, `block` queries after another, as `ops.attention` says.

  `first` is the position of the first query, a number of the running program; None: S - L.
  """
  B, L = q_BLKJE.shape[:2]
  S = k_BSKE.shape[1]
  block = min(L, LANES, -(-L // SPANS)) if block is None else min(L, block)
  if segment_BL is None:
    segment_BL, segment_BS = jnp.zeros((B, L), jnp.int32), jnp.zeros((B, S), jnp.int32)

  def padded(v_BL):
    return jnp.pad(v_BL, [(0, 0), (0, -L % block)] + [(0, 0)] * (v_BL.ndim - 2))

  form = Form(None if window is None or window >= S else window, scale, block, first is None)
  first = jnp.asarray(S - L if first is None else first, jnp.int32)
  arrays = (jnp.moveaxis(padded(v), 1, 2) for v in (k_BSKE, v_BSKU))
  q_BKLJE = jnp.moveaxis(padded(q_BLKJE), 1, 2)
  if prefix is not None:
    before = (jnp.moveaxis(jnp.broadcast_to(v, (B, *v.shape[1:])), 1, 2) for v in prefix[:2])
    prefix = (*before, None if prefix.stay_BM is None else prefix.stay_BM[0])
  segments = (padded(segment_BL), padded(segment_BS))
  o_BKLJU = _blockwise(form, first, q_BKLJE, *arrays, *segments, prefix)
  return jnp.moveaxis(o_BKLJU, 1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(form, offset, q_BKLJE, k_BKSE, v_BKSU, segment_BL, segment_BS, prefix):
  """Returns the attention of whole blocks of queries.

  The way back makes every block's weights again from the logarithm of their sum, as in
  FlashAttention (arXiv 2205.14135, section 3.1): less than half the time of `jax.checkpoint`.
  """
  arrays = (q_BKLJE, k_BKSE, v_BKSU, segment_BL, segment_BS, prefix)
  return _blockwise_forward(form, offset, *arrays)[0]


def _blockwise_forward(form, offset, q_BKLJE, k_BKSE, v_BKSU, segment_BL, segment_BS, prefix):
  """Returns o and what the way back needs: no array of L x S."""
  def step(span, _, rows):
    first, q_BKLJE, segment_BL = rows
    start = _first_key(form, span, first)
    keys = (_slice(v, start, span.size) for v in (k_BKSE, v_BKSU))
    seen_BLS = _seen(form, first - start, segment_BL, _slice(segment_BS, start, span.size))
    return None, _softmax_block(form, q_BKLJE, *_behind(prefix, *keys, seen_BLS))

  parts = []
  for span in _spans(form, q_BKLJE.shape[2], k_BKSE.shape[2]):
    parts.append(_over_blocks(form, span, step, offset, None, (q_BKLJE, segment_BL))[1])
  o_BKLJU, log_BKLJ = (jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))
  arrays = (q_BKLJE, k_BKSE, v_BKSU, segment_BL, segment_BS, prefix)
  return o_BKLJU, (offset, *arrays, o_BKLJU, log_BKLJ)


def _blockwise_backward(form, kept, o_bar_BKLJU):
  """Returns the cotangents of q, k, v and a prefix; none for the offset and the segments."""
  offset, q_BKLJE, k_BKSE, v_BKSU, segment_BL, segment_BS, prefix, o_BKLJU, log_BKLJ = kept
  mean_BKLJ = jnp.sum(o_BKLJU.astype(log_BKLJ.dtype) * o_bar_BKLJU, axis=-1)

  def step(span, sums, rows):
    first, q_BKLJE, segment_BL, *rows = rows
    start = _first_key(form, span, first)
    keys = (_slice(v, start, span.size) for v in (k_BKSE, v_BKSU))
    seen_BLS = _seen(form, first - start, segment_BL, _slice(segment_BS, start, span.size))
    given = _behind(prefix, *keys, seen_BLS)
    q_bar_BKLJE, *added = _softmax_block_backward(form, q_BKLJE, *given, *rows)
    own, before = sums
    if before:
      M = prefix[0].shape[2]
      before = tuple(v + new[:, :, :M] for v, new in zip(before, added, strict=True))
      added = (new[:, :, M:] for new in added)
    own = tuple(_add(v, new, start) for v, new in zip(own, added, strict=True))
    return (own, before), q_bar_BKLJE

  sums = tuple(
    tuple(jnp.zeros(v.shape, log_BKLJ.dtype) for v in arrays)
    for arrays in ((k_BKSE, v_BKSU), () if prefix is None else prefix[:2]))
  rows, parts = (q_BKLJE, segment_BL, o_bar_BKLJU, log_BKLJ, mean_BKLJ), []
  for span in _spans(form, q_BKLJE.shape[2], k_BKSE.shape[2]):
    sums, part = _over_blocks(form, span, step, offset, sums, rows)
    parts.append(part)
  q_bar_BKLJE = jnp.concatenate(parts, axis=2).astype(q_BKLJE.dtype)
  own, before = (tuple(v.astype(k_BKSE.dtype) for v in each) for each in sums)
  return None, q_bar_BKLJE, *own, None, None, (*before, None) if before else None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _behind(prefix, k_BKSE, v_BKSU, seen_BLS):
  """Returns keys, values and what is seen of them with those of the prefix before them."""
  if prefix is None:
    return k_BKSE, v_BKSU, seen_BLS
  before_BKME, value_BKMU, stay_M = prefix
  M = before_BKME.shape[2]
  stay_M = jnp.ones(M, bool) if stay_M is None else stay_M
  stay_BLM = jnp.broadcast_to(stay_M, (*seen_BLS.shape[:2], M))
  pairs = ((before_BKME, k_BKSE), (value_BKMU, v_BKSU), (stay_BLM, seen_BLS))
  return tuple(jnp.concatenate(pair, axis=2) for pair in pairs)


def _softmax_block(form, q_BKLJE, k_BKSE, v_BKSU, seen_BLS):
  """Returns o of one block of queries and the logarithm of the sum of their weights."""
  logit_BKLJS = _dot("bklje,bkse->bkljs", q_BKLJE, k_BKSE) * form.scale
  logit_BKLJS = jnp.where(seen_BLS[:, None, :, None], logit_BKLJS, FLOOR)
  top_BKLJ1 = jnp.max(logit_BKLJS, axis=-1, keepdims=True)
  weight_BKLJS = jnp.exp(logit_BKLJS - top_BKLJ1)
  sum_BKLJ1 = jnp.sum(weight_BKLJS, axis=-1, keepdims=True)
  o_BKLJU = _dot("bkljs,bksu->bklju", weight_BKLJS.astype(v_BKSU.dtype), v_BKSU)
  o_BKLJU = jnp.where(top_BKLJ1 > FLOOR, o_BKLJU / sum_BKLJ1, 0)
  return o_BKLJU.astype(q_BKLJE.dtype), (top_BKLJ1 + jnp.log(sum_BKLJ1))[..., 0]


def _softmax_block_backward(
  form, q_BKLJE, k_BKSE, v_BKSU, seen_BLS, o_bar_BKLJU, log_BKLJ, mean_BKLJ
):
  """Returns the cotangents of q, k and v that one block of queries brings."""
  logit_BKLJS = _dot("bklje,bkse->bkljs", q_BKLJE, k_BKSE) * form.scale
  weight_BKLJS = jnp.exp(jnp.minimum(logit_BKLJS - log_BKLJ[..., None], 0))
  weight_BKLJS = jnp.where(seen_BLS[:, None, :, None], weight_BKLJS, 0)
  weight_bar_BKLJS = _dot("bklju,bksu->bkljs", o_bar_BKLJU, v_BKSU)
  logit_bar_BKLJS = weight_BKLJS * (weight_bar_BKLJS - mean_BKLJ[..., None]) * form.scale
  logit_bar_BKLJS = logit_bar_BKLJS.astype(k_BKSE.dtype)
  q_bar_BKLJE = _dot("bkljs,bkse->bklje", logit_bar_BKLJS, k_BKSE)
  k_bar_BKSE = _dot("bkljs,bklje->bkse", logit_bar_BKLJS, q_BKLJE)
  v_bar_BKSU = _dot("bkljs,bklju->bksu", weight_BKLJS.astype(v_BKSU.dtype), o_bar_BKLJU)
  return q_bar_BKLJE, k_bar_BKSE, v_bar_BKSU


def _seen(form, ahead, segment_BL, segment_BS):
  """Returns which keys the queries see; the first query stands `ahead` of the first key."""
  behind_LS = ahead + jnp.arange(segment_BL.shape[1])[:, None] - jnp.arange(segment_BS.shape[1])
  seen_LS = behind_LS >= 0
  if form.window is not None:
    seen_LS &= behind_LS < form.window
  return seen_LS & (segment_BL[:, :, None] == segment_BS[:, None, :])


def _spans(form, L, S):
  """Returns up to SPANS spans, so that early queries are not multiplied with late keys."""
  blocks = L // form.block
  pieces = min(SPANS, blocks) if form.window is None and form.last else 1
  edges = [blocks * i // pieces * form.block for i in range(pieces + 1)]
  most = S if form.window is None else form.block + form.window - 1
  return [
    Span(a, b, min(S - L + b if form.last else S, most)) for a, b in itertools.pairwise(edges)
  ]


def _first_key(form, span, first):
  """Returns the position of the first key that the block of queries at `first` reads."""
  return 0 if form.window is None else jnp.maximum(first + form.block - span.size, 0)


def _over_blocks(form, span, step, offset, sums, rows):
  """Returns what `step` has summed, and its outputs of the span's queries side by side.

  A row has positions at axis 1 if it has two axes, else at axis 2, as every output has.
  """
  count = (span.stop - span.start) // form.block

  def blocks(v):
    axis = min(v.ndim - 1, 2)
    v = jax.lax.slice_in_dim(v, span.start, span.stop, axis=axis)
    v = v.reshape(*v.shape[:axis], count, form.block, *v.shape[axis + 1 :])
    return jnp.moveaxis(v, axis, 0)

  def join(v):
    v = jnp.moveaxis(v, 0, 2)
    return v.reshape(*v.shape[:2], span.stop - span.start, *v.shape[4:])

  first = offset + span.start + form.block * jnp.arange(count)
  xs = (first, *(blocks(v) for v in rows))
  sums, parts = jax.lax.scan(functools.partial(step, span), sums, xs, unroll=count == 1)
  return sums, jax.tree.map(join, parts)


def _slice(v, start, size):
  return jax.lax.dynamic_slice_in_dim(v, start, size, axis=min(v.ndim - 1, 2))


def _add(v_BKSE, new_BKSE, start):
  """Returns `v_BKSE` with `new_BKSE` added from position `start` on."""
  new_BKSE = _slice(v_BKSE, start, new_BKSE.shape[2]) + new_BKSE
  return jax.lax.dynamic_update_slice_in_dim(v_BKSE, new_BKSE, start, axis=2)


def _dot(subscripts, left, right):
  dtype = jnp.promote_types(left.dtype, jnp.float32)
  return jnp.einsum(subscripts, left, right, preferred_element_type=dtype)
