"""A published config.json, read key by key; every value is checked and named where it is wrong."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from hybridlm.interop import folders

LARGEST_SIZE = 2**31 - 1
# transformers writes floats that JSON lacks as {"__float__": "Infinity"}.
FLOAT_TAG = "__float__"
# What a multiplier may be in size: products of a few stay numbers that float32 has.
MULTIPLIERS = (1e-9, 1e9)
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def load(folder: str | os.PathLike, name: str = "config.json") -> dict[str, Any]:
  """Returns the JSON object of a file in a folder, tagged floats decoded.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is too large, or not a JSON object.
  """
  return _untagged(folders.read_json(folder, name))


def _untagged(value: Any) -> Any:
  if isinstance(value, list):
    return [_untagged(item) for item in value]
  if not isinstance(value, dict):
    return value
  tag = value.get(FLOAT_TAG)
  if len(value) == 1 and isinstance(tag, str) and tag in FLOATS:
    return FLOATS[tag]
  return {key: _untagged(item) for key, item in value.items()}


def dump(plain: Any) -> str:
  """Returns JSON text in the form transformers writes: sorted keys, infinity as an object."""
  return json.dumps(_tagged(plain), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _tagged(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _tagged(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_tagged(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return {FLOAT_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
  return value


@dataclasses.dataclass(frozen=True)
class Fields:
  """The keys of a config.json, or of a table inside it, and the tensors it lies beside.

  Attributes:
    plain: the decoded JSON object.
    place: what to name in errors.
    names: names of the tensors in the same folder.
  """

  plain: Mapping[str, Any]
  place: str
  names: frozenset[str] = frozenset()

  def error(self, key: str, rule: str) -> ValueError:
    """Returns the error that names a key, its value and the rule it breaks."""
    return ValueError(f"{self.place}: {key}={folders.clip(self.plain.get(key))}: {rule}")

  def has(self, key: str) -> bool:
    """Whether a key is there and not null."""
    return self.plain.get(key) is not None

  def _get(self, key: str, default: Any) -> Any:
    if self.has(key):
      return self.plain[key]
    if default is None:
      raise ValueError(f"{self.place}: lacks the key {key!r}")
    return default

  def integer(self, key: str, default: int | None = None) -> int:
    """Returns a whole number of at least 1; without a default the key must be there."""
    value = self._get(key, default)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 1 <= value <= LARGEST_SIZE:
      raise self.error(key, f"must be a whole number from 1 to {LARGEST_SIZE}")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """Returns a finite number."""
    value = self._get(key, default)
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not whole or not abs(value) < 1e300:
      raise self.error(key, "must be a finite number")
    return float(value)

  def multiplier(self, key: str) -> float:
    """Returns a number that weights can be multiplied by; 1 where none is stated."""
    return self._multiplier(key, self._get(key, 1.0))

  def multipliers(self, key: str, count: int) -> tuple[float, ...]:
    """Returns `count` numbers that weights can be multiplied by; ones where none are stated."""
    values = self._get(key, (1.0,) * count)
    if not isinstance(values, (list, tuple)) or len(values) != count:
      raise self.error(key, f"must be a list of {count} multipliers")
    return tuple(self._multiplier(key, value) for value in values)

  def _multiplier(self, key: str, value: Any) -> float:
    low, high = MULTIPLIERS
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not whole or not low <= abs(value) <= high:
      raise self.error(key, f"a multiplier must be a number of a size from {low:g} to {high:g}")
    return float(value)

  def flag(self, key: str, default: bool) -> bool:
    """Returns true or false."""
    value = self._get(key, default)
    if not isinstance(value, bool):
      raise self.error(key, "must be true or false")
    return value

  def words(self, key: str) -> list[str]:
    """Returns a list of strings."""
    value = self._get(key, None)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
      raise self.error(key, "must be a list of words")
    return value

  def limits(self, key: str) -> tuple[float, float]:
    """Returns a range `(low, high)`, 0 <= low < high, high may be infinite; all by default."""
    value = self._get(key, (0.0, math.inf))
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    numbers = pair and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
    if not numbers or not 0 <= value[0] < 1e300 or not value[0] < value[1] <= math.inf:
      raise self.error(key, "must be a range [low, high] with 0 <= low < high")
    return float(value[0]), float(value[1])

  def only(self, key: str, default: Any, *others: Any) -> Any:
    """Returns the value of a key that may take few values only, its default and the others."""
    value = self.plain.get(key, default)
    allowed = (default, *others)
    if not any(type(value) is type(each) and value == each for each in allowed):
      raise self.error(key, f"only {' or '.join(repr(each) for each in allowed)} can be read")
    return value

  def table(self, *keys: str) -> "Fields":
    """Returns the table under the first of these keys that is there; an empty one otherwise."""
    for key in keys:
      if self.has(key):
        if not isinstance(self.plain[key], Mapping):
          raise self.error(key, "must be a table")
        return Fields(self.plain[key], f"{self.place}: {key}", self.names)
    return Fields({}, self.place, self.names)

  def layers(self, key: str = "num_hidden_layers") -> int:
    """Returns a number of layers, at most as many as the folder has tensors."""
    count = self.integer(key)
    if count > len(self.names):
      raise self.error(key, f"the folder holds only {len(self.names)} tensors")
    return count

  def divided(self, key: str, by: int, what: str) -> int:
    """Returns a whole number divided by another that must divide it."""
    if self.integer(key) % by:
      raise self.error(key, f"must be a multiple of {what}={by}")
    return self.integer(key) // by

