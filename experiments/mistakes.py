"""Whose fault an error is: the user's, in one line, or ours, with its traceback."""

import contextlib
import dis
from collections.abc import Iterator, Mapping
from typing import Any

PACKAGES = ("hybridlm", "experiments", "configs")
TYPES = (ValueError, FileNotFoundError)


def is_mistake(error: BaseException) -> bool:
  """Whether this is a user's mistake: of the right type, and from a `raise` statement of ours.

  The same types out of a library beneath us are bugs.
  """
  trace = error.__traceback__
  if trace is None or not isinstance(error, TYPES):
    return False
  while trace.tb_next is not None:
    trace = trace.tb_next
  code = trace.tb_frame.f_code
  package = _module(trace.tb_frame.f_globals).partition(".")[0]
  thrown = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
  return thrown and package in PACKAGES


def _module(scope: Mapping[str, Any]) -> str:
  """Returns the name of a module by its globals: its own where it runs as `python -m NAME`."""
  spec = scope.get("__spec__")
  return spec.name if spec is not None else scope.get("__name__", "")


@contextlib.contextmanager
def about(key: str) -> Iterator[None]:
  """Puts the config key, or the file, in front of a mistake found while the block runs.

  Raises:
    ValueError: the mistake, under that name.
  """
  try:
    yield
  except ValueError as error:
    if not is_mistake(error) or str(error).startswith(key):
      raise
    raise ValueError(f"{key}: {error}") from error
