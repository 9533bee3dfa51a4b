"""Folders that are whole or not there: a manifest of checksums, written last, in one rename.

A folder without its manifest is an interrupted save. Orbax restores a flipped bit without a word;
here every byte is checked before Orbax sees it.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from absl import logging

MANIFEST = "manifest.json"
# Files whose checksums are computed at once; hashing leaves other threads alone.
_THREADS = 4


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file as a whole: whoever reads it, a crash between included, sees old or new."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
  _sync(path.parent)


def _text(value: Any) -> str:
  return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a file by a JSON value, as a whole."""
  write_text(path, _text(value))


def read_json(path: pathlib.Path) -> Any:
  """Returns the JSON value in a file."""
  return json.loads(path.read_text("utf-8"))


def _sync(path: pathlib.Path) -> None:
  """Waits until a file's content, or a folder's list of names, is on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST)


def _digest(path: pathlib.Path) -> dict[str, Any]:
  with open(path, "rb") as file:
    return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _digests(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns checksum and size of every file below a folder, by relative path."""
  files = _files(path)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(_digest, files))
  return {file.relative_to(path).as_posix(): one for file, one in zip(files, found, strict=True)}


def _digest_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def numbered(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of checkpoints, whole or not, oldest first."""
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if p.is_dir() and len(p.name) == 8 and p.name.isdigit())


def complete(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the checkpoints whose save came to its end, oldest first; nothing is verified."""
  return [p for p in numbered(pathlib.Path(folder)) if (p / MANIFEST).is_file()]


def remove(path: pathlib.Path) -> None:
  """Removes a checkpoint, manifest first, so that one half removed is not taken for a whole."""
  (path / MANIFEST).unlink(missing_ok=True)
  shutil.rmtree(path)


def prepare(path: pathlib.Path) -> None:
  """Makes a checkpoint's folder; interrupted saves beside it, and what was in its place, go."""
  folder = path.parent
  folder.mkdir(parents=True, exist_ok=True)
  for old in set(numbered(folder)) - set(complete(folder)) | ({path} if path.exists() else set()):
    remove(old)
  path.mkdir()


def retain(path: pathlib.Path, keep: int) -> None:
  """Removes all checkpoints but the last `keep` up to this one, later steps included."""
  found = complete(path.parent)
  for old in set(found) - set([p for p in found if p.name <= path.name][-keep:]):
    remove(old)


def seal(path: pathlib.Path, step: int, leaves: Mapping[str, Any]) -> None:
  """Makes every file and folder name durable, then writes the manifest."""
  for item in (*_files(path), *(p for p in path.rglob("*") if p.is_dir())):
    _sync(item)
  body = {"step": step, "leaves": leaves, "files": _digests(path)}
  write_json(path / MANIFEST, {"body": body, "sha256": _digest_json(body)})
  _sync(path.parent)


def leaves(path: pathlib.Path) -> dict[str, Any]:
  """Returns the shape and dtype of every leaf that a checkpoint holds, by name."""
  return read_json(path / MANIFEST)["body"]["leaves"]


def damage(path: pathlib.Path) -> str | None:
  """Returns in a few words what is wrong with a complete checkpoint, or None."""
  try:
    manifest = read_json(path / MANIFEST)
    body, sealed = manifest["body"], manifest["sha256"]
  except (ValueError, KeyError, TypeError) as error:
    return f"{MANIFEST} cannot be read: {type(error).__name__}"
  if sealed != _digest_json(body) or (path / MANIFEST).read_text("utf-8") != _text(manifest):
    return f"{MANIFEST} has other bytes"
  if body["step"] != int(path.name):
    return f"{MANIFEST} is of step {body['step']}"
  expected, found = body["files"], _digests(path)
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      return f"{name} is missing"
    if name not in expected:
      return f"{name} is not in the manifest"
    was, now = expected[name], found[name]
    if now["bytes"] != was["bytes"]:
      return f"{name} has {now['bytes']} bytes, not {was['bytes']}"
    if now != was:
      return f"{name} has other bytes"
  return None


def newest_good(folder: str | os.PathLike, *, skip: int = 0) -> pathlib.Path | None:
  """Returns the newest checkpoint whose every byte is as it was written; None if none was saved.

  Each damaged one on the way is warned about in one line.

  Args:
    folder: where the checkpoints of one run lie.
    skip: good ones to pass by first; where there are not so many, the oldest good one it is.

  Raises:
    ValueError: there are checkpoints and all are damaged.
  """
  folder = pathlib.Path(folder).absolute()
  found = complete(folder)[::-1]
  for path in set(numbered(folder)) - set(found):
    logging.warning("checkpoint %s has no manifest: an interrupted save, ignored", path)
  first, good = None, []
  for path in found:
    problem = damage(path)
    if problem is None:
      good.append(path)
      if len(good) > skip:
        break
      continue
    first = first or f"{path.name}: {problem}"
    if path != found[-1]:
      text = "checkpoint %s is damaged (%s): falling back to the one before"
      logging.warning(text, path, problem)
  if good:
    return good[-1]
  if first:
    raise ValueError(f"all {len(found)} checkpoints in {folder} are damaged, the newest {first}")
  return None
