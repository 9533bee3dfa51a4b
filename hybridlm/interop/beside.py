"""What lies beside a model's weights: tokenizer files, special ids and the family's name."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from hybridlm.interop import folders, gguf
from hybridlm.interop.folders import clip

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
FILES = (
  TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
  "tokenizer.model", "added_tokens.json", "chat_template.jinja", "remap.json", GENERATION,
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Beside(NamedTuple):
  """Files by name, special ids by their keys in a config.json, and a `model_type` if one is known.

  `place` is where they come from, for messages.
  """

  place: str
  files: Mapping[str, bytes]
  ids: Mapping[str, Any]
  family: str | None


def gather(source: str | os.PathLike | None) -> Beside:
  """Returns what a GGUF file, a published folder or one of ours holds beside its weights.

  Ids are those of config.json, else of generation_config.json, which is made where only the former
  is there. None holds nothing.

  Raises:
    FileNotFoundError: there is nothing at `source`.
    ValueError: a file is damaged, or a link that leaves its folder.
  """
  if source is None:
    return Beside("", {}, {}, None)
  source = pathlib.Path(source)
  plain: dict[str, Any] = {}
  if source.is_file():
    files = {name: text.encode() for name, text in gguf.files(source).items()}
    plain["model_type"] = gguf.ARCHITECTURE
  elif source.is_dir():
    held = [name for name in FILES if (source / name).is_file()]
    files = {name: folders.plain_file(source, name).read_bytes() for name in held}
    if (source / CONFIG).is_file():
      plain = folders.read_json(source, CONFIG)
  else:
    raise FileNotFoundError(f"{source}: no such file or folder")
  stated = _parsed(source, files, GENERATION)
  ids = {**_ids(stated), **_ids(plain)}
  if ids and not stated:
    files[GENERATION] = (json.dumps(ids, indent=1) + "\n").encode()
  family = plain.get("model_type")
  return Beside(str(source), files, ids, family if isinstance(family, str) else None)


def _parsed(source: pathlib.Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
  return folders.parse_json(files[name], f"{source / name}") if name in files else {}


def _ids(plain: Mapping[str, Any]) -> dict[str, Any]:
  return {key: plain[key] for key in IDS if plain.get(key) is not None}


def check(found: Beside, V: int) -> None:
  """Raises where the tokenizer or a special id reaches beyond a vocabulary of V.

  Raises:
    ValueError: names the id and V, or says that the tokenizer is damaged.
  """
  for key, value in found.ids.items():
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and -1 <= i < V for i in ids):
      raise ValueError(f"{found.place}: {key}={clip(value)} is outside V={V}")
  if TOKENIZER not in found.files:
    return
  source = pathlib.Path(found.place)
  parts, place = _parsed(source, found.files, TOKENIZER), source / TOKENIZER
  added, model = parts.get("added_tokens") or [], parts.get("model")
  table = model.get("vocab") if isinstance(model, dict) else None
  if not isinstance(table, (dict, list)) or not isinstance(added, list):
    raise ValueError(f"{place}: damaged: it has no vocabulary")
  ids = list(table.values()) if isinstance(table, dict) else [len(table) - 1]
  ids += [token.get("id") if isinstance(token, dict) else token for token in added]
  wrong = [i for i in ids if type(i) is not int]
  if wrong:
    raise ValueError(f"{place}: damaged: the id {clip(wrong[0])} is not a whole number")
  if max(ids, default=-1) >= V:
    last = clip(max(ids))
    raise ValueError(f"{place}: holds the id {last}, the model's vocabulary ends at V={V}")


def write(folder: str | os.PathLike, found: Beside) -> None:
  """Writes the files into an existing folder."""
  for name, content in found.files.items():
    (pathlib.Path(folder) / name).write_bytes(content)
