"""Sums of the distillation loss over the full vocabulary, without ever holding [B, L, V].

Hidden states meet their heads a few positions at a time. While a chunk's logits are at hand, their
gradient is too (for the forward KL p_student − p_teacher), so the forward pass also accumulates the
gradients of the hidden states and the head and throws the logits away: four products with a head a
step, where rematerialising the chunks takes six. On two CPU cores that is 2.4 to 3 times faster.

Under a mesh every device has its own rows and positions and its share of the vocabulary: maxima and
sums over the vocabulary go between devices chunk by chunk, the gradient of the head once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridlm.distill import divergences, fused, places
from hybridlm.distill.places import Place

# Tokens a chunk on the CPU, where a chunk's logits should stay in cache (measured, V = 1k to 4k),
# and elsewhere, where a chunk should fill the chip.
_CPU_TOKENS, _TOKENS = 256, 1024
# What the sum of a divergence is called.
NAMES = {name: "kl" if name == "forward_kl" else name for name in divergences.TABLE}


def sums(
  student_BLD: Float[Array, "B L D"],
  head_DV: Float[Array, "D V"],
  target_BL: Int[Array, "B L"],
  weight_BL: Float[Array, "B L"],
  *,
  teacher_BLD: Float[Array, "B L teacher_D"] | None = None,
  teacher_head_DV: Float[Array, "teacher_D teacher_V"] | None = None,
  top_id_BLT: Int[Array, "B L T"] | None = None,
  top_log_BLT: Float[Array, "B L T"] | None = None,
  tail_log_BL: Float[Array, "B L"] | None = None,
  temperature: float = 1.0,
  kl: float = 1.0,
  ce: float = 0.0,
  divergence: str = "forward_kl",
  skew: float = 0.1,
  top_k: int | None = None,
  vocabulary: int | None = None,
  stay_V: Bool[Array, "student_V"] | None = None,
  chunk: int | None = None,
) -> dict[str, Float[Array, ""]]:
  """Returns sums over tokens, in float32 or wider: they do not depend on how a batch is split.

  Only "loss" has a gradient, towards `student_BLD` and `head_DV`. Under a mesh (`jax.set_mesh`)
  rows are divided over data and fsdp, positions over sequence and the vocabulary over tensor.

  Args:
    student_BLD: final hidden states of the student.
    head_DV: its output matrix.
    target_BL: the next token of each position.
    weight_BL: weight of each position; where it is 0, the target is not read.
    teacher_BLD: final hidden states of the teacher, of its own width; None trains on targets alone.
    teacher_head_DV: the teacher's output matrix.
    top_id_BLT, top_log_BLT, tail_log_BL: instead of those two, a teacher's likeliest tokens, their
      log-probabilities at the temperature and the log of the probability of all others.
    temperature: divides both models' logits in the divergence, which is scaled by its square.
    kl: factor of the divergence from the teacher; without a teacher there is no such term.
    ce: factor of the cross-entropy with the targets.
    divergence: a name of `distill.divergences.TABLE`.
    skew: share of the teacher in the mixture of "skewed_kl"; others do not read it.
    top_k: compares the teacher's most likely tokens one by one and all others as one; None: each.
    vocabulary: real rows; those from there on are padding, with probability 0. Needed where the
      two heads have different numbers of rows.
    stay_V: tokens that stay, by rows of the student's head; others have probability 0 in both
      models, and as a target a cross-entropy of infinity. None: all. No program of its own.
    chunk: positions handled at a time; None takes what is fast here.

  Returns:
    "loss": Σ w·(kl·T²·divergence + ce·CE); "weight": Σ w; "ce": Σ w·CE (nats, at temperature 1);
    "correct": Σ w·[student's first maximum is the target]; and with a teacher Σ w·T²·divergence,
    called "kl" for the forward KL and else by its own name, and "agree": Σ w·[the two models' first
    maxima are equal].

  Raises:
    ValueError: shapes that do not fit each other or the mesh, a value out of range, no term.

  Source: arXiv 2407.14679 §3 and 2504.11409 §4; T² of arXiv 1503.02531 §2.
  """
  stored = _all_or_none(top_id_BLT=top_id_BLT, top_log_BLT=top_log_BLT, tail_log_BL=tail_log_BL)
  whole = _all_or_none(teacher_BLD=teacher_BLD, teacher_head_DV=teacher_head_DV)
  _check_shapes(student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV)
  real = _real_rows(head_DV, teacher_head_DV, vocabulary)
  check(
    temperature=temperature, kl=kl, ce=ce, divergence=divergence, skew=skew, top_k=top_k,
    vocabulary=real, taught=whole or stored,
  )
  _check_stays(stay_V, head_DV)
  if stored:
    _check_stored(top_id_BLT, top_log_BLT, tail_log_BL, target_BL, real, (whole, stay_V, top_k))
  place = places.of(*student_BLD.shape)
  columns = _columns(head_DV, teacher_head_DV, real)
  settings = fused.Settings(
    float(temperature), float(kl), float(ce), divergence, NAMES[divergence], float(skew), top_k,
    real, columns, _chunk(chunk, target_BL.shape, place), place,
  )
  teacher = fused.Top(top_id_BLT, top_log_BLT, tail_log_BL) if stored else None
  if whole:
    teacher = fused.Whole(teacher_BLD, _fitted(teacher_head_DV, columns))
  rest = (teacher, target_BL, weight_BL, None if stay_V is None else _fitted(stay_V, columns))
  return fused.sums(settings, student_BLD, _fitted(head_DV, columns), jax.lax.stop_gradient(rest))


def _all_or_none(**arrays: Any) -> bool:
  """Returns whether arrays are there that come together."""
  given = {array is not None for array in arrays.values()}
  if len(given) > 1:
    raise ValueError(f"loss: {' and '.join(arrays)} come together or not at all")
  return given.pop()


def _check_shapes(student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV):
  """Raises where arrays disagree about batch, length or width."""
  pairs = [("student_BLD", student_BLD, "head_DV", head_DV)]
  if teacher_BLD is not None:
    pairs.append(("teacher_BLD", teacher_BLD, "teacher_head_DV", teacher_head_DV))
  for name, hidden_BLD, head_name, matrix_DV in pairs:
    if hidden_BLD.shape[2] != matrix_DV.shape[0]:
      raise ValueError(
        f"loss: {name} has width {hidden_BLD.shape[2]}, but {head_name} {matrix_DV.shape[0]}"
      )
    if hidden_BLD.shape[:2] != target_BL.shape:
      raise ValueError(f"loss: {name} is {hidden_BLD.shape[:2]} tokens, targets {target_BL.shape}")
  if weight_BL.shape != target_BL.shape:
    raise ValueError(f"loss: weight_BL is {weight_BL.shape}, target_BL {target_BL.shape}")


def _check_stays(stay_V, head_DV) -> None:
  if stay_V is not None and stay_V.shape != head_DV.shape[1:]:
    raise ValueError(f"loss: stay_V has {stay_V.shape[0]} entries, head_DV {head_DV.shape[1]} rows")


def _real_rows(head_DV, teacher_head_DV, vocabulary: int | None) -> int:
  """Returns the number of real vocabulary rows, checked against both heads."""
  rows = [head.shape[1] for head in (head_DV, teacher_head_DV) if head is not None]
  if vocabulary is None and len(set(rows)) > 1:
    raise ValueError(
      f"loss: the student's head has {rows[0]} rows and the teacher's {rows[1]}; say how many are"
      " real with vocabulary="
    )
  real = rows[0] if vocabulary is None else vocabulary
  if not 1 <= real <= min(rows):
    raise ValueError(f"loss: vocabulary={real} must lie in 1..{min(rows)}, the rows of the head")
  return real


def check(
  *,
  temperature: float,
  kl: float,
  ce: float,
  divergence: str,
  skew: float,
  top_k: int | None,
  vocabulary: int,
  taught: bool,
) -> None:
  """Raises unless these arguments of `sums` can go together; `taught`: whether there is a teacher.

  Raises:
    ValueError: names the argument, its value and the rule.
  """
  if not 0 < temperature < math.inf:
    raise ValueError(f"loss: temperature={temperature} must be positive")
  if not (0 <= kl < math.inf and 0 <= ce < math.inf):
    raise ValueError(f"loss: factors kl={kl} and ce={ce} must not be negative")
  if not ce and not (taught and kl):
    raise ValueError(f"loss: nothing to minimise with kl={kl}, ce={ce} and "
                     f"{'a' if taught else 'no'} teacher")
  if divergence not in divergences.TABLE:
    known = ", ".join(divergences.TABLE)
    raise ValueError(f"loss: divergence={divergence!r} is not one of {known}")
  if not 0 < skew < 1:
    raise ValueError(f"loss: skew={skew} must lie between 0 and 1")
  if top_k is not None and not 1 <= top_k <= vocabulary:
    raise ValueError(f"loss: top_k={top_k} must lie in 1..{vocabulary}, the tokens there are")


def _check_stored(top_id_BLT, top_log_BLT, tail_log_BL, target_BL, real: int, others) -> None:
  """Raises unless what is stored of a teacher fits the batch and stands alone."""
  whole, stay_V, top_k = others
  if whole or stay_V is not None or top_k is not None:
    raise ValueError("loss: a stored teacher goes with no other, and with neither stay_V nor top_k")
  shapes = (top_id_BLT.shape, top_log_BLT.shape, (*tail_log_BL.shape, top_id_BLT.shape[2]))
  if len(set(shapes)) > 1 or tail_log_BL.shape != target_BL.shape:
    raise ValueError(
      f"loss: top_id_BLT is {top_id_BLT.shape}, top_log_BLT {top_log_BLT.shape}, tail_log_BL "
      f"{tail_log_BL.shape}, target_BL {target_BL.shape}"
    )
  if not 1 <= top_id_BLT.shape[2] <= real:
    raise ValueError(f"loss: {top_id_BLT.shape[2]} stored tokens a position, of {real}")


def _chunk(chunk: int | None, shape: tuple[int, int], place: Place) -> int:
  """Returns positions a chunk: few enough for the cache on a CPU, enough to fill other chips."""
  devices = places.sizes()
  batch = shape[0] // math.prod(devices[name] for name in place.rows)
  length = shape[1] // (devices[place.positions] if place.positions else 1)
  if chunk is None:
    chunk = max(1, _CPU_TOKENS // batch)
    if jax.default_backend() != "cpu":
      chunk = 1 << max(0, (_TOKENS // batch).bit_length() - 1)
  if chunk < 1:
    raise ValueError(f"loss: chunk {chunk} must be at least 1 position")
  return min(chunk, length)


def _columns(head_DV, teacher_head_DV, real: int) -> int:
  """Returns how many columns both heads shall have, a multiple of the devices that share them."""
  devices = places.sizes().get(places.COLUMNS, 1)
  rows = {head.shape[1] for head in (head_DV, teacher_head_DV) if head is not None}
  columns = rows.pop() if len(rows) == 1 else real
  return columns + -columns % devices


def _fitted(array: jax.Array, columns: int) -> jax.Array:
  """Returns an array [.., V] with so many columns: padding goes or comes."""
  short = columns - array.shape[-1]
  if short == 0:
    return array
  if short < 0:
    return array[..., :columns]
  return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, short)])
