"""Scores: how much each entry of an axis matters, by folding activations over calibration rows.

An estimator is a table from block kind to the tap it reads and the letters its score keeps. For a
row of L positions with real tokens R the statistic of a channel is mean over R of |a|, and scores
are the root of sum(w * mean^2) / sum(w) over rows, w = |R| / L (arXiv 2504.11409, section 3;
mean over the sequence and L2 over the batch, arXiv 2407.14679, section 2.2). Sums and weights
are kept, so that scores merge over batches, hosts and runs.
"""

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridlm import axes
from hybridlm.config import Attention, Mamba, Mlp, ModelConfig, block_name
from hybridlm.prune.trees import tree_hash

VERSION = 1
# The score each axis is chosen by.
SCORE_OF = {"H": "score_GHP", "P": "score_GHP", "F": "score_F", "D": "score_D", "J": "score_KJ"}
TAP_OF: Mapping[type, tuple[str, str]] = {
  Mamba: ("x_BLGHP", "score_GHP"),
  Attention: ("head_BLKJE", "score_KJ"),
  Mlp: ("up_BLF", "score_F"),
}
# Estimators that read activations, as changes to TAP_OF. "activation" is Minitron-SSM's; the
# others score the heads on the gate or on the output projection's input instead (its Table 2),
# or the MLP after its activation function.
ACTIVATION: Mapping[str, Mapping[type, tuple[str, str]]] = {
  "activation": {},
  "activation_z": {Mamba: ("z_BLGHP", "score_GHP")},
  "activation_out": {Mamba: ("y_BLGHP", "score_GHP")},
  "activation_post": {Mlp: ("act_BLF", "score_F")},
}
ESTIMATORS = (*ACTIVATION, "magnitude", "random")
Apply = Callable[[Any, Mapping[str, Any], tuple[str, ...]], Mapping[str, Mapping[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Sums over calibration rows, and what they were made from.

  Attributes:
    sums: `07/score_F` -> sum of w * mean^2 (float32), and `score_X` for blocks: a plain mean.
    weight: sum of w.
    meta: parameters (SHA-256), estimator, version, dtype, data, tokens.
  """

  sums: Mapping[str, np.ndarray]
  weight: float
  meta: Mapping[str, Any]

  def get(self, path: str) -> np.ndarray:
    """Returns the scores of one axis of one block, non-negative, larger for what matters more.

    Raises:
      ValueError: the axis was not calibrated.
    """
    if path not in self.sums:
      raise ValueError(f"scores miss {path!r}: calibrate that axis, they hold {self.axes}")
    mean = np.asarray(self.sums[path], np.float64) / self.weight
    return mean if path == "score_X" else np.sqrt(mean)

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
      ValueError: they were made from other parameters, another estimator or another dtype.
    """
    for key in ("parameters", "estimator", "version", "dtype", "depth"):
      one, two = self.meta.get(key), other.meta.get(key)
      if one != two:
        raise ValueError(f"scores differ in {key}: {one} and {two}")
    if self.meta["estimator"] == "random":
      raise ValueError("scores of the estimator 'random' do not merge: a mean of draws is no draw")
    if set(self.sums) != set(other.sums):
      raise ValueError(f"scores differ in axes: {self.axes} and {other.axes}")
    sums = {path: self.sums[path] + other.sums[path] for path in self.sums}
    tokens = self.meta["tokens"] + other.meta["tokens"]
    data = sorted({*self.meta["data"].split("+"), *other.meta["data"].split("+")} - {""})
    meta = {**self.meta, "tokens": tokens, "data": "+".join(data)}
    return Scores(sums, self.weight + other.weight, meta)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the scores as one `.npz` file, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    meta = json.dumps({"weight": self.weight, **self.meta})
    np.savez(held, **{"meta": np.array(meta)}, **{k: np.asarray(v) for k, v in self.sums.items()})
    part = path.with_name(path.name + ".part")
    part.write_bytes(held.getvalue())
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
        sums = {key: held[key] for key in held.files if key != "meta"}
        meta = json.loads(str(held["meta"]))
        return cls(sums, meta.pop("weight"), meta)
    except Exception as error:
      raise ValueError(f"scores {path}: not a score file: {error}") from error


def row_statistic(
  a: Float[Array, "B L ..."], weight_BL: Float[Array, "B L"]
) -> Float[Array, "B ..."]:
  """Returns w * (mean over real tokens of |a|)^2 for each row, w = real tokens / L, in float32."""
  real_B = weight_BL.sum(1)
  summed = jnp.einsum("bl...,bl->b...", jnp.abs(a.astype(jnp.float32)), weight_BL)
  scale_B = 1.0 / (jnp.maximum(real_B, 1.0) * weight_BL.shape[1])
  return jnp.einsum("b...,b->b...", jnp.square(summed), scale_B)


def taps_of(cfg: ModelConfig, estimator: str, letters: str) -> dict[str, list[tuple[str, str]]]:
  """Returns block folder -> pairs (tap, score) that an activation estimator folds."""
  table = {**TAP_OF, **ACTIVATION[estimator]}
  wanted = {SCORE_OF[letter] for letter in letters}
  found = {}
  for index, block in enumerate(cfg.blocks):
    pairs = [table[type(block)], ("norm_BLD", "score_D")]
    found[block_name(index)] = [pair for pair in pairs if pair[1] in wanted]
  return found


def _fold(taps, pairs, weight_BL) -> dict[str, jax.Array]:
  sums = {}
  for name, asked in pairs.items():
    for tap, score in asked:
      a = taps[name][tap]
      if tap == "head_BLKJE":
        a = jnp.linalg.norm(a.astype(jnp.float32), axis=-1)
      sums[f"{name}/{score}"] = row_statistic(a, weight_BL).sum(0)
  return sums


def _activation(apply: Apply, params, batches, pairs) -> tuple[dict[str, np.ndarray], float, int]:
  names = tuple(sorted({tap for asked in pairs.values() for tap, _ in asked}))

  @jax.jit
  def fold(params, batch):
    sums = _fold(apply(params, batch, names), pairs, batch["weight_BL"])
    return sums, batch["weight_BL"].sum()

  total: dict[str, np.ndarray] = {}
  weight, tokens = 0.0, 0
  for index, batch in enumerate(batches):
    sums, real = jax.device_get(fold(params, batch))
    for path, value in sums.items():
      if not np.isfinite(value).all():
        raise ValueError(f"calibration batch {index}: activations of {path} are not finite")
      total[path] = total.get(path, np.float32(0)) + value
    weight += float(real) / batch["weight_BL"].shape[1]
    tokens += int(real)
  if tokens == 0:
    raise ValueError("calibration: no batch holds a real token")
  return total, weight, tokens


def _magnitude(cfg: ModelConfig, params, letters: str) -> dict[str, np.ndarray]:
  """Scores from weights alone: the squared entries of the projections, summed over other axes."""
  wanted = {SCORE_OF[letter] for letter in letters}
  sums: dict[str, np.ndarray] = {}
  for index in range(len(cfg.blocks)):
    name = block_name(index)
    for leaf_name, leaf in params["blocks"][name].items():
      have = axes.of(leaf_name)
      for score in wanted if leaf_name.startswith("w_") else ():
        keep = axes.of(score)
        if set(keep) <= set(have):
          spec = f"{have}->{keep}"
          path = f"{name}/{score}"
          value = np.asarray(jnp.einsum(spec, jnp.square(jnp.asarray(leaf, jnp.float32))))
          sums[path] = sums.get(path, np.float32(0)) + value
  return sums


def _random(cfg: ModelConfig, letters: str, seed: int) -> dict[str, np.ndarray]:
  wanted = sorted({SCORE_OF[letter] for letter in letters})
  rng = np.random.default_rng(seed)
  sums = {}
  for index, block in enumerate(cfg.blocks):
    for score in wanted:
      if set(axes.of(score)) <= {"D", *block.axes}:
        shape = axes.shape(score, cfg.sizes(index))
        sums[f"{block_name(index)}/{score}"] = rng.uniform(size=shape).astype(np.float32)
  return sums


def calibrate(
  cfg: ModelConfig,
  apply: Apply,
  params: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
  *,
  estimator: str = "activation",
  letters: str = "HPFDJ",
  data: str = "",
  seed: int = 0,
) -> Scores:
  """Returns the scores of the given axes.

  Args:
    cfg: the model.
    apply: `(params, batch, taps) -> taps`, block folder -> tap name -> activations.
    params: its parameters.
    batches: dicts with `token_BL`, `weight_BL` and `segment_BL`; not read by "magnitude" and
      "random".
    estimator: one of `ESTIMATORS`.
    letters: the axes to score.
    data: fingerprint of the batches, kept with the scores.
    seed: of the "random" estimator.

  Raises:
    ValueError: an unknown estimator or axis, no real token, or activations that are not finite.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
  if not letters or not set(letters) <= set(SCORE_OF):
    raise ValueError(f"axes {letters!r}: choose from {''.join(SCORE_OF)}")
  weight, tokens = 1.0, 0
  if estimator in ACTIVATION:
    pairs = taps_of(cfg, estimator, letters)
    sums, weight, tokens = _activation(apply, params, batches, pairs)
  elif estimator == "magnitude":
    sums, data = _magnitude(cfg, params, letters), ""
  else:
    sums, data = _random(cfg, letters, seed), f"seed {seed}"
  meta = {
    "parameters": tree_hash(params),
    "estimator": estimator,
    "version": VERSION,
    "dtype": cfg.dtype,
    "data": data,
    "tokens": tokens,
  }
  return Scores(sums, weight, meta)
