"""Causal grouped-query attention by query blocks, and rotary positions."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops import mesh

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
LANES = 128
SPANS = 4
# Stands in for minus infinity: a query without keys has no largest logit above it.
FLOOR = -1e30


def attend(
  q_BLKJE: Float[Array, "B L K J E"],
  k_BSKE: Float[Array, "B S K E"],
  v_BSKE: Float[Array, "B S K E"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  segment_BS: Int[Array, "B S"] | None = None,
  window: int | None = None,
  scale: float | None = None,
  impl: str | None = None,
  block: int | None = None,
  mesh_axes: mesh.MeshAxes = mesh.MESH_AXES,
) -> Float[Array, "B L K J E"]:
  """Returns softmax(scale q k) v over the visible keys, in q's dtype; J queries share a key head.

  The queries are the last L of the S positions. A query sees keys of its own segment id, at or
  before its position, at most `window` of them counting itself (None: all); one that sees none
  returns zero. `scale` is 1/sqrt(E) by default. `segment_BS` may be left out when S = L.
  `impl` names an implementation, which runs or raises: "xla" (any device, softmax in float32,
  `block` queries at a time, by default a quarter of L up to 128; never an L x S array),
  "cudnn" (GPU, L = S, no segments) and "splash" (TPU, L and S multiples of 128). None takes "xla".
  Under a mesh (`jax.set_mesh`) each device has its own rows (B) and key heads (K, or where they do
  not divide J, with keys whole), by `mesh_axes`, and its own queries (L): "xla" gathers the keys.
  Raises ValueError for an unknown name, sizes that disagree, and what `impl` cannot express.
  Source: grouped-query attention (arXiv 2305.13245).
  """
  name = "xla" if impl is None else impl
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"attention {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
  _check_shapes(q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS)
  for label, value in (("window", window), ("block", block)):
    if value is not None and value < 1:
      raise ValueError(f"{label} {value} is below 1 position in attention")
  if segment_BS is None:
    segment_BS = segment_BL
  scale = q_BLKJE.shape[-1] ** -0.5 if scale is None else scale
  run = {"xla": functools.partial(_xla, block=block), "cudnn": _cudnn, "splash": _splash}[name]
  axes, L, S = mesh.along("L", mesh_axes), q_BLKJE.shape[1], k_BSKE.shape[1]
  if axes:
    if name != "xla" or L != S:
      raise ValueError(f"attention {name!r} of {L} queries and {S} keys cannot be divided over "
                       f"mesh axis {axes[0]}: 'xla' of as many keys as queries can")
    run = functools.partial(_gathered, axis=axes[0], block=block)
  keys = "BLK" if axes else "BSK"
  arrays = {"q_BLKJE": q_BLKJE, f"k_{keys}E": k_BSKE, f"v_{keys}E": v_BSKE,
            "segment_BL": segment_BL, "other_BL" if axes else "other_BS": segment_BS}

  def local(**given):
    return (run(*(given.get(name) for name in arrays), window=window, scale=scale),)

  return mesh.over(local, arrays, ("o_BLKJE",), mesh_axes, "attention")[0]


def _gathered(q_BLKJE, k_BLKE, v_BLKE, segment_BL, other_BL, *, axis, **options):
  """Returns the attention of this device's queries over the keys of all along a mesh axis.

  The last device's queries see nearly all keys, so leaving out what others do not see would not
  make a step shorter.
  """
  def gather(v_BL):
    return v_BL if v_BL is None else jax.lax.all_gather(v_BL, axis, axis=1, tiled=True)

  keys = (gather(v) for v in (k_BLKE, v_BLKE))
  first = jax.lax.axis_index(axis) * q_BLKJE.shape[1]
  return _xla(q_BLKJE, *keys, segment_BL, gather(other_BL), first=first, **options)


def _check_shapes(q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS):
  """Raises ValueError naming the first array whose shape does not follow q's and k's."""
  if q_BLKJE.ndim != 5 or k_BSKE.ndim != 4:
    raise ValueError(f"q {q_BLKJE.shape} must have axes BLKJE and k {k_BSKE.shape} BSKE")
  B, L, K, _, E = q_BLKJE.shape
  S = k_BSKE.shape[1]
  if not 1 <= L <= S:
    raise ValueError(f"{L} queries cannot be the last of {S} positions in attention")
  if L != S and (segment_BL is None) != (segment_BS is None):
    raise ValueError(f"segments of both the {L} queries and the {S} keys are needed in attention")
  if segment_BL is None and segment_BS is not None:
    raise ValueError("segment_BS was given without segment_BL in attention")
  expected = {
    "k_BSKE": (k_BSKE, (B, S, K, E)),
    "v_BSKE": (v_BSKE, (B, S, K, E)),
    "segment_BL": (segment_BL, (B, L)),
    "segment_BS": (segment_BS, (B, S)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but q_BLKJE {q_BLKJE.shape} and S = {S} ask for "
        f"{shape} in attention"
      )


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


def _xla(q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS, *, window, scale, block, first=None):
  """Returns the attention of every device, one block of queries after another.

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
  arrays = (jnp.moveaxis(padded(v), 1, 2) for v in (k_BSKE, v_BSKE))
  q_BKLJE = jnp.moveaxis(padded(q_BLKJE), 1, 2)
  o_BKLJE = _blockwise(form, first, q_BKLJE, *arrays, padded(segment_BL), padded(segment_BS))
  return jnp.moveaxis(o_BKLJE, 1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(form, offset, q_BKLJE, k_BKSE, v_BKSE, segment_BL, segment_BS):
  """Returns the attention of whole blocks of queries.

  The way back makes every block's weights again from the logarithm of their sum, as in
  FlashAttention (arXiv 2205.14135, section 3.1): less than half the time of `jax.checkpoint`.
  """
  return _blockwise_forward(form, offset, q_BKLJE, k_BKSE, v_BKSE, segment_BL, segment_BS)[0]


def _blockwise_forward(form, offset, q_BKLJE, k_BKSE, v_BKSE, segment_BL, segment_BS):
  """Returns o and what the way back needs: no array of L x S."""
  def step(span, _, rows):
    first, q_BKLJE, segment_BL = rows
    start = _first_key(form, span, first)
    keys = (_slice(v, start, span.size) for v in (k_BKSE, v_BKSE))
    seen_BLS = _seen(form, first - start, segment_BL, _slice(segment_BS, start, span.size))
    return None, _softmax_block(form, q_BKLJE, *keys, seen_BLS)

  parts = []
  for span in _spans(form, q_BKLJE.shape[2], k_BKSE.shape[2]):
    parts.append(_over_blocks(form, span, step, offset, None, (q_BKLJE, segment_BL))[1])
  o_BKLJE, log_BKLJ = (jnp.concatenate(part, axis=2) for part in zip(*parts, strict=True))
  return o_BKLJE, (offset, q_BKLJE, k_BKSE, v_BKSE, segment_BL, segment_BS, o_BKLJE, log_BKLJ)


def _blockwise_backward(form, kept, o_bar_BKLJE):
  """Returns the cotangents of q, k and v; none for the offset and the segments."""
  offset, q_BKLJE, k_BKSE, v_BKSE, segment_BL, segment_BS, o_BKLJE, log_BKLJ = kept
  mean_BKLJ = jnp.sum(o_BKLJE.astype(log_BKLJ.dtype) * o_bar_BKLJE, axis=-1)

  def step(span, sums, rows):
    first, q_BKLJE, segment_BL, *rows = rows
    start = _first_key(form, span, first)
    keys = (_slice(v, start, span.size) for v in (k_BKSE, v_BKSE))
    seen_BLS = _seen(form, first - start, segment_BL, _slice(segment_BS, start, span.size))
    q_bar_BKLJE, *added = _softmax_block_backward(form, q_BKLJE, *keys, seen_BLS, *rows)
    return tuple(_add(v, new, start) for v, new in zip(sums, added, strict=True)), q_bar_BKLJE

  sums = tuple(jnp.zeros(v.shape, log_BKLJ.dtype) for v in (k_BKSE, v_BKSE))
  rows, parts = (q_BKLJE, segment_BL, o_bar_BKLJE, log_BKLJ, mean_BKLJ), []
  for span in _spans(form, q_BKLJE.shape[2], k_BKSE.shape[2]):
    sums, part = _over_blocks(form, span, step, offset, sums, rows)
    parts.append(part)
  q_bar_BKLJE = jnp.concatenate(parts, axis=2).astype(q_BKLJE.dtype)
  return None, q_bar_BKLJE, *(v.astype(k_BKSE.dtype) for v in sums), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _softmax_block(form, q_BKLJE, k_BKSE, v_BKSE, seen_BLS):
  """Returns o of one block of queries and the logarithm of the sum of their weights."""
  logit_BKLJS = _dot("bklje,bkse->bkljs", q_BKLJE, k_BKSE) * form.scale
  logit_BKLJS = jnp.where(seen_BLS[:, None, :, None], logit_BKLJS, FLOOR)
  top_BKLJ1 = jnp.max(logit_BKLJS, axis=-1, keepdims=True)
  weight_BKLJS = jnp.exp(logit_BKLJS - top_BKLJ1)
  sum_BKLJ1 = jnp.sum(weight_BKLJS, axis=-1, keepdims=True)
  o_BKLJE = _dot("bkljs,bkse->bklje", weight_BKLJS.astype(v_BKSE.dtype), v_BKSE)
  o_BKLJE = jnp.where(top_BKLJ1 > FLOOR, o_BKLJE / sum_BKLJ1, 0)
  return o_BKLJE.astype(q_BKLJE.dtype), (top_BKLJ1 + jnp.log(sum_BKLJ1))[..., 0]


def _softmax_block_backward(
  form, q_BKLJE, k_BKSE, v_BKSE, seen_BLS, o_bar_BKLJE, log_BKLJ, mean_BKLJ
):
  """Returns the cotangents of q, k and v that one block of queries brings."""
  logit_BKLJS = _dot("bklje,bkse->bkljs", q_BKLJE, k_BKSE) * form.scale
  weight_BKLJS = jnp.exp(jnp.minimum(logit_BKLJS - log_BKLJ[..., None], 0))
  weight_BKLJS = jnp.where(seen_BLS[:, None, :, None], weight_BKLJS, 0)
  weight_bar_BKLJS = _dot("bklje,bkse->bkljs", o_bar_BKLJE, v_BKSE)
  logit_bar_BKLJS = weight_BKLJS * (weight_bar_BKLJS - mean_BKLJ[..., None]) * form.scale
  logit_bar_BKLJS = logit_bar_BKLJS.astype(k_BKSE.dtype)
  q_bar_BKLJE = _dot("bkljs,bkse->bklje", logit_bar_BKLJS, k_BKSE)
  k_bar_BKSE = _dot("bkljs,bklje->bkse", logit_bar_BKLJS, q_BKLJE)
  v_bar_BKSE = _dot("bkljs,bklje->bkse", weight_BKLJS.astype(v_BKSE.dtype), o_bar_BKLJE)
  return q_bar_BKLJE, k_bar_BKSE, v_bar_BKSE


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


def _cudnn(q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS, *, window, scale):
  """Returns cuDNN's attention; raises ValueError where it cannot run."""
  if jax.default_backend() != "gpu":
    raise ValueError(f"attention 'cudnn' needs a GPU, not {jax.default_backend()!r}")
  if segment_BL is not None:
    raise ValueError("attention 'cudnn' cannot express segments: use 'xla' or 'splash'")
  B, L, K, J, E = q_BLKJE.shape
  S = k_BSKE.shape[1]
  if L != S:
    raise ValueError(f"attention 'cudnn' needs as many queries as keys, not {L} and {S}")
  o_BLHE = jax.nn.dot_product_attention(
    q_BLKJE.reshape(B, L, K * J, E), k_BSKE, v_BSKE, scale=scale, is_causal=True,
    local_window_size=None if window is None else (window - 1, 0), implementation="cudnn",
  )
  return o_BLHE.reshape(B, L, K, J, E)


def _splash(q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS, *, window, scale, interpret=False):
  """Returns the TPU kernel's attention; raises ValueError off a TPU."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  if jax.default_backend() != "tpu" and not interpret:
    raise ValueError(f"attention 'splash' needs a TPU, not {jax.default_backend()!r}")
  B, L, K, J, E = q_BLKJE.shape
  S = k_BSKE.shape[1]
  if L % LANES or S % LANES:
    raise ValueError(f"attention 'splash' needs multiples of {LANES}, not {L} queries, {S} keys")
  left = None if window is None else window - 1
  mask = splash.LocalMask((L, S), (left, 0), offset=S - L)
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([mask] * (K * J)), interpret=interpret
  )
  q_BHLE = jnp.moveaxis((q_BLKJE * scale).reshape(B, L, K * J, E), 1, 2)
  k_BKSE, v_BKSE = jnp.moveaxis(k_BSKE, 1, 2), jnp.moveaxis(v_BSKE, 1, 2)
  segments = None if segment_BL is None else splash.SegmentIds(segment_BL, segment_BS)
  o_BHLE = jax.vmap(kernel)(q_BHLE, k_BKSE, v_BKSE, segments)
  return jnp.moveaxis(o_BHLE, 2, 1).reshape(B, L, K, J, E)


def rotate(
  x_BLE: Float[Array, "B L *heads E"],
  position_L: Int[Array, "L"] | Int[Array, "B L"],
  *,
  base: float,
  rotary: int,
  frequency: Float[Array, "half"] | None = None,
) -> Float[Array, "B L *heads E"]:
  """Returns x with its first `rotary` channels turned by position, the others as they are.

  Channels i and i + rotary/2 are a pair, turned by position times base**(-2i/rotary), or times
  `frequency[i]` when that vector of rotary/2 is given. Angles are float32 (float64 of float64).
  Raises ValueError when `rotary` is odd, negative or more than E.
  Source: RoFormer (arXiv 2104.09864), equation 34, in the half layout of Llama.
  """
  E = x_BLE.shape[-1]
  if rotary % 2 or not 0 <= rotary <= E:
    raise ValueError(f"rotary {rotary} is not an even number of the {E} channels of a head")
  half = rotary // 2
  dtype = jnp.promote_types(x_BLE.dtype, jnp.float32)
  if frequency is None:
    frequency = base ** (-jnp.arange(half, dtype=dtype) / max(half, 1))
  if frequency.shape != (half,):
    raise ValueError(f"frequency has shape {frequency.shape}, not ({half},) for rotary {rotary}")
  angle = position_L.astype(dtype)[..., None] * frequency.astype(dtype)
  angle = angle.reshape(*angle.shape[:-1], *[1] * (x_BLE.ndim - 3), half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  left, right, rest = jnp.split(x_BLE, [half, rotary], axis=-1)
  turned = [left * cos - right * sin, right * cos + left * sin]
  return jnp.concatenate([v.astype(x_BLE.dtype) for v in (*turned, rest)], axis=-1)
