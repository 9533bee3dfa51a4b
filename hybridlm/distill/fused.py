"""The loss chunk by chunk, with its gradients beside it, on one device or on each of a mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybridlm.distill import divergences, places, vocabulary
from hybridlm.distill.places import Place
from hybridlm.distill.vocabulary import OUT, Vocabulary


class Settings(NamedTuple):
  """What `loss.sums` was asked for, checked; static.

  name: what the divergence's sum is called.
  vocabulary: tokens.  columns: of both heads, over all devices.  chunk: positions at a time.
  """

  temperature: float
  kl: float
  ce: float
  divergence: str
  name: str
  skew: float
  top_k: int | None
  vocabulary: int
  columns: int
  chunk: int
  place: Place


class Whole(NamedTuple):
  """A teacher at hand: final hidden states and output matrix."""

  hidden_BLD: jax.Array
  head_DV: jax.Array


class Top(NamedTuple):
  """What is stored of a teacher."""

  id_BLT: jax.Array
  log_BLT: jax.Array
  tail_log_BL: jax.Array


def _total(weight_BQ, value_BQ):
  """Returns Σ w·value; values of weight 0 do not count, NaN or not."""
  return jnp.where(weight_BQ != 0, weight_BQ * value_BQ, 0.0).sum()


def _chunk_sums(settings: Settings, columns: Vocabulary, x_BQD, head_DV, rest):
  """Returns a chunk's sums and a function from nothing to the gradient of its logits."""
  teacher, target_BQ, weight_BQ, stay_V = rest
  logits_BQV = _logits(settings, columns, x_BQD, head_DV, stay_V)
  weight_BQ = weight_BQ.astype(logits_BQV.dtype)
  top_BQ1 = columns.max(logits_BQV)
  soft = vocabulary.softmax(logits_BQV, top_BQ1, 1.0, columns)
  hit_BQV = columns.numbers(logits_BQV.shape) == target_BQ[..., None]
  known_BQ = (target_BQ >= 0) & (target_BQ < columns.real)
  own_BQ = columns.sum(jnp.where(hit_BQV, logits_BQV, 0.0))[..., 0]
  ce_BQ = soft.log[..., 0] - own_BQ
  if stay_V is not None:
    ce_BQ = jnp.where(own_BQ > OUT / 2, ce_BQ, jnp.inf)
  ce_BQ = jnp.where(known_BQ, ce_BQ, jnp.nan)
  choice_BQ = columns.first(logits_BQV == top_BQ1)
  out = {
    "weight": weight_BQ.sum(),
    "ce": _total(weight_BQ, ce_BQ),
    "correct": _total(weight_BQ, (choice_BQ == target_BQ).astype(weight_BQ.dtype)),
  }
  loss_BQ = settings.ce * ce_BQ if settings.ce else 0.0

  def ce_gradient():
    return settings.ce * (soft.probabilities() - hit_BQV) if settings.ce else 0.0

  gradient = ce_gradient
  if teacher is not None:
    temperature = settings.temperature
    warm = soft if temperature == 1 else vocabulary.softmax(
      logits_BQV, top_BQ1, temperature, columns
    )
    value_BQ1, slope, theirs_BQ = _divergence(settings, columns, warm, teacher, stay_V)
    value_BQ = temperature**2 * value_BQ1[..., 0]
    out[settings.name] = _total(weight_BQ, value_BQ)
    out["agree"] = _total(weight_BQ, (theirs_BQ == choice_BQ).astype(weight_BQ.dtype))
    if settings.kl:
      loss_BQ = loss_BQ + settings.kl * value_BQ

    def gradient():
      return ce_gradient() + settings.kl * temperature * slope()

  out["loss"] = _total(weight_BQ, loss_BQ)
  return out, lambda: weight_BQ[..., None] * gradient()


def _logits(settings: Settings, columns: Vocabulary, x_BQD, head_DV, stay_V):
  padded = settings.vocabulary < settings.columns
  return vocabulary.logits(x_BQD, head_DV, columns, stay_V, padded=padded)


def _divergence(settings: Settings, columns: Vocabulary, own, teacher, stay_V):
  """Returns the divergence's value, its gradient function and the teacher's choice."""
  if isinstance(teacher, Top):
    dtype = own.logits.dtype
    top = (teacher.id_BLT, teacher.log_BLT.astype(dtype), teacher.tail_log_BL.astype(dtype))
    place_BQ1 = teacher.log_BLT.argmax(-1, keepdims=True)
    choice_BQ = jnp.take_along_axis(teacher.id_BLT, place_BQ1, axis=2)[..., 0]
  else:
    logits_BQV = _logits(settings, columns, *teacher, stay_V)
    top_BQ1 = columns.max(logits_BQV)
    soft = vocabulary.softmax(logits_BQV, top_BQ1, settings.temperature, columns)
    choice_BQ = columns.first(logits_BQV == top_BQ1)
    if settings.top_k is None:
      compare = divergences.TABLE[settings.divergence]
      return *compare(soft, own, total=columns.sum, skew=settings.skew), choice_BQ
    top = divergences.top_of(soft, settings.top_k, columns)
  found = divergences.of_top(
    settings.divergence, top, own, vocabulary=columns, skew=settings.skew
  )
  return *found, choice_BQ


