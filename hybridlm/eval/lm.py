"""Language-model metrics of a student, alone and against its teacher, from the loss's own sums."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hybridlm.distill import loss

# `hidden(params, batch)` returns final hidden states [B, L, D] and the head [D, V].
Hidden = Callable[[Any, Any], tuple[Any, Any]]
_LARGEST_EXPONENT = 709.0


def report(sums: Mapping[str, float], *, nbytes: int) -> dict[str, float]:
  """Returns metrics from totals over a test set.

  Args:
    sums: what `distill.loss.sums` returns at temperature 1, added up over batches.
    nbytes: bytes of text that the targets stand for (the end of a document is none).

  Returns:
    "cross_entropy" (nats a token), "perplexity" (infinite where it overflows), "bits_per_byte" (all
    nats, those of document ends too, over all bytes), "accuracy" (top-1), "tokens", "bytes"; with a
    teacher also "kl" (nats a token, teacher ‖ student) and "agreement" (equal top-1).

  Raises:
    ValueError: no token, or no byte.
  """
  tokens = sums["weight"]
  if not tokens > 0 or not nbytes > 0:
    raise ValueError(f"evaluation over {tokens} tokens and {nbytes} bytes: nothing to test")
  cross_entropy = sums["ce"] / tokens
  fits = cross_entropy < _LARGEST_EXPONENT
  metrics = {
    "cross_entropy": cross_entropy,
    "perplexity": math.exp(cross_entropy) if fits else math.inf,
    "bits_per_byte": sums["ce"] / math.log(2) / nbytes,
    "accuracy": sums["correct"] / tokens,
    "tokens": tokens,
    "bytes": nbytes,
  }
  if "kl" in sums:
    metrics |= {"kl": sums["kl"] / tokens, "agreement": sums["agree"] / tokens}
  return metrics


def make(
  hidden: Hidden,
  *,
  bytes_V: Int[Array, "V"],
  teacher: Hidden | None = None,
  vocabulary: int | None = None,
  chunk: int | None = None,
) -> Callable[[Any, Any, Iterable[Any]], dict[str, float]]:
  """Returns `evaluate(params, frozen, batches)`, compiled once, which returns `report`'s metrics.

  Every token with a weight above 0 counts once.

  Args:
    hidden: the student's apply function, called with `params`.
    bytes_V: bytes of text of each token; 0 for the end of a document.
    teacher: the teacher's apply function, called with `frozen`; None leaves its metrics out.
    vocabulary: real rows of the heads (see `distill.loss.sums`).
    chunk: positions the loss handles at a time.

  Raises:
    ValueError: when called, no token or no byte in all batches.
  """
  def totals(params, frozen, batch):
    student_BLD, head_DV = hidden(params, batch)
    weight_BL = (batch["weight_BL"] > 0).astype(jnp.float32)
    pair = {}
    if teacher is not None:
      teacher_BLD, teacher_head_DV = teacher(frozen, batch)
      pair = {"teacher_BLD": teacher_BLD, "teacher_head_DV": teacher_head_DV}
    sums = loss.sums(student_BLD, head_DV, batch["target_BL"], weight_BL, ce=1.0,
                     vocabulary=vocabulary, chunk=chunk, **pair)
    bytes_BL = jnp.where(weight_BL > 0, bytes_V[batch["target_BL"]], 0)
    return sums | {"bytes": bytes_BL.sum()}

  compiled = jax.jit(totals)

  def evaluate(params, frozen, batches):
    parts = jax.device_get([compiled(params, frozen, batch) for batch in batches])
    if not parts:
      raise ValueError("evaluation: there is no batch to evaluate on")
    added = {name: math.fsum(float(part[name]) for part in parts) for name in parts[0]}
    return report(added, nbytes=int(added.pop("bytes")))

  return evaluate
