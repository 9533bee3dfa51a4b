"""The model as functions of a config, parameters and a batch: what pruning and training take."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hybridlm import axes
from hybridlm.config import ModelConfig
from hybridlm.distill import intermediate as intermediates
from hybridlm.distill import loss
from hybridlm.nn.lm import HybridLM
from hybridlm.prune import align
from hybridlm.prune.plan import Plan

# What a batch holds of a teacher that was stored.
STORED = ("top_id_BLT", "top_log_BLT", "tail_log_BL")


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
      hidden_BLD, head_DV, *_labels(batch), kl=0.0, ce=1.0, vocabulary=cfg.real_vocabulary
    )

  return sums


def distillation_loss(
  cfg: ModelConfig,
  teacher_cfg: ModelConfig,
  *,
  temperature: float = 1.0,
  kl: float = 1.0,
  ce: float = 0.0,
  divergence: str = "forward_kl",
  skew: float = 0.1,
  top_k: int | None = None,
  plan: Plan | Sequence[Plan] | None = None,
  intermediate: tuple[str, ...] = (),
  intermediate_loss: str = "cosine",
  intermediate_weight: float | None = None,
) -> Callable[..., dict[str, jax.Array]]:
  """Returns `(params, teacher_params, batch) -> sums`: a divergence from a teacher, and others.

  The sums are those of `distill.loss.sums` and, where intermediate activations are compared,
  "intermediate", Σ w·(mean distance over blocks and kinds), which "loss" then includes.

  Args:
    cfg: the student.
    teacher_cfg: the teacher, of the same real vocabulary.
    temperature: of both softmaxes; the divergence is scaled by its square.
    kl: weight of the divergence.
    ce: weight of the next-token cross-entropy.
    divergence: "forward_kl" (of student from teacher), "reverse_kl", "jensen_shannon" or
      "skewed_kl".
    skew: share of the teacher in the mixture of "skewed_kl".
    top_k: compares the teacher's most likely tokens one by one and all others as one; None: each.
    plan: the cut, or the cuts one after the other, that made the student of the teacher: says which
      blocks and channels are compared. None: the two have the same.
    intermediate: what else is compared, block by block: "out", the residual stream after a block,
      "mix", what a block adds to it, "state", the SSM state after the last position.
    intermediate_loss: "cosine", "mse" or "normalized_mse".
    intermediate_weight: its weight; None makes it as large as the divergence at every step, by a
      factor that has no gradient (arXiv 2407.14679, section 3).

  Raises:
    ValueError: the vocabularies differ, values out of range, a plan that does not lead from the
      teacher to the student.

  >>> sums = hybridlm.distillation_loss(cfg, cfg, intermediate=("out",))(params, params, batches[0])
  >>> bool(abs(sums["kl"]) < 1e-4), float(sums["intermediate"])  # of a model with itself
  (True, 0.0)
  """
  if cfg.real_vocabulary != teacher_cfg.real_vocabulary:
    raise ValueError(
      f"student predicts {cfg.real_vocabulary} tokens, teacher {teacher_cfg.real_vocabulary}: "
      "they must share a vocabulary"
    )
  terms = {
    "temperature": temperature, "kl": kl, "ce": ce, "divergence": divergence, "skew": skew,
    "top_k": top_k, "vocabulary": cfg.real_vocabulary,
  }
  loss.check(**terms, taught=True)
  intermediates.check(intermediate, intermediate_loss, intermediate_weight, kl)
  pairs = align.pairs(cfg, teacher_cfg, plan, intermediate) if intermediate else ()
  taps = tuple(dict.fromkeys(pair.tap for pair in pairs))

  def sums(params, teacher, batch):
    (student_BLD, head_DV), seen = _hidden_and_taps(cfg, params, batch, taps)
    (teacher_BLD, teacher_head_DV), shown = _hidden_and_taps(teacher_cfg, teacher, batch, taps)
    found = loss.sums(
      student_BLD, head_DV, *_labels(batch), teacher_BLD=teacher_BLD,
      teacher_head_DV=teacher_head_DV, **terms,
    )
    if not pairs:
      return found
    apart = _apart(pairs, seen, shown, _labels(batch)[1], intermediate_loss)
    logits = kl * found[loss.NAMES[divergence]]
    return intermediates.added(found, apart, weight=intermediate_weight, logits=logits)

  return sums


def _labels(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
  """Returns targets and weights; numpy's are taken up here."""
  return jnp.asarray(batch["target_BL"]), jnp.asarray(batch["weight_BL"])


def _hidden_and_taps(cfg: ModelConfig, params, batch, taps: tuple[str, ...]):
  segment_BL = batch.get("segment_BL")
  return apply(cfg, params, batch["token_BL"], segment_BL, taps=taps, output="hidden")


def _apart(pairs: Sequence[align.Pair], seen, shown, weight_BL, name: str) -> jax.Array:
  """Returns Σ w·distance, the mean over blocks of a kind and then over kinds."""
  kinds: dict[str, list[jax.Array]] = {}
  for pair in pairs:
    theirs = pair.of_teacher(shown[pair.teacher][pair.tap])
    kinds.setdefault(pair.kind, []).append(intermediates.total(
      seen[pair.student][pair.tap], theirs, weight_BL, axes=axes.of(pair.tap),
      vector=pair.vector, loss=name,
    ))
  return sum(sum(each) / len(each) for each in kinds.values()) / len(kinds)


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
  terms = {
    "temperature": temperature, "kl": kl, "ce": ce, "divergence": divergence, "skew": skew,
    "vocabulary": cfg.real_vocabulary,
  }
  loss.check(**terms, top_k=None, taught=True)

  def sums(params, frozen, batch):
    stored = {name: jnp.asarray(batch[name]) for name in STORED}
    return loss.sums(*apply_hidden(cfg, params, batch), *_labels(batch), **stored, **terms)

  return sums
