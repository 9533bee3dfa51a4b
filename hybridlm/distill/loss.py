"""Sums of the distillation loss over the full vocabulary, without ever holding [B, L, V].

Hidden states meet their heads a few positions at a time. While a chunk's logits are at hand, their
gradient is too (p_student − p_teacher), so the forward pass also accumulates the gradients of the
hidden states and the head and throws the logits away: four products with a head a step, where
rematerialising the chunks takes six. On two CPU cores that is 2.4 to 3 times faster.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The logit of a row that is padding or does not stay: exp gives exactly 0, and differences of two
# give 0, not NaN.
_OUT = -1e30
# Tokens a chunk on the CPU, where a chunk's logits should stay in cache (measured, V = 1k to 4k).
_CPU_TOKENS = 256
_POSITIONS = 128


class _Settings(NamedTuple):
  temperature: float
  kl: float
  ce: float
  vocabulary: int
  chunk: int


def sums(
  student_BLD: Float[Array, "B L D"],
  head_DV: Float[Array, "D V"],
  target_BL: Int[Array, "B L"],
  weight_BL: Float[Array, "B L"],
  *,
  teacher_BLD: Float[Array, "B L teacher_D"] | None = None,
  teacher_head_DV: Float[Array, "teacher_D teacher_V"] | None = None,
  temperature: float = 1.0,
  kl: float = 1.0,
  ce: float = 0.0,
  vocabulary: int | None = None,
  stay_V: Bool[Array, "student_V"] | None = None,
  chunk: int | None = None,
) -> dict[str, Float[Array, ""]]:
  """Returns float32 sums over tokens, so that results do not depend on how a batch is split.

  Only "loss" has a gradient, towards `student_BLD` and `head_DV`; nothing flows to the teacher.

  Args:
    student_BLD: final hidden states of the student.
    head_DV: its output matrix.
    target_BL: the next token of each position.
    weight_BL: weight of each position; where it is 0, the target is not read.
    teacher_BLD: final hidden states of the teacher, of its own width; None trains on targets alone.
    teacher_head_DV: the teacher's output matrix.
    temperature: divides both models' logits in the KL term, which is then scaled by its square.
    kl: factor of KL(teacher ‖ student); without a teacher there is no such term.
    ce: factor of the cross-entropy with the targets.
    vocabulary: real rows; those from there on are padding and have probability 0 in both models.
      Needed where the two heads have different numbers of rows.
    stay_V: tokens that stay, one entry for each row of the student's head; the others have
      probability 0 in both models, and one of them as a target a cross-entropy of infinity. None:
      all. Being an array, it costs no program of its own.
    chunk: positions handled at a time; None takes what is fast here.

  Returns:
    "loss": Σ w·(kl·T²·KL + ce·CE); "weight": Σ w; "ce": Σ w·CE (nats, at temperature 1);
    "correct": Σ w·[student's first maximum is the target]; and with a teacher "kl": Σ w·T²·KL and
    "agree": Σ w·[the two models' first maxima are equal].

  Raises:
    ValueError: shapes that do not fit each other, a factor or temperature out of range, no term.

  Source: forward KL over all logits, arXiv 2407.14679 §3 and 2504.11409 §4; T² of Hinton et al.,
  arXiv 1503.02531 §2.
  """
  teacher = None if teacher_BLD is None else (teacher_BLD, teacher_head_DV)
  _check_shapes(student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV)
  vocabulary = _real_rows(head_DV, teacher_head_DV, vocabulary)
  _check_factors(temperature, kl, ce, teacher)
  length = target_BL.shape[1]
  chunk = min(_best_chunk(target_BL.shape[0]) if chunk is None else chunk, length)
  if chunk < 1:
    raise ValueError(f"loss: chunk {chunk} must be at least 1 position")
  settings = _Settings(float(temperature), float(kl), float(ce), vocabulary, chunk)
  if stay_V is not None and stay_V.shape != head_DV.shape[1:]:
    raise ValueError(f"loss: stay_V has {stay_V.shape[0]} entries, head_DV {head_DV.shape[1]} rows")
  rest = (teacher, target_BL, weight_BL, stay_V)
  return _fused(settings, student_BLD, head_DV, jax.lax.stop_gradient(rest))


def _check_shapes(student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV):
  """Raises where arrays disagree about batch, length or width."""
  if (teacher_BLD is None) != (teacher_head_DV is None):
    raise ValueError("loss: teacher_BLD and teacher_head_DV come together or not at all")
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


def _check_factors(temperature: float, kl: float, ce: float, teacher: Any) -> None:
  if not temperature > 0:
    raise ValueError(f"loss: temperature={temperature} must be positive")
  if not (kl >= 0 and ce >= 0):
    raise ValueError(f"loss: factors kl={kl} and ce={ce} must not be negative")
  if not ce and (teacher is None or not kl):
    raise ValueError(f"loss: nothing to minimise with kl={kl}, ce={ce} and "
                     f"{'no' if teacher is None else 'a'} teacher")


def _best_chunk(batch: int) -> int:
  """Returns positions a chunk: few enough for the cache on a CPU, enough to fill other chips."""
  return max(1, _CPU_TOKENS // batch) if jax.default_backend() == "cpu" else _POSITIONS


def _logits(x_BQD, head_DV, settings: _Settings, stay_V):
  """Returns float32 logits [B, Q, V], rows that are no choice at `_OUT`, and column numbers."""
  logits_BQV = jnp.einsum("BQD,DV->BQV", x_BQD, head_DV, preferred_element_type=jnp.float32)
  column_BQV = jax.lax.broadcasted_iota(jnp.int32, logits_BQV.shape, 2)
  if settings.vocabulary < head_DV.shape[1]:
    logits_BQV = jnp.where(column_BQV < settings.vocabulary, logits_BQV, _OUT)
  if stay_V is not None:
    # The other head may have more padding or less: it is out already.
    short = max(0, head_DV.shape[1] - stay_V.shape[0])
    rows_V = jnp.pad(stay_V, (0, short))[: head_DV.shape[1]]
    logits_BQV = jnp.where(rows_V, logits_BQV, _OUT)
  return logits_BQV, column_BQV


def _softmax(logits_BQV, top_BQ1, temperature: float):
  """Returns unnormalised probabilities, their sum and the log of the partition function."""
  part_BQV = jnp.exp((logits_BQV - top_BQ1) / temperature)
  total_BQ1 = part_BQV.sum(-1, keepdims=True)
  return part_BQV, total_BQ1, top_BQ1 / temperature + jnp.log(total_BQ1)


def _first_maximum(logits_BQV, top_BQ1, column_BQV):
  """Returns argmax; XLA's own is a slow reduction of pairs on the CPU."""
  last = logits_BQV.shape[-1] - 1
  return jnp.where(logits_BQV == top_BQ1, column_BQV, last).min(-1)


def _total(weight_BQ, value_BQ):
  """Returns Σ w·value; values of weight 0 do not count, NaN or not."""
  return jnp.where(weight_BQ != 0, weight_BQ * value_BQ, 0.0).sum()


def _chunk_sums(settings: _Settings, x_BQD, head_DV, teacher, target_BQ, weight_BQ, stay_V):
  """Returns a chunk's sums and a function from nothing to the gradient of its logits."""
  logits_BQV, column_BQV = _logits(x_BQD, head_DV, settings, stay_V)
  top_BQ1 = logits_BQV.max(-1, keepdims=True)
  part_BQV, total_BQ1, log_BQ1 = _softmax(logits_BQV, top_BQ1, 1.0)
  hit_BQV = column_BQV == target_BQ[..., None]
  known_BQ = (target_BQ >= 0) & (target_BQ < settings.vocabulary)
  ce_BQ = log_BQ1[..., 0] - jnp.where(hit_BQV, logits_BQV, 0.0).sum(-1)
  if stay_V is not None:
    ce_BQ = jnp.where(jnp.take(stay_V, target_BQ, mode="clip"), ce_BQ, jnp.inf)
  ce_BQ = jnp.where(known_BQ, ce_BQ, jnp.nan)
  choice_BQ = _first_maximum(logits_BQV, top_BQ1, column_BQV)
  out = {
    "weight": weight_BQ.sum(),
    "ce": _total(weight_BQ, ce_BQ),
    "correct": _total(weight_BQ, (choice_BQ == target_BQ).astype(jnp.float32)),
  }
  loss_BQ = settings.ce * ce_BQ if settings.ce else 0.0

  def ce_gradient():
    return settings.ce * (part_BQV / total_BQ1 - hit_BQV) if settings.ce else 0.0

  gradient = ce_gradient
  if teacher is not None:
    temperature = settings.temperature
    soft = (part_BQV, total_BQ1, log_BQ1)
    if temperature != 1:
      soft = _softmax(logits_BQV, top_BQ1, temperature)
    kl_BQ, choice, difference = _divergence(settings, soft, logits_BQV, teacher, stay_V)
    out["kl"] = _total(weight_BQ, kl_BQ)
    out["agree"] = _total(weight_BQ, (choice == choice_BQ).astype(jnp.float32))
    if settings.kl:
      loss_BQ = loss_BQ + settings.kl * kl_BQ

    def gradient():
      return ce_gradient() + settings.kl * difference()

  out["loss"] = _total(weight_BQ, loss_BQ)
  return out, lambda: weight_BQ[..., None] * gradient()


def _divergence(settings: _Settings, soft, logits_BQV, teacher, stay_V):
  """Returns T²·KL(teacher ‖ student), the teacher's argmax and the gradient to student logits."""
  temperature, shared = settings.temperature, min(logits_BQV.shape[-1], teacher[1].shape[1])
  teacher_BQV, column_BQV = _logits(*teacher, settings, stay_V)
  top_BQ1 = teacher_BQV.max(-1, keepdims=True)
  part_BQV, total_BQ1, log_BQ1 = _softmax(teacher_BQV, top_BQ1, temperature)
  own_BQV, own_total_BQ1, own_log_BQ1 = soft
  # Columns beyond the shorter head are padding in both.
  gap_BQV = (teacher_BQV[..., :shared] - logits_BQV[..., :shared]) / temperature
  mean_BQ1 = (part_BQV[..., :shared] * gap_BQV).sum(-1, keepdims=True) / total_BQ1
  kl_BQ = temperature**2 * (mean_BQ1 - log_BQ1 + own_log_BQ1)[..., 0]

  def difference():
    extra = logits_BQV.shape[-1] - shared
    theirs_BQV = jnp.pad(part_BQV[..., :shared] / total_BQ1, ((0, 0), (0, 0), (0, extra)))
    return temperature * (own_BQV / own_total_BQ1 - theirs_BQV)

  return kl_BQ, _first_maximum(teacher_BQV, top_BQ1, column_BQV), difference


def _padded(tree, chunk: int):
  """Returns arrays [B, L, ...] with L filled up by zeros to a multiple of the chunk."""
  def pad(x_BL):
    short = -x_BL.shape[1] % chunk
    return jnp.pad(x_BL, [(0, 0), (0, short)] + [(0, 0)] * (x_BL.ndim - 2)) if short else x_BL

  return jax.tree.map(pad, tree)


def _scan(settings: _Settings, student_BLD, head_DV, rest, step, start):
  """Returns `step(carry, chunk's arrays)` scanned over chunks of L: last carry, stacked outputs."""
  teacher, target_BL, weight_BL, stay_V = rest
  hidden_BLD, teacher_head_DV = (None, None) if teacher is None else teacher
  whole = _padded((student_BLD, hidden_BLD, target_BL, weight_BL), settings.chunk)

  def body(carry, index):
    x_BQD, t_BQD, target_BQ, weight_BQ = jax.tree.map(
      lambda x_BL: jax.lax.dynamic_slice_in_dim(x_BL, index * settings.chunk, settings.chunk, 1),
      whole,
    )
    pair = None if teacher is None else (t_BQD, teacher_head_DV)
    out, gradient = _chunk_sums(
      settings, x_BQD, head_DV, pair, target_BQ, weight_BQ, stay_V
    )
    return step(carry, x_BQD, out, gradient)

  count = whole[0].shape[1] // settings.chunk
  return jax.lax.scan(body, start, jnp.arange(count))


def _zeros(rest) -> dict[str, Any]:
  names = ("loss", "weight", "ce", "correct") + (() if rest[0] is None else ("kl", "agree"))
  return {name: jnp.zeros((), jnp.float32) for name in names}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings: _Settings, student_BLD, head_DV, rest):
  def step(total, x_BQD, out, gradient):
    return jax.tree.map(jnp.add, total, out), None

  return _scan(settings, student_BLD, head_DV, rest, step, _zeros(rest))[0]


def _fused_forward(settings: _Settings, student_BLD, head_DV, rest):
  """Returns the sums, and as residuals the gradients of "loss" with respect to both inputs."""
  def step(carry, x_BQD, out, gradient):
    total, grad_DV = carry
    # Products run in the inputs' dtype and add up in float32.
    grad_BQV = gradient().astype(head_DV.dtype)
    grad_BQD = jnp.einsum("BQV,DV->BQD", grad_BQV, head_DV, preferred_element_type=jnp.float32)
    grad_DV += jnp.einsum("BQD,BQV->DV", x_BQD, grad_BQV, preferred_element_type=jnp.float32)
    return (jax.tree.map(jnp.add, total, out), grad_DV), grad_BQD.astype(x_BQD.dtype)

  start = (_zeros(rest), jnp.zeros(head_DV.shape, jnp.float32))
  (total, grad_DV), grad_CBQD = _scan(settings, student_BLD, head_DV, rest, step, start)
  batch, length, width = student_BLD.shape
  grad_BLD = jnp.moveaxis(grad_CBQD, 0, 1).reshape(batch, -1, width)[:, :length]
  return total, (grad_BLD, grad_DV.astype(head_DV.dtype))


def _fused_backward(settings: _Settings, residuals, cotangents):
  scale = cotangents["loss"]
  grads = jax.tree.map(lambda grad: (scale * grad).astype(grad.dtype), residuals)
  return (*grads, None)


_fused.defvjp(_fused_forward, _fused_backward)
