"""Texts to score as pairs of ids: split, windowed, cut to length, batched, put back in order."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm.eval.targets import Score

_SHORTEST = 32


class Pair(NamedTuple):
  """Ids that are given and ids that are scored after them; neither is empty."""

  context: tuple[int, ...]
  target: tuple[int, ...]


class Result(NamedTuple):
  """Log-probability of all target ids in nats, and whether greedy decoding gives all of them."""

  logprob: float
  greedy: bool


def pair(
  encode: Callable[[str, bool | None], Sequence[int]], context: str, target: str, *, prefix: int
) -> Pair:
  """Returns the ids of a context, and of what follows it from where the context's own ids end.

  The target's ids are the last ones of both texts encoded together; white space at the end of the
  context is part of it. A token that crosses the border is in neither, and the context keeps its
  own ids, as the harness has it. A context without any token is the prefix token, unless the
  target of an empty one starts with that token itself.

  Args:
    encode: `encode(text, special) -> ids`; special tokens are added, or not, or as is usual (None).
    context: what is given.
    target: what is scored.
    prefix: the id that starts a text.
  """
  if not context:
    ids = tuple(encode(target, False))
    return Pair(ids[:1], ids[1:]) if ids[:1] == (prefix,) else Pair((prefix,), ids)
  given = tuple(encode(context.rstrip(), None))
  rest = tuple(encode(context + target, None))[len(given) :]
  return Pair(given or (prefix,), rest)


def windows(ids: Sequence[int], *, prefix: int, length: int) -> list[Pair]:
  """Returns pairs that score every id once, each after as many ids as fit.

  The first window starts from the prefix token; a later one follows the id before it, and the last
  one reaches back so that it is as long as the others.

  Args:
    ids: of a whole text.
    prefix: the id that starts a text.
    length: ids a model reads at once, at least 1.
  """
  ids = tuple(ids)
  found = [Pair((prefix,), ids[:length])] if ids else []
  for start in range(length, len(ids), length):
    stop = min(start + length, len(ids))
    found.append(Pair(ids[stop - length - 1 : start], ids[start:stop]))
  return found


def fitted(one: Pair, length: int) -> Pair:
  """Returns a pair that a model of `length` positions reads: the context loses ids on the left.

  Raises:
    ValueError: a side is empty, or the target alone is too long.
  """
  if not one.context or not one.target:
    side = "context" if not one.context else "target"
    raise ValueError(f"a request to score has an empty {side}: there is no token in it")
  if len(one.target) > length:
    raise ValueError(f"a target of {len(one.target)} tokens is longer than the length {length}")
  excess = len(one.context) + len(one.target) - (length + 1)
  return Pair(one.context[max(0, excess) :], one.target)


def bucket(size: int, largest: int) -> int:
  """Returns the padded length of rows of `size` positions: few lengths mean few compilations.

  Lengths are 32, 48, 64, 96, 128, .. and the largest.
  """
  edge = _SHORTEST
  while edge < size:
    # From a power of two one and a half times as far, from there to the next power.
    edge += edge // 2 if edge & (edge - 1) == 0 else edge // 3
  return min(edge, largest)


def batches(
  pairs: Sequence[Pair], *, batch: int, length: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
  """Yields which pairs a batch holds, and the batch: longest first, padded on the right.

  Every batch has `batch` rows; those that stand for no pair have weight 0 like all padding. The
  targets of a row end where its weights do.
  """
  order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].target))
  for first in range(0, len(order), batch):
    chosen = order[first : first + batch]
    size = bucket(len(pairs[chosen[0]].context) + len(pairs[chosen[0]].target) - 1, length)
    token_BL, target_BL = np.zeros((2, batch, size), np.int32)
    weight_BL = np.zeros((batch, size), np.float32)
    for row, index in enumerate(chosen):
      ids = np.array(pairs[index].context + pairs[index].target, np.int32)
      token_BL[row, : len(ids) - 1], target_BL[row, : len(ids) - 1] = ids[:-1], ids[1:]
      weight_BL[row, len(pairs[index].context) - 1 : len(ids) - 1] = 1
    yield chosen, {"token_BL": token_BL, "target_BL": target_BL, "weight_BL": weight_BL}


def run(
  score: Score,
  params: Any,
  pairs: Iterable[Pair],
  *,
  vocabulary: int,
  batch: int,
  length: int,
  done: Callable[[int], object] = lambda count: None,
) -> list[Result]:
  """Returns the result of every pair, in order.

  Args:
    score: as `eval.targets.make` returns it.
    params: of the model.
    pairs: what to score; contexts that do not fit lose their left end.
    vocabulary: ids the model knows; each id of a pair is below.
    batch: rows a batch.
    length: positions the model reads at once.
    done: told how many more pairs are scored.

  Raises:
    ValueError: a pair that `fitted` refuses or that holds an id outside the vocabulary, before any
      is scored; or a log-probability that is not a number.
  """
  pairs = [fitted(one, length) for one in pairs]
  for index, one in enumerate(pairs):
    for side, ids in one._asdict().items():
      if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"request {index}: id {wrong} of its {side} is outside the model's "
                         f"vocabulary, 0..{vocabulary - 1}")
  results: dict[int, Result] = {}
  for chosen, one in batches(pairs, batch=batch, length=length):
    logprob_BL, greedy_BL = jax.device_get(score(params, one))
    right_BL = (one["weight_BL"] == 0) | greedy_BL
    for row, index in enumerate(chosen):
      total = float(logprob_BL[row].astype(np.float64).sum())
      if not math.isfinite(total):
        raise ValueError(f"request {index} has log-probability {total}: the model's logits are not "
                         "finite")
      results[index] = Result(total, bool(right_BL[row].all()))
    done(len(chosen))
  return [results[index] for index in range(len(pairs))]


def before(text: str, stops: Iterable[str]) -> str:
  """Returns a text up to the first of the stop strings in it; empty ones stop nothing."""
  places = [text.find(stop) for stop in stops if stop]
  return text[: min((place for place in places if place >= 0), default=len(text))]


def finished(
  ids: Sequence[int], stops: Sequence[str], ends: Sequence[int], decode: Callable[..., str]
) -> bool:
  """Whether generated ids end a text: the last is an end token, or a stop string is complete.

  `decode(ids, special)` gives their text, special tokens included.
  """
  if ids and ids[-1] in ends:
    return True
  text = decode(ids, True) if any(stops) else ""
  return any(stop in text for stop in stops if stop)
