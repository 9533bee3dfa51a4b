"""The model as functions of a config, parameters and a batch: what pruning and training take."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hybridlm.config import ModelConfig
from hybridlm.distill import loss
from hybridlm.nn.lm import HybridLM


@functools.partial(jax.jit, static_argnames=("cfg", "taps", "output"))
def apply(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  token_BL: Int[Array, "B L"],
  segment_BL: Int[Array, "B L"] | None = None,
  kept: Mapping[str, Any] | None = None,
  taps: tuple[str, ...] = (),
  output: str = "logits",
) -> tuple[Any, dict[str, dict[str, jax.Array]]]:
  """Returns `(result, taps)` of the compiled model: `nn.lm.HybridLM.__call__` as a function."""
  return HybridLM(cfg).apply({"params": params}, token_BL, segment_BL, kept, taps, output)


def apply_taps(cfg: ModelConfig, params, batch, taps):
  """Returns the taps of one batch: the form `prune.scores` and `prune.depth` take."""
  return apply(cfg, params, batch["token_BL"], batch.get("segment_BL"), taps=taps)[1]


def apply_hidden(cfg: ModelConfig, params, batch, kept=None):
  """Returns `(hidden_BLD, head_DV)` of one batch: the form losses take.

  `kept` is what `prune.cut.mask` returns beside masked parameters; its `stay_V` is for the loss.
  """
  return apply(cfg, params, batch["token_BL"], batch.get("segment_BL"), kept, output="hidden")[0]


def language_loss(cfg: ModelConfig) -> Callable[..., dict[str, jax.Array]]:
  """Returns `(params, frozen, batch) -> sums`: next-token cross-entropy; `frozen` is not read.

  The sums are those of `distill.loss.sums`: `loss` and `weight` among them.

  >>> sums = hybridlm.language_loss(cfg)(params, None, batches[0])
  >>> bool(abs(sums["loss"] / sums["weight"] - jnp.log(31)) < 0.1)  # nothing learnt yet
  True
  """

  def sums(params, frozen, batch):
    hidden_BLD, head_DV = apply_hidden(cfg, params, batch)
    return loss.sums(
      hidden_BLD,
      head_DV,
      jnp.asarray(batch["target_BL"]),
      jnp.asarray(batch["weight_BL"]),
      kl=0.0,
      ce=1.0,
      vocabulary=cfg.real_vocabulary,
    )

  return sums


def distillation_loss(
  cfg: ModelConfig,
  teacher_cfg: ModelConfig,
  *,
  temperature: float = 1.0,
  kl: float = 1.0,
  ce: float = 0.0,
) -> Callable[..., dict[str, jax.Array]]:
  """Returns `(params, teacher_params, batch) -> sums`: forward KL to a teacher, and cross-entropy.

  Args:
    cfg: the student.
    teacher_cfg: the teacher, of the same real vocabulary.
    temperature: of both softmaxes; the divergence is scaled by its square.
    kl: weight of KL(teacher || student).
    ce: weight of the next-token cross-entropy.

  Raises:
    ValueError: the vocabularies differ.

  >>> sums = hybridlm.distillation_loss(cfg, cfg)(params, params, batches[0])
  >>> bool(abs(sums["kl"]) < 1e-4)  # of a model with itself
  True
  """
  if cfg.real_vocabulary != teacher_cfg.real_vocabulary:
    raise ValueError(
      f"student predicts {cfg.real_vocabulary} tokens, teacher {teacher_cfg.real_vocabulary}: "
      "they must share a vocabulary"
    )

  def sums(params, teacher, batch):
    hidden_BLD, head_DV = apply_hidden(cfg, params, batch)
    teacher_BLD, teacher_head_DV = apply_hidden(teacher_cfg, teacher, batch)
    return loss.sums(
      hidden_BLD,
      head_DV,
      jnp.asarray(batch["target_BL"]),
      jnp.asarray(batch["weight_BL"]),
      teacher_BLD=teacher_BLD,
      teacher_head_DV=teacher_head_DV,
      temperature=temperature,
      kl=kl,
      ce=ce,
      vocabulary=cfg.real_vocabulary,
    )

  return sums


def stored_loss(
  cfg: ModelConfig,
  *,
  temperature: float = 1.0,
  kl: float = 1.0,
  ce: float = 0.0,
  divergence: str = "forward_kl",
  skew: float = 0.1,
) -> Callable[..., dict[str, jax.Array]]:
  """Returns `(params, frozen, batch) -> sums`: distillation from what a teacher left on disk.

  `frozen` is not read. Beside the usual arrays a batch has `top_id_BLT` (int32, the teacher's most
  likely tokens), `top_log_BLT` (float32, their log-probabilities at the temperature) and
  `tail_log_BL` (float32, the log of the probability of all others; minus infinity where T is the
  whole vocabulary). Arguments and sums are those of `distillation_loss`.
  """

  def sums(params, frozen, batch):
    hidden_BLD, head_DV = apply_hidden(cfg, params, batch)
    return loss.sums(
      hidden_BLD,
      head_DV,
      jnp.asarray(batch["target_BL"]),
      jnp.asarray(batch["weight_BL"]),
      top_id_BLT=jnp.asarray(batch["top_id_BLT"]),
      top_log_BLT=jnp.asarray(batch["top_log_BLT"]),
      tail_log_BL=jnp.asarray(batch["tail_log_BL"]),
      temperature=temperature,
      kl=kl,
      ce=ce,
      divergence=divergence,
      skew=skew,
      vocabulary=cfg.real_vocabulary,
    )

  return sums
