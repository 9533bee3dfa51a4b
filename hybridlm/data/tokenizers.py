"""Text to ids and back: raw bytes, and byte-level BPE."""

import hashlib
import importlib.resources
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, SupportsInt, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32

from hybridlm.data import gguf

# The library's encodings cost hundreds of bytes a token while they last: so many characters at
# once, and long texts in pieces.
_CHARACTERS = 1 << 20
_PIECE = 1 << 18
_BEFORE_SPACE = re.compile(r"\S(?=[ \n])")
# The byte-level alphabet of Radford et al. 2019: these bytes stand for themselves, the others for
# the characters from 256 on, in order.
_PRINTED = frozenset((*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)))
# A tokenizer that strips, normalises or adds a space loses count of these bytes.
_PROBE = "Probe's text\r\n\n  12\t\u00e9e\u0301 \u6f22 \U0001f642  "


@runtime_checkable
class Tokenizer(Protocol):
  """What the pipeline asks of a tokenizer.

  V: number of ids, the end-of-text id included.  eot: that id; no text ever encodes to it.
  byte_lengths_V: the UTF-8 bytes that each id stands for; 0 for eot and ids without text.
  fingerprint: equal for tokenizers that give equal ids.
  """

  V: int
  eot: int
  byte_lengths_V: Int32[np.ndarray, "V"]
  fingerprint: str

  def encode(self, text: str) -> Int32[np.ndarray, "L"]:
    """Returns the ids of a text, without eot."""

  def encode_all(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of every text, the same as one by one."""

  def decode(self, ids: Iterable[SupportsInt]) -> str:
    """Returns the text of ids; eot is left out, broken UTF-8 becomes U+FFFD."""


class Bytes:
  """The 256 bytes of UTF-8 as ids 0..255, and eot = 256."""

  V = 257
  eot = 256
  fingerprint = "bytes"

  def __init__(self):
    self.byte_lengths_V = np.append(np.ones(256, np.int32), np.int32(0))

  def encode(self, text: str) -> Int32[np.ndarray, "L"]:
    """Returns the bytes of a text."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def encode_all(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the bytes of every text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[SupportsInt]) -> str:
    """Returns the text of ids; ids that are no byte are left out."""
    return bytes(int(i) for i in _checked(ids, self.V) if i < 256).decode("utf-8", "replace")


class Bpe:
  """Byte-level BPE from the JSON of the `tokenizers` library.

  text: the JSON.  V: vocabulary size of the model that reads the ids; by default just enough.
  end: the token of the JSON that ends a text; by default the id after the largest one is eot.
  Text that spells a special token is encoded as plain text. Published vocabularies may lack rare
  bytes (control characters): a text that holds one is refused.
  """

  def __init__(self, text: str, *, V: int | None = None, end: str | None = None,
               place: str = "this tokenizer"):
    self._inner = _parse(text, place)
    self._cuts = _cuts(self._inner, json.loads(text))
    self.text, self._place = text, place
    vocabulary = self._inner.get_vocab(with_added_tokens=True)
    if end is not None and end not in vocabulary:
      raise ValueError(f"{place} has no token {end!r} to end a text with")
    self.eot = vocabulary[end] if end is not None else max(vocabulary.values()) + 1
    largest = max(self.eot, *vocabulary.values())
    self.V = largest + 1 if V is None else V
    if self.V <= largest:
      raise ValueError(f"{place} uses ids up to {largest}, eot included; V = {V} is too few")
    self.byte_lengths_V = _byte_lengths(self._inner, self.V, self.eot)
    self._known = _known_bytes(vocabulary)
    found = self.encode(_PROBE)
    kept = self.byte_lengths_V[found].sum() == len(_PROBE.encode())
    if not kept or self.decode(found) != _PROBE:
      raise ValueError(f"{place} does not keep every byte of a text")
    canonical = json.dumps([json.loads(text), self.V, self.eot], sort_keys=True)
    self.fingerprint = "bpe-" + hashlib.sha256(canonical.encode()).hexdigest()

  def encode(self, text: str) -> Int32[np.ndarray, "L"]:
    """Returns the ids of a text, without eot."""
    return self.encode_all([text])[0]

  def encode_all(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Returns the ids of every text; the library's own threads share the texts.

    Raises ValueError where a text holds a byte that the vocabulary lacks.
    """
    for text in texts:
      self._check(text)
    texts = [list(_pieces(text)) if self._cuts else [text] for text in texts]
    ids = []
    for few in _portions(piece for pieces in texts for piece in pieces):
      found = self._inner.encode_batch_fast(few, add_special_tokens=False)
      ids.extend(np.array(f.ids, np.int32) for f in found)
    edges = np.cumsum([0, *map(len, texts)])
    return [np.concatenate(ids[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]

  def decode(self, ids: Iterable[SupportsInt]) -> str:
    """Returns the text of ids; eot and ids without text are left out."""
    known = [i for i in _checked(ids, self.V) if self.byte_lengths_V[i]]
    return self._inner.decode(known, skip_special_tokens=False)

  def _check(self, text: str) -> None:
    lost = text.encode().translate(None, self._known)
    if lost:
      at = next(i for i, c in enumerate(text) if set(c.encode()) - set(self._known))
      raise ValueError(f"{self._place} has no id for the byte {lost[0]:#04x}: the text holds "
                       f"{text[at]!r} at {at}")

  def added(self) -> dict[str, int]:
    """Returns the special tokens: name -> id."""
    tokens = self._inner.get_added_tokens_decoder().items()
    return {token.content: number for number, token in tokens if token.special}

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the JSON that `load` reads."""
    pathlib.Path(path).write_text(self.text, encoding="utf-8", newline="\n")


def special(tokenizer: Tokenizer, name: str, *, place: str) -> int:
  """Returns the id of a special token by its name; text that spells it never encodes to it.

  Raises ValueError, after what needs it, where the tokenizer has no such token.
  """
  added = tokenizer.added() if isinstance(tokenizer, Bpe) else {}
  if name not in added:
    raise ValueError(f"{place} needs the special token {name!r}; the tokenizer has "
                     + (", ".join(sorted(added)[:8]) or "none"))
  return added[name]


def train(texts: Iterable[str], *, V: int) -> Bpe:
  """Returns a byte-level BPE of V ids (256 bytes, V - 257 merges, eot = V - 1) learnt from texts.

  Same texts, same tokenizer.  Raises ValueError where the texts do not hold so many merges.
  Source: Sennrich et al. 2016 (BPE) over the bytes of UTF-8, as Radford et al. 2019 split words.
  """
  if V < 257:
    raise ValueError(f"a byte-level vocabulary of V = {V} has no room for 256 bytes and eot")
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=V - 1, min_frequency=2, show_progress=False,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  )
  inner.train_from_iterator(texts, trainer)
  if inner.get_vocab_size() < V - 1:
    raise ValueError(
      f"the texts give {inner.get_vocab_size() + 1} ids at most; V = {V} needs more text"
    )
  return Bpe(inner.to_str(pretty=False) + "\n")


def packaged() -> tuple[str, ...]:
  """Returns the names of the tokenizers that come with the package."""
  names = (f.name for f in _assets().iterdir())
  return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))


