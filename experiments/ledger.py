"""What a long search has done so far: one line of JSON a finished piece of work, never a part."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from experiments import artefacts


def name(value: Any) -> str:
  """Returns a short name of plain values, the same for equal ones: twelve digits of their hash."""
  return artefacts.digest(value)[:12]


class Ledger:
  """Records by their "id", in the order they were made; those of a killed run are there again.

  Args:
    path: a file; it is made with the first record.

  Raises:
    ValueError: a line that is no record, the last one apart, which a kill may have cut short.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._records: dict[str, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines[:-1], 1):
      record = _record(line)
      if record is None:
        raise ValueError(f"{path} is damaged: line {number} is no record; delete its folder")
      self._records[record["id"]] = record
    if lines[-1]:
      os.truncate(path, sum(len(line) + 1 for line in lines[:-1]))

  def __len__(self) -> int:
    return len(self._records)

  def records(self) -> list[dict[str, Any]]:
    """Returns all records, oldest first."""
    return list(self._records.values())

  def find(self, key: str) -> dict[str, Any] | None:
    """Returns the record of an id, if there is one."""
    return self._records.get(key)

  def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the record of an id; where there is none, makes it and writes it down."""
    if key not in self._records:
      line = json.dumps({"id": key, **make()}, allow_nan=False)
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with self._path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
      # As it will be read again: tuples are lists, keys are strings.
      self._records[key] = json.loads(line)
    return self._records[key]


def _record(line: bytes) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None
