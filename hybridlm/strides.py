"""Copies between memory orders, tile by tile: numpy's own are ten times slower on big matrices."""

from collections.abc import Iterator

import numpy as np

# A tile of both arrays stays in a core's cache; the spare columns keep its rows off one cache set.
_TILE_BYTES = 1 << 17
_SPARE = 32
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def memory_order(array: np.ndarray) -> tuple[int, ...]:
  """Returns the axes from the one with the largest stride to the one that runs fastest."""
  return tuple(sorted(range(array.ndim), key=lambda i: (-abs(array.strides[i]), i)))


def _merged(array: np.ndarray) -> np.ndarray:
  """Returns a view in which neighbouring axes that are one run of memory are one axis."""
  shape: list[int] = []
  step = None
  for size, stride in zip(array.shape, array.strides, strict=True):
    if shape and step == size * stride:
      shape[-1] *= size
    else:
      shape.append(size)
    step = stride
  return array.reshape(shape)


def _transpose(target: np.ndarray, source: np.ndarray) -> None:
  """Copies a matrix whose first axis runs fastest in memory, through tiles in cache."""
  tile = int((_TILE_BYTES // source.itemsize) ** 0.5)
  held = np.empty((tile, tile + _SPARE), source.dtype)
  for j in range(0, source.shape[1], tile):
    for i in range(0, source.shape[0], tile):
      part = source[i : i + tile, j : j + tile].T
      small = held[: part.shape[0], : part.shape[1]]
      np.copyto(small, part)
      target[i : i + tile, j : j + tile] = small.T


def contiguous(array: np.ndarray) -> np.ndarray:
  """Returns the array in C order: itself where it is, else a copy."""
  if array.flags.c_contiguous:
    return array
  made = np.empty(array.shape, array.dtype)
  flat = _merged(array)
  if flat.ndim == 2 and flat.strides[0] == array.itemsize and array.itemsize in _UNSIGNED:
    plain = _UNSIGNED[array.itemsize]
    _transpose(made.view(plain).reshape(flat.shape), flat.view(plain))
  else:
    np.copyto(made, array)
  return made


def pieces(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
  """Yields views of an array, in C order one after the other, of about `size` bytes each.

  A piece is at least one entry of the first axis that memory does not merge with the second.
  """
  flat = _merged(array) if array.ndim else array.reshape(1)
  count = max(1, size * len(flat) // max(1, flat.nbytes))
  for start in range(0, len(flat), count):
    yield flat[start : start + count]


def raw(array: np.ndarray) -> memoryview:
  """Returns the bytes of an array in C order, copied only where its memory order is another."""
  return memoryview(contiguous(array).reshape(-1).view(np.uint8))
