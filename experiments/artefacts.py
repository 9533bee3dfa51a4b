"""Files that stages leave behind: written whole or not at all, hashed, and checked before use."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm import lazy
from hybridlm.config import ModelConfig
from hybridlm.interop import native

MODEL = "model"  # the folder of a stage that holds its model


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that a reader finds the old one, the new one, or none: never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  with part.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes plain values as JSON, whole or not at all."""
  write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
  """Returns the value a JSON file holds.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not JSON.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def read_record(path: pathlib.Path, kinds: Mapping[str, type]) -> dict[str, Any]:
  """Returns the object a JSON file holds, with values of these types under these keys.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file holds something else.
  """
  record = read_json(path)
  if not isinstance(record, dict):
    raise ValueError(f"{path} is damaged: it holds {str(record)[:40]!r}, not a record")
  for key, kind in kinds.items():
    if not isinstance(record.get(key), kind):
      raise ValueError(f"{path} is damaged: {key} is {str(record.get(key))[:40]!r}, not a table")
  return record


def digest(value: Any) -> str:
  """Returns the SHA-256 of plain values, the same for equal values in any key order."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of every file below a folder, by its path inside the folder."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def check_hashes(folder: pathlib.Path, expected: Mapping[str, str]) -> None:
  """Raises unless every expected file is there, byte for byte.

  Raises:
    ValueError: names the first file that is missing or differs.
  """
  for name, wanted in sorted(expected.items()):
    path = folder / name
    if not path.is_file():
      raise ValueError(f"artefact {folder}: {name} is missing; delete the folder to redo it")
    if file_hash(path) != wanted:
      raise ValueError(
        f"artefact {folder}: {name} is not what was written, its SHA-256 differs; delete the "
        "folder to redo it"
      )


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds a folder for this process while the block runs; the lock dies with the process.

  Raises:
    ValueError: another process holds it.
  """
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{folder} is in use by another run; wait for it or stop it") from error
    yield
  finally:
    os.close(handle)


def save_model(
  folder: pathlib.Path, cfg: ModelConfig, params: Mapping[str, Any], *,
  like: pathlib.Path | None = None,
) -> None:
  """Writes a model into the folder `model` of a stage's folder, whole or not at all.

  like: a folder whose tokenizer files lie beside the weights; None, or a folder that is not there:
  none do.
  """
  like = like if like is not None and like.is_dir() else None
  native.write(folder / MODEL, cfg, lazy.of(params), like=like)


def load_model_config(folder: pathlib.Path) -> ModelConfig:
  """Returns the config of the model that a stage's folder holds.

  Raises:
    FileNotFoundError: the folder holds no model.
    ValueError: it is not a model's config.
  """
  return native.read_config(folder / MODEL)


def load_model(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the config and the parameters of the model that a stage's folder holds.

  Raises:
    FileNotFoundError: the folder holds no model.
    ValueError: a file is damaged, or the parameters are not the config's tree.
  """
  cfg, params = read_model(folder)
  return cfg, jax.tree.map(jnp.asarray, params)


def read_model(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns what `load_model` does in the host's memory, for what lays it out on many devices.

  Raises:
    FileNotFoundError: the folder holds no model.
    ValueError: a file is damaged, or the parameters are not the config's tree.
  """
  cfg, leaves = native.open(folder / MODEL)
  return cfg, lazy.tree({path: leaf.read() for path, leaf in leaves.items()})
