"""Which sentence comes next: four-way choices made from any held-out text."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridlm.eval import requests, targets

# A sentence ends in a mark and closing quotes; the next one starts after white space.
_BORDER = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]?[A-Z])")
# Characters of a sentence that takes part: no "Mr.", no table.
_SHORTEST, _LONGEST = 24, 400


class Item(NamedTuple):
  """A context, sentences that could follow it, and which one does."""

  context: str
  options: tuple[str, ...]
  answer: int


def sentences(text: str) -> list[str]:
  """Returns the sentences of a text in order, without the white space around them."""
  found, start = [], 0
  for border in _BORDER.finditer(text):
    found.append(text[start : border.end()].strip())
    start = border.end()
  return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def items(
  documents: Sequence[str], *, count: int, seed: int, context: int = 3, options: int = 4
) -> list[Item]:
  """Returns `count` items, spread over the documents by a seed; the same for the same arguments.

  The wrong options are other sentences of the same document. The options of an item differ from
  each other, none of them is in its context, and each sentence is the answer of one item at most.

  Args:
    documents: held-out texts.
    count: items.
    seed: decides which places, which wrong options, and their order.
    context: sentences before the one that is asked for.
    options: sentences to choose from, the true one included.

  Raises:
    ValueError: the documents do not hold so many items.
  """
  rng = np.random.default_rng(seed)
  split = [sentences(text) for text in documents]
  places = [
    (number, index)
    for number, parts in enumerate(split)
    for index in range(context, len(parts))
    if _SHORTEST <= len(parts[index]) <= _LONGEST
  ]
  found, asked = [], set()
  for place in rng.permutation(len(places)):
    if len(found) == count:
      break
    number, index = places[place]
    true, shown = split[number][index], split[number][index - context : index]
    others = sorted({s for s in split[number] if _SHORTEST <= len(s) <= _LONGEST} - {true, *shown})
    if len(others) < options - 1 or true in shown or true in asked:
      continue
    asked.add(true)
    chosen = [others[i] for i in rng.choice(len(others), options - 1, replace=False)]
    answer = int(rng.integers(options))
    found.append(Item(" ".join(shown), (*chosen[:answer], true, *chosen[answer:]), answer))
  if len(found) < count or count < 1:
    raise ValueError(
      f"next sentences: {count} items wanted, the {len(documents)} documents give {len(found)}; "
      f"an item needs {context} sentences before it and {options} to choose from"
    )
  return found


def pairs(
  asked: Sequence[Item], encode: Callable[[str, bool | None], Sequence[int]], *, prefix: int
) -> list[requests.Pair]:
  """Returns what to score, the options of one item after the other (see `requests.pair`)."""
  return [
    requests.pair(encode, item.context, " " + option, prefix=prefix)
    for item in asked for option in item.options
  ]


def measure(
  score: targets.Score,
  params: Any,
  asked: Sequence[Item],
  encode: Callable[[str, bool | None], Sequence[int]],
  *,
  prefix: int,
  vocabulary: int,
  batch: int,
  length: int,
  done: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
  """Returns the accuracy of choosing the option of largest mean log-probability a token.

  Beside "accuracy" its 95 % interval ("low", "high"), "count" and "chance". The other arguments
  are those of `requests.run` and `requests.pair`.
  """
  scored = pairs(asked, encode, prefix=prefix)
  results = requests.run(score, params, scored, vocabulary=vocabulary, batch=batch, length=length,
                         done=done)
  means = [found.logprob / len(one.target) for found, one in zip(results, scored, strict=True)]
  hits, first = 0, 0
  for item in asked:
    last = first + len(item.options)
    hits += int(np.argmax(means[first:last])) == item.answer
    first = last
  chance = float(np.mean([1 / len(item.options) for item in asked]))
  return targets.rate(hits, len(asked)) | {"chance": chance}
