"""Folders of published files: what may be read in them, and how a new one is put in place."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

# Left in every folder we write: what we may replace, and which files in it are ours.
MARK = ".hybridlm"
JSON_LIMIT = 100 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def clip(value: Any) -> str:
  """Returns a value as a message can show it: on one line, and short."""
  if isinstance(value, int) and value.bit_length() > 256:
    return f"a whole number of {value.bit_length()} bits"
  text = repr(value[:60]) if isinstance(value, str) else repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def plain_file(folder: str | os.PathLike, name: Any) -> pathlib.Path:
  """Returns the path of a file that a folder holds under a plain name.

  Links may point to files of the same folder, and from a snapshot of the Hugging Face cache to
  its `blobs`; no name or link leads elsewhere.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the name is a path, or the link leaves the folder.
  """
  folder = pathlib.Path(folder)
  if not isinstance(name, str) or not name or name in (".", ".."):
    raise ValueError(f"{folder}: {clip(name)} is not a file name")
  if set(name) & {"/", "\\", "\0"} or not name.isprintable() or len(name) > 200:
    raise ValueError(f"{folder}: {clip(name)} is not a plain file name inside the folder")
  path = folder / name
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  home, real = folder.resolve(), path.resolve()
  allowed = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
  if not any(real.is_relative_to(place) for place in allowed):
    raise ValueError(f"{path}: the link leaves the folder, to {real}")
  return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {clip(twice)} stands there twice")
  return found


def parse_json(data: bytes, place: str) -> dict[str, Any]:
  """Returns the object that UTF-8 JSON holds; `place` begins every message.

  Raises:
    ValueError: it is not UTF-8, not JSON, nested too deeply, repeats a key, or is no object.
  """
  try:
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
    raise ValueError(f"{place}: not JSON: {reason}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{place}: holds {clip(value)}, not an object")
  return value


def read_json(folder: str | os.PathLike, name: str) -> dict[str, Any]:
  """Returns the object that a JSON file of a folder holds.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is too large, or not a JSON object.
  """
  path = plain_file(folder, name)
  if path.stat().st_size > JSON_LIMIT:
    raise ValueError(f"{path}: {path.stat().st_size} bytes, more than the limit of {JSON_LIMIT}")
  return parse_json(path.read_bytes(), str(path))


def _ours(folder: pathlib.Path) -> bool:
  """Whether nothing is lost with a folder: it is empty, or holds only what we wrote into it.

  A mark that is a link, cannot be read or is damaged is not ours. An empty one stands in a folder
  in the making, in which everything is.
  """
  if not os.listdir(folder):
    return True
  mark = folder / MARK
  if mark.is_symlink() or not mark.is_file():
    return False
  try:
    text = mark.read_text("utf-8")
    names = json.loads(text) if text else None
  except (OSError, ValueError, RecursionError):
    return False
  if names is None:
    return True
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    return False
  return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} <= {MARK, *names}


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def _held(part: pathlib.Path) -> Iterator[None]:
  """Holds a folder in the making for this process; the lock dies with the process."""
  with _writable(part):
    part.mkdir(parents=True, exist_ok=True)
    handle = os.open(part, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{part} is being written by another run") from error
    yield
  finally:
    os.close(handle)


@contextlib.contextmanager
def _writable(folder: pathlib.Path) -> Iterator[None]:
  """Says in one line what the system has against a folder."""
  try:
    yield
  except OSError as error:
    raise ValueError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _clear(folder: pathlib.Path) -> None:
  """Empties a folder but for its mark, which tells that what is still there is ours."""
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    elif path.name != MARK:
      path.unlink()


def remove(folder: str | os.PathLike) -> None:
  """Deletes a folder that we wrote; one that is deleted in part still says that it is ours.

  Does nothing where there is none.
  """
  folder = pathlib.Path(folder)
  if folder.is_dir():
    _clear(folder)
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def _old(folder: pathlib.Path) -> pathlib.Path:
  """Returns where a folder waits while another takes its place: no name that people choose."""
  return folder.with_name(f".{folder.name}.hybridlm-old")


def _part(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f"{folder.name}.partial")


def check_target(folder: str | os.PathLike) -> None:
  """Raises unless a folder can be written: it is not there, empty, or all in it is our own.

  The same holds for the siblings that are needed on the way, `NAME.partial` and
  `.NAME.hybridlm-old`; the first folder above that is there can be written in.

  Raises:
    ValueError: something of somebody else's would be lost, or the system refuses.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  if not folder.name:
    raise ValueError(f"{folder}: cannot be written: it has no name")
  with _writable(folder):
    for place in (folder, _part(folder), _old(folder)):
      _check(place)
    above = next(path for path in folder.parents if path.exists())
    if not above.is_dir():
      raise ValueError(f"{folder}: cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
      raise ValueError(f"{folder}: cannot be written: no right to write in {above}")


def _check(place: pathlib.Path) -> None:
  if place.is_symlink() or (place.exists() and not place.is_dir()):
    raise ValueError(f"{place}: exists and is not a folder")
  if place.exists() and not _ours(place):
    raise ValueError(f"{place}: exists and holds files that hybridlm did not write; move it away")


def put(part: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Renames a folder that we wrote to `folder`, in place of what we wrote there before.

  What was there waits as `.NAME.hybridlm-old` until that is done, and is deleted then. What a run
  that died left under that name is deleted once there is a whole folder beside it.

  Raises:
    ValueError: `folder` holds files that we did not write.
  """
  part, folder = pathlib.Path(part), pathlib.Path(os.path.abspath(folder))
  check_target(folder)
  old = _old(folder)
  if folder.exists():
    remove(old)
    folder.rename(old)
  part.rename(folder)
  _sync(folder.parent)
  remove(old)


def _mark(folder: pathlib.Path, *more: str) -> None:
  """Writes down that what a folder holds is ours, and files that it will hold."""
  names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
  held = folder / f"{MARK}.part"
  held.write_text(json.dumps([name for name in [*names, *more] if name != MARK]), "utf-8")
  held.replace(folder / MARK)


@contextlib.contextmanager
def hiding(folder: str | os.PathLike, name: str) -> Iterator[None]:
  """Keeps a file of a folder we wrote under another name: while the block runs, nothing loads it.

  Where the block raises, or the process dies, the name does not come back.
  """
  shown = pathlib.Path(folder, name)
  hidden = shown.with_name(f"{name}.unverified")
  _mark(shown.parent, hidden.name)
  shown.rename(hidden)
  yield
  hidden.rename(shown)
  _sync(shown.parent)


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields the sibling `NAME.partial` to write into; it takes the place of `folder` at the end.

  Files are synced to disk before the rename. Where the block raises, nothing is left; where the
  process dies, the sibling is, and the next run removes it.

  Raises:
    ValueError: `folder` holds files that we did not write, or cannot be written, or another
      process is writing it.
  """
  folder = pathlib.Path(os.path.abspath(folder))
  part = _part(folder)
  check_target(folder)
  with _held(part):
    _clear(part)
    (part / MARK).write_bytes(b"")
    try:
      yield part
      _mark(part)
      for path in (*part.rglob("*"), part):
        _sync(path)
      put(part, folder)
    except BaseException:
      with contextlib.suppress(OSError):
        remove(part)
      raise
