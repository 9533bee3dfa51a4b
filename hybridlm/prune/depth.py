"""Depth scores: what the model loses with a block less, with several, or without its state."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import axes
from hybridlm.config import Mamba, ModelConfig, Parallel, block_name, ssm_of
from hybridlm.prune.estimators.fold import Apply

Hidden = Callable[[Any, Mapping[str, Any]], tuple[jax.Array, jax.Array]]
Lost = Callable[[np.ndarray, np.ndarray], np.ndarray]
ESTIMATORS = ("kl", "mse", "greedy", "influence", "window")
NOOP = ("kl",)
# What a parallel block loses with one of its branches off.
BRANCHES = ("score_attention_X", "score_ssm_branch_X")
# Leaves through which blocks write to the residual stream.
WRITES = ("w_o_", "b_o_", "w_out_", "w_down_", "b_down_")
WHOLE = {"precision": "highest"}
# Positions whose logits are held at a time, a row.
_CHUNK = 64


def check(cfg: ModelConfig, depth: str | None, window: int | None, noop: str | None) -> None:
  """Raises unless these are depth estimators of a model.

  Raises:
    ValueError: an unknown name, a window without a length or a length without a window, or one that
      leaves no block.
  """
  if depth is not None and depth not in ESTIMATORS:
    raise ValueError(f"depth estimator {depth!r} is not one of {', '.join(ESTIMATORS)}")
  if noop is not None and noop not in NOOP:
    raise ValueError(f"no-op estimator {noop!r} is not one of {', '.join(NOOP)}")
  if (depth == "window") != (window is not None):
    raise ValueError(f"depth estimator {depth!r} with window={window}: 'window', and no other, "
                     "takes the number of blocks that go")
  if window is not None and not 1 <= window < len(cfg.blocks):
    raise ValueError(f"window={window}: of {len(cfg.blocks)} blocks 1 to {len(cfg.blocks) - 1} "
                     "can go")


def damped(
  cfg: ModelConfig, params: Mapping[str, Any], stay_X: Any, state_X: Any,
  attention_X: Any = None, ssm_X: Any = None,
) -> dict[str, Any]:
  """Returns the tree with every leaf of block i times `stay_X[i]`, those with N also `state_X[i]`.

  A block of zeros adds nothing; one whose leaves with N are zero is its own no-op: y = D x after
  the convolution, gated and normed. Of a block whose keys others read only what it writes to the
  residual stream is damped. `attention_X` and `ssm_X`: what a branch of a parallel block puts in.
  """
  blocks = {}
  lends = {group[0] for group in cfg.kv_groups}
  for index, block in enumerate(cfg.blocks):
    folder = params["blocks"][block_name(index)]
    branches = _writes(block) if attention_X is not None else ()
    for name, leaf in folder.items():
      stay = 1.0 if index in lends and not name.startswith(WRITES) else stay_X[index]
      share = stay * (state_X[index] if "N" in axes.of(name) else jnp.ones(()))
      for stems, each_X in zip(branches, (attention_X, ssm_X), strict=False):
        share = share * (each_X[index] if name.startswith(stems) else 1.0)
      blocks.setdefault(block_name(index), {})[name] = leaf * share.astype(leaf.dtype)
  return {**params, "blocks": blocks}


def _writes(block: Any) -> tuple[tuple[str, ...], ...]:
  """Returns stems of the leaves through which attention, and SSM, of a parallel block write."""
  if not isinstance(block, Parallel):
    return ()
  mean = block.fusion.kind == "mean"
  return (("attention_gain",), ("ssm_gain",)) if mean else (("w_o_", "b_o_"), ("w_out_",))


def _excess(g):
  """Returns exp(-g) - 1 + g for |g| up to 1/2, where those terms cancel."""
  series = 1.0 / 5040 - g / 40320
  for order in (720, 120, 24, 6, 2):
    series = 1.0 / order - g * series
  return g * g * series


def _kl_chunk(cfg: ModelConfig, head_DV, full_BQD, change_BQD, weight_BQ) -> jax.Array:
  """Returns KL(full || small) of a few positions, summed over each row's real tokens.

  Written in g = log p - log q as the sum of p (exp(-g) - 1 + g), terms that are never negative: a
  block that hardly matters is not lost in the rounding of two partition functions.
  """
  dot = {"preferred_element_type": jnp.float32}
  real_V = jnp.arange(head_DV.shape[1]) < cfg.real_vocabulary
  logits_BQV = jnp.einsum("BQD,DV->BQV", full_BQD, head_DV, **dot)
  logits_BQV = jnp.where(real_V, logits_BQV, -1e30)
  change_BQV = jnp.einsum("BQD,DV->BQV", change_BQD.astype(head_DV.dtype), head_DV, **dot)
  change_BQV = jnp.where(real_V, change_BQV, 0.0)
  p_BQV, q_BQV = jax.nn.softmax(logits_BQV), jax.nn.softmax(logits_BQV + change_BQV)
  near_BQ1 = jnp.abs(change_BQV).max(-1, keepdims=True) < 1.0
  little_BQV = jnp.where(near_BQ1, change_BQV, 0.0)
  close_BQ1 = jnp.log1p(jnp.sum(p_BQV * jnp.expm1(little_BQV), -1, keepdims=True))
  wide_BQ1 = (jax.nn.logsumexp(logits_BQV + change_BQV, -1, keepdims=True)
              - jax.nn.logsumexp(logits_BQV, -1, keepdims=True))
  g_BQV = jnp.where(near_BQ1, close_BQ1, wide_BQ1) - change_BQV
  series_BQV = p_BQV * _excess(jnp.clip(g_BQV, -0.5, 0.5))
  term_BQV = jnp.where(jnp.abs(g_BQV) < 0.5, series_BQV, q_BQV - p_BQV + p_BQV * g_BQV)
  return jnp.where(weight_BQ > 0, weight_BQ * term_BQV.sum(-1), 0.0).sum(1)


def _kl(cfg: ModelConfig, full, small, batch) -> jax.Array:
  """Returns KL(full || small), summed over each row's real tokens, some positions at a time."""
  full_BLD, head_DV = full
  change_BLD = small[0].astype(jnp.float32) - full_BLD.astype(jnp.float32)
  chunk = min(_CHUNK, full_BLD.shape[1])

  def split(v):
    v = jnp.pad(v, [(0, 0), (0, -v.shape[1] % chunk)] + [(0, 0)] * (v.ndim - 2))
    return jnp.moveaxis(v.reshape(v.shape[0], -1, chunk, *v.shape[2:]), 1, 0)

  parts = tuple(split(v) for v in (full_BLD, change_BLD, batch["weight_BL"]))
  return jax.lax.map(lambda part: _kl_chunk(cfg, head_DV, *part), parts).sum(0)


