"""Depth scores: what the model loses with one block less."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.config import ModelConfig, block_name
from hybridlm.distill import loss
from hybridlm.prune.scores import Apply

Hidden = Callable[[Any, Mapping[str, Any]], tuple[jax.Array, jax.Array]]
ESTIMATORS = ("kl", "influence")


def without(params: Mapping[str, Any], index: int) -> dict[str, Any]:
  """Returns the tree with every leaf of one block zero, so that the block adds nothing."""
  name = block_name(index)
  zeros = jax.tree.map(jnp.zeros_like, params["blocks"][name])
  return {**params, "blocks": {**params["blocks"], name: zeros}}


@functools.partial(jax.jit, static_argnames="vocabulary")
def _divergence(full, small, batch, *, vocabulary: int) -> jax.Array:
  return loss.sums(
    *small,
    batch["token_BL"],
    batch["weight_BL"],
    teacher_BLD=full[0],
    teacher_head_DV=full[1],
    vocabulary=vocabulary,
  )["kl"]


def leave_one_out_kl(
  cfg: ModelConfig, hidden: Hidden, params: Mapping[str, Any], batch: Mapping[str, Any]
) -> np.ndarray:
  """Returns, for each block, the sum over tokens of KL(full || without that block), in nats.

  Args:
    cfg: the model.
    hidden: `(params, batch) -> (hidden_BLD, head_DV)`; jit it, it runs once a block.
    params: its parameters.
    batch: dict with `token_BL`, `weight_BL` and `segment_BL`.

  Source: arXiv 2504.11409, section 3.2.
  """

  batch = {name: jnp.asarray(batch[name]) for name in batch}
  full = hidden(params, batch)
  kl = []
  for index in range(len(cfg.blocks)):
    small = hidden(without(params, index), batch)
    kl.append(_divergence(full, small, batch, vocabulary=cfg.real_vocabulary))
  return np.asarray(jax.device_get(kl), np.float32)


def influence(
  cfg: ModelConfig, apply: Apply, params: Mapping[str, Any], batch: Mapping[str, Any]
) -> np.ndarray:
  """Returns, for each block, the sum over tokens of 1 - cos(its input, its output).

  Block influence; arXiv 2407.14679, section 2.2.
  """
  taps = apply(params, batch, ("in_BLD", "out_BLD"))
  found = []
  for index in range(len(cfg.blocks)):
    one, two = (taps[block_name(index)][tap].astype(jnp.float32) for tap in ("in_BLD", "out_BLD"))
    norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(two, axis=-1)
    cosine_BL = jnp.einsum("BLD,BLD->BL", one, two) / jnp.maximum(norms, 1e-30)
    found.append(jnp.sum(batch["weight_BL"] * (1.0 - cosine_BL)))
  return np.asarray(jax.device_get(found), np.float32)


def calibrate(
  cfg: ModelConfig,
  apply: Apply,
  hidden: Hidden,
  params: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
  *,
  estimator: str,
) -> np.ndarray:
  """Returns sums over calibration rows of a depth score, one a block: sum over tokens / L.

  Divided by the rows' weight (real tokens / L) they are means a token.

  Raises:
    ValueError: an estimator of another name, or a score that is not finite.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f"depth estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
  total = np.zeros(len(cfg.blocks), np.float32)
  for number, batch in enumerate(batches):
    if estimator == "kl":
      found = leave_one_out_kl(cfg, hidden, params, batch)
    else:
      found = influence(cfg, apply, params, batch)
    if not np.isfinite(found).all():
      block = int(np.flatnonzero(~np.isfinite(found))[0])
      raise ValueError(f"calibration batch {number}: depth score of block {block} is not finite")
    total += found / batch["weight_BL"].shape[1]
  return total
