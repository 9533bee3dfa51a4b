"""A teacher's most likely tokens on disk: one record a row of data, read at any batch size.

A store is a folder: files of records, sealed one by one, and `store.json`, written last. A record
is addressed by its row's number in the stream of training rows, or, in a part that is evaluated,
by what its row holds; it carries a hash of that and a checksum.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, Integer, Shaped

FORMAT = "hybridlm-store-1"
MANIFEST = "store.json"
TRAIN, VALID = "train", "valid"
DTYPES = ("float16", "float32")

Top = tuple[Integer[np.ndarray, "L T"], Float[np.ndarray, "L T"], Float[np.ndarray, "L"]]
_HASH = 16  # bytes of the hash of a row, and of a checksum
_THREADS = 8
_OPTIONS = "group_size:1,uncompressed"  # log-probabilities hardly get smaller


@dataclasses.dataclass(frozen=True)
class Key:
  """What a store was made from, as plain values; those of a store and of its use must agree.

  teacher: fingerprint of its weights.  tokenizer: its name, and `tokens` its fingerprint.  train,
  valid: fingerprints of the rows and their order.  length: tokens a row.  V: real vocabulary.
  k: tokens kept a position.  temperature: of the softmax.  precision: what the teacher's weights
  were held in, "": as they are.
  """

  teacher: str
  tokenizer: str
  tokens: str
  train: str
  valid: str
  length: int
  V: int
  k: int
  temperature: float
  precision: str


class NotWritten(ValueError, OSError):
  """A file of a store could not be written; those before it are whole."""


# Field -> what to say of it.
_SAID = {
  "tokens": "tokenizer", "length": "sequence length", "V": "vocabulary", "k": "top_k",
  "temperature": "temperature", "teacher": "teacher", "precision": "precision of the teacher",
  "train": "training data or their order", "valid": "validation data",
}


def check_key(place: str, found: Key, wanted: Key) -> None:
  """Raises unless a store holds what a run needs.

  Raises:
    ValueError: names the first thing that differs, and both values.
  """
  for name, said in _SAID.items():
    theirs, ours = getattr(found, name), getattr(wanted, name)
    if theirs != ours:
      if name == "tokens":
        theirs, ours = (f"{one.tokenizer!r} ({one.tokens[:12]})" for one in (found, wanted))
      values = [value[:12] if name in ("teacher", "train", "valid") else value
                for value in (theirs, ours)]
      if name == "precision":
        values = [repr(value) for value in values]
      raise ValueError(f"store {place}: another {said}: it was made with {values[0]}, "
                       f"this run has {values[1]}")


def row_hash(token_L: Integer[np.ndarray, "L"], segment_L: Integer[np.ndarray, "L"]) -> bytes:
  """Returns the hash of all that a teacher reads of a row."""
  digest = hashlib.blake2b(digest_size=_HASH)
  for part_L in (token_L, segment_L):
    digest.update(np.ascontiguousarray(part_L, "<i4").tobytes())
  return digest.digest()


def pack(top: Top, *, row: bytes, number: int, V: int, dtype: str) -> bytes:
  """Returns the record of one row.

  Args:
    top: ids, log-probabilities and the logarithm of what is left, of every position.
    row: its `row_hash`.
    number: of the row.
    V: ids below 65536 take two bytes, others three.
    dtype: of the log-probabilities; what is left is kept as float32.
  """
  id_LT, log_LT, tail_L = top
  id_LT = np.ascontiguousarray(id_LT, "<u4")
  parts = [id_LT.astype("<u2").tobytes()]
  if V > 1 << 16:
    parts.append((id_LT >> 16).astype("u1").tobytes())
  parts += [np.ascontiguousarray(log_LT, np.dtype(dtype).newbyteorder("<")).tobytes(),
            np.ascontiguousarray(tail_L, "<f4").tobytes()]
  body = row + b"".join(parts)
  return _checksum(body, number) + body


def unpack(record: bytes, *, number: int, key: Key, dtype: str, place: str) -> tuple[bytes, Top]:
  """Returns the `row_hash` of a record's row, and its top tokens in float32.

  Rounded log-probabilities are made to sum to 1 again.

  Raises:
    ValueError: the record is damaged, or that of another row.
  """
  body = _body(record, number=number, key=key, dtype=dtype, place=place)
  count, at = key.length * key.k, _HASH
  id_LT = np.frombuffer(body, "<u2", count, at).astype(np.int32)
  at += 2 * count
  if key.V > 1 << 16:
    id_LT |= np.frombuffer(body, "u1", count, at).astype(np.int32) << 16
    at += count
  log_LT = np.frombuffer(body, np.dtype(dtype).newbyteorder("<"), count, at).astype(np.float32)
  tail_L = np.frombuffer(body, "<f4", key.length, at + np.dtype(dtype).itemsize * count)
  id_LT, log_LT = (each.reshape(key.length, key.k) for each in (id_LT, log_LT))
  tail_L = tail_L.astype(np.float32)
  if dtype != "float32":
    mass_L = np.log(np.exp(log_LT).sum(1) + np.exp(tail_L))
    log_LT, tail_L = log_LT - mass_L[:, None], tail_L - mass_L
  return body[:_HASH], (id_LT, log_LT, tail_L)


def _body(record: bytes, *, number: int, key: Key, dtype: str, place: str) -> bytes:
  """Returns what follows a record's checksum, if that is right."""
  checksum, body = record[:_HASH], record[_HASH:]
  if len(record) != record_size(key, dtype) or checksum != _checksum(body, number):
    raise ValueError(f"{place}: the record of row {number} is damaged")
  return body