def _mse(cfg: ModelConfig, full, small, batch) -> jax.Array:
  """Returns the mean over D of the squared change of the hidden state, summed over real tokens."""
  change_BLD = small[0].astype(jnp.float32) - full[0].astype(jnp.float32)
  return jnp.einsum("BL,BL->B", jnp.square(change_BLD).mean(-1), batch["weight_BL"], **WHOLE)


LOSSES = {"kl": _kl, "mse": _mse, "greedy": _kl, "window": _kl}


@functools.lru_cache(maxsize=16)
def _whole(hidden: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the program of the whole model, one for all that is measured against it."""
  return jax.jit(hidden)


@functools.lru_cache(maxsize=16)
def losses(
  cfg: ModelConfig, hidden: Hidden, name: str
) -> Callable[[Any, Mapping[str, Any]], Lost]:
  """Returns `(params, batch) -> lost`, and `lost(stay_X, state_X)` what each row loses: [B].

  Where blocks have two branches, `lost` takes `attention_X` and `ssm_X` too, as `damped` does. One
  program serves every choice. Divided by L, sums of rows over their weights are means a token.
  """
  whole = _whole(hidden)
  branched = any(map(_writes, cfg.blocks))

  @jax.jit
  def program(params, shares, batch, full):
    small = hidden(damped(cfg, params, *shares), batch)
    return LOSSES[name](cfg, full, small, batch) / batch["weight_BL"].shape[1]

  def of(params, batch):
    full = whole(params, batch)

    def lost(stay_X, state_X, *branches):
      none = without(cfg, [])
      branches = branches or ((none, none) if branched else ())
      shares = tuple(np.asarray(v, np.float32) for v in (stay_X, state_X, *branches))
      return program(params, shares, batch, full)

    return lost

  return of


@functools.lru_cache(maxsize=16)
def tokens(cfg: ModelConfig, hidden: Callable[..., Any]) -> Callable[..., dict[str, jax.Array]]:
  """Returns `(params, batch) -> {"score_M": [rows, M]}`: what each row loses without a meta token.

  The KL of the logits, as of blocks. `hidden` takes what stays (`prune.cut.mask`) as a third
  argument; one program serves all tokens.
  """
  whole = _whole(hidden)

  @jax.jit
  def program(params, stay_M, batch, full):
    small = hidden(params, batch, {"stay_M": stay_M})
    return _kl(cfg, full, small, batch) / batch["weight_BL"].shape[1]

  def run(params, batch):
    full, every = whole(params, batch), np.arange(cfg.meta)
    lost = [program(params, every != gone, batch, full) for gone in every]
    return {"score_M": jnp.stack(lost, 1)}

  return run


def without(cfg: ModelConfig, gone: Sequence[int]) -> np.ndarray:
  """Returns 1 for each block, 0 for those that go."""
  stay_X = np.ones(len(cfg.blocks), np.float32)
  stay_X[list(gone)] = 0.0
  return stay_X


def _each(cfg: ModelConfig, lost: Lost) -> list[Any]:
  every = without(cfg, [])
  return [lost(without(cfg, [index]), every) for index in range(len(cfg.blocks))]


def _windows(cfg: ModelConfig, lost: Lost, window: int) -> list[Any]:
  every, found = without(cfg, []), []
  for first in range(len(cfg.blocks) - window + 1):
    gone = range(first, first + window)
    # Whoever reads the keys of another block stays no longer than that.
    alone = any(group[0] in gone and group[-1] not in gone for group in cfg.kv_groups)
    found.append(None if alone else lost(without(cfg, gone), every))
  return found


def _silent(cfg: ModelConfig, lost: Lost) -> list[Any]:
  every, found = without(cfg, []), []
  for index, block in enumerate(cfg.blocks):
    has = isinstance(ssm_of(block), Mamba)
    found.append(lost(every, without(cfg, [index])) if has else None)
  return found


def _halves(cfg: ModelConfig, lost: Lost) -> dict[str, list[Any]]:
  """Returns what is lost without one branch of each block that has two; nothing without any."""
  every = without(cfg, [])
  pairs = [index for index, block in enumerate(cfg.blocks)
           if isinstance(block, Parallel) and None not in (block.attention, block.ssm)]
  found: dict[str, list[Any]] = {name: [None] * len(cfg.blocks) for name in BRANCHES if pairs}
  for index in pairs:
    off = without(cfg, [index])
    for name, branches in zip(BRANCHES, ((off, every), (every, off)), strict=True):
      found[name][index] = lost(every, every, *branches)
  return found


@functools.lru_cache(maxsize=16)
def influence(cfg: ModelConfig, apply: Apply) -> Callable[[Any, Mapping[str, Any]], Any]:
  """Returns what gives 1 - cos(input, output) of each block, summed over each row's real tokens."""
  def run(params, batch):
    taps, found = apply(params, batch, ("in_BLD", "out_BLD")), []
    for index in range(len(cfg.blocks)):
      mine = taps[block_name(index)]
      one, two = (mine[tap].astype(jnp.float32) for tap in ("in_BLD", "out_BLD"))
      norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(two, axis=-1)
      # What is left of 1 would be lost on chips that round the factors of a product.
      cosine_BL = jnp.einsum("BLD,BLD->BL", one, two, **WHOLE) / jnp.maximum(norms, 1e-30)
      found.append(jnp.einsum("BL,BL->B", 1.0 - cosine_BL, batch["weight_BL"], **WHOLE))
    return jnp.stack(found, 1) / batch["weight_BL"].shape[1]

  return jax.jit(run)


def rows(
  cfg: ModelConfig, apply: Apply, hidden: Hidden, *, depth: str | None, window: int | None,
  noop: str | None,
) -> Callable[[Any, Mapping[str, Any]], dict[str, np.ndarray]]:
  """Returns `(params, batch) -> {score: [rows, X]}` of the depth estimators that are sums.

  `score_X` is what is lost without a block: the KL of the logits (arXiv 2504.11409, section 3.2),
  the MSE of the last hidden state (MiniPuzzle, arXiv 2504.03624) or block influence (arXiv
  2407.14679, section 2.2).
  `score_window_X` is what is lost without blocks i to i + window - 1, infinite where they do not
  fit, or go without blocks that read their keys (arXiv 2408.11796). `score_ssm_X` is what is lost
  when a block's SSM becomes a no-op, 0 for blocks that have none (Mamba-Shedder, arXiv 2501.17088).
  `score_attention_X` and `score_ssm_branch_X`: with that branch of a parallel block off.
  """
  name = depth if depth in LOSSES else "kl"
  of = losses(cfg, hidden, name)
  states = of if LOSSES[name] is LOSSES["kl"] else losses(cfg, hidden, "kl")
  near = influence(cfg, apply) if depth == "influence" else None

  def run(params, batch):
    found: dict[str, Any] = {}
    lost = of(params, batch) if depth in ("kl", "mse", "window") else None
    if depth in ("kl", "mse"):
      found["score_X"] = _each(cfg, lost)
    if depth == "window":
      found["score_window_X"] = _windows(cfg, lost, window)
    if noop:
      each = lost if lost and states is of else states(params, batch)
      found |= {"score_ssm_X": _silent(cfg, each)} | _halves(cfg, each)
    made = {}
    for path, values in jax.device_get(found).items():
      fill = np.full(len(batch["weight_BL"]), np.inf if path == "score_window_X" else 0.0)
      values = [fill if value is None else value for value in values]
      made[path] = np.stack([*values, *[fill] * (len(cfg.blocks) - len(values))], 1)
    if near is not None:
      made["score_X"] = jax.device_get(near(params, batch))
    return made

  return run


def greedy(
  cfg: ModelConfig,
  hidden: Hidden,
  params: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]],
  *,
  gone: Sequence[int] = (),
  save: Callable[[list[int]], None] = lambda gone: None,
) -> np.ndarray:
  """Returns the order in which blocks go, one a turn, each time the one whose loss hurts least.

  The score of a block is the number of blocks gone before it: the larger, the longer it stays. As
  in Nemotron Nano 2 (arXiv 2508.14444), with the KL of the logits for their MSE. A block whose keys
  others read goes after all of those.

  Args:
    cfg: the model.
    hidden: `(params, batch) -> (hidden_BLD, head_DV)`.
    params: its parameters.
    batches: what the loss is measured on in every turn.
    gone: blocks that an earlier, interrupted run has removed, in order.
    save: takes the blocks gone so far after every turn.
  """
  gone, count, of = list(gone), len(cfg.blocks), losses(cfg, hidden, "greedy")
  every = without(cfg, [])
  while len(gone) < count:
    left = [index for index in range(count) if index not in gone and not any(
      index == group[0] and set(group[1:]) - set(gone) for group in cfg.kv_groups)]
    total = np.zeros(len(left), np.float64)
    for number, batch in enumerate(batches if len(left) > 1 else ()):
      lost = of(params, batch)
      found = jax.device_get([lost(without(cfg, [*gone, index]), every) for index in left])
      for row in np.stack(found, 1).astype(np.float64):
        total += row
      finite(number, "score_X", total[None], [*left])
    gone.append(left[int(np.argmin(total))])
    save(gone)
  order_X = np.zeros(count, np.float64)
  order_X[gone] = np.arange(count)
  return order_X


def finite(
  number: int, path: str, value_BX: np.ndarray, blocks: Sequence[int] | None = None
) -> None:
  """Raises where a depth score of a batch is no number; infinity says that a window does not fit.

  Raises:
    ValueError: names batch and block.
  """
  bad = np.isnan(value_BX) if path == "score_window_X" else ~np.isfinite(value_BX)
  if bad.any():
    place = int(np.flatnonzero(bad.any(0))[0])
    block = place if blocks is None else blocks[place]
    raise ValueError(f"calibration batch {number}: depth score of block {block} is not finite")
