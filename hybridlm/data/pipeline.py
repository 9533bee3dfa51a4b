"""Batches for training and evaluation, from a spec of plain values."""

import copy
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Shaped

from hybridlm.data import cache, instructions, mixture, packing, sources, tokenizers

# Part of every fingerprint: raise it when the same spec starts to give other batches.
_VERSION = 1
# Part of the name of kept ids: raise it when the same texts give others, or another file.
_TOKENS_VERSION = 1

# Batches made while the device computes: enough for one that takes longer than the others.
_AHEAD = 2

Batch = dict[str, Shaped[np.ndarray, "B L ..."]]


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Where text comes from, how it becomes ids, and what training mixes when.

  sources: each under a name of its own.
  tokenizer: "bytes", the name of a packaged tokenizer, or a path (see `tokenizers.load`).
  phases: ((step, {source: weight}), ..): from that step (batches drawn so far) on, rows come from
    the sources in proportion to the weights; the first step is 0. Pairs may stand for the mapping.
    May be left out where there is one source.
  end: the tokenizer's token that ends a document; None: its own (see `tokenizers.load`).
  """

  sources: tuple[sources.Source, ...]
  tokenizer: str = "bytes"
  phases: tuple = ()
  end: str | None = None


class Corpus:
  """A spec's documents as ids: each source is read once, each split tokenised once, when asked for.

  folder: where ids are kept between runs, by fingerprint; None keeps them in memory only.
  Nothing that can be seen from outside depends on what was asked before.
  """

  def __init__(self, spec: DataSpec, *, folder: str | pathlib.Path | None = None):
    names = [source.name for source in spec.sources]
    if not names:
      raise ValueError("the data spec has no source")
    for name in names:
      if names.count(name) > 1:
        raise ValueError(f"source {name!r} is named {names.count(name)} times in the data spec")
    self.spec = spec
    self.phases = mixture.phases(spec.phases, names)
    self.tokenizer = tokenizers.load(spec.tokenizer, end=spec.end)
    self._folder = folder
    self._documents: dict[str, tuple[sources.Document, ...]] = {}
    self._tokens: dict[tuple[str, str], packing.Tokens] = {}

  def mixed(self, phases: Sequence) -> "Corpus":
    """Returns the same documents and ids, mixed by other phases."""
    other = copy.copy(self)  # both remember what is read and tokenised, whoever asks first
    other.spec = dataclasses.replace(self.spec, phases=tuple(phases))
    other.phases = mixture.phases(other.spec.phases, [source.name for source in self.spec.sources])
    return other

  def documents(self, source: str, split: str) -> tuple[sources.Document, ...]:
    """Returns the documents of a source's split, ordered by name."""
    known = {s.name: s for s in self.spec.sources}
    if source not in known:
      raise ValueError(f"source {source!r} is not in the data spec; it has {', '.join(known)}")
    if source not in self._documents:
      self._documents[source] = sources.read(known[source])
    everything, rule = self._documents[source], known[source].rule
    found = sources.split(everything, split, rule=rule)
    if not found:
      raise ValueError(
        f"split {split!r} of source {source!r} is empty: rule {rule!r} gives it none of the "
        f"source's {len(everything)} documents"
      )
    return found

  def tokens(self, source: str, split: str) -> packing.Tokens:
    """Returns the ids of a source's split."""
    if (source, split) not in self._tokens:
      documents = self.documents(source, split)
      tokenizer = self.tokenizer

      def make() -> packing.Tokens:
        if not documents[0].parts:
          ids, counts = tokenizer.encode_all([d.text for d in documents]), None
        else:
          special = functools.partial(tokenizers.special, tokenizer, place=f"source {source!r}")
          ids, counts = instructions.encode([d.parts for d in documents], tokenizer, special)
        return packing.join(ids, eot=tokenizer.eot, V=tokenizer.V, counts=counts)

      key = _digest({
        "version": _TOKENS_VERSION, "documents": sources.fingerprint(documents),
        "ids": tokenizer.fingerprint,
      })
      self._tokens[source, split] = cache.get(self._folder, key, make)
    return self._tokens[source, split]

  def fingerprint(self, source: str, split: str) -> str:
    """Returns a SHA-256 of a split's names and texts and of the tokenizer."""
    documents = sources.fingerprint(self.documents(source, split))
    return _digest({"documents": documents, "tokenizer": self.tokenizer.fingerprint})


