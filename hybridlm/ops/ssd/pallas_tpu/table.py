"""Which blocks the kernels work in, what they hold in VMEM, and what they cannot run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

LANES, SUBLANES = 128, 8
# Positions whose Q x Q products are formed at once: one side of the matrix unit.
TILE = 128
# A state is kept once a chunk; after so many positions it is smaller than what they read of x.
CHUNK = 512
# v5p has 64 MiB of VMEM a core, v5e and v6e 128: what is left is for the compiler and for XLA.
VMEM_LIMIT = 48 * 2**20
# Heads are unrolled in the kernels: the time to compile grows with them.
MOST_HEADS = 16


class Blocks(NamedTuple):
  """How a scan is cut: a grid step is a chunk of `heads` heads of one group."""

  heads: int  # heads in a block
  splits: int  # blocks a group
  tiles: int  # tiles in a chunk
  P: int  # channels and states, padded to whole registers
  N: int

  @property
  def chunk(self) -> int:
    """Returns the positions in a chunk."""
    return self.tiles * TILE

  @property
  def rows(self) -> int:
    """Returns the channels of all heads in a block."""
    return self.heads * self.P

  @property
  def kept(self) -> tuple[int, int]:
    """Returns the shape of a kept state: turned where N would not fill the lanes in HBM."""
    return (self.N, self.rows) if self.N % LANES else (self.rows, self.N)


def default_chunk(G: int, H: int, P: int, N: int, dtype: jax.typing.DTypeLike) -> int:
  """Returns the positions in a chunk: the most, up to 512, whose blocks fit in VMEM."""
  fitting = (n for n in (CHUNK, CHUNK // 2) if _fitting(H, P, N, dtype, n) is not None)
  return next(fitting, TILE)


def blocks(H: int, P: int, N: int, dtype: jax.typing.DTypeLike, chunk: int) -> Blocks:
  """Returns the most heads in a block that fit in VMEM; `chunk` is rounded up to whole tiles.

  Raises ValueError where none fits.
  """
  found = _fitting(H, P, N, dtype, chunk)
  if found is None:
    raise ValueError(_too_large(P, N, dtype, chunk))
  return found


def refusal(
  x_BLGHP: Array | jax.ShapeDtypeStruct, b_BLGN: Array | jax.ShapeDtypeStruct, *, chunk: int
) -> str | None:
  """Returns in one line why the kernels cannot run these sizes and dtypes, or None."""
  for name, array in (("x_BLGHP", x_BLGHP), ("b_BLGN", b_BLGN)):
    if array.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name} has dtype {array.dtype}, but pallas_tpu takes bfloat16 and float32"
  (H, P), N = x_BLGHP.shape[3:], b_BLGN.shape[3]
  if _fitting(H, P, N, x_BLGHP.dtype, chunk) is None:
    return _too_large(P, N, x_BLGHP.dtype, chunk)
  return None


def vmem_bytes(cut: Blocks, dtype: jax.typing.DTypeLike) -> int:
  """Returns the bytes of VMEM that the backward kernel, the larger of the two, asks for.

  Every block that streams is there twice, one being copied while the other is worked on.
  """
  item, (Q, N, rows) = jnp.dtype(dtype).itemsize, (cut.chunk, cut.N, cut.rows)
  state = _padded(rows, N, 4)
  streamed = 3 * _padded(rows, Q, item) + 4 * _padded(N, Q, item)  # x, y_bar, x_bar; b, c, theirs
  streamed += 2 * _padded(cut.heads, Q, 4) + 3 * state  # dt, dt_bar; kept, state_bar in and out
  scratch = (cut.splits + cut.tiles) * state  # state_bar; states before each tile
  scratch += 2 * _padded(rows, TILE, item)  # what is fed to the states
  scratch += 3 * _padded(TILE, Q, 4) + 2 * _padded(N, Q, 4)  # C B^T, its cotangent, caps; b, c
  columns, lines = _padded(TILE, cut.heads, 4), _padded(cut.heads, TILE, 4)
  scratch += cut.tiles * (parts(dtype) * (columns + lines) + 2 * lines)  # decays
  # What the compiler lays aside: it was at most this at every size that was compiled.
  values = 4 * _padded(rows, TILE, 4) + 2 * state + 16 * _padded(TILE, TILE, 4)
  return 2 * streamed + scratch + values


def matmul_flops(positions: int, heads: int, groups: int, cut: Blocks) -> tuple[int, int]:
  """Returns the FLOPs of the products, forward and backward: full Q x Q tiles, C B^T once.

  `heads` is of all groups. A head has one Q x Q product forward and two backward, and two and six
  with the state; the sixth makes the states before the tiles of a chunk again.
  """
  inside, through, shared = 2 * TILE * cut.P, 2 * cut.N * cut.P, 2 * TILE * cut.N
  forward = groups * shared + heads * (inside + 2 * through)
  backward = 3 * groups * shared + heads * (2 * inside + 6 * through)
  return positions * forward, positions * backward


def parts(dtype: jax.typing.DTypeLike) -> int:
  """Returns in how many parts sums of steps are held: two where x is float32."""
  return 2 if jnp.dtype(dtype) == jnp.float32 else 1


def up(size: int, step: int) -> int:
  """Returns `size` rounded up to a multiple of `step`."""
  return -(-size // step) * step


def _padded(rows: int, columns: int, item: int) -> int:
  """Returns the bytes of an array in VMEM, where it fills whole registers."""
  return up(rows, SUBLANES * 4 // item) * up(columns, LANES) * item


def _fitting(H, P, N, dtype, chunk) -> Blocks | None:
  packed = SUBLANES * 4 // jnp.dtype(dtype).itemsize
  tiles, sizes = -(-chunk // TILE), (up(P, packed), up(N, packed))
  for heads in range(min(H, MOST_HEADS), 0, -1):
    if H % heads == 0:
      cut = Blocks(heads, H // heads, tiles, *sizes)
      if vmem_bytes(cut, dtype) <= VMEM_LIMIT:
        return cut
  return None


def _too_large(P, N, dtype, chunk) -> str:
  return (
    f"a head of P={P} N={N} {jnp.dtype(dtype).name} with chunk {chunk} needs more than the "
    f"{VMEM_LIMIT} bytes of VMEM that pallas_tpu takes"
  )
