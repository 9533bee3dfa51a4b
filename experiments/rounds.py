"""Schedules: prune, distil, prune again. What a round says, and its stages."""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.mistakes import about

# What a round may say: sizes, and what differs in its distillation.
PARTS = ("targets", "distil")


def label(number: int) -> str:
  """Returns what the folders and rows of a round begin with: `round1`."""
  return f"round{number}"


def place(number: int) -> str:
  """Returns what messages about a round begin with."""
  return f"schedule: round {number}"


def configs(c: ConfigDict) -> list[ConfigDict]:
  """Returns one config a round of `c.schedule`: its targets alone, its distillation over `c`'s.

  What lies between two rounds is not exported, and every round makes a plan from its scores.

  Raises:
    ValueError: a round that is no table, or a key that no round has; names the round.
  """
  if isinstance(c.schedule, (str, Mapping, ConfigDict)):
    raise ValueError(f"schedule={c.schedule!r} is not a tuple of rounds")
  made = []
  for number, given in enumerate(c.schedule, 1):
    said = table(given, place(number))
    with about(place(number)):
      known(said, PARTS, "")
      if not said.get("targets"):
        raise ValueError("it has no targets: name at least one size to prune to")
      one = ConfigDict(c.to_dict())
      one.schedule, one.export.format = (), "none"
      one.targets = ConfigDict({key: None for key in c.targets})
      for part in PARTS:
        values = table(said.get(part, {}), f"{place(number)}: {part}")
        known(values, tuple(one[part]), f"{part}.")
        for key, value in values.items():
          put(one[part], key, value, part)
    made.append(one)
  return made


def table(value: Any, where: str) -> dict[str, Any]:
  """Returns a table of a config as a plain one, or says where there is none."""
  if not isinstance(value, (Mapping, ConfigDict)):
    raise ValueError(f"{where}: {value!r} is not a table")
  return dict(value.items())


def known(said: Mapping[str, Any], names: tuple[str, ...], prefix: str) -> None:
  """Raises where a table has a key that is none of these names; `prefix` goes before each."""
  for key in said:
    if key not in names:
      near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.0)
      raise ValueError(
        f"{prefix}{key} is unknown; nearest: {', '.join(prefix + name for name in near)}")


def put(tree: ConfigDict, key: str, value: Any, part: str) -> None:
  """Sets a value of a config that is to be of the same type as before, or names it."""
  try:
    tree[key] = value
  except TypeError as error:
    raise ValueError(f"{part}.{key}={value!r}: {error}") from error
