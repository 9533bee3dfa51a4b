"""Conversations as parts of text, of which a model learns to write only the answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from hybridlm.data import tokenizers

ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
  """A piece of a document that is turned into ids by itself.

  counts: whether its ids are targets.  special: it names one token of the tokenizer.
  """

  text: str
  counts: bool
  special: bool = False


def _plain(role: str, text: str) -> tuple[Part, ...]:
  return (Part(text, role == "assistant"),)


def _labels(role: str, text: str) -> tuple[Part, ...]:
  learnt = role == "assistant"
  return Part(f"{role.capitalize()}: ", False), Part(f"{text}\n\n", learnt)


def _chatml(role: str, text: str) -> tuple[Part, ...]:
  learnt = role == "assistant"
  return (
    Part("<|im_start|>", False, special=True), Part(f"{role}\n", False), Part(text, learnt),
    Part("<|im_end|>", learnt, special=True), Part("\n", False),
  )


# How a turn is written: as it is, after the name of who speaks, or between ChatML's own tokens.
TEMPLATES: Mapping[str, Callable[[str, str], tuple[Part, ...]]] = {
  "plain": _plain, "labels": _labels, "chatml": _chatml,
}


def parts(record: Mapping[str, Any], *, template: str, place: str) -> tuple[Part, ...]:
  """Returns the parts of a conversation; what comes from the assistant counts, nothing else.

  Args:
    record: has strings under "prompt" and "response", or a list under "messages" of tables with
      strings under "role" (system, user or assistant) and "content".
    template: a name in `TEMPLATES`.
    place: of the record, for messages.

  Raises:
    ValueError: another form, or no answer to learn.
  """
  if "messages" in record:
    turns = [_turn(each, f"{place}, message {n}") for n, each in enumerate(_list(record, place), 1)]
  else:
    turns = [("user", string(record, "prompt", place)),
             ("assistant", string(record, "response", place))]
  if not any(role == "assistant" and text for role, text in turns):
    raise ValueError(f"{place}: there is no answer to learn: what the assistant says is empty")
  made = [part for role, text in turns for part in TEMPLATES[template](role, text)]
  return tuple(part for part in made if part.text)


def string(record: Any, key: str, place: str) -> str:
  """Returns the text under a key of a record.

  Raises:
    ValueError: none is there, or it cannot be written as UTF-8.
  """
  if not isinstance(record, Mapping) or not isinstance(record.get(key), str):
    raise ValueError(f"{place}: not an object with a string under {key!r}")
  try:
    record[key].encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{place}: {key!r} holds half a surrogate pair at {error.start}") from error
  return record[key]


def _list(record: Mapping[str, Any], place: str) -> list[Any]:
  if not isinstance(record["messages"], list):
    raise ValueError(f"{place}: 'messages' holds no list")
  return record["messages"]


def _turn(message: Any, place: str) -> tuple[str, str]:
  role, text = string(message, "role", place), string(message, "content", place)
  if role not in ROLES:
    raise ValueError(f"{place}: role {role!r} is not one of {', '.join(ROLES)}")
  return role, text


def encode(
  documents: Sequence[Sequence[Part]],
  tokenizer: tokenizers.Tokenizer,
  special: Callable[[str], int],
) -> tuple[list[Int32[np.ndarray, "_"]], list[Bool[np.ndarray, "_"]]]:
  """Returns the ids of every document, and which of them, and of the end after them, count.

  Parts are encoded one by one: what is learnt starts and ends where an id does. The end counts
  where the last part does.

  Args:
    documents: of parts.
    tokenizer: for text.
    special: gives the id of a token by its name.
  """
  texts = list(dict.fromkeys(
    part.text for each in documents for part in each if not part.special))
  ids = dict(zip(texts, tokenizer.encode_all(texts), strict=True))
  found, counts = [], []
  for each in documents:
    pieces = [np.array([special(part.text)], np.int32) if part.special else ids[part.text]
              for part in each]
    sizes = [*map(len, pieces), 1]
    marks = [*(part.counts for part in each), each[-1].counts]
    found.append(np.concatenate(pieces))
    counts.append(np.repeat(np.array(marks, bool), sizes))
  return found, counts
