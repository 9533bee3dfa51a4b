"""Batches in, statistics of rows out: the programs that run the estimators of a spec."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes
from hybridlm.config import ModelConfig, attention_of, block_name
from hybridlm.prune.estimators import table
from hybridlm.prune.estimators.base import Moments, Seen, owned, rotary, tie

Apply = Callable[[Any, Mapping[str, Any], tuple[str, ...]], Mapping[str, Mapping[str, jax.Array]]]
Loss = Callable[[Any, Any, Mapping[str, Any]], Mapping[str, jax.Array]]
Chosen = tuple[tuple[str, str], ...]  # score and name, from `table.parse`
META = "meta_MD"
Rows = dict[str, Any]  # path of a score -> [rows, ...], and of the mean of a variance beside it


def _named(path: str, value: Any, block) -> Rows:
  """Returns a statistic under its path; channels of a rotary pair share theirs."""
  turned = rotary(block) if path.endswith("score_E") else 0
  if isinstance(value, Moments):
    return {path: tie(value.m2_B, turned), f"{path}/mean_{value.letters}": value.mean_B}
  return {path: tie(value, turned)}


def _blocks(cfg: ModelConfig, wanted) -> dict[str, Any]:
  return {name: cfg.blocks[int(name)] for name in wanted}


def _lent(cfg: ModelConfig, found, name: str) -> Mapping[str, jax.Array]:
  """Returns a block's taps, with the keys and values that it reads where they are another's."""
  attention = attention_of(cfg.blocks[int(name)])
  if attention is None or not attention.shared:
    return found[name]
  theirs = found[block_name(cfg.owners[int(name)])]
  return {tap: a for tap, a in theirs.items() if tap.startswith(("k_", "v_"))} | found[name]


def _products(cfg: ModelConfig, loss: Loss, params, row: Mapping[str, Any], wanted, outside):
  """Returns weight times gradient of one row's mean loss, for the projections that are scored."""
  blocks = _blocks(cfg, wanted)
  leaves = {name: {leaf: params["blocks"][name][leaf].astype(jnp.float32)
                   for score in mine for leaf in owned(blocks[name], params["blocks"][name], score)}
            for name, mine in wanted.items()}
  leaves |= {"embed": {META: params["embed"][META].astype(jnp.float32)}} if outside else {}

  def mean(leaves):
    inner = {name: {**folder, **leaves.get(name, {})}
             for name, folder in params["blocks"].items()}
    embed = {**params["embed"], **leaves.get("embed", {})}
    sums = loss({**params, "embed": embed, "blocks": inner}, None, row)
    return sums["loss"] / jnp.maximum(sums["weight"], 1.0)

  return jax.tree.map(jnp.multiply, leaves, jax.grad(mean)(leaves))


# Programs are kept, so that calibrations of one config and spec compile once.
@functools.lru_cache(maxsize=16)
def taps(cfg: ModelConfig, apply: Apply, chosen: Chosen) -> Callable[..., Rows] | None:
  """Returns the program `(params, batch) -> rows` of the estimators that read activations.

  One forward pass serves them all. None: none was chosen.
  """
  wanted = table.asked(cfg, dict(chosen), "taps")
  blocks = _blocks(cfg, wanted)
  names = {tap for name, mine in wanted.items() for score, each in mine.items()
           for tap in each.statistics[score].reads(blocks[name])}

  def run(params, batch):
    found = apply(params, batch, tuple(sorted(names)))
    rows: Rows = {}
    for name, mine in wanted.items():
      seen = Seen(blocks[name], params["blocks"][name], _lent(cfg, found, name),
                  batch["weight_BL"], batch.get("segment_BL"))
      for score, each in mine.items():
        rows |= _named(f"{name}/{score}", each.statistics[score].fold(seen), blocks[name])
    return rows

  return jax.jit(run) if wanted else None


@functools.lru_cache(maxsize=16)
def gradients(
  cfg: ModelConfig, loss: Loss | None, chosen: Chosen
) -> Callable[..., Rows] | None:
  """Returns the program `(params, batch) -> rows` of the estimators that read gradients.

  Rows are taken one after another, so that one gradient is held at a time; a row's loss is the mean
  over its real tokens, and its statistic is weighted by their share of the row.

  Raises:
    ValueError: such an estimator was chosen, and there is no loss.
  """
  wanted = table.asked(cfg, dict(chosen), "gradients")
  outside = table.meta(cfg, dict(chosen), "gradients")
  if not wanted and outside is None:
    return None
  if loss is None:
    names = sorted({name for _, name in chosen if table.named(name).reads == "gradients"})
    raise ValueError(f"estimator {names[0]!r} reads gradients: it needs a loss, and none was given")
  blocks = _blocks(cfg, wanted)

  def one(params, row):
    products = _products(cfg, loss, params, row, wanted, outside)
    share, rows = row["weight_BL"].mean(), {}
    if outside:
      rows["score_M"] = share * outside.fold(Seen(None, products["embed"]))
    for name, mine in wanted.items():
      seen = Seen(blocks[name], products[name])
      for score, each in mine.items():
        value = share * each.statistics[score].fold(seen)
        rows |= _named(f"{name}/{score}", value, blocks[name])
    return rows

  def run(params, batch):
    rows = {name: v_BL[:, None] for name, v_BL in batch.items()}
    return jax.lax.map(lambda row: one(params, row), rows)

  return jax.jit(run)


@functools.lru_cache(maxsize=16)
def counts(cfg: ModelConfig, chosen: Chosen) -> Callable[..., Rows] | None:
  """Returns the program `(params, batch) -> rows` of token counts, if V is scored."""
  if "score_V" not in dict(chosen):
    return None

  def run(params, batch):
    def count(token_L, weight_L):
      return jnp.zeros(cfg.V, jnp.float32).at[token_L].add(weight_L)

    return {"score_V": jax.vmap(count)(batch["token_BL"], batch["weight_BL"])}

  return jax.jit(run)


def still(
  cfg: ModelConfig, params: Mapping[str, Any], chosen: Chosen, seed: int
) -> dict[str, np.ndarray]:
  """Returns the scores that no batch is read for: of weights, and draws."""
  sums = {}
  for name, mine in table.asked(cfg, dict(chosen), "weights").items():
    block = cfg.blocks[int(name)]
    for score, each in mine.items():
      value = each.statistics[score].fold(Seen(block, params["blocks"][name]))
      sums |= _named(f"{name}/{score}", np.asarray(value, np.float64), block)
  outside = table.meta(cfg, dict(chosen), "weights")
  if outside:
    sums["score_M"] = np.asarray(outside.fold(Seen(None, params["embed"])), np.float64)
  rng = np.random.default_rng(seed)
  for name, mine in table.asked(cfg, dict(chosen), "draw").items():
    for score, each in sorted(mine.items()):
      shape = axes.shape(score, cfg.sizes(int(name)))
      value = each.statistics[score].fold(rng, shape)
      sums |= _named(f"{name}/{score}", value, cfg.blocks[int(name)])
  drawn = table.meta(cfg, dict(chosen), "draw")
  return sums | ({"score_M": drawn.fold(rng, (cfg.meta,))} if drawn else {})
