"""The score store: a calibration on disk, with what it was made from, that can always go on.

A store is one file of `Scores`: sums in float64, what decides them, and a digest of every row that
was counted. It is replaced whole, so that a killed run loses what came after its last save and
nothing else. Rows that a store holds are never computed again, whatever batches they come in.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridlm.config import ModelConfig, block_name
from hybridlm.prune import depth as depths
from hybridlm.prune import scores as scoring
from hybridlm.prune.estimators import fold, table
from hybridlm.prune.estimators.base import rotary
from hybridlm.prune.scores import Scores
from hybridlm.prune.trees import tree_hash

# What a calibration is made from; where one differs, it is another.
KEY = (
  "parameters", "config", "data", "estimator", "version", "axes", "dtype", "depth", "window",
  "noop", "seed",
)
# Fields of a config by which it is computed, or made, the same: they change no score.
FREE = (
  "context", "dtype", "remat", "init_std", "ssd", "chunk", "attention", "stack", "layout",
  "quantize", "wide_ends", "held",
)
# What blocks, or a model, without something have instead: as if that were not known.
ABSENT = {"meta": 0, "U": None, "shared": False, "gate": "gated"}
Batch = Mapping[str, Any]


class Model(NamedTuple):
  """A model as calibration takes it.

  cfg: its config.  params: its parameters, on any mesh.  apply: `(params, batch, taps) -> taps`.
  hidden: `(params, batch) -> (hidden_BLD, head_DV)`, for scores of meta tokens with what stays
  (`prune.cut.mask`) as a third argument.  loss: `(params, frozen, batch) -> sums`, for
  estimators that read gradients.  place: lays a batch out on the devices.
  """

  cfg: ModelConfig
  params: Mapping[str, Any]
  apply: fold.Apply
  hidden: depths.Hidden | None = None
  loss: fold.Loss | None = None
  place: Callable[[Batch], Batch] = dict


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is measured.

  Attributes:
    estimator: a name, or a name and exceptions by letter (`prune.estimators.table.parse`).
    axes: letters to score.
    depth: one of `prune.depth.ESTIMATORS`; None: blocks are not scored.
    window: how many blocks go together, for the depth estimator "window".
    noop: "kl" scores what each block loses without its SSM, a parallel one without either branch;
      None: not scored.
    data: fingerprint of the text that batches are drawn from, not of how many.
    seed: of the estimator "random".
  """

  estimator: str = "activation"
  axes: str = "HPFDJ"
  depth: str | None = None
  window: int | None = None
  noop: str | None = None
  data: str = ""
  seed: int = 0

  def chosen(self) -> fold.Chosen:
    """Returns each score and the estimator that measures it."""
    return tuple(sorted(table.parse(self.estimator, self.axes).items()))

  def reads_batches(self) -> bool:
    """Whether there is anything to read batches for."""
    read = {score for score, name in self.chosen()
            if score == "score_V" or table.named(name).reads in ("taps", "gradients")}
    return bool(read or self.depth or self.noop)

  def readings(self) -> dict[str, str]:
    """Returns how scores are read off their sums, see `Scores`."""
    found = {score: "count" if score == "score_V" else table.named(name).reading
             for score, name in self.chosen()}
    return found | ({"score_X": "order"} if self.depth == "greedy" else {})


