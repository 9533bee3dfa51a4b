"""The one door to the scan: checks shapes, then runs the implementation that is asked for."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm.ops import mesh
from hybridlm.ops.segments import check_segments
from hybridlm.ops.ssd import chunked, place, reference, restart, sharded, vjp

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu", "pallas_gpu")
DTYPES = ("bfloat16", "float16", "float32", "float64")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
CHUNKED = vjp.Passes(chunked.forward, chunked.backward, chunked.LEAST_CHUNKS)
# On CPU as fast as 32 forward and faster backward, where 128 is slower forward (docs/kernels.md);
# elsewhere the published models' own length.
CPU_CHUNK, ACCELERATOR_CHUNK = 64, 128


def ssd(
  x_BLGHP: Float[Array, "B L G H P"],
  dt_BLGH: Float[Array, "B L G H"],
  a_GH: Float[Array, "G H"],
  b_BLGN: Float[Array, "B L G N"],
  c_BLGN: Float[Array, "B L G N"],
  *,
  skip_GH: Float[Array, "G H"] | None = None,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BGHPN: Float[Array, "B G H P N"] | None = None,
  restart_GHPN: Float[Array, "G H P N"] | None = None,
  impl: str | None = None,
  chunk: int | None = None,
  mesh_axes: mesh.MeshAxes = mesh.MESH_AXES,
) -> tuple[Float[Array, "B L G H P"], Float[Array, "B G H P N"]]:
  """Returns y_BLGHP in x's dtype and the float32 state after the last token.

  Per head: state <- exp(dt a) state + dt x B^T, y = state C + skip x; B and C are shared by the
  heads of a group. `dt_BLGH` is after softplus, `a_GH` negative, `skip_GH` zero by default.
  The state starts from `state_BGHPN` (zeros by default), which position 0 continues, and is
  dropped wherever `segment_BL` differs from the position before: every segment but one that
  `state_BGHPN` continues starts from `restart_GHPN` (zeros by default). Segments are contiguous:
  only 0, the id of padding, may come back after a gap (seen where the values are, outside of
  `jax.jit`).
  `impl` names an implementation, which runs or raises: "reference" (the recurrence), "chunked"
  (any platform), "pallas_tpu", "pallas_gpu" (Hopper). None takes "chunked": a kernel that was
  never run on a device is not picked unasked. `chunk` is its length in tokens; None takes its
  default. Under a mesh (`jax.set_mesh`) with axes named in `mesh_axes` (letter -> axes) every
  implementation but the reference runs on each device's own rows (B) and groups (G, or where they
  do not divide H, with B and C whole), and own positions (L), see `sharded`.
  Reverse-mode differentiable only, and inside a `jax.shard_map` of the caller's with
  `check_vma=False` only, but for the reference.
  Raises ValueError for an unknown name, sizes that disagree, L = 0, a chunk below 1, dtypes that
  are no floats of 16 bits or more or not of one kind, and what the named kernel cannot run.
  Source: Mamba-2 (arXiv 2405.21060), sections 5 and 6.
  """
  name = "chunked" if impl is None else impl
  if name not in IMPLEMENTATIONS:
    raise ValueError(f"ssd implementation {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
  arrays = {"x_BLGHP": x_BLGHP, "dt_BLGH": dt_BLGH, "a_GH": a_GH, "b_BLGN": b_BLGN,
            "c_BLGN": c_BLGN, "skip_GH": skip_GH, "segment_BL": segment_BL,
            "state_BGHPN": state_BGHPN}
  _check_shapes(arrays | {"restart_GHPN": restart_GHPN}, f"ssd {name!r}")
  _check_dtypes(arrays, f"ssd {name!r}")
  check_segments(segment_BL, f"ssd {name!r}")
  if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
    raise ValueError(f"chunk {chunk!r} is not a whole number of 1 or more tokens in ssd {name!r}")
  if chunk is not None and name == "reference":
    raise ValueError(f"chunk {chunk} has no meaning for the ssd implementation 'reference'")
  run = functools.partial(_run, name, chunk=chunk, mesh_axes=mesh_axes)
  return run(arrays) if restart_GHPN is None else _restarted(run, arrays, restart_GHPN, mesh_axes)


def _run(name, arrays, *, chunk, mesh_axes):
  """Returns y and the state of the implementation of that name."""
  if name == "reference":
    return reference.ssd(**arrays)
  if name == "chunked":
    if chunk is None:
      chunk = CPU_CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK
    scan = functools.partial(vjp.ssd, passes=CHUNKED, chunk=chunk)
    return _over_mesh(scan, arrays, mesh_axes)
  return _kernel(name, arrays, chunk, mesh_axes)


def _restarted(run, arrays, restart_GHPN, mesh_axes):
  """Returns y and the state of a scan all of whose documents start from one state."""
  axes = mesh.along("L", mesh_axes)
  if axes:
    raise ValueError(f"ssd takes no restart_GHPN where {axes[0]} divides the positions")
  own, segment_BL = arrays["state_BGHPN"], arrays["segment_BL"]
  if segment_BL is None and own is None:
    rows = (arrays["x_BLGHP"].shape[0], *restart_GHPN.shape)
    return run(arrays | {"state_BGHPN": jnp.broadcast_to(restart_GHPN, rows)})
  y_BLGHP, state_BGHPN = run(arrays)
  if segment_BL is None:
    return y_BLGHP, state_BGHPN
  given = (arrays[name] for name in ("dt_BLGH", "a_GH", "c_BLGN", "segment_BL"))
  return restart.add(y_BLGHP, state_BGHPN, *given, restart_GHPN, continues=own is not None)


def _over_mesh(scan, arrays, mesh_axes):
  """Returns y and the state of `scan` on every device's own part of the mesh in force."""
  axes = mesh.along("L", mesh_axes)
  if axes:
    scan = functools.partial(sharded.ssd, axis=axes[0], scan=scan)
  return mesh.over(scan, arrays, ("y_BLGHP", "state_BGHPN"), mesh_axes, "ssd")