def load(name: str, *, V: int | None = None, end: str | None = None) -> Tokenizer:
  """Returns "bytes", a tokenizer that comes with the package, or one from a path.

  A path is a JSON file of the tokenizers library, a folder with a `tokenizer.json`, or a GGUF file.
  V and end as `Bpe` takes them; where a folder or a GGUF file names the token that ends a text,
  that is the default of end.  Raises FileNotFoundError for a name that is none of these.
  """
  if name == "bytes":
    if V is not None and V < Bytes.V:
      raise ValueError(f"raw bytes use ids up to {Bytes.eot}, eot included; V = {V} is too few")
    return Bytes()
  if name in packaged():
    text = (_assets() / f"{name}.json").read_text(encoding="utf-8")
  elif pathlib.Path(name).is_dir():
    text, own = _folder(pathlib.Path(name))
    end = end or own
  elif pathlib.Path(name).is_file() and pathlib.Path(name).suffix == ".gguf":
    files = gguf.files(name)
    text = files["tokenizer.json"]
    end = end or json.loads(files["tokenizer_config.json"]).get("eos_token")
  elif pathlib.Path(name).is_file():
    text = _read(name)
  else:
    raise FileNotFoundError(
      f"tokenizer {name!r} is neither a file nor a folder nor one of bytes, {', '.join(packaged())}"
    )
  return Bpe(text, V=V, end=end, place=f"tokenizer {name!r}")


