"""Causal grouped-query attention by query blocks, and rotary positions."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
LANES = 128


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
  block: int = 128,
) -> Float[Array, "B L K J E"]:
  """Returns softmax(scale q k) v over the visible keys, in q's dtype; J queries share a key head.

  The queries are the last L of the S positions. A query sees keys of its own segment id, at or
  before its position, at most `window` of them counting itself (None: all); one that sees none
  returns zero. `scale` is 1/sqrt(E) by default. `segment_BS` may be left out when S = L.
  `impl` names an implementation, which runs or raises: "xla" (any device, softmax in float32,
  `block` queries at a time, no L x L array), "cudnn" (GPU, no segments) and "splash" (TPU, L and
  S multiples of 128). None takes "xla".
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
  arrays = (q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS)
  if name == "cudnn":
    return _cudnn(*arrays, window=window, scale=scale)
  if name == "splash":
    return _splash(*arrays, window=window, scale=scale)
  return _xla(*arrays, window=window, scale=scale, block=block)


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


def _xla(q_BLKJE, k_BSKE, v_BSKE, segment_BL, segment_BS, *, window, scale, block):
  """Returns the attention of every device, one block of queries after another."""
  B, L, K, J, E = q_BLKJE.shape
  block = min(block, L)
  offset = k_BSKE.shape[1] - L
  pad = -L % block
  if segment_BL is None:
    segment_BL = jnp.zeros((B, L), jnp.int32)
    segment_BS = jnp.zeros((B, L + offset), jnp.int32)

  def padded(v):
    return jnp.pad(v, [(0, 0), (0, pad)] + [(0, 0)] * (v.ndim - 2))

  def blocks(v):
    return jnp.moveaxis(padded(v).reshape(B, -1, block, *v.shape[2:]), 1, 0)

  k_BSKE, v_BSKE, segment_BS = padded(k_BSKE), padded(v_BSKE), padded(segment_BS)
  S = k_BSKE.shape[1]
  span = S if window is None else min(S, block + window - 1)

  @jax.checkpoint
  def body(_, queries):
    first, q_BLKJE, segment_BL = queries
    start = jnp.maximum(first + block - span, 0)
    k, v, segment = (
      jax.lax.dynamic_slice_in_dim(x, start, span, axis=1) for x in (k_BSKE, v_BSKE, segment_BS)
    )
    behind_LS = (first + jnp.arange(block))[:, None] - (start + jnp.arange(span))
    seen_BLS = segment_BL[:, :, None] == segment[:, None, :]
    seen_BLS &= (behind_LS >= 0) & (behind_LS < (S if window is None else window))
    return None, _softmax_block(q_BLKJE, k, v, seen_BLS, scale)

  first = offset + block * jnp.arange((L + pad) // block)
  _, o = jax.lax.scan(body, None, (first, blocks(q_BLKJE), blocks(segment_BL)))
  return jnp.moveaxis(o, 0, 1).reshape(B, L + pad, K, J, E)[:, :L]


def _softmax_block(q_BLKJE, k_BSKE, v_BSKE, seen_BLS, scale):
  """Returns the attention of one block of queries, softmax in float32."""
  dtype = jnp.promote_types(q_BLKJE.dtype, jnp.float32)
  dot = functools.partial(jnp.einsum, preferred_element_type=dtype)
  logit_BKJLS = dot("blkje,bske->bkjls", q_BLKJE, k_BSKE) * scale
  seen_B11LS = seen_BLS[:, None, None]
  top = jnp.max(logit_BKJLS, axis=-1, keepdims=True, initial=-1e30, where=seen_B11LS)
  weight_BKJLS = jnp.exp(jnp.where(seen_B11LS, logit_BKJLS - top, -jnp.inf))
  total = jnp.sum(weight_BKJLS, axis=-1, keepdims=True)
  weight_BKJLS /= jnp.maximum(total, jnp.finfo(dtype).tiny)
  o_BLKJE = dot("bkjls,bske->blkje", weight_BKJLS.astype(v_BSKE.dtype), v_BSKE)
  return o_BLKJE.astype(q_BLKJE.dtype)


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
  `frequency[i]` when that vector of rotary/2 is given. Angles are float32.
  Raises ValueError when `rotary` is odd, negative or more than E.
  Source: RoFormer (arXiv 2104.09864), equation 34, in the half layout of Llama.
  """
  E = x_BLE.shape[-1]
  if rotary % 2 or not 0 <= rotary <= E:
    raise ValueError(f"rotary {rotary} is not an even number of the {E} channels of a head")
  half = rotary // 2
  if frequency is None:
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / max(half, 1))
  if frequency.shape != (half,):
    raise ValueError(f"frequency has shape {frequency.shape}, not ({half},) for rotary {rotary}")
  angle = position_L.astype(jnp.float32)[..., None] * frequency.astype(jnp.float32)
  angle = angle.reshape(*angle.shape[:-1], *[1] * (x_BLE.ndim - 3), half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  left, right, rest = jnp.split(x_BLE, [half, rotary], axis=-1)
  turned = [left * cos - right * sin, right * cos + left * sin]
  return jnp.concatenate([v.astype(x_BLE.dtype) for v in (*turned, rest)], axis=-1)