def config_hash(cfg: ModelConfig) -> str:
  """Returns the SHA-256 of what a config says that parameters do not: positions, windows, eps."""
  def known(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items()
            if name not in FREE and not (name in ABSENT and value == ABSENT[name])}

  plain = known(cfg.to_dict())
  plain["blocks"] = [known(block) for block in plain["blocks"]]
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def fingerprint(cfg: ModelConfig, params: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
  """Returns all that decides a row's statistics: the model, data, estimators and their version."""
  axes = "".join(letter for letter in table.SCORE_OF if letter in spec.axes)
  drawn = "random" in spec.estimator
  seed, data = spec.seed if drawn else 0, spec.data
  if not spec.reads_batches():
    data = f"seed {seed}" if drawn else ""
  return {
    "parameters": tree_hash(params), "config": config_hash(cfg), "data": data,
    "estimator": spec.estimator, "version": table.VERSION, "axes": axes, "dtype": cfg.dtype,
    "depth": spec.depth, "window": spec.window, "noop": spec.noop, "seed": seed,
  }


def held(path: str | os.PathLike, key: Mapping[str, Any]) -> Scores | None:
  """Returns the scores that a store holds; None where there is no file.

  Raises:
    ValueError: the file holds no scores, or those of another calibration; says what differs.
  """
  if not pathlib.Path(path).is_file():
    return None
  scores = Scores.load(path)
  for name in KEY:
    if scores.meta.get(name) != key[name]:
      theirs, ours = (str(value)[:40] for value in (scores.meta.get(name), key[name]))
      raise ValueError(f"score store {path}: of another calibration, its {name} is {theirs!r}, "
                       f"not {ours!r}")
  return scores


def merge(paths: Sequence[str | os.PathLike]) -> Scores:
  """Returns the scores of several stores together, as of one run over all their rows.

  Raises:
    FileNotFoundError: a store is not there.
    ValueError: no store; stores of different calibrations, or that count the same row.
  """
  if not paths:
    raise ValueError("score stores: none given to merge")
  first, *rest = (Scores.load(path) for path in paths)
  for path, other in zip(paths[1:], rest, strict=True):
    for name in KEY:
      if other.meta.get(name) != first.meta.get(name):
        raise ValueError(f"score store {path}: its {name} is {other.meta.get(name)!r}, that of "
                         f"{paths[0]} is {first.meta.get(name)!r}")
    first = first.merge(other)
  return first


def digests(batch: Batch) -> list[str]:
  """Returns the SHA-256 of each row of a batch: all its arrays."""
  names = sorted(batch)
  arrays = {name: np.ascontiguousarray(batch[name]) for name in names}
  found = []
  for row in range(len(arrays["token_BL"])):
    digest = hashlib.sha256()
    for name in names:
      value = arrays[name][row]
      digest.update(f"{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
    found.append(digest.hexdigest())
  return found


def _real(batch: Batch) -> np.ndarray:
  return np.asarray(batch["weight_BL"]).sum(1) > 0


def rest(
  batches: Sequence[Batch], rows: Iterable[str], name: str = "scores"
) -> list[tuple[Batch, list[str]]]:
  """Returns `(batch, digests)` of what is still to be computed, in order.

  Batches that hold rows counted already are put together anew with others of their length, of the
  same size, and filled up with padding.

  Raises:
    ValueError: `rows` counts one that is in no batch: what it holds is more than was asked for.
  """
  named = [digests(batch) for batch in batches]
  left = collections.Counter(rows)
  fresh = []
  for batch, own in zip(batches, named, strict=True):
    mask = _real(batch)
    for row, digest in enumerate(own):
      if left[digest] > 0:
        left[digest] -= 1
        mask[row] = False
    fresh.append(mask)
  more = sum(count for count in left.values() if count > 0)
  if more:
    raise ValueError(f"{name}: {more} rows it counts are not among the data given")
  if not any((mask != _real(batch)).any() for batch, mask in zip(batches, fresh, strict=True)):
    return list(zip(batches, named, strict=True))
  alike: dict[Any, list[int]] = {}
  for number, batch in enumerate(batches):
    shapes = tuple((key, np.shape(batch[key])[1:]) for key in sorted(batch))
    alike.setdefault(shapes, []).append(number)
  return [one for numbers in alike.values()
          for one in _packed(*([part[n] for n in numbers] for part in (batches, named, fresh)))]


def _packed(batches, named, fresh) -> list[tuple[Batch, list[str]]]:
  """Returns the fresh rows of batches in batches of the first one's size."""
  if not any(mask.any() for mask in fresh):
    return []
  size = len(fresh[0])
  rows = {key: np.concatenate([np.asarray(b[key])[m] for b, m in zip(batches, fresh, strict=True)])
          for key in batches[0]}
  names = [d for own, m in zip(named, fresh, strict=True)
           for d, keep in zip(own, m, strict=True) if keep]
  short = -len(names) % size
  rows = {key: np.concatenate([v, np.zeros((short, *v.shape[1:]), v.dtype)])
          for key, v in rows.items()}
  return [({key: v[i : i + size] for key, v in rows.items()},
           (names + [""] * short)[i : i + size]) for i in range(0, len(names), size)]


def _start(model: Model, spec: Spec, key: Mapping[str, Any]) -> Scores:
  """Returns the scores before the first row."""
  chosen = spec.chosen()
  turned = {block_name(i): rotary(block) for i, block in enumerate(model.cfg.blocks)}
  meta = {**key, "tokens": 0, "readings": spec.readings(),
          "rotary": {name: count for name, count in turned.items() if count}}
  sums = fold.still(model.cfg, model.params, chosen, spec.seed)
  return Scores(sums, 0.0, meta)


def _programs(model: Model, spec: Spec) -> list[Callable[..., Mapping[str, Any]]]:
  """Returns what is run on each batch, compiled once each."""
  cfg, chosen = model.cfg, spec.chosen()
  made = [fold.taps(cfg, model.apply, chosen), fold.gradients(cfg, model.loss, chosen),
          fold.counts(cfg, chosen)]
  if table.meta(cfg, dict(chosen), "taps"):
    made.append(depths.tokens(cfg, model.hidden))
  if spec.depth not in (None, "greedy") or spec.noop:
    made.append(depths.rows(cfg, model.apply, model.hidden, depth=spec.depth, window=spec.window,
                            noop=spec.noop))
  return [program for program in made if program is not None]


def _check(number: int, found: Mapping[str, np.ndarray]) -> None:
  for path, value in found.items():
    if path.endswith("_X"):
      depths.finite(number, path, value)
    elif not np.isfinite(value).all():
      raise ValueError(f"calibration batch {number}: activations of {path} are not finite")


def _needs(model: Model, spec: Spec, batches: Sequence[Batch]) -> None:
  """Raises where data are asked for that batches do not hold."""
  for _, name in spec.chosen():
    missing = [n for n, batch in enumerate(batches) if "target_BL" not in batch]
    if table.named(name).reads == "gradients" and missing:
      raise ValueError(f"estimator {name!r} reads gradients of the loss: batch {missing[0]} has no "
                       "target_BL")


def calibrate(
  model: Model,
  batches: Iterable[Batch],
  spec: Spec,
  *,
  path: str | os.PathLike | None = None,
  every: int = 4,
) -> Scores:
  """Returns the scores of a model on all rows of the batches, each computed once.

  Args:
    model: what is scored.
    batches: dicts with `token_BL`, `weight_BL`, `segment_BL` and, for gradients, `target_BL`.
    spec: what is measured.
    path: a store that is gone on with, saved every few batches and at the end; None: memory only.
    every: batches between saves.

  Raises:
    ValueError: an unknown estimator or axis, or one that does not go with the other; no real token;
      activations that are not finite; a store of another calibration or of more data.
  """
  if every < 1:
    raise ValueError(f"score store: every={every} batches between saves must be at least 1")
  depths.check(model.cfg, spec.depth, spec.window, spec.noop)
  programs = _programs(model, spec)
  key, batches = fingerprint(model.cfg, model.params, spec), list(batches)
  if not spec.reads_batches():
    batches = []
  _needs(model, spec, batches)
  scores = None if path is None else held(path, key)
  scores = scores or _start(model, spec, key)
  todo = [(batch, digests(batch)) for batch in batches]
  if scores.rows:
    todo = rest(batches, scores.rows, f"score store {path}")
  for number, (batch, names) in enumerate(todo):
    scores = _add(model, scores, programs, number, batch, names)
    if path is not None and (number + 1) % every == 0:
      scores.save(path)
  scores = _weighed(scores, spec)
  if spec.depth == "greedy":
    scores = _greedy(model, scores, batches, path)
  if path is not None:
    scores.save(path)
  return scores


def _weighed(scores: Scores, spec: Spec) -> Scores:
  """Returns the scores with weight 1 where no batch is read."""
  if scores.weight:
    return scores
  if spec.reads_batches():
    what = "calibration: no batch holds a real token"
    raise ValueError(what + (", and depth scores need some" if spec.depth or spec.noop else ""))
  return dataclasses.replace(scores, weight=1.0)


def _add(model: Model, scores: Scores, programs, number: int, batch: Batch, names) -> Scores:
  """Returns the scores with one batch more."""
  placed, found = model.place(batch), {}
  for program in programs:
    found |= jax.device_get(program(model.params, placed))
  _check(number, found)
  for row in scoring.rows_of(found, np.asarray(batch["weight_BL"]), names):
    scores = scores.plus(row)
  return scores


def _greedy(model: Model, scores: Scores, batches: Sequence[Batch], path) -> Scores:
  """Returns the scores with the greedy order, gone on with where a run was interrupted.

  An order is one of the rows it was found on: with more of them it is sought from the start.
  """
  rows = len(scores.rows)
  known = scores.meta.get("gone", []) if scores.meta.get("gone_rows") == rows else []

  def save(gone: list[int]) -> None:
    if path is not None:
      meta = {**scores.meta, "gone": gone, "gone_rows": rows}
      dataclasses.replace(scores, meta=meta).save(path)

  order_X = depths.greedy(
    model.cfg, model.hidden, model.params, [model.place(batch) for batch in batches], gone=known,
    save=save,
  )
  meta = {**scores.meta, "gone": [int(i) for i in np.argsort(order_X)], "gone_rows": rows}
  return dataclasses.replace(scores, sums={**scores.sums, "score_X": order_X}, meta=meta)