def _folder(path: pathlib.Path) -> tuple[str, str | None]:
  """Returns a folder's JSON, and the token that ends a text where the folder names one."""
  file, settings = path / "tokenizer.json", path / "tokenizer_config.json"
  if not file.is_file():
    raise FileNotFoundError(f"tokenizer {str(path)!r}: the folder has no tokenizer.json")
  if not settings.is_file():
    return _read(str(file)), None
  try:
    end = json.loads(_read(str(settings))).get("eos_token")
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{settings} is not a table in JSON: {error}") from error
  # Written as a string, or as the token's record.
  return _read(str(file)), end.get("content") if isinstance(end, Mapping) else end


def _assets():
  return importlib.resources.files("hybridlm.data") / "assets"


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_bytes().decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"tokenizer {path!r} is not UTF-8 at byte {error.start}") from error


def _parse(text: str, place: str) -> tokenizers.Tokenizer:
  """Returns the library's tokenizer, checked to be a byte-level BPE, without what alters texts."""
  try:
    parts = json.loads(text)
    inner = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(
      f"{place} is not JSON of the tokenizers library: {' '.join(str(error).split())}"
    ) from error
  if parts["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(parts["pre_tokenizer"]):
    raise ValueError(f"{place} is not a byte-level BPE")
  if parts["model"].get("dropout"):
    raise ValueError(f"{place} drops merges at random; ids must follow from the text")
  for added in inner.get_added_tokens_decoder().values():
    if not added.special and (added.lstrip or added.rstrip):
      raise ValueError(f"{place} strips the space around {added.content!r}; bytes would be lost")
  inner.encode_special_tokens = True
  inner.no_truncation()
  inner.no_padding()
  return inner


def _byte_lengths(inner: tokenizers.Tokenizer, V: int, eot: int) -> Int32[np.ndarray, "V"]:
  """Returns how many bytes each id stands for; special tokens never stand for text."""
  byte_lengths_V = np.zeros(V, np.int32)
  for token, i in inner.get_vocab(with_added_tokens=False).items():
    byte_lengths_V[i] = len(token)  # in the byte-level alphabet a byte is one character
  for i, added in inner.get_added_tokens_decoder().items():
    byte_lengths_V[i] = 0 if added.special else len(added.content.encode())
  byte_lengths_V[eot] = 0
  return byte_lengths_V


def _cuts(inner: tokenizers.Tokenizer, parts: Mapping) -> bool:
  """Returns whether texts may be cut where a space or newline follows what is none.

  So it is where words are split by the pattern of Radford et al. 2019: it looks at nothing before
  the word, and a word has white space at its start only. Splitting digits off first changes nothing
  of that. Added tokens may hold spaces inside.
  """
  words = parts["pre_tokenizer"]
  *first, last = words["pretokenizers"] if words["type"] == "Sequence" else [words]
  plain = all(added.special for added in inner.get_added_tokens_decoder().values())
  digits = all(step["type"] == "Digits" for step in first)
  return plain and digits and last["type"] == "ByteLevel" and last.get("use_regex", True)


def _known_bytes(vocabulary: Iterable[str]) -> bytes:
  """Returns the bytes that have a token of their own, those that UTF-8 never uses among them."""
  others = [byte for byte in range(256) if byte not in _PRINTED]
  letters = {chr(256 + i): byte for i, byte in enumerate(others)}
  letters |= {chr(byte): byte for byte in _PRINTED}
  never = (0xC0, 0xC1, *range(0xF5, 0x100))
  return bytes({*never, *(letters[token] for token in vocabulary if token in letters)})


def _pieces(text: str) -> Iterator[str]:
  """Returns a text in pieces that encode as they do together."""
  start = 0
  while end := _BEFORE_SPACE.search(text, start + _PIECE):
    yield text[start : end.end()]
    start = end.end()
  yield text[start:]


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
  """Returns texts in order, a few at a time."""
  few, held = [], 0
  for text in texts:
    few.append(text)
    held += len(text)
    if held >= _CHARACTERS:
      yield few
      few, held = [], 0
  if few:
    yield few


def _checked(ids: Iterable[SupportsInt], V: int) -> list[int]:
  """Returns ids as a list, or says which is outside the vocabulary."""
  ids = [int(i) for i in ids]
  for i in ids:
    if not 0 <= i < V:
      raise ValueError(f"id {i} is outside the vocabulary of {V}")
  return ids
