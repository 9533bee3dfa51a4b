"""Byte n-gram language models with Witten-Bell smoothing: the yardstick beside every model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64

# What can follow: 256 bytes and the end of the document.
SYMBOLS = 257
_END = 256


class Counts(NamedTuple):
  """Counts of one order n, of n-grams and of the n - 1 symbols before them, by rising code."""

  gram: UInt64[np.ndarray, "grams"]
  seen: Int[np.ndarray, "grams"]
  context: UInt64[np.ndarray, "contexts"]
  total: Int[np.ndarray, "contexts"]
  kinds: Int[np.ndarray, "contexts"]


class Ngram(NamedTuple):
  """A byte n-gram model of order len(orders).

  code: the number of each symbol that training saw, and one number for all the others.
  base: how many numbers there are; an n-gram's code has its symbols as digits, the last one last.
  """

  code: Int[np.ndarray, "257"]
  base: int
  orders: tuple[Counts, ...]


def fit(texts: Sequence[str], *, order: int) -> Ngram:
  """Returns the model of an order, that is of order - 1 bytes of context, counted on documents.

  A document starts from `order - 1` ends of document and is closed by one; none sees another.
  Memory: about 40 bytes a byte of text at once.  Raises ValueError where the order is below 1 or
  its n-grams do not fit 64 bits.
  """
  if order < 1:
    raise ValueError(f"n-gram order {order} is below 1")
  symbols, target = _symbols(texts, order)
  used = np.unique(symbols)
  base = len(used) + 1
  if base**order > 2**64:
    raise ValueError(
      f"n-grams of order {order} over {len(used)} different symbols do not fit 64 bits"
    )
  code = np.full(SYMBOLS, len(used))
  code[used] = np.arange(len(used))
  grams = _grams(code[symbols], base, order)[target]
  return Ngram(code, base, tuple(_count(_last(grams, n, base, order), base)
                                 for n in range(1, order + 1)))


def bits_per_byte(model: Ngram, texts: Sequence[str]) -> Float[np.ndarray, "orders"]:
  """Returns, for each order 1, 2, .. of the model, the bits it spends on a byte of the texts.

  Each byte and each end of document is predicted; the sum of bits is divided by the bytes.
  """
  symbols, target = _symbols(texts, len(model.orders))
  size = int(target.sum()) - len(texts)
  if not size:
    raise ValueError("the texts for n-grams are empty: there is no byte to divide by")
  grams = _grams(model.code[symbols], model.base, len(model.orders))[target]
  return -np.log2(_interpolate(model, grams)).sum(axis=1) / size


def distribution(model: Ngram, before: bytes) -> Float[np.ndarray, "orders 257"]:
  """Returns each order's probability of every symbol after the first bytes of a document."""
  context = 0
  for symbol in ([_END] * len(model.orders) + list(before))[len(before) + 1 :]:
    context = context * model.base + int(model.code[symbol])
  grams = np.uint64(context * model.base) + model.code.astype(np.uint64)
  return _interpolate(model, grams)


def _interpolate(
  model: Ngram, grams: UInt64[np.ndarray, "targets"]
) -> Float[np.ndarray, "orders targets"]:
  """Returns P_n = (c(h w) + T(h) P_{n-1}) / (c(h) + T(h)), each from the order below it.

  T(h) is the number of different symbols seen after h; where h was not seen, P_n = P_{n-1};
  P_0 = 1/257.  Source: Witten and Bell 1991, method C, as interpolated by Chen and Goodman 1999,
  section 2.5.  Symbols that training never saw share a number whose counts are all 0.
  """
  below = np.full(len(grams), 1 / SYMBOLS)
  levels = []
  for n, counts in enumerate(model.orders, 1):
    codes = _last(grams, n, model.base, len(model.orders))
    # Repeated n-grams are looked up once, in rising order: the tables are larger than the cache.
    distinct, back = np.unique(codes, return_inverse=True)
    context = distinct // np.uint64(model.base)
    seen = _look_up(counts.gram, counts.seen, distinct)[back]
    total = _look_up(counts.context, counts.total, context)[back]
    kinds = _look_up(counts.context, counts.kinds, context)[back]
    below = np.where(total > 0, (seen + kinds * below) / np.maximum(total + kinds, 1), below)
    levels.append(below)
  return np.stack(levels)


def _symbols(texts: Sequence[str], order: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns every document between order - 1 ends and one end, and which symbols are predicted."""
  symbols, target = [np.zeros(0, np.int16)], [np.zeros(0, bool)]
  for text in texts:
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    symbols += [np.full(order - 1, _END, np.int16), data, np.full(1, _END, np.int16)]
    target += [np.zeros(order - 1, bool), np.ones(len(data) + 1, bool)]
  return np.concatenate(symbols), np.concatenate(target)


def _grams(code, base: int, order: int) -> UInt64[np.ndarray, "symbols"]:
  """Returns the code of the n-gram that ends at each symbol; before the first lie zeros."""
  grams = np.zeros(len(code), np.uint64)
  for back in range(min(order, len(code)) - 1, -1, -1):
    grams *= np.uint64(base)
    grams[back:] += code[: len(code) - back].astype(np.uint64)
  return grams


def _last(grams, n: int, base: int, order: int) -> UInt64[np.ndarray, "_"]:
  """Returns the codes of the last n symbols of n-grams of an order."""
  return grams if n == order else grams % np.uint64(base**n)


def _count(grams, base: int) -> Counts:
  """Returns the counts of n-grams and, from neighbours in order, of their contexts."""
  gram, seen = np.unique(grams, return_counts=True)
  context, first, kinds = np.unique(gram // np.uint64(base), return_index=True, return_counts=True)
  return Counts(gram, seen, context, np.add.reduceat(seen, first), kinds)


def _look_up(keys, values, wanted):
  """Returns the value of each wanted key, 0 where there is none; keys rise."""
  place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[place] == wanted, values[place], 0)