def _kernel(name, arrays, chunk, mesh_axes):
  """Returns what a kernel makes, on each device's rows and groups; refuses what it cannot run."""
  module = importlib.import_module(f"hybridlm.ops.ssd.{name}")
  x_BLGHP, b_BLGN = arrays["x_BLGHP"], arrays["b_BLGN"]
  G, H, P, N = *x_BLGHP.shape[2:], b_BLGN.shape[3]
  if chunk is None:
    chunk = module.default_chunk(G, H, P, N, x_BLGHP.dtype)
  reason = module.refusal(x_BLGHP, b_BLGN, chunk=chunk)
  if reason is not None:
    raise ValueError(reason)
  scan = functools.partial(vjp.ssd, passes=_passes(name), chunk=chunk)
  return _over_mesh(scan, arrays, mesh_axes)


@functools.cache
def _passes(name):
  """Returns the passes of a kernel, which no other platform is given."""
  # Only who asks for a kernel pays for importing its compiler.
  module = importlib.import_module(f"hybridlm.ops.ssd.{name}")

  def forward(x_BLGHP, *arrays, chunk, keep):
    x_BLGHP = place.only_on(x_BLGHP, platform=PLATFORMS[name], name=name)
    return module.forward(x_BLGHP, *arrays, chunk=chunk, keep=keep)

  return vjp.Passes(forward, module.backward, fixed=name == "pallas_gpu")


def _check_dtypes(arrays, place):
  """Raises ValueError naming the first array whose dtype the scan does not take."""
  for label in ("x_BLGHP", "dt_BLGH", "b_BLGN", "c_BLGN"):
    if arrays[label].dtype.name not in DTYPES:
      raise ValueError(
        f"{label} has dtype {arrays[label].dtype}, which is not one of {', '.join(DTYPES)}, "
        f"in {place}"
      )
  kind = arrays["x_BLGHP"].dtype
  for label in ("b_BLGN", "c_BLGN"):
    if arrays[label].dtype != kind:
      raise ValueError(
        f"{label} has dtype {arrays[label].dtype}, but x_BLGHP {kind}, in {place}"
      )


def _check_shapes(arrays, place):
  """Raises ValueError naming the first array whose shape does not follow x's and B's sizes."""
  x_shape, b_shape = arrays["x_BLGHP"].shape, arrays["b_BLGN"].shape
  if len(x_shape) != 5 or len(b_shape) != 4:
    raise ValueError(f"x {x_shape} must have axes BLGHP and b {b_shape} BLGN in {place}")
  sizes = dict(zip("BLGHP", x_shape, strict=True)) | {"N": b_shape[3]}
  if sizes["L"] == 0:
    raise ValueError(f"sequence of 0 tokens in {place}: x has shape {x_shape}")
  for name, array in arrays.items():
    shape = tuple(sizes[letter] for letter in name.rpartition("_")[2])
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but x_BLGHP {x_shape} and N = {sizes['N']} "
        f"ask for {shape} in {place}"
      )
