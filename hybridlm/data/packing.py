"""Documents laid end to end and cut into rows [L], each token predicted exactly once."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped

Row = dict[str, Shaped[np.ndarray, "L"]]


class Tokens(NamedTuple):
  """The ids of many documents, one after the other, as eot d1 eot d2 eot .. dn eot.

  flat: every id, the eot before each document and the one after the last.
  start: where each document's eot lies in flat, and where the last eot lies.
  eot: the id that separates.
  counts: which ids are targets; None: all are. An eot goes with the document before it.
  """

  flat: Integer[np.ndarray, "tokens"]
  start: Int[np.ndarray, "documents_and_one"]
  eot: int
  counts: Bool[np.ndarray, "tokens"] | None = None


def join(
  documents: Sequence[Integer[np.ndarray, "_"]], *, eot: int, V: int,
  counts: Sequence[Bool[np.ndarray, "_"]] | None = None,
) -> Tokens:
  """Returns the documents' ids in one array, two bytes an id where V allows it.

  counts: which ids of each document, and of the eot after it, are targets; None: all are.
  Raises ValueError where an id is outside the V of the model that will read it.
  """
  sizes = np.array([len(ids) + 1 for ids in documents], np.int64)
  start = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
  flat = np.full(start[-1] + 1, eot, np.uint16 if V <= 1 << 16 else np.int32)
  for number, ids in enumerate(documents):
    if len(ids) and not 0 <= ids.min() <= ids.max() < V:
      bad = ids.min() if ids.min() < 0 else ids.max()
      raise ValueError(f"document {number} holds id {bad}, outside the vocabulary of {V}")
    flat[start[number] + 1 : start[number + 1]] = ids
  marks = None if counts is None else np.concatenate([np.ones(1, bool), *counts])
  return Tokens(flat, start, eot, marks)


class Rows(grain.MapDataset):
  """Rows [L] of packed documents; the documents change places from epoch to epoch.

  Row r of an epoch holds positions rL.. of the documents laid end to end, so that a long document
  goes on in the next row as a segment of its own, and only the last row of an epoch has padding.
  `order` names how an epoch lays documents: "shuffled" by seed and epoch, or "given".
  """

  def __init__(self, tokens: Tokens, *, length: int, order: str, seed: int = 0):
    super().__init__()
    if order not in ("shuffled", "given"):
      raise ValueError(f"order {order!r} is unknown; orders are shuffled, given")
    self._tokens, self._length, self._order, self._seed = tokens, length, order, seed
    self._layout = (-1, None, None)

  def __len__(self) -> int:
    return -(-int(self._tokens.start[-1]) // self._length)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, row = divmod(index, len(self))
    base, edge = self._lay(epoch)
    return _row(self._tokens, base, edge, first=row * self._length, length=self._length)

  def _lay(self, epoch: int):
    """Returns each document's place in flat, in the epoch's order, and all edges in the epoch.

    The latest epoch's layout is kept; it follows from the arguments, whoever asks.
    """
    known, base, edge = self._layout
    if known != epoch:
      start = self._tokens.start
      order = np.arange(len(start) - 1)
      if self._order == "shuffled":
        # Raw bits and a stable sort: the same on every NumPy, unlike Generator.permutation.
        bits = np.random.PCG64([self._seed, epoch]).random_raw(len(order))
        order = np.argsort(bits, kind="stable")
      base, edge = start[:-1][order], np.append(0, np.cumsum(np.diff(start)[order]))
      self._layout = (epoch, base, edge)
    return base, edge


def _row(tokens: Tokens, base, edge, *, first: int, length: int) -> Row:
  """Returns positions first .. first + length of the epoch.

  Weights are 0 past its end, and where the next id is no target.
  """
  stop = min(first + length, int(edge[-1]))
  low, high = np.searchsorted(edge, [first, stop - 1], side="right") - 1
  begin, end = edge[low : high + 1], edge[low + 1 : high + 2]
  count = np.minimum(end, stop) - np.maximum(begin, first)
  place = np.repeat(base[low : high + 1] - begin, count) + np.arange(first, stop)
  real = stop - first
  token_L, target_L = (np.full(length, tokens.eot, np.int32) for _ in range(2))
  segment_L, weight_L = np.zeros(length, np.int32), np.zeros(length, np.float32)
  token_L[:real] = tokens.flat[place]
  target_L[:real] = tokens.flat[place + 1]  # after a document's last id, in any order, lies an eot
  segment_L[:real] = np.repeat(np.arange(1, len(count) + 1), count)
  weight_L[:real] = 1 if tokens.counts is None else tokens.counts[place + 1]
  return {"token_BL": token_L, "target_BL": target_L, "segment_BL": segment_L,
          "weight_BL": weight_L}
