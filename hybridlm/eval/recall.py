"""What a model can look up in its context: associative recall and needle retrieval, from ids.

Both make batches whose weights are 1 at the positions where an answer is predicted. Every answer
stands in the row's context once, after a key that stands there once. Source of the first: Arora et
al. 2023 (Zoology, arXiv 2312.04927), multi-query associative recall; the second is retrieval from
filler text at a chosen depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from hybridlm.eval import targets

Batch = dict[str, Shaped[np.ndarray, "B L"]]


def associative(
  ids_V: Int[np.ndarray, "V"], *, rows: int, pairs: int, queries: int, distance: int, seed: int
) -> Batch:
  """Returns rows `k1 v1 k2 v2 .. filler q1 a1 q2 a2 ..`, where answer a follows key q as above.

  A row is 2·pairs + distance + 2·queries - 1 positions long. Its keys, values and filler share no
  id, keys and values differ from each other, and no key is asked for twice.

  Args:
    ids_V: the ids to draw from, each once.
    rows: rows of the batch, each with keys and values of its own.
    pairs: keys with a value.
    queries: keys asked for, at most as many as pairs.
    distance: filler ids between the last pair and the first query.
    seed: the same seed, the same batch.

  Raises:
    ValueError: a count out of range, or too few ids.
  """
  if not 1 <= queries <= pairs or distance < 0 or rows < 1:
    raise ValueError(f"recall: {rows} rows, {queries} queries, {pairs} pairs and distance "
                     f"{distance} do not go together")
  if len(ids_V) < 2 * pairs + (distance > 0):
    raise ValueError(f"recall: {pairs} pairs need {2 * pairs + (distance > 0)} different ids, the "
                     f"vocabulary has {len(ids_V)}")
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(rows):
    mixed = rng.permutation(ids_V)
    keys, values, rest = mixed[:pairs], mixed[pairs : 2 * pairs], mixed[2 * pairs :]
    asked = rng.permutation(pairs)[:queries]
    filler = rng.choice(rest, distance) if distance else rest[:0]
    shown, queried = (np.stack([keys[some], values[some]], 1).ravel()
                      for some in (np.arange(pairs), asked))
    made.append(np.concatenate([shown, filler, queried]))
  start = 2 * pairs + distance
  return _batch(np.stack(made), range(start, start + 2 * queries, 2))


def needle(
  filler: Int[np.ndarray, "filler"],
  ids_V: Int[np.ndarray, "V"],
  *,
  rows: int,
  length: int,
  depth: float,
  key: int = 4,
  value: int = 4,
  seed: int,
) -> Batch:
  """Returns rows of filler with a key and its value inside, which end in the key and the value.

  A row is `length` positions long; the last answer is only a target.

  Args:
    filler: ids of text; each row takes a piece of it.
    ids_V: the ids that keys and values are drawn from, those of the row's filler excepted.
    rows: rows of the batch.
    length: positions.
    depth: where the needle lies: 0 before all filler, 1 right before the question.
    key: ids of a key.
    value: ids of a value.
    seed: the same seed, the same batch.

  Raises:
    ValueError: no room for the needle, too little filler, too few ids, or a depth outside 0..1.
  """
  plain = length + 1 - 2 * (key + value)
  if not 0 <= depth <= 1 or min(key, value, rows) < 1:
    raise ValueError(f"needle: depth {depth} must lie in 0..1, and key {key}, value {value} and "
                     f"rows {rows} must be at least 1")
  if plain < 0 or len(filler) < plain:
    raise ValueError(f"needle: {length} positions take {plain} ids of filler beside two times "
                     f"{key + value} ids of key and value; there are {len(filler)}")
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(rows):
    first = int(rng.integers(len(filler) - plain + 1))
    text = filler[first : first + plain]
    free = np.setdiff1d(ids_V, text)
    if len(free) < key + value:
      raise ValueError(f"needle: {len(free)} ids of the vocabulary are not in {plain} ids of "
                       f"filler; a key and a value take {key + value}")
    new = rng.choice(free, key + value, replace=False)
    place = round(depth * plain)
    made.append(np.concatenate([text[:place], new, text[place:], new]))
  return _batch(np.stack(made), range(length - value, length))


def _batch(id_BL: Int[np.ndarray, "B ids"], answers: Iterable[int]) -> Batch:
  """Returns inputs, next ids as targets, and weight 1 where the target is an answer.

  Rows have one id more than positions; `answers` are positions whose next id is an answer.
  """
  weight_BL = np.zeros((len(id_BL), id_BL.shape[1] - 1), np.float32)
  weight_BL[:, list(answers)] = 1
  id_BL = id_BL.astype(np.int32)
  return {"token_BL": id_BL[:, :-1], "target_BL": id_BL[:, 1:], "weight_BL": weight_BL}


def measure(
  score: targets.Score, params: Any, batches: Iterable[Mapping[str, Any]], *, by: str
) -> dict[str, float]:
  """Returns how often the answer is what greedy decoding gives, and its mean log-probability.

  Args:
    score: as `eval.targets.make` returns it.
    params: of the model.
    batches: of `associative` or `needle`.
    by: "answer" counts every answer id, "row" rows whose answer ids are all right.

  Returns:
    "accuracy" with its 95 % interval ("low", "high"), "count", and "logprob" (nats an answer id).

  Raises:
    ValueError: an unknown way to count, or nothing to count.
  """
  if by not in _COUNTS:
    raise ValueError(f"recall is counted by {by!r}; ways are {', '.join(_COUNTS)}")
  right, logprobs = [], []
  for batch in batches:
    logprob_BL, greedy_BL = jax.device_get(score(params, batch))
    asked_BL = np.asarray(batch["weight_BL"]) > 0
    right.extend(_COUNTS[by](greedy_BL, asked_BL))
    logprobs.extend(logprob_BL[asked_BL].astype(np.float64))
  if not np.isfinite(logprobs).all():
    raise ValueError("recall: the log-probability of an answer is not a finite number")
  return targets.rate(int(np.sum(right)), len(right)) | {"logprob": float(np.mean(logprobs))}


def _by_answer(greedy_BL: np.ndarray, asked_BL: np.ndarray) -> Sequence[bool]:
  return greedy_BL[asked_BL].tolist()


def _by_row(greedy_BL: np.ndarray, asked_BL: np.ndarray) -> Sequence[bool]:
  return (greedy_BL | ~asked_BL).all(1).tolist()


_COUNTS: dict[str, Callable[..., Sequence[bool]]] = {"answer": _by_answer, "row": _by_row}
