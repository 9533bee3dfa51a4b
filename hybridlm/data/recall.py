"""Documents of associative recall, to be learnt beside text: pairs, then keys whose values count.

After Arora et al. 2023 (Zoology, arXiv 2312.04927), multi-query associative recall. A document is
one line: `k1 v1 k2 v2 .. filler q1 a1 q2 a2 ..`, keys lower case, values upper case, filler digits.
As many keys are asked for as there are pairs, each drawn anew: were every key asked for once, who
has learnt which values are left would answer half of four questions without knowing any pair. Only
the answers are targets.
"""

import string
from collections.abc import Iterator

import numpy as np

from hybridlm.data import packing
from hybridlm.data.instructions import Part

KEYS, VALUES, FILLER = string.ascii_lowercase, string.ascii_uppercase, string.digits


def documents(*, pairs: int, distance: int, count: int) -> Iterator[tuple[Part, ...]]:
  """Yields documents of 4·pairs + distance + 1 symbols; more of them begin with the same ones.

  A part is one symbol, so that a tokenizer gives each an id of its own.

  Args:
    pairs: keys with a value, and questions.
    distance: symbols of filler between the last pair and the first key that is asked for.
    count: of documents.

  Raises:
    ValueError: more pairs than there are keys, or a count out of range.
  """
  if not 1 <= pairs <= len(KEYS) or distance < 0 or count < 1:
    raise ValueError(f"{count} documents of pairs={pairs} and distance={distance}: pairs must lie "
                     f"in 1..{len(KEYS)}, distance must not be negative, documents be at least 1")
  # Raw bits and stable sorts: the same on every NumPy, unlike Generator.permutation.
  draws = np.random.PCG64([pairs, distance]).random_raw(
    (count, len(KEYS) + len(VALUES) + distance + pairs))
  parts = np.split(draws, np.cumsum([len(KEYS), len(VALUES), distance]), axis=1)
  keys, values = (
    np.argsort(parts[at], axis=1, kind="stable")[:, :pairs].tolist() for at in (0, 1))
  fillers, questions = (parts[2] % len(FILLER)).tolist(), (parts[3] % pairs).tolist()
  read = {symbol: Part(symbol, False) for symbol in KEYS + VALUES + FILLER + "\n"}
  learnt = {symbol: Part(symbol, True) for symbol in VALUES}
  for key, value, filler, question in zip(keys, values, fillers, questions, strict=True):
    known = [(KEYS[k], VALUES[v]) for k, v in zip(key, value, strict=True)]
    shown = [read[symbol] for pair in known for symbol in pair]
    asked = [part for at in question for part in (read[known[at][0]], learnt[known[at][1]])]
    yield (*shown, *(read[FILLER[digit]] for digit in filler), *asked, read["\n"])


def rows(
  tokens: packing.Tokens, *, batch: int, limit: int
) -> list[dict[str, np.ndarray]]:
  """Returns the first documents of a split one a row, so that no pair is cut from its question.

  Training packs documents and cuts them where a row ends; an answer whose pair lies in the row
  before is anybody's guess.

  Args:
    tokens: of the split.
    batch: rows a batch; the last batch is filled up with rows of padding.
    limit: batches at most.
  """
  count = min(len(tokens.start) - 1, batch * limit)
  edges = tokens.start[: count + 1]
  length = int(np.diff(edges).max())
  shape = (-(-count // batch) * batch, length)
  token_BL, target_BL = (np.full(shape, tokens.eot, np.int32) for _ in range(2))
  segment_BL, weight_BL = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for row, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
    size = end - begin
    token_BL[row, :size] = tokens.flat[begin:end]
    target_BL[row, :size] = tokens.flat[begin + 1 : end + 1]
    segment_BL[row, :size] = 1
    counts = None if tokens.counts is None else tokens.counts[begin + 1 : end + 1]
    weight_BL[row, :size] = 1 if counts is None else counts
  whole = {"token_BL": token_BL, "target_BL": target_BL, "segment_BL": segment_BL,
           "weight_BL": weight_BL}
  return [{name: array[first : first + batch] for name, array in whole.items()}
          for first in range(0, shape[0], batch)]