@runtime_checkable
class Rows(Protocol):
  """What knows more about each row of a stream, see `Batches.joined`."""

  fingerprint: str

  def join(self, first: int, batch: Batch) -> Batch:
    """Returns a batch with more arrays; `first` is the number of its first row in the stream."""


class Batches:
  """An endless iterator over training batches whose position can be saved and set.

  A thread makes the next ones meanwhile; the position is that of the batch handed out last.

  fingerprint: of everything that decides the batches, process count left out, so that a run may
    go on with other processes.
  """

  def __init__(self, dataset: grain.MapDataset, fingerprint: str, *, share: tuple[int, int, int]):
    # One thread: order is kept, and the interpreter's lock would let no second one run.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    self._dataset, self._share = dataset, share
    self._inner = iter(dataset.to_iter_dataset(options))
    self.fingerprint = fingerprint

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Batch:
    found = next(self._inner)
    if isinstance(found, ValueError):
      raise ValueError(str(found)) from found
    return found

  def joined(self, rows: Rows) -> "Batches":
    """Returns the same batches from the start, each with what `rows` knows about its rows."""
    size, index, count = self._share

    def join(number: int, batch: Batch) -> Batch | ValueError:
      try:
        return rows.join((number * count + index) * size, batch)
      except ValueError as error:  # grain would write its own lines under the message
        return error

    key = _digest({"batches": self.fingerprint, "rows": rows.fingerprint})
    return Batches(self._dataset.map_with_index(join), key, share=self._share)

  def skip(self, count: int) -> None:
    """Moves to where `count` batches have been handed out."""
    self._inner.set_state(self._inner.get_state() | {"next_index": count})

  def get_state(self) -> dict:
    """Returns the position, for JSON."""
    return {"fingerprint": self.fingerprint, "grain": self._inner.get_state()}

  def set_state(self, state: Mapping) -> None:
    """Moves to a position that `get_state` gave for the same data."""
    if state["fingerprint"] != self.fingerprint:
      raise ValueError(
        f"the saved position belongs to data {state['fingerprint'][:12]}, "
        f"this is data {self.fingerprint[:12]}: sources, tokenizer, mixture, seed, batch or length "
        "differ"
      )
    self._inner.set_state(dict(state["grain"]))


def train_batches(
  corpus: Corpus, *, batch: int, length: int, seed: int, split: str = "train",
  process_index: int = 0, process_count: int = 1,
) -> Batches:
  """Returns this process's share [batch / process_count, L] of an endless stream of batches.

  Every epoch of a source holds each token once as a target, in an order of its own: documents are
  laid out anew and rows shuffled; its last row is padded. The shares in order of process are the
  batch of one process.
  """
  _check(batch, length)
  _check_process(batch, process_index, process_count)
  if seed < 0:
    raise ValueError(f"seed {seed} is negative")
  names = tuple(sorted({name for _, weights in corpus.phases for name, _ in weights}))
  rows = [
    _rows(corpus, name, split, length, order="shuffled", seed=_seed(seed, name, "documents"))
    .shuffle(seed=_seed(seed, name, "rows")).repeat()
    for name in names
  ]
  selection = mixture.Selection(corpus.phases, names=names, batch=batch)
  mixed = grain.MapDataset.select_from_datasets(rows, selection)
  size = batch // process_count
  share = mixed.batch(size, drop_remainder=True)[process_index::process_count]
  key = train_fingerprint(corpus, batch=batch, length=length, seed=seed, split=split)
  return Batches(share, key, share=(size, process_index, process_count))


