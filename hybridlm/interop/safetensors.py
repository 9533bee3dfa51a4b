"""The safetensors format: headers checked before anything is allocated, tensors streamed.

Source: https://github.com/huggingface/safetensors (format), and the index of sharded folders as
Hugging Face writes it.
"""

import concurrent.futures
import functools
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hybridlm import strides
from hybridlm.interop import folders
from hybridlm.interop.folders import clip

DTYPES: Mapping[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
MOST_AXES = 16
SHARD_BYTES = 5_000_000_000
# What one write copies and hands to the disk; two of them are under way at a time.
PIECE = 16 << 20
WRITERS = 2


class Entry(NamedTuple):
  """One tensor of a file; `start` and `stop` are bytes from the beginning of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int


class Header(NamedTuple):
  """What a file says it holds."""

  tensors: dict[str, Entry]
  metadata: dict[str, str]


class Tensor(NamedTuple):
  """One tensor of a folder; `read(rows=(a, b))` reads rows a to b of the first dimension only."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[..., np.ndarray]


Item = tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]


def read_header(path: str | os.PathLike) -> Header:
  """Returns what a file holds: every name, dtype, shape and byte range, checked.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not whole and valid; names the file, the tensor and the rule.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  with path.open("rb") as file:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    if len(first) < 8:
      raise ValueError(f"{path}: {size} bytes are too few for a safetensors file")
    length = struct.unpack("<Q", first)[0]
    if length > HEADER_LIMIT or length > size - 8:
      raise ValueError(
        f"{path}: a header of {length} bytes; the file has {size}, the limit is {HEADER_LIMIT}"
      )
    table = folders.parse_json(file.read(length), f"{path}: header")
  metadata = table.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise ValueError(f"{path}: __metadata__ is {clip(metadata)}, not a table of strings")
  begin = 8 + length
  tensors = {name: _entry(f"{path}: tensor {clip(name)}", table[name], begin) for name in table}
  _check_ranges(path, tensors, begin, size)
  return Header(tensors, metadata)


def _whole(value: Any, count: int | None = None) -> bool:
  """Whether a value is a list of whole numbers that fit 63 bits, `count` of them if given."""
  return (
    isinstance(value, list)
    and (count is None or len(value) == count)
    and all(type(i) is int and 0 <= i < 1 << 63 for i in value)
  )


def _entry(place: str, plain: Any, begin: int) -> Entry:
  if not isinstance(plain, dict) or set(plain) != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{place}: {clip(plain)} must have dtype, shape and data_offsets, no more")
  code, shape, offsets = plain["dtype"], plain["shape"], plain["data_offsets"]
  if not isinstance(code, str) or code not in DTYPES:
    raise ValueError(f"{place}: dtype {clip(code)} is not one of {', '.join(DTYPES)}")
  if not _whole(shape) or len(shape) > MOST_AXES:
    raise ValueError(f"{place}: shape {clip(shape)} is not at most {MOST_AXES} whole numbers")
  if not _whole(offsets, 2):
    raise ValueError(f"{place}: data_offsets {clip(offsets)} are not two whole numbers")
  start, stop = offsets
  need = math.prod(shape) * DTYPES[code].itemsize
  if stop - start != need or math.prod(max(n, 1) for n in shape) >= 1 << 60:
    raise ValueError(
      f"{place}: data_offsets {offsets} hold {stop - start} bytes, "
      f"{code} of shape {clip(shape)} needs {clip(need)}"
    )
  return Entry(DTYPES[code], tuple(shape), begin + start, begin + stop)


def _check_ranges(path: pathlib.Path, tensors: Mapping[str, Entry], begin: int, size: int) -> None:
  """Raises unless the tensors fill the file from `begin` to its end, one after the other."""
  at = begin
  for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
    if entry.stop > size:
      raise ValueError(
        f"{path}: tensor {clip(name)}: ends at byte {entry.stop}, the file at {size}: truncated"
      )
    if entry.start != at:
      word = "overlaps the one before" if entry.start < at else "leaves a hole before it"
      raise ValueError(f"{path}: tensor {clip(name)}: its byte range {word}")
    at = entry.stop
  if at != size:
    raise ValueError(f"{path}: {size - at} bytes after the last tensor belong to none")


def read(
  path: str | os.PathLike, entry: Entry, rows: tuple[int, int] | None = None
) -> np.ndarray:
  """Returns a tensor in memory of its own, or rows a to b of its first dimension.

  Raises:
    ValueError: the rows are outside the tensor, or the file has become shorter.
  """
  shape, start = entry.shape, entry.start
  if rows is not None:
    if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
      raise ValueError(f"{path}: rows {rows} of a tensor of shape {shape}")
    start += (entry.stop - entry.start) // max(shape[0], 1) * rows[0]
    shape = (rows[1] - rows[0], *shape[1:])
  array = np.empty(shape, entry.dtype)
  left = memoryview(array.reshape(-1).view(np.uint8))
  with open(path, "rb", buffering=0) as file:
    file.seek(start)
    while left:
      count = file.readinto(left)
      if not count:
        raise ValueError(f"{path}: ends before byte {start + array.nbytes}: truncated")
      left = left[count:]
  return array


def open_folder(folder: str | os.PathLike) -> dict[str, Tensor]:
  """Returns the tensors of `model.safetensors`, or of the shards its index names; reads no data.

  Raises:
    FileNotFoundError: the folder, its weights or a shard is missing.
    ValueError: a header or the index is not valid, or they disagree.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such folder")
  if (folder / SINGLE).is_file():
    return _tensors(folders.plain_file(folder, SINGLE))
  if (folder / INDEX).is_file():
    return _sharded(folder)
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in folders.PICKLES)
  if pickles:
    raise FileNotFoundError(
      f"{folder}: no safetensors, only {clip(pickles[0])}: pickles can run code and are never "
      "loaded; save the model as safetensors"
    )
  raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there")


