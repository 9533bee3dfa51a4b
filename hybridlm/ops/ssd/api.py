"""The one door to the scan: checks shapes, then runs the implementation that is asked for."""

import jax
from jaxtyping import Array, Float, Int

from hybridlm.ops.ssd import reference, vjp

IMPLEMENTATIONS = ("reference", "chunked")
# On CPU 32 beat 16, 64 and 128 at every shape tried; elsewhere the published models' own length.
CPU_CHUNK, ACCELERATOR_CHUNK = 32, 128


def ssd(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  *,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BGHPN: Float[Array, "B G H P N"] | None = None,
  impl: str | None = None,
  chunk: int | None = None,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BLGHP in x's dtype and the float32 state after the last token.

  Per head: state <- exp(dt a) state + dt x B^T, y = state C; B and C are shared by the heads of
  a group. `dt_BLGH` is after softplus, `a_GH` negative; the D skip is the caller's.
  The state starts from `state_BGHPN` (zeros by default), which position 0 continues, and is
  dropped wherever `segment_BL` differs from the position before.
  `impl` names an implementation ("reference", "chunked"), which runs or raises; None takes
  "chunked". `chunk` is its length in tokens; None takes its default.
  Raises ValueError for an unknown name, sizes that disagree, L = 0 and a chunk below 1.
  Source: Mamba-2 (arXiv 2405.21060), sections 5 and 6.
  """
  name = "chunked" if impl is None else impl
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"ssd implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
  _check_shapes(x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN, segment_BL, state_BGHPN)
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk {chunk} is below 1 token in ssd")
  if chunk is not None and name == "reference":
    raise ValueError(f"chunk {chunk} has no meaning for the ssd implementation 'reference'")
  arrays = (x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN)
  options = {"segment_BL": segment_BL, "state_BGHPN": state_BGHPN}
  if name == "reference":
    return reference.ssd(*arrays, **options)
  if chunk is None:
    chunk = CPU_CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK
  return vjp.ssd(*arrays, **options, chunk=chunk)


def _check_shapes(x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN, segment_BL, state_BGHPN):
  """Raises ValueError naming the first array whose shape does not follow x's and B's sizes."""
  if x_BLGHP.ndim != 5 or b_BLGN.ndim != 4:
    raise ValueError(f"x {x_BLGHP.shape} must have axes BLGHP and b {b_BLGN.shape} BLGN in ssd")
  B, L, G, H, P = x_BLGHP.shape
  N = b_BLGN.shape[3]
  if L == 0:
    raise ValueError(f"sequence of 0 tokens in ssd: x has shape {x_BLGHP.shape}")
  expected = {
    "dt_BLGH": (dt_BLGH, (B, L, G, H)),
    "a_GH": (a_GH, (G, H)),
    "b_BLGN": (b_BLGN, (B, L, G, N)),
    "c_BLGN": (c_BLGN, (B, L, G, N)),
    "segment_BL": (segment_BL, (B, L)),
    "state_BGHPN": (state_BGHPN, (B, G, H, P, N)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but x_BLGHP {x_BLGHP.shape} and N = {N} "
        f"ask for {shape} in ssd"
      )