def eval_batches(
  corpus: Corpus, *, source: str, split: str, batch: int, length: int, limit: int | None = None,
  process_index: int = 0, process_count: int = 1,
) -> list[Batch]:
  """Returns this process's share of a split in order, each token once; the last batch is padded.

  limit: at most so many batches, of rows spread evenly over the split, instead of all.
  """
  _check(batch, length)
  _check_process(batch, process_index, process_count)
  if limit is not None and limit < 1:
    raise ValueError(f"limit {limit} of evaluation batches is below 1")
  rows = _rows(corpus, source, split, length, order="given")
  total = len(rows)
  chosen = total if limit is None else min(total, limit * batch)
  picked = [i * total // chosen for i in range(chosen)]
  share = batch // process_count
  batches = []
  for first in range(process_index * share, -(-chosen // batch) * batch, batch):
    found = [rows[i] for i in picked[first : first + share]]
    batches.append(_stack(found, share, length, corpus.tokenizer.eot))
  return batches


def train_fingerprint(
  corpus: Corpus, *, batch: int, length: int, seed: int, split: str = "train",
) -> str:
  """Returns a SHA-256 of all that decides `train_batches`, process by process excepted."""
  used = sorted({name for _, weights in corpus.phases for name, _ in weights})
  return _digest({
    "version": _VERSION, "batch": batch, "length": length, "seed": seed, "phases": corpus.phases,
    "sources": {name: corpus.fingerprint(name, split) for name in used},
  })


def rows_fingerprint(
  corpus: Corpus, *, batch: int, length: int, seed: int, split: str = "train",
) -> str:
  """Returns a SHA-256 of all that decides the rows of `train_batches` and their order.

  Batches of other sizes hold the same rows, as long as phases start at the same rows.
  """
  used = sorted({name for _, weights in corpus.phases for name, _ in weights})
  return _digest({
    "version": _VERSION, "length": length, "seed": seed,
    "phases": [(step * batch, weights) for step, weights in corpus.phases],
    "sources": {name: corpus.fingerprint(name, split) for name in used},
  })


def eval_fingerprint(
  corpus: Corpus, *, source: str, split: str, batch: int, length: int, limit: int | None = None,
) -> str:
  """Returns a SHA-256 of all that decides `eval_batches`."""
  return _digest({
    "version": _VERSION, "batch": batch, "length": length, "limit": limit,
    "source": corpus.fingerprint(source, split),
  })


def _rows(corpus: Corpus, source: str, split: str, length: int, **order) -> packing.Rows:
  tokens = corpus.tokens(source, split)
  if tokens.start[-1] < length:
    raise ValueError(
      f"split {split!r} of source {source!r} has {tokens.start[-1]} tokens, "
      f"fewer than one sequence of {length}"
    )
  return packing.Rows(tokens, length=length, **order)


def _stack(rows: Sequence[packing.Row], batch: int, length: int, eot: int) -> Batch:
  """Returns rows as one batch, filled up with rows of padding."""
  fill = {"token_BL": eot, "target_BL": eot, "segment_BL": 0, "weight_BL": 0}
  stacked = {}
  for name, value in fill.items():
    dtype = np.float32 if name == "weight_BL" else np.int32
    stacked[name] = np.full((batch, length), value, dtype)
    for b, row in enumerate(rows):
      stacked[name][b] = row[name]
  return stacked


def _check(batch: int, length: int) -> None:
  if batch < 1:
    raise ValueError(f"batch {batch} is below 1")
  if length < 1:
    raise ValueError(f"sequence length {length} is below 1")


def _check_process(batch: int, index: int, count: int) -> None:
  if count < 1 or not 0 <= index < count:
    raise ValueError(f"process {index} is not one of {count}")
  if batch % count:
    raise ValueError(f"batch {batch} is not a multiple of the {count} processes")


def _seed(seed: int, *names: str) -> int:
  """Returns 32 bits; grain adds the epoch to a seed, so neighbouring seeds must lie far apart."""
  return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:4], "little")


def _digest(values: Mapping) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