def _tensors(path: pathlib.Path) -> dict[str, Tensor]:
  return {
    name: Tensor(entry.shape, entry.dtype, functools.partial(read, path, entry))
    for name, entry in read_header(path).tensors.items()
  }


def _sharded(folder: pathlib.Path) -> dict[str, Tensor]:
  place = folder / INDEX
  weights = folders.read_json(folder, INDEX).get("weight_map")
  if not isinstance(weights, dict) or not weights:
    raise ValueError(f"{place}: weight_map is {clip(weights)}, not a table of tensors")
  shards: dict[str, None] = {}
  for name, shard in weights.items():
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
      raise ValueError(f"{place}: tensor {clip(name)}: {clip(shard)} is not a safetensors file")
    shards[shard] = None
  found: dict[str, Tensor] = {}
  for shard in shards:
    for name, tensor in _tensors(folders.plain_file(folder, shard)).items():
      if name in found:
        raise ValueError(f"{folder}: tensor {clip(name)} is in two shards, {shard} and another")
      if name not in weights:
        raise ValueError(f"{folder / shard}: tensor {clip(name)} is not in {INDEX}")
      if weights[name] == shard:
        found[name] = tensor
      else:
        raise ValueError(f"{folder}: tensor {clip(name)} is in {shard}, the index says otherwise")
  missing = weights.keys() - found.keys()
  if missing:
    name = min(missing)
    raise ValueError(f"{folder / weights[name]}: tensor {clip(name)} of the index is missing")
  return {name: found[name] for name in weights}


def _size(item: Item) -> int:
  return math.prod(item[1]) * np.dtype(item[2]).itemsize


def _shards(sizes: Sequence[int], limit: int) -> list[list[int]]:
  """Returns item numbers by shard, in order; a tensor larger than a shard has one of its own."""
  shards: list[list[int]] = [[]]
  held = 0
  for index, size in enumerate(sizes):
    if shards[-1] and held + size > limit:
      shards.append([])
      held = 0
    shards[-1].append(index)
    held += size
  return shards


