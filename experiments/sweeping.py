"""What a sweep consists of: a line of text becomes members, each with a name and settings.

    KEY=VALUE,VALUE;KEY=VALUE,VALUE        every combination (a product)
    zip:KEY=VALUE,VALUE;KEY=VALUE,VALUE    the first values together, then the second, ...
    list:NAME:KEY=VALUE,KEY=VALUE;NAME:    one by one; a member may set nothing

Keys are those of the config, without `config.`. Commas and semicolons inside brackets or quotes
belong to a value. Several sweeps multiply.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments import artefacts

SEED = "seed"  # members that differ in it alone are repetitions of one experiment
_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "'\""
# A folder's name: what shells and file systems leave alone.
_PLAIN = re.compile(r"[^\w.=,+-]+")
_LONGEST = 100


class Member(NamedTuple):
  """One run of a sweep: the name of its folder, and (key, value) pairs as the command line has."""

  name: str
  settings: tuple[tuple[str, str], ...]


def members(sweeps: Sequence[str]) -> list[Member]:
  """Returns the members of sweeps, in order: the first sweep changes slowest.

  Raises:
    ValueError: a sweep that is not written as above, a key that is set twice, two equal members.
  """
  if not sweeps:
    raise ValueError("give --sweep, such as --sweep='distil.peak=1e-3,2e-3;seed=0,1'")
  found, settings = [], {}
  for combined in itertools.product(*map(parse, sweeps)):
    pairs = tuple(pair for member in combined for pair in member.settings)
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
      raise ValueError(f"sweep: {twice[0]!r} is set twice")
    name = _folder(combined)
    same = settings.get(frozenset(pairs))
    if same is not None:
      raise ValueError(f"sweep: {name!r} is the same member as {same!r}")
    settings[frozenset(pairs)] = name
    found.append(Member(name, pairs))
  return found


def parse(text: str) -> list[Member]:
  """Returns the members of one sweep; their names are empty where the text gives none.

  Raises:
    ValueError: says what is wrong and where.
  """
  form, colon, rest = text.strip().partition(":")
  if colon and form in ("zip", "list"):
    made = {"zip": _zip, "list": _list}[form](rest)
  elif colon and form.isidentifier():
    raise ValueError(f"sweep {text!r}: {form!r} is not a form; forms are zip: and list:")
  else:
    made = [Member("", pairs) for pairs in itertools.product(*_axes(text)) if pairs]
  if not made:
    raise ValueError(f"sweep {text!r} has no member")
  return made


def _zip(text: str) -> list[Member]:
  columns = _axes(text)
  counts = {values[0][0]: len(values) for values in columns}
  if len(set(counts.values())) > 1:
    said = ", ".join(f"{key} has {count}" for key, count in counts.items())
    raise ValueError(f"sweep 'zip:{text}': every key needs as many values: {said}")
  return [Member("", pairs) for pairs in zip(*columns, strict=True)]


def _list(text: str) -> list[Member]:
  made = []
  for part in split(text, ";"):
    name, colon, settings = part.partition(":")
    name = name.strip()
    if not colon or not name or _PLAIN.search(name) or "=" in name:
      raise ValueError(f"sweep: {part!r} is not NAME:KEY=VALUE,KEY=VALUE")
    pairs = tuple(_assignment(each) for each in split(settings, ","))
    made.append(Member(name, pairs))
  names = [member.name for member in made]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"sweep: the name {name!r} is given twice")
  return made


def _axes(text: str) -> list[list[tuple[str, str]]]:
  """Returns, key by key, the pairs of a key with each of its values."""
  found = []
  for part in split(text, ";"):
    key, values = _assignment(part)
    found.append([(key, value) for value in split(values, ",", empty=True)])
  return found


def _assignment(text: str) -> tuple[str, str]:
  key, equals, value = text.partition("=")
  if not equals or not key.strip():
    raise ValueError(f"sweep: {text.strip()!r} is not KEY=VALUE")
  return key.strip(), value.strip()


def split(text: str, mark: str, *, empty: bool = False) -> list[str]:
  """Returns the parts between marks that stand outside brackets and quotes, stripped.

  empty: keeps parts without text, where an empty value means to unset a key.

  Raises:
    ValueError: a bracket or a quote that is not closed.
  """
  parts, start = [], 0
  for at in _bare(text):
    if text[at] == mark:
      parts.append(text[start:at].strip())
      start = at + 1
  parts.append(text[start:].strip())
  return parts if empty else [part for part in parts if part]


def _bare(text: str) -> Iterator[int]:
  """Returns the positions outside brackets and quotes."""
  open_brackets, quote = [], ""
  for at, letter in enumerate(text):
    if quote:
      quote = "" if letter == quote else quote
    elif letter in _QUOTES:
      quote = letter
    elif letter in _OPEN:
      open_brackets.append(_CLOSE[_OPEN.index(letter)])
    elif open_brackets and letter == open_brackets[-1]:
      open_brackets.pop()
    elif letter in _CLOSE:
      raise ValueError(f"sweep: {text!r} closes {letter!r}, which is not open")
    elif not open_brackets:
      yield at
  if open_brackets or quote:
    missing = quote or open_brackets[-1]
    raise ValueError(f"sweep: {text!r} lacks a closing {missing!r}")


def _folder(combined: Sequence[Member]) -> str:
  """Returns a member's folder: its given names and, where a sweep gives none, what it sets."""
  said = []
  for member in combined:
    said += [member.name] if member.name else [f"{key}={value}" for key, value in member.settings]
  text = ",".join(said)
  plain = _PLAIN.sub("_", text)
  if plain == text and len(plain) <= _LONGEST:
    return plain
  return f"{plain[:_LONGEST - 13]}-{artefacts.digest(text)[:12]}"
