"""Checks of one field of a config, with its owner in the message."""

from typing import Any


def positive(owner: str, **sizes: Any) -> None:
  """Raises unless every size is a whole number of at least 1."""
  for name, value in sizes.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{owner}: {name}={value!r} must be a whole number of at least 1")


def one_of(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises unless a name is one of those allowed."""
  if value not in allowed:
    raise ValueError(f"{owner}: {name}={value!r} is not one of {', '.join(allowed)}")
