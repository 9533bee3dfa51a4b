"""Scores: how much each entry of an axis matters, as sums over calibration rows.

What estimators make of a row (`prune.estimators`) is float32; rows are added in order in float64 on
the host, so that scores do not depend on the batch split, the mesh or where a run was interrupted.
For a row of L positions with R real tokens the weight is w = R / L, and padding never counts. Sums
and weights are kept, so that scores merge over batches, hosts and runs.
"""

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybridlm import axes
from hybridlm.prune.estimators.base import row_statistic, tie
from hybridlm.prune.estimators.fold import Apply, Loss
from hybridlm.prune.estimators.table import REGISTRY, SCORE_OF, VERSION, parse

__all__ = ["ESTIMATORS", "SCORE_OF", "VERSION", "Apply", "Loss", "Scores", "parse", "row_statistic"]
ESTIMATORS = tuple(REGISTRY)
# What two sets of scores must agree in before they are added.
SAME = (
  "parameters", "config", "estimator", "version", "dtype", "depth", "window", "noop", "rotary",
)
MEAN = "/mean_"


@dataclasses.dataclass(frozen=True)
class Scores:
  """Sums over calibration rows, and what they were made from.

  How a score is read off its sum is said by name in `meta["readings"]`: "root", the root of sum
  over weight (the default); "mean", sum over weight (the default of `score_X` and its like);
  "variance", the root of sum over tokens, the sum being one of squared deviations; "weights", the
  root of the sum, which no batch adds to; "order" and "count", the sum.

  Attributes:
    sums: `07/score_F` and, of the whole model, `score_X` -> float64 sums over rows.
    weight: sum of w.
    meta: parameters and config (SHA-256), estimator, version, dtype, data, tokens, readings, and
      the rest of what decides the sums.
    means: `07/score_F/mean_F` -> means over tokens, of scores that are variances.
    rows: digests of the rows counted, where they are known: none is counted twice.
  """

  sums: Mapping[str, np.ndarray]
  weight: float
  meta: Mapping[str, Any]
  means: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  rows: tuple[str, ...] = ()

  def reading(self, path: str) -> str:
    """Returns how a score is read off its sum."""
    name = path.rpartition("/")[2]
    plain = "mean" if name.endswith("_X") else "root"
    return self.meta.get("readings", {}).get(name, plain)

  def get(self, path: str) -> np.ndarray:
    """Returns the scores of one axis of one block, non-negative, larger for what matters more.

    Raises:
      ValueError: the axis was not calibrated.
    """
    if path not in self.sums:
      raise ValueError(f"scores miss {path!r}: calibrate that axis, they hold {self.axes}")
    value, reading = np.asarray(self.sums[path], np.float64), self.reading(path)
    if reading in ("order", "count"):
      return value
    if reading == "mean":
      return value / self.weight
    return np.sqrt(value / {"variance": self.meta.get("tokens"), "weights": 1.0}.get(
      reading, self.weight))

  def width(self) -> np.ndarray:
    """Returns `score_D`: the scores after every block's norm, summed over blocks."""
    paths = sorted(path for path in self.sums if path.endswith("/score_D"))
    return np.sum([self.get(path) for path in paths], axis=0) if paths else self.get("score_D")

  @property
  def axes(self) -> str:
    """Names of the scores held, for messages."""
    return ", ".join(sorted({path.rpartition("/")[2] for path in self.sums})) or "nothing"

  def merge(self, other: "Scores") -> "Scores":
    """Returns the scores of both calibrations together.

    Raises:
      ValueError: they were made from another model, another estimator or another dtype; scores that
        are no sums; or both count the same row.
    """
    for key in SAME:
      one, two = self.meta.get(key), other.meta.get(key)
      if one != two:
        raise ValueError(f"scores differ in {key}: {one} and {two}")
    if "random" in self.meta["estimator"]:
      raise ValueError("scores of the estimator 'random' do not merge: a mean of draws is no draw")
    if "order" in self.meta.get("readings", {}).values():
      raise ValueError("scores of the depth estimator 'greedy' do not merge: orders have no sum")
    if set(self.sums) != set(other.sums):
      raise ValueError(f"scores differ in axes: {self.axes} and {other.axes}")
    twice = set(self.rows) & set(other.rows)
    if twice:
      raise ValueError(f"scores share {len(twice)} rows of data, {min(twice)[:12]} the first: they "
                       "would count twice")
    data = sorted({*self.meta["data"].split("+"), *other.meta["data"].split("+")} - {""})
    return dataclasses.replace(self.plus(other), meta={
      **self.meta, "data": "+".join(data), "tokens": self.meta["tokens"] + other.meta["tokens"]})

  def plus(self, other: "Scores") -> "Scores":
    """Returns the sums of both; nothing is checked.

    Deviations from two means are joined as in Chan, Golub and LeVeque, "Algorithms for computing
    the sample variance" (1983), equation 2.1.
    """
    sums = dict(self.sums)
    for path, value in other.sums.items():
      still = path in sums and self.reading(path) == "weights"
      sums[path] = sums[path] if still else sums.get(path, 0.0) + np.asarray(value, np.float64)
    means, seen, new = dict(self.means), self.meta["tokens"], other.meta["tokens"]
    for path, value in other.means.items():
      value = np.asarray(value, np.float64)
      if path not in means:
        means[path] = value
      elif new:
        gap = value - means[path]
        means[path] = means[path] + gap * (new / (seen + new))
        score = path.partition(MEAN)[0]
        sums[score] = sums[score] + self._onto(path, np.square(gap) * (seen * new / (seen + new)))
    meta = {**self.meta, "tokens": seen + new}
    return Scores(sums, self.weight + other.weight, meta, means, self.rows + other.rows)

  def _onto(self, path: str, value: np.ndarray) -> np.ndarray:
    """Returns an array laid out as a mean is, summed onto the axes of its score."""
    score, _, letters = path.partition(MEAN)
    value = np.einsum(f"{letters}->{axes.of(score.rpartition('/')[2])}", value)
    turned = self.meta.get("rotary", {}).get(score.partition("/")[0], 0)
    return tie(value, turned) if score.endswith("score_E") else value

  def save(self, path: str | os.PathLike) -> None:
    """Writes the scores as one `.npz` file, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    meta = json.dumps({"weight": self.weight, **self.meta})
    arrays = {key: np.asarray(value) for key, value in {**self.sums, **self.means}.items()}
    np.savez(held, **{"meta": np.array(meta), "rows": np.array(self.rows, "U64")}, **arrays)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
      file.write(held.getvalue())
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Scores":
    """Returns the scores a file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file does not hold scores.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"scores {path}: no such file")
    try:
      with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as held:
        arrays = {key: held[key] for key in held.files if key not in ("meta", "rows")}
        rows = tuple(held["rows"].tolist()) if "rows" in held.files else ()
        meta = json.loads(str(held["meta"]))
    except Exception as error:
      raise ValueError(f"scores {path}: not a score file: {error}") from error
    sums = {key: value for key, value in arrays.items() if MEAN not in key}
    means = {key: value for key, value in arrays.items() if MEAN in key}
    if not isinstance(meta, dict) or "weight" not in meta:
      raise ValueError(f"scores {path}: not a score file: it says no weight")
    return cls(sums, meta.pop("weight"), meta, means, rows)


def rows_of(
  found: Mapping[str, Any], weight_BL: np.ndarray, digests: Sequence[str]
) -> Iterator[Scores]:
  """Yields what each row of a batch adds, rows without a real token left out.

  Args:
    found: path -> [B, ...], as the programs of `prune.estimators.fold` return them.
    weight_BL: 1 for real tokens.
    digests: of the rows.
  """
  length = weight_BL.shape[1]
  for row, digest in enumerate(digests):
    real = float(weight_BL[row].sum(dtype=np.float64))
    if not real:
      continue
    mine = {path: np.asarray(value[row], np.float64) for path, value in found.items()}
    sums = {path: value for path, value in mine.items() if MEAN not in path}
    means = {path: value for path, value in mine.items() if MEAN in path}
    yield Scores(sums, real / length, {"tokens": int(round(real))}, means, (digest,))
