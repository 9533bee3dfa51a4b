"""What the processes of one run agree on. In a run of one process nothing is sent.

All processes call these functions in the same order, with no computation under way.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_ERRORS = (ValueError, OSError)


def writes() -> bool:
  """Returns whether this process is the one that writes files that all share."""
  return jax.process_index() == 0


def _broadcast(text: str) -> str:
  """Returns process 0's text."""
  data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  here = data if writes() else np.zeros(size, np.int32)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(here), np.uint8)).decode()


def first(make: Callable[[], Any]) -> Any:
  """Returns what process 0 gets from `make`, a JSON value; only process 0 calls it.

  Raises:
    ValueError: it raised one there, or an `OSError`; all processes raise, in the same words.
  """
  if jax.process_count() == 1:
    return make()
  value, error = None, None
  if writes():
    try:
      value = make()
    except _ERRORS as caught:
      error = caught
  said = json.loads(_broadcast(json.dumps({"value": value, "error": error and _words(error)})))
  if error is not None:
    raise error
  if said["error"] is not None:
    raise ValueError(said["error"])
  return said["value"]


def check(error: Exception | None) -> None:
  """Raises on every process if one of them has an error: its own, or the first one's words.

  Raises:
    ValueError: another process has the error.
  """
  if jax.process_count() > 1:
    words = _words(error).encode() if error else b""
    sizes = multihost_utils.process_allgather(np.int32(len(words)))
    row = np.zeros(max(1, int(sizes.max())), np.int32)
    row[: len(words)] = np.frombuffer(words, np.uint8)
    rows = multihost_utils.process_allgather(row)
    other = int(np.argmax(sizes > 0))
    if error is None and sizes.any():
      said = bytes(np.asarray(rows[other][: sizes[other]], np.uint8)).decode()
      raise ValueError(f"process {other}: {said}")
  if error is not None:
    raise error


def _words(error: Exception) -> str:
  return " ".join(str(error).split())
