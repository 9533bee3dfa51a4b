"""Ids kept in a folder between runs."""

import pathlib
import uuid
import zipfile
from collections.abc import Callable

import numpy as np

from hybridlm.data import packing


def get(
  folder: str | pathlib.Path | None, key: str, make: Callable[[], packing.Tokens]
) -> packing.Tokens:
  """Returns the tokens kept under a key, or makes and keeps them; folder None keeps nothing.

  Files appear whole or not at all, so that processes may share a folder. Raises ValueError where
  a file is damaged (its checksum is part of the format).
  """
  if folder is None:
    return make()
  path = pathlib.Path(folder, f"tokens-{key[:32]}.npz")
  if path.exists():
    return _read(path)
  tokens = make()
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
  try:
    with partial.open("wb") as file:
      counts = {} if tokens.counts is None else {"counts": tokens.counts}
      np.savez(file, flat=tokens.flat, start=tokens.start, eot=tokens.eot, **counts)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
  return tokens


def _read(path: pathlib.Path) -> packing.Tokens:
  with path.open("rb") as file:
    try:
      with np.load(file, allow_pickle=False) as kept:
        counts = kept["counts"] if "counts" in kept else None
        return packing.Tokens(kept["flat"], kept["start"], int(kept["eot"]), counts)
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
      raise ValueError(f"{path} is damaged: remove it and the ids are made anew") from error