def record_size(key: Key, dtype: str) -> int:
  """Returns the bytes of one record."""
  entry = (2 if key.V <= 1 << 16 else 3) + np.dtype(dtype).itemsize
  return 2 * _HASH + key.length * (key.k * entry + 4)


def _checksum(body: bytes, number: int) -> bytes:
  return hashlib.blake2b(body, digest_size=_HASH, key=number.to_bytes(8, "little")).digest()


def sealed(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
  """Returns the whole files of a part, in order."""
  return sorted(folder.glob(f"{part}-*.array_record"))


def seal(folder: pathlib.Path, part: str, first: int, records: Sequence[bytes]) -> pathlib.Path:
  """Writes the records from row `first` on as one file, whole or not at all; returns the file.

  Raises:
    NotWritten: it could not be, for want of space perhaps.
  """
  path = folder / f"{part}-{first:012d}.array_record"
  partial = path.with_suffix(".partial")
  try:
    writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
    for record in records:
      writer.write(record)
    writer.close()
    with partial.open("rb") as file:
      os.fsync(file.fileno())
    os.replace(partial, path)
  except (RuntimeError, OSError) as error:  # the first is the writer's own
    partial.unlink(missing_ok=True)
    told = " ".join(str(error).split())[:200]
    raise NotWritten(f"{path} could not be written: {told}; files before it are whole") from error
  return path


def count(path: pathlib.Path) -> int:
  """Returns how many records a sealed file holds."""
  return _open(path).num_records()


def _open(path: pathlib.Path) -> Any:
  return array_record_module.ArrayRecordReader(
    str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768)


def first_row(path: pathlib.Path) -> int:
  """Returns the number of the first row in a sealed file."""
  return int(path.stem.rpartition("-")[2])


def manifest(
  folder: pathlib.Path, key: Key, *, dtype: str, rows: int, valid: Sequence[bytes]
) -> dict[str, Any]:
  """Returns what `store.json` holds once every row is sealed.

  Args:
    folder: of the store.
    key: what it was made from.
    dtype: of log-probabilities.
    rows: training rows.
    valid: `row_hash` of each row of the other part, in order.
  """
  files = {path.name: path.stat().st_size for part in (TRAIN, VALID)
           for path in sealed(folder, part)}
  return {"format": FORMAT, "key": dataclasses.asdict(key), "dtype": dtype, "rows": rows,
          "valid": [each.hex() for each in valid], "files": files}


class Store:
  """A finished store, opened: `key`, `dtype`, the number of training `rows`, its `fingerprint`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged: no manifest of ours, or files missing, cut off or of another size.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    path = self.folder / MANIFEST
    if not path.is_file():
      raise FileNotFoundError(f"store {folder}: there is no {MANIFEST}: it is none, or unfinished")
    text = path.read_text("utf-8", errors="replace")
    try:
      plain = json.loads(text)
      self.key = Key(**plain["key"])
      self.dtype, self.rows = str(plain["dtype"]), int(plain["rows"])
      self._valid = {bytes.fromhex(each): n for n, each in enumerate(plain["valid"])}
      sizes = {str(name): int(size) for name, size in plain["files"].items()}
      known = plain["format"] == FORMAT and self.dtype in DTYPES
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f"{path} is damaged: {error!r}") from error
    if not known:
      raise ValueError(f"{path}: format {plain['format']!r} of {self.dtype}, not {FORMAT!r}")
    for name, size in sizes.items():
      file = self.folder / name
      if not file.is_file() or file.stat().st_size != size:
        found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
        raise ValueError(f"store {folder}: {name} is damaged: {found}, not {size} bytes")
    self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
    self._files = {part: [(first_row(path), path) for path in sealed(self.folder, part)
                          if path.name in sizes] for part in (TRAIN, VALID)}
    # Of thousands of files only as many are open as threads read.
    self._reader = functools.lru_cache(2 * _THREADS)(_open)

  def join(
    self, first: int, batch: Mapping[str, Shaped[np.ndarray, "B L ..."]]
  ) -> dict[str, Shaped[np.ndarray, "B L ..."]]:
    """Returns a training batch with what the teacher said; `first` numbers its first row.

    Adds `top_id_BLT` (int32), `top_log_BLT` (log-probabilities) and `tail_log_BL` (the logarithm
    of what is left).

    Raises:
      ValueError: a row beyond the last, a damaged record, or one of another row.
    """
    numbers = range(first, first + len(batch["token_BL"]))
    if numbers.stop > self.rows:
      raise ValueError(f"store {self.folder}: it has {self.rows} rows of training data; row "
                       f"{max(first, self.rows)} is beyond them")
    return self._joined(TRAIN, numbers, batch)

  def join_valid(
    self, batch: Mapping[str, Shaped[np.ndarray, "B L ..."]]
  ) -> dict[str, Shaped[np.ndarray, "B L ..."]]:
    """Returns a batch of the validation data, in whatever order, with the same.

    Raises:
      ValueError: as in `join`, or a row that is not in the store.
    """
    found = [self._valid.get(one) for one in _hashes(batch)]
    if None in found:
      raise ValueError(f"store {self.folder}: another validation data: row {found.index(None)} of "
                       "a batch is not in it")
    return self._joined(VALID, found, batch)

  def verify(self, index: int = 0, count: int = 1) -> None:
    """Reads every record of this process's share of the files, several files at once.

    Raises:
      ValueError: names the first file with a damaged record, and the row.
    """
    files = [(part, n) for part in (TRAIN, VALID) for n in range(len(self._files[part]))]
    with futures.ThreadPoolExecutor(_THREADS) as pool:  # reading and hashing leave the lock
      for _ in pool.map(lambda each: self._verify(*each), files[index::count]):
        pass

  def _verify(self, part: str, index: int) -> None:
    (first, path), *others = self._files[part][index:]
    end = others[0][0] if others else self.rows if part == TRAIN else len(self._valid)
    place = f"store {self.folder}: {path.name}"
    for number in range(first, end):
      record = self._read(path, number - first, place)
      _body(record, number=number, key=self.key, dtype=self.dtype, place=place)

  def _joined(self, part: str, numbers: Sequence[int], batch) -> dict[str, np.ndarray]:
    tops = []
    for number, wanted in zip(numbers, _hashes(batch), strict=True):
      files = self._files[part]
      first, path = files[bisect.bisect(files, number, key=lambda pair: pair[0]) - 1]
      place = f"store {self.folder}: {path.name}"
      found, top = unpack(self._read(path, number - first, place), number=number, key=self.key,
                          dtype=self.dtype, place=place)
      if found != wanted:
        raise ValueError(f"{place}: row {number} is of other data than this run reads there")
      tops.append(top)
    names = ("top_id_BLT", "top_log_BLT", "tail_log_BL")
    return dict(batch) | {name: np.stack(each)
                          for name, each in zip(names, zip(*tops, strict=True), strict=True)}

  def _read(self, path: pathlib.Path, number: int, place: str) -> bytes:
    try:
      return self._reader(path).read([number])[0]
    except (RuntimeError, ValueError, IndexError) as error:
      told = " ".join(str(error).split())[:200]
      raise ValueError(f"{place}: record {number} is damaged: {told}") from error


def _hashes(batch: Mapping[str, np.ndarray]) -> list[bytes]:
  return [row_hash(*pair) for pair in zip(batch["token_BL"], batch["segment_BL"], strict=True)]