def _scan(settings: Settings, columns: Vocabulary, student_BLD, head_DV, rest, step, start):
  """Returns `step(carry, chunk's arrays)` scanned over chunks of L: last carry, stacked outputs."""
  teacher, target_BL, weight_BL, stay_V = rest
  whole = isinstance(teacher, Whole)
  parts = (student_BLD, teacher.hidden_BLD if whole else teacher, target_BL, weight_BL)
  parts = jax.tree.map(lambda x_BL: _padded(x_BL, settings.chunk), parts)

  def body(carry, index):
    x_BQD, theirs, target_BQ, weight_BQ = jax.tree.map(
      lambda x_BL: jax.lax.dynamic_slice_in_dim(x_BL, index * settings.chunk, settings.chunk, 1),
      parts,
    )
    theirs = Whole(theirs, teacher.head_DV) if whole else theirs
    chunk = (theirs, target_BQ, weight_BQ, stay_V)
    out, gradient = _chunk_sums(settings, columns, x_BQD, head_DV, chunk)
    return step(carry, x_BQD, out, gradient)

  count = parts[0].shape[1] // settings.chunk
  return jax.lax.scan(body, start, jnp.arange(count))


def _padded(x_BL, chunk: int):
  """Returns an array [B, L, ...] with L filled up by zeros to a multiple of the chunk."""
  short = -x_BL.shape[1] % chunk
  return jnp.pad(x_BL, [(0, 0), (0, short)] + [(0, 0)] * (x_BL.ndim - 2)) if short else x_BL


def _zeros(settings: Settings, student_BLD, rest) -> dict[str, Any]:
  names = ["loss", "weight", "ce", "correct"]
  names += [] if rest[0] is None else [settings.name, "agree"]
  return {name: jnp.zeros((), _wide(student_BLD)) for name in names}


def _wide(array: jax.Array) -> Any:
  """Returns the dtype that sums have."""
  return jnp.promote_types(array.dtype, jnp.float32)


def _columns(settings: Settings, head_DV: jax.Array) -> Vocabulary:
  """Returns the columns of this device's part of a head."""
  return Vocabulary(settings.vocabulary, head_DV.shape[1], settings.place.columns)


def _values(settings: Settings, student_BLD, head_DV, rest) -> dict[str, jax.Array]:
  """Returns the sums over this device's tokens."""
  def step(total, x_BQD, out, gradient):
    return jax.tree.map(jnp.add, total, out), None

  start = _zeros(settings, student_BLD, rest)
  columns = _columns(settings, head_DV)
  total, _ = _scan(settings, columns, student_BLD, head_DV, rest, step, start)
  return places.reduced(settings.place, total)


def _gradients(settings: Settings, student_BLD, head_DV, rest):
  """Returns `_values`, and the gradients of "loss" with respect to both inputs."""
  def step(carry, x_BQD, out, gradient):
    total, grad_DV = carry
    # Products run in the inputs' dtype and add up in float32.
    grad_BQV = gradient().astype(head_DV.dtype)
    grad_BQD = jnp.einsum("BQV,DV->BQD", grad_BQV, head_DV, preferred_element_type=grad_DV.dtype)
    grad_DV += jnp.einsum("BQD,BQV->DV", x_BQD, grad_BQV, preferred_element_type=grad_DV.dtype)
    if settings.place.columns:
      grad_BQD = jax.lax.psum(grad_BQD, settings.place.columns)
    return (jax.tree.map(jnp.add, total, out), grad_DV), grad_BQD.astype(x_BQD.dtype)

  columns = _columns(settings, head_DV)
  start = (_zeros(settings, student_BLD, rest), jnp.zeros(head_DV.shape, _wide(head_DV)))
  (total, grad_DV), grad_CBQD = _scan(settings, columns, student_BLD, head_DV, rest, step, start)
  batch, length, width = student_BLD.shape
  grad_BLD = jnp.moveaxis(grad_CBQD, 0, 1).reshape(batch, -1, width)[:, :length]
  grad_DV = places.gathered(settings.place, grad_DV).astype(head_DV.dtype)
  return places.reduced(settings.place, total), (grad_BLD, grad_DV)


def _placed(settings: Settings, function, grads: Any):
  """Returns a function of arrays with every device of the mesh in force on its own part.

  `grads`: where it leaves what it returns beside the sums, None if that is nothing.
  """
  place = settings.place
  function = functools.partial(function, settings)
  if place.alone:
    return function

  def spread(student_BLD, head_DV, rest):
    teacher, target_BL, weight_BL, stay_V = rest
    tokens = place.spec("BL")
    where = None
    if isinstance(teacher, Whole):
      where = Whole(tokens, place.spec("DV"))
    elif isinstance(teacher, Top):
      where = Top(tokens, tokens, tokens)
    whole = PartitionSpec()
    return jax.shard_map(
      function,
      in_specs=(tokens, place.spec("DV"), (where, tokens, tokens, place.spec("V"))),
      out_specs=whole if grads is None else (whole, grads),
      axis_names=places.free(),
      check_vma=False,
    )(student_BLD, head_DV, rest)

  return spread


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(settings: Settings, student_BLD, head_DV, rest) -> dict[str, jax.Array]:
  """Returns the sums of `loss.sums`; `rest` is the teacher, targets, weights and what stays."""
  return _placed(settings, _values, None)(student_BLD, head_DV, rest)


def _forward(settings: Settings, student_BLD, head_DV, rest):
  """Returns the sums, and as residuals the gradients of "loss" with respect to both inputs."""
  grads = (settings.place.spec("BL"), settings.place.head())
  return _placed(settings, _gradients, grads)(student_BLD, head_DV, rest)


def _backward(settings: Settings, residuals, cotangents):
  scale = cotangents["loss"]
  grads = jax.tree.map(lambda grad: (scale * grad).astype(grad.dtype), residuals)
  return (*grads, None)


sums.defvjp(_forward, _backward)
