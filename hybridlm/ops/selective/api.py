"""The one door to the selective scan: checks shapes, then runs the implementation asked for."""

import functools

import jax
from jaxtyping import Array, Float, Int

from hybridlm.ops import mesh
from hybridlm.ops.segments import check_segments
from hybridlm.ops.selective import chunked, reference, sharded

IMPLEMENTATIONS = ("reference", "chunked")
DTYPES = ("bfloat16", "float16", "float32", "float64")
# A chunk's states are what is worked on at once. On a CPU a few of them should fit its cache, and
# one position follows the other; a device with many cores waits less often with more.
CPU_CHUNK, ACCELERATOR_CHUNK = 32, 128
CPU_INSIDE, ACCELERATOR_INSIDE = "steps", "tree"


def selective(
  x_BLH: Float[Array, "B L H"],
  dt_BLH: Float[Array, "B L H"],
  a_HN: Float[Array, "H N"],
  b_BLN: Float[Array, "B L N"],
  c_BLN: Float[Array, "B L N"],
  *,
  skip_H: Float[Array, "H"] | None = None,
  segment_BL: Int[Array, "B L"] | None = None,
  state_BHN: Float[Array, "B H N"] | None = None,
  restart_HN: Float[Array, "H N"] | None = None,
  impl: str | None = None,
  chunk: int | None = None,
  mesh_axes: mesh.MeshAxes = mesh.MESH_AXES,
) -> tuple[Float[Array, "B L H"], Float[Array, "B H N"]]:
  """Returns y_BLH in x's dtype and the float32 state after the last token.

  Per channel and state: state <- exp(dt a) state + dt b x, y = sum over n of c state + skip x; all
  channels share B and C. `dt_BLH` is after softplus, `a_HN` negative, `skip_H` zero by default.
  Wherever `segment_BL` differs from the position before, the state becomes `restart_HN` (zeros by
  default), what every document starts from; position 0 continues `state_BHN`, by default
  `restart_HN` too. Segments are contiguous: only 0, the id of padding, may come back after a gap
  (seen where the values are, outside of `jax.jit`).
  `impl` names an implementation, which runs or raises: "reference" (the recurrence) or "chunked".
  None takes "chunked". `chunk` is its length in tokens; None takes its default. Under a mesh
  (`jax.set_mesh`) with axes named in `mesh_axes` (letter -> axes) all but the reference run on each
  device's own rows (B), channels (H, over the axes of G) and positions (L, see `sharded`).
  Reverse-mode differentiable only, and inside a `jax.shard_map` of the caller's with
  `check_vma=False` only, but for the reference.
  Raises ValueError for an unknown name, sizes that disagree, L = 0, a chunk below 1, and dtypes
  that are no floats of 16 bits or more.
  Source: Mamba (arXiv 2312.00752), sections 3.2 and 3.3.
  """
  name = "chunked" if impl is None else impl
  if name not in IMPLEMENTATIONS:
    known = ", ".join(IMPLEMENTATIONS)
    raise ValueError(f"selective implementation {name!r} is not one of {known}")
  arrays = {"x_BLH": x_BLH, "dt_BLH": dt_BLH, "a_HN": a_HN, "b_BLN": b_BLN, "c_BLN": c_BLN,
            "skip_H": skip_H, "segment_BL": segment_BL, "state_BHN": state_BHN,
            "restart_HN": restart_HN}
  place = f"selective {name!r}"
  _check_shapes(arrays, place)
  _check_dtypes(arrays, place)
  check_segments(segment_BL, place)
  if chunk is not None and (type(chunk) is not int or chunk < 1):
    raise ValueError(f"chunk {chunk!r} is not a whole number of 1 or more tokens in {place}")
  if name == "reference":
    if chunk is not None:
      raise ValueError(f"chunk {chunk} has no meaning for the selective implementation 'reference'")
    return reference.selective(**arrays)
  cpu = jax.default_backend() == "cpu"
  if chunk is None:
    chunk = CPU_CHUNK if cpu else ACCELERATOR_CHUNK
  inside = CPU_INSIDE if cpu else ACCELERATOR_INSIDE
  return _over_mesh(
    functools.partial(chunked.selective, chunk=chunk, inside=inside), arrays, mesh_axes)


def _over_mesh(scan, arrays, mesh_axes):
  """Returns y and the state of `scan` on every device's own part of the mesh in force."""
  axes = mesh.along("L", mesh_axes)
  if axes:
    scan = functools.partial(sharded.selective, axis=axes[0], scan=scan)
  if "G" in mesh_axes:  # there is one group, so what divides groups divides its channels
    mesh_axes = {**mesh_axes, "H": mesh_axes["G"]}
  return mesh.over(scan, arrays, ("y_BLH", "state_BHN"), mesh_axes, "selective")


def _check_dtypes(arrays, place):
  """Raises ValueError naming the first array whose dtype the scan does not take."""
  for label in ("x_BLH", "dt_BLH", "b_BLN", "c_BLN"):
    if arrays[label].dtype.name not in DTYPES:
      raise ValueError(
        f"{label} has dtype {arrays[label].dtype}, which is not one of {', '.join(DTYPES)}, "
        f"in {place}"
      )


def _check_shapes(arrays, place):
  """Raises ValueError naming the first array whose shape does not follow x's and A's sizes."""
  x_shape, a_shape = arrays["x_BLH"].shape, arrays["a_HN"].shape
  if len(x_shape) != 3 or len(a_shape) != 2:
    raise ValueError(f"x {x_shape} must have axes BLH and a {a_shape} HN in {place}")
  sizes = dict(zip("BLH", x_shape, strict=True)) | {"N": a_shape[1]}
  if sizes["L"] == 0:
    raise ValueError(f"sequence of 0 tokens in {place}: x has shape {x_shape}")
  for name, array in arrays.items():
    shape = tuple(sizes[letter] for letter in name.rpartition("_")[2])
    if array is not None and array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}, but x_BLH {x_shape} and N = {sizes['N']} ask for "
        f"{shape} in {place}"
      )