def write_folder(
  folder: str | os.PathLike,
  tensors: Iterable[Item],
  *,
  shard_bytes: int = SHARD_BYTES,
  metadata: Mapping[str, str],
) -> None:
  """Writes tensors as `model.safetensors`, or as shards with an index where one is too small.

  Args:
    folder: an existing folder.
    tensors: `(name, shape, dtype, read)`; each is read when its turn comes, from the last to the
      first, and two are held at a time at most. `read()` may return a view of any memory order.
    shard_bytes: most bytes of tensors in a file.
    metadata: strings that every file's header carries.

  Raises:
    ValueError: a name twice, a dtype that the format has not, or a tensor that is read with
      another shape or dtype than announced.
  """
  folder = pathlib.Path(folder)
  items = list(tensors)
  twice = len({item[0] for item in items}) != len(items)
  unknown = [item for item in items if np.dtype(item[2]) not in CODES]
  if twice or unknown:
    what = f"{clip(unknown[0][0])} has dtype {unknown[0][2]}" if unknown else "a name stands twice"
    raise ValueError(f"{folder}: cannot be written as safetensors: {what}")
  sizes = [_size(item) for item in items]
  shards = _shards(sizes, shard_bytes)
  if len(shards) == 1:
    write_file(folder / SINGLE, items, metadata=metadata)
    return
  weights = {}
  for number, shard in reversed(list(enumerate(shards, 1))):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_file(folder / name, [items[index] for index in shard], metadata=metadata)
    weights |= {items[index][0]: name for index in shard}
  index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weights.items()))}
  with _replaced(folder / INDEX) as handle:
    _write_all(handle, (json.dumps(index, indent=2) + "\n").encode(), 0)


class _replaced:
  """A file that appears under its name when it is whole and on the disk."""

  def __init__(self, path: pathlib.Path):
    self._path, self._part = path, path.with_name(f"{path.name}.part")

  def __enter__(self) -> int:
    self._handle = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    return self._handle

  def __exit__(self, kind, error, trace) -> None:
    try:
      if kind is None:
        os.fsync(self._handle)
        os.replace(self._part, self._path)
      else:
        self._part.unlink()
    finally:
      os.close(self._handle)


def write_file(
  path: str | os.PathLike, items: Sequence[Item], *, metadata: Mapping[str, str]
) -> None:
  """Writes one file, whole or not at all; the widest dtypes come first, so that all are aligned.

  Raises:
    ValueError: a tensor is read with another shape or dtype than announced.
  """
  items = sorted(items, key=lambda item: -np.dtype(item[2]).itemsize)
  table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  at = 0
  for item in items:
    name, shape, dtype, _ = item
    stop, code = at + _size(item), CODES[np.dtype(dtype)]
    table[name] = {"dtype": code, "shape": list(map(int, shape)), "data_offsets": [at, stop]}
    at = stop
  text = json.dumps(table, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with _replaced(pathlib.Path(path)) as handle:
    _write_all(handle, struct.pack("<Q", len(text)) + text, 0)
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
      _stream(handle, items, 8 + len(text), pool)


def _stream(handle: int, items: Sequence[Item], at: int, pool) -> None:
  """Writes tensors from the last to the first; one is read while the one before is on its way.

  Backwards, because a source that was hashed just before is in the page cache from its end on.
  """
  under_way: list[concurrent.futures.Future] = []
  at += sum(_size(item) for item in items)
  for name, shape, dtype, fetch in reversed(items):
    array = fetch()
    if array.shape != tuple(shape) or array.dtype != dtype:
      raise ValueError(
        f"tensor {name}: read as {array.dtype} {array.shape}, announced as {dtype} {tuple(shape)}"
      )
    _finish(under_way)
    under_way = []
    at -= array.nbytes
    for start, piece in _offsets(array):
      under_way.append(pool.submit(_write_piece, handle, piece, at + start))
    del array
  _finish(under_way)


def _offsets(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  start = 0
  for piece in strides.pieces(array, PIECE):
    yield start, piece
    start += piece.nbytes


def _finish(under_way: Sequence[concurrent.futures.Future]) -> None:
  for future in under_way:
    future.result()


def _write_piece(handle: int, piece: np.ndarray, at: int) -> None:
  _write_all(handle, strides.raw(piece), at)


def _write_all(handle: int, data: bytes | memoryview, at: int) -> None:
  left = memoryview(data)
  while left:
    count = os.pwrite(handle, left, at)
    at, left = at + count, left[count:]
