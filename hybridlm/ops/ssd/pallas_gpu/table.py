"""Which tiles the forward kernel takes at which sizes, and which sizes the kernels refuse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Positions in a chunk: one instruction's rows, the most that a warpgroup's registers hold.
CHUNK = 64
# Of H100 and H200: shared memory that a block may ask for, registers of four warpgroups' threads,
# registers that are enough to fetch, columns of a product, and how many blocks run at a time.
SHARED_BYTES = 227 * 1024
REGISTERS = 512
FETCH_REGISTERS = 40
MOST_COLUMNS = 256
MULTIPROCESSORS = 132
# A step's dt a from which on nothing of the state is left in float32: less would only drown the
# small steps after it in the chunk's sums.
LEAST_LOG = -104.0
# Lines of float32 a chunk: sums, dt and runs.
LINES = 3


class Tiles(NamedTuple):
  """How one block works; `stages` and `copies` are multiples of `readers`.

  A barrier knows even from odd turns only, so that a reader has to see every one of its turns.
  """

  readers: int  # warpgroups that make y, each of them every so many chunks
  stages: int  # chunks of x, B and C in shared memory at a time
  copies: int  # states in shared memory at a time
  apart: bool  # y leaves through memory of its own, else in the place of its chunk's state
  reader_registers: int
  state_registers: int


# What walks for the state alone.
CARRY = Tiles(0, 4, 0, False, 0, 0)
NARROW = Tiles(2, 4, 2, True, 152, 168)
TIGHT = Tiles(2, 4, 2, False, 152, 168)
WIDE = Tiles(1, 2, 2, True, 232, 232)
WIDEST = Tiles(1, 2, 1, True, 232, 232)

# By device kind, G, H, P and N: the shapes that are benchmarked. Other shapes take the first of
# these that fits. None of them was timed yet: they are the largest rings that fit.
TABLE = {
  ("NVIDIA H200", 8, 16, 64, 128): NARROW,
  ("NVIDIA H200", 8, 14, 64, 128): NARROW,
  ("NVIDIA H200", 8, 32, 64, 256): WIDE,
  ("NVIDIA H200", 8, 16, 80, 128): TIGHT,
  ("NVIDIA H200", 8, 12, 80, 128): TIGHT,
  ("NVIDIA H200", 1, 50, 64, 16): NARROW,
  ("NVIDIA H200", 1, 16, 64, 128): NARROW,
  ("NVIDIA H200", 8, 2, 64, 128): NARROW,
}


def tiles(G: int, H: int, P: int, N: int, *, kind: str = "NVIDIA H200") -> Tiles | None:
  """Returns the row of a device kind and shape, for others the first that fits, or None."""
  fitting = (row for row in (NARROW, TIGHT, WIDE, WIDEST) if _fits(row, P, N))
  return TABLE.get((kind, G, H, P, N), next(fitting, None))


def segments(heads: int, chunks: int) -> int:
  """Returns into how many parts the chunks of a row are cut, so that few heads fill the card.

  Whatever is cut is walked twice, the first time for its last state alone.
  """
  fitting = (
    n for n in (8, 4, 2) if heads * n <= MULTIPROCESSORS and chunks % n == 0 and chunks >= 4 * n
  )
  return next(fitting, 1)


def default_chunk(G: int, H: int, P: int, N: int, dtype: jax.typing.DTypeLike) -> int:
  """Returns the positions in a chunk: the same for every shape and dtype."""
  return CHUNK


def refusal(
  x_BLGHP: Float[Array, "B L G H P"], b_BLGN: Float[Array, "B L G N"], *, chunk: int
) -> str | None:
  """Returns in one line why the forward kernel cannot run these sizes and dtypes, or None."""
  for name, array in (("x_BLGHP", x_BLGHP), ("b_BLGN", b_BLGN)):
    if array.dtype != jnp.bfloat16:
      return f"{name} has dtype {array.dtype}, but pallas_gpu takes bfloat16"
  G, H, P, N = *x_BLGHP.shape[2:], b_BLGN.shape[3]
  if chunk != CHUNK:
    return f"chunk {chunk} is not {CHUNK}, the one that pallas_gpu has"
  if P % 16 or N % 16 or (P % 64 and N % 64):
    return f"P = {P} and N = {N} must be multiples of 16, and one of them of 64, in pallas_gpu"
  if tiles(G, H, P, N) is None:
    return f"P = {P} and N = {N} are too large for the registers of pallas_gpu"
  return None


def upright(P: int) -> bool:
  """Returns whether a head's state lies as [P, N], else as [N, P]: 64 has to divide its rows."""
  return P % 64 == 0


def swizzle(P: int, N: int) -> int:
  """Returns the width of a tile in bytes of B, C, the state and what is added to it."""
  return width(N) if upright(P) else min(width(N), width(P))


def width(size: int) -> int:
  """Returns the widest tile in bytes that divides a row of `size` bfloat16 numbers."""
  return next(v for v in (128, 64, 32) if size * 2 % v == 0)


def shared_bytes(row: Tiles, P: int, N: int) -> int:
  """Returns the bytes of shared memory that one block takes, its barriers included."""
  x, b, state = (2 * v for v in (CHUNK * P, CHUNK * N, P * N))
  arrays = row.stages * (x + 2 * b + 4 * LINES * CHUNK) + row.copies * state + x
  barriers = 2 * (row.stages + row.copies)
  return arrays + row.readers * row.apart * x + 8 * barriers


def _fits(row, P, N):
  """Returns whether a row's arrays fit in shared memory and its state in registers."""
  # Beside the state a warpgroup holds addresses, decays and a piece of x; a reader y and scores.
  holds = P * N // 128 + 64 <= row.state_registers and P // 2 + 96 <= row.reader_registers
  room = max(P, N) <= MOST_COLUMNS and (row.apart or (not upright(P) and N >= CHUNK))
  return room and holds and shared_bytes(row, P, N) <= SHARED_BYTES
