"""The tokenizer that a GGUF file holds, as the JSON of the `tokenizers` library."""

import importlib.util
import json
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

# Values of metadata: bytes by type, and the two types that say their own length.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# Entries of an array; the largest vocabularies have a quarter of a million.
MOST = 1 << 22
# How words are split before merging, by the name that GGUF has for it.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS: Mapping[str, Mapping[str, Any]] = {
  "gpt-2": _BYTES,
  "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]},
}
# Kinds of tokens in GGUF that the JSON lists apart: value -> whether they are special.
_ADDED = {3: True, 4: False}  # control, user-defined


def reader(path: str | pathlib.Path) -> Any:
  """Returns the `gguf` package's reader of a file: `fields` and `tensors`, mapped and not read.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the package gguf is missing, or the file is not a whole GGUF file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  if importlib.util.find_spec("gguf") is None:
    raise ValueError(f"{path}: reading GGUF needs the package gguf: pip install 'hybridlm[gguf]'")
  import gguf

  _scan(path)
  try:
    return gguf.GGUFReader(path)
  except Exception as error:  # whatever its parser stumbles over: many types
    reason = " ".join(str(error).split())
    raise ValueError(f"{path} is not a whole GGUF file: {reason}") from error


def _scan(path: pathlib.Path) -> None:
  """Raises where a count in the header cannot be true: the package's reader would believe it.

  The format: magic, version, numbers of tensors and of keys; of each key its name, the type of its
  value and the value, where strings and arrays say how many bytes or entries follow.
  """
  size = path.stat().st_size

  def number(file, form: str) -> int:
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
      raise ValueError(f"{path} is not a whole GGUF file: it ends inside its metadata")
    return struct.unpack(form, data)[0]

  def skip(file, count: int, width: int) -> None:
    if count > MOST or count * width > size - file.tell():
      raise ValueError(f"{path} is not a whole GGUF file: {count} entries of {width} bytes at byte "
                       f"{file.tell()} of {size}")
    file.seek(count * width, os.SEEK_CUR)

  def over(file, kind: int) -> None:
    if kind == STRING:
      skip(file, number(file, "<Q"), 1)
    elif kind == ARRAY:
      inner, count = number(file, "<I"), number(file, "<Q")
      if inner == STRING:
        skip(file, count, 0)
        for _ in range(count):
          skip(file, number(file, "<Q"), 1)
      else:
        skip(file, count, WIDTHS.get(inner, size))
    else:
      skip(file, 1, WIDTHS.get(kind, size))

  with path.open("rb") as file:
    if file.read(4) != b"GGUF" or number(file, "<I") not in (2, 3):
      raise ValueError(f"{path} is not a whole GGUF file: it does not begin as version 2 or 3 does")
    tensors, keys = number(file, "<Q"), number(file, "<Q")
    for count, width in ((tensors, 24), (keys, 12)):
      if count * width > size:
        raise ValueError(f"{path} is not a whole GGUF file: {count} entries in {size} bytes")
    for _ in range(keys):
      over(file, STRING)
      over(file, number(file, "<I"))


def value(read: Any, path: str | pathlib.Path, key: str, kind: type, default: Any = None) -> Any:
  """Returns one value of a file's metadata.

  Args:
    read: what `reader` returned.
    path: of the file, for messages.
    key: of the value.
    kind: its Python type.
    default: what stands for a missing key; None: it must be there.

  Raises:
    ValueError: the key is missing, or its value is of another type.
  """
  if key not in read.fields:
    if default is None:
      raise ValueError(f"{path}: its metadata lack {key}")
    return default
  try:
    found = read.fields[key].contents()
  except Exception as error:  # as above
    raise ValueError(f"{path}: {key} cannot be read: {' '.join(str(error).split())}") from error
  if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
    raise ValueError(f"{path}: {key} is {str(found)[:40]!r}, not of type {kind.__name__}")
  return found


def tokenizer(path: str | pathlib.Path) -> str:
  """Returns the file's byte-level BPE as the text of a `tokenizer.json`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a GGUF file, no tokenizer in it, or one of another kind.
  """
  return _tokenizer(reader(path), path)


def _tokenizer(read: Any, path: str | pathlib.Path) -> str:
  model = value(read, path, "tokenizer.ggml.model", str)
  if model != "gpt2":
    raise ValueError(f"{path}: its tokenizer is of kind {model!r}, not a byte-level BPE ('gpt2')")
  split = value(read, path, "tokenizer.ggml.pre", str)
  if split not in SPLITS:
    raise ValueError(f"{path}: it splits words as {split!r}, known: {', '.join(SPLITS)}")
  tokens = _list(read, path, "tokens", str)
  kinds = _list(read, path, "token_type", int)
  merges = [merge.split(" ") for merge in _list(read, path, "merges", str)]
  if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(f"{path}: tokens are listed twice, or not one token_type for each")
  if not all(len(pair) == 2 for pair in merges):
    raise ValueError(f"{path}: a merge in tokenizer.ggml.merges is not a pair")
  added = [
    {"id": i, "content": token, "special": _ADDED[kind], "single_word": False, "lstrip": False,
     "rstrip": False, "normalized": False}
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in _ADDED
  ]
  parts = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
    "normalizer": None, "pre_tokenizer": SPLITS[split], "post_processor": None, "decoder": _BYTES,
    "model": {
      "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
      "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": merges,
    },
  }
  return json.dumps(parts, ensure_ascii=False) + "\n"


def files(path: str | pathlib.Path) -> dict[str, str]:
  """Returns what a published folder has beside its weights, by file name, as text.

  `tokenizer.json`, `tokenizer_config.json` (special tokens, chat template) and
  `generation_config.json` (their ids); nothing where the file has no tokenizer.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: as `tokenizer` does.
  """
  read, ids = reader(path), {}
  if "tokenizer.ggml.model" not in read.fields:
    return {}
  for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
    key = f"tokenizer.ggml.{theirs}_token_id"
    if key in read.fields:
      ids[f"{ours}_token_id"] = value(read, path, key, int)
  tokens = _list(read, path, "tokens", str)
  special: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
  for name, i in ids.items():
    if not 0 <= i < len(tokens):
      raise ValueError(f"{path}: {name}={i} is none of its {len(tokens)} tokens")
    special[name.removesuffix("_id")] = tokens[i]
  if "tokenizer.chat_template" in read.fields:
    special["chat_template"] = value(read, path, "tokenizer.chat_template", str)
  plain = {"tokenizer_config.json": special, "generation_config.json": ids}
  texts = {name: json.dumps(content, indent=1) + "\n" for name, content in plain.items()}
  return {"tokenizer.json": _tokenizer(read, path)} | texts


def _list(read: Any, path: str | pathlib.Path, name: str, kind: type) -> list:
  """Returns a list of the tokenizer's metadata, its entries checked."""
  found = value(read, path, f"tokenizer.ggml.{name}", list)
  if not all(type(entry) is kind for entry in found):
    raise ValueError(f"{path}: tokenizer.ggml.{name} holds other things than {kind.__name__}")
  return found
