"""Texts to ids and back as a published model expects them, special tokens and all."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
CONFIGS = ("tokenizer_config.json", "generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class Prompts:
  """How one model reads and writes text.

  name: of the model or tokenizer, for reports.
  plain: `plain(text, special) -> ids`, with the special tokens that frame a text, or without.
  decode: `decode(ids, special) -> text`, with the special tokens among the ids, or without.
  ends: ids after which a text is over; the first also stands for an end of text in a prompt.
  largest: the largest id a text may hold, those of added tokens included.
  bos: the id that starts a text, if the model has one.
  templates: chat templates (Jinja) by name; the usual one is "default".
  words: special tokens by the names chat templates use, such as "bos_token".
  """

  name: str
  plain: Callable[[str, bool], Sequence[int]]
  decode: Callable[[Sequence[int], bool], str]
  ends: tuple[int, ...]
  largest: int
  bos: int | None = None
  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  words: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def prefix(self) -> int:
    """The id that a text without context follows."""
    return self.ends[0] if self.bos is None else self.bos

  def encode(self, text: str, special: bool | None = None) -> Sequence[int]:
    """Returns ids; None adds special tokens unless the text starts with one already."""
    if special is None:
      start = self.decode((self.prefix,), True)
      special = not (start and text.startswith(start))
    return self.plain(text, special)


def of_tokenizer(tokenizer: Any, name: str) -> Prompts:
  """Returns the prompts of a tokenizer that knows no special token but the end of a text.

  `tokenizer` has `encode(text)`, `decode(ids)`, the id `eot`, and V that all ids are below, as
  those of `hybridlm.data` do.
  """
  return Prompts(
    name=name, ends=(int(tokenizer.eot),), largest=int(tokenizer.V) - 1,
    plain=lambda text, special: [int(i) for i in tokenizer.encode(text)],
    decode=lambda ids, special: tokenizer.decode(ids),
  )


def of_folder(folder: str | pathlib.Path) -> Prompts:
  """Returns the prompts of a published model's folder: `of_files` of the files it has.

  Raises:
    FileNotFoundError: there is no tokenizer.json.
    ValueError: a file is damaged, or a special token is not in the vocabulary.
  """
  folder = pathlib.Path(folder)
  if not (folder / TOKENIZER).is_file():
    raise FileNotFoundError(f"{folder / TOKENIZER}: no such file")
  files = {}
  for name in (TOKENIZER, TEMPLATE, *CONFIGS):
    if (folder / name).is_file():
      try:
        files[name] = (folder / name).read_bytes().decode("utf-8")
      except UnicodeDecodeError as error:
        raise ValueError(f"{folder / name} is not UTF-8 at byte {error.start}") from error
  return of_files(files, folder.resolve().name)


def of_files(files: Mapping[str, str], name: str) -> Prompts:
  """Returns the prompts of a published model from the texts of its files.

  Read are tokenizer.json, special tokens from tokenizer_config.json, or else end and start of text
  by id from generation_config.json or config.json, and chat templates from chat_template.jinja or
  tokenizer_config.json. Where nothing names an end of text, it is the id after the largest. What
  frames a text is up to tokenizer.json alone, as in transformers 5: `add_bos_token` and
  `add_eos_token` of tokenizer_config.json count for tokenizers without such a file.

  Args:
    files: text by file name; all but tokenizer.json may be missing.
    name: of the model, for reports and messages.

  Raises:
    ValueError: a file is damaged, or a special token is not in the vocabulary.
  """
  inner = _inner(files[TOKENIZER], name)
  settings, generation, config = (_record(files, each, name) for each in CONFIGS)
  words = {key: _word(value) for key, value in settings.items() if key.endswith("_token")}
  words = {key: word for key, word in words.items() if word}
  ends, starts = [], []
  for key, found in (("eos_token", ends), ("bos_token", starts)):
    if key in words:
      found.append(_id(inner, words[key], name))
    for record in (generation, config):
      value = record.get(f"{key}_id")
      found.extend(i for i in (value if isinstance(value, list) else [value]) if i is not None)
  if "bos_token" not in words and settings:
    starts = []  # the tokenizer has none, whatever the model's config repeats
  largest = max(inner.get_vocab(with_added_tokens=True).values())
  return Prompts(
    name=name,
    plain=lambda text, special: inner.encode(text, add_special_tokens=special).ids,
    decode=lambda ids, special: inner.decode(list(ids), skip_special_tokens=not special),
    ends=tuple(dict.fromkeys(ends)) or (largest + 1,),
    largest=largest,
    bos=starts[0] if starts else None,
    templates=_templates(files.get(TEMPLATE), settings.get("chat_template"), name),
    words=words,
  )


def _inner(text: str, place: str) -> tokenizers.Tokenizer:
  try:
    inner = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(
      f"{place}: {TOKENIZER} is not JSON of the tokenizers library: {error}"
    ) from error
  inner.no_truncation()
  inner.no_padding()
  return inner


def _record(files: Mapping[str, str], name: str, place: str) -> dict[str, Any]:
  """Returns the JSON object of a file, empty where there is none."""
  try:
    record = json.loads(files.get(name, "{}"))
  except ValueError as error:
    raise ValueError(f"{place}: {name} is not JSON: {error}") from error
  if not isinstance(record, dict):
    raise ValueError(f"{place}: {name} holds {str(record)[:40]!r}, not an object")
  return record


def _word(value: Any) -> str | None:
  """Returns a special token's text; files hold it bare or as an object."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def _id(inner: tokenizers.Tokenizer, word: str, place: str) -> int:
  found = inner.token_to_id(word)
  if found is None:
    raise ValueError(f"{place}: token {word!r} of {CONFIGS[0]} is not in tokenizer.json")
  return found


def _templates(own: str | None, value: Any, place: str) -> dict[str, str]:
  """Returns chat templates by name: that of a file of its own comes before the settings'."""
  if own is not None:
    return {"default": own}
  if isinstance(value, str):
    return {"default": value}
  found = {}
  if isinstance(value, dict):
    value = [{"name": key, "template": template} for key, template in value.items()]
  for each in [] if value is None else value if isinstance(value, list) else [value]:
    pair = [each.get(key) for key in ("name", "template")] if isinstance(each, dict) else []
    if not pair or not all(isinstance(part, str) for part in pair):
      raise ValueError(f"{place}: chat_template of {CONFIGS[0]} holds {str(each)[:40]!r}, which is "
                       "no template with a name")
    found[pair[0]] = pair[1]
  return found
