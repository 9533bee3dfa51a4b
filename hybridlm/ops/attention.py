"""Causal grouped-query attention by query blocks, and rotary positions."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops import attention_blocks, mesh
from hybridlm.ops.attention_blocks import Prefix

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
LANES = 128


def attend(
  q_BLKJE: Float[Array, "B L K J E"],
  k_BSKE: Float[Array, "B S K E"],
  v_BSKU: Float[Array, "B S K U"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  segment_BS: Int[Array, "B S"] | None = None,
  prefix: Prefix | None = None,
  window: int | None = None,
  scale: float | None = None,
  impl: str | None = None,
  block: int | None = None,
  mesh_axes: mesh.MeshAxes = mesh.MESH_AXES,
) -> Float[Array, "B L K J U"]:
  """Returns softmax(scale q k) v over the visible keys, in q's dtype; J queries share a key head.

  The queries are the last L of the S positions. A query sees keys of its own segment id, at or
  before its position, at most `window` of them counting itself (None: all); one that sees none
  returns zero. Every query sees also the keys of `prefix`, whatever its segment and the window.
  `scale` is 1/sqrt(E) by default. `segment_BS` may be left out when S = L.
  `impl` names an implementation, which runs or raises: "xla" (any device, softmax in float32,
  `block` queries at a time, by default a quarter of L up to 128; never an L x S array),
  "cudnn" (GPU, L = S, no segments) and "splash" (TPU, L and S multiples of 128), both without a
  prefix and of values as wide as keys. None takes "xla".
  Under a mesh (`jax.set_mesh`) each device has its own rows (B) and key heads (K, or where they do
  not divide J, with keys whole), by `mesh_axes`, and its own queries (L): "xla" gathers the keys.
  Raises ValueError for an unknown name, sizes that disagree, and what `impl` cannot express.
  Source: grouped-query attention (arXiv 2305.13245).
  """
  name = "xla" if impl is None else impl
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"attention {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
  _check_shapes(q_BLKJE, k_BSKE, v_BSKU, segment_BL, segment_BS)
  _check_prefix(name, k_BSKE, v_BSKU, prefix)
  for label, value in (("window", window), ("block", block)):
    if value is not None and value < 1:
      raise ValueError(f"{label} {value} is below 1 position in attention")
  if segment_BS is None:
    segment_BS = segment_BL
  scale = q_BLKJE.shape[-1] ** -0.5 if scale is None else scale
  xla = functools.partial(attention_blocks.attend, block=block)
  run = {"xla": xla, "cudnn": _cudnn, "splash": _splash}[name]
  axes, L, S = mesh.along("L", mesh_axes), q_BLKJE.shape[1], k_BSKE.shape[1]
  if axes:
    if prefix is not None:
      raise ValueError(f"attention of a prefix cannot be divided over mesh axis {axes[0]}")
    if name != "xla" or L != S:
      raise ValueError(f"attention {name!r} of {L} queries and {S} keys cannot be divided over "
                       f"mesh axis {axes[0]}: 'xla' of as many keys as queries can")
    run = functools.partial(_gathered, axis=axes[0], block=block)
  keys = "BLK" if axes else "BSK"
  arrays = {"q_BLKJE": q_BLKJE, f"k_{keys}E": k_BSKE, f"v_{keys}U": v_BSKU,
            "segment_BL": segment_BL, "other_BL" if axes else "other_BS": segment_BS}
  names = ("before_AMKE", "value_AMKU", "stay_AM")
  before = {} if prefix is None else dict(zip(names, prefix, strict=True))

  def local(**given):
    own = [given.get(name) for name in before]
    options = {"window": window, "scale": scale} | ({"prefix": Prefix(*own)} if own else {})
    return (run(*(given.get(name) for name in arrays), **options),)

  return mesh.over(local, arrays | before, ("o_BLKJU",), mesh_axes, "attention")[0]


def _gathered(q_BLKJE, k_BLKE, v_BLKU, segment_BL, other_BL, *, axis, **options):
  """Returns the attention of this device's queries over the keys of all along a mesh axis.

  The last device's queries see nearly all keys, so leaving out what others do not see would not
  make a step shorter.
  """
  def gather(v_BL):
    return v_BL if v_BL is None else jax.lax.all_gather(v_BL, axis, axis=1, tiled=True)

  keys = (gather(v) for v in (k_BLKE, v_BLKU))
  first = jax.lax.axis_index(axis) * q_BLKJE.shape[1]
  segments = (segment_BL, gather(other_BL))
  return attention_blocks.attend(q_BLKJE, *keys, *segments, first=first, **options)


def _check_prefix(name, k_BSKE, v_BSKU, prefix):
  """Raises ValueError for a prefix of other sizes, and for what only "xla" can express."""
  (K, E), U = k_BSKE.shape[2:], v_BSKU.shape[3]
  if name != "xla" and (prefix is not None or U != E):
    what = f"values of width {U} and keys of {E}" if prefix is None else "a prefix"
    raise ValueError(f"attention {name!r} cannot express {what}: use 'xla'")
  if prefix is None:
    return
  M = prefix.k_BMKE.shape[1]
  expected = {"k_BMKE": (1, M, K, E), "v_BMKE": (1, M, K, U), "stay_BM": (1, M)}
  for field, shape in expected.items():
    array = getattr(prefix, field)
    if array is not None and array.shape != shape:
      raise ValueError(f"{field} of a prefix has shape {array.shape}, but the keys {k_BSKE.shape} "
                       f"and values {v_BSKU.shape} ask for {shape} in attention")


def _check_shapes(q_BLKJE, k_BSKE, v_BSKU, segment_BL, segment_BS):
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
    "v_BSKU": (v_BSKU, (B, S, K, v_BSKU.shape[-1])),
    "segment_BL": (segment_BL, (B, L)),
    "segment_BS": (segment_BS, (B, S)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but q_BLKJE {q_BLKJE.shape} and S = {S} ask for "
        f"{shape} in attention"
      )


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
