"""Every divergence is its definition in float64, value and gradient, on one device and on many."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hybridlm.distill import divergences, loss, vocabulary

B, L, D, TEACHER_D, REAL, ROWS, TEACHER_ROWS, TOP = 8, 24, 16, 20, 29, 31, 37, 5
MESHES = {
  "one device": None,
  "data 2 fsdp 4": {"data": 2, "fsdp": 4},
  "tensor 8": {"tensor": 8},
  "sequence 8": {"sequence": 8},
  "fsdp 2 tensor 2 sequence 2": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}
# What is computed side by side in one program a mesh.
CASES = {
  "forward": {},
  "forward, hot, of other weights": {"temperature": 2.5, "kl": 0.7, "ce": 0.4},
  "reverse": {"divergence": "reverse_kl", "temperature": 1.5},
  "jensen_shannon": {"divergence": "jensen_shannon", "temperature": 0.5},
  "skewed": {"divergence": "skewed_kl", "skew": 0.3, "ce": 0.2},
  "top": {"top_k": TOP, "temperature": 2.0},
  "reverse top": {"divergence": "reverse_kl", "top_k": TOP, "ce": 0.3},
  "stored": {"stored": TOP, "divergence": "skewed_kl", "temperature": 2.0},
  "staying": {"stay": True, "divergence": "jensen_shannon", "ce": 0.5},
}


@functools.cache
def inputs():
  """Returns float32 arrays; padded columns would win every softmax if they counted."""
  rng = np.random.default_rng(0)
  student_BLD = rng.normal(size=(B, L, D))
  head_DV = rng.normal(size=(D, ROWS)) / 2
  teacher_BLD = rng.normal(size=(B, L, TEACHER_D))
  teacher_head_DV = rng.normal(size=(TEACHER_D, TEACHER_ROWS)) / 2
  head_DV[:, REAL:] *= 50
  teacher_head_DV[:, REAL:] *= 50
  weight_BL = rng.uniform(size=(B, L)) * (rng.uniform(size=(B, L)) > 0.2)
  stay_V = np.arange(ROWS) % 3 != 1
  target_BL = rng.integers(0, REAL // 3, (B, L)) * 3  # all of them stay
  floats = (student_BLD, head_DV, weight_BL, teacher_BLD, teacher_head_DV)
  return (*(x.astype(np.float32) for x in floats), target_BL.astype(np.int32), stay_V)


def log_teacher(temperature):
  """Returns the teacher's log-probabilities of real tokens, in float64."""
  logits_BLV = (inputs()[3].astype(np.float64) @ inputs()[4])[..., :REAL] / temperature
  return logits_BLV - np.log(np.exp(logits_BLV).sum(-1, keepdims=True))


def top(log_BLV, count):
  """Returns ids, logs and the log of what is left, of the likeliest tokens."""
  id_BLT = np.argsort(-log_BLV, -1, kind="stable")[..., :count]
  rest_BLV = np.exp(log_BLV)
  np.put_along_axis(rest_BLV, id_BLT, 0, -1)
  log_BLT = np.take_along_axis(log_BLV, id_BLT, -1)
  with np.errstate(divide="ignore"):
    return id_BLT, log_BLT, np.log(rest_BLV.sum(-1))


DEFINITIONS = {
  "forward_kl": lambda p, q, skew: (p * jnp.log(p / q)).sum(-1),
  "reverse_kl": lambda p, q, skew: (q * jnp.log(q / p)).sum(-1),
  "jensen_shannon": lambda p, q, skew: (
    (p * jnp.log(2 * p / (p + q))).sum(-1) + (q * jnp.log(2 * q / (p + q))).sum(-1)
  ) / 2,
  "skewed_kl": lambda p, q, skew: (p * jnp.log(p / (skew * p + (1 - skew) * q))).sum(-1),
}


def dense(student_BLD, head_DV, *, temperature=1.0, kl=1.0, ce=0.0, divergence="forward_kl",
          skew=0.1, top_k=None, stored=None, stay=False):
  """The definition with all logits at once, in the dtype of its arguments."""
  _, _, weight_BL, _, _, target_BL, stay_V = inputs()
  token_V = np.flatnonzero(stay_V[:REAL]) if stay else np.arange(REAL)
  log_BLV = log_teacher(temperature)[..., token_V]
  log_BLV = log_BLV - np.log(np.exp(log_BLV).sum(-1, keepdims=True))
  logits_BLV = (student_BLD @ head_DV)[..., token_V]
  p, q = jnp.exp(log_BLV), jax.nn.softmax(logits_BLV / temperature)
  if top_k or stored:
    id_BLT, log_BLT, tail_log_BL = top(log_BLV, top_k or stored)
    p = jnp.concatenate([jnp.exp(log_BLT), jnp.exp(tail_log_BL)[..., None]], -1)
    mine_BLT = jnp.take_along_axis(q, jnp.asarray(id_BLT), -1)
    q = jnp.concatenate([mine_BLT, 1 - mine_BLT.sum(-1, keepdims=True)], -1)
  value_BL = temperature**2 * DEFINITIONS[divergence](p, q, skew)
  at_BL = jnp.asarray(np.searchsorted(token_V, target_BL))
  ce_BL = -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), at_BL[..., None], -1)[..., 0]
  choice = {"agree": jnp.asarray(log_BLV.argmax(-1)), "correct": at_BL}
  sums = {loss.NAMES[divergence]: value_BL, "ce": ce_BL, "loss": kl * value_BL + ce * ce_BL}
  sums |= {k: logits_BLV.argmax(-1) == v for k, v in choice.items()} | {"weight": 1.0}
  return {name: (weight_BL * value).sum() for name, value in sums.items()}


def chunked(student_BLD, head_DV, *, temperature=1.0, stored=None, stay=False, **settings):
  """The same by the library, 5 positions at a time."""
  _, _, weight_BL, teacher_BLD, teacher_head_DV, target_BL, stay_V = map(jnp.asarray, inputs())
  settings |= {"vocabulary": REAL, "chunk": 5, "stay_V": stay_V if stay else None}
  if stored:
    id_BLT, log_BLT, tail_log_BL = top(log_teacher(temperature), stored)
    settings |= {"top_id_BLT": jnp.asarray(id_BLT, jnp.int32)}
    settings |= {"top_log_BLT": jnp.asarray(log_BLT, jnp.float32)}
    settings |= {"tail_log_BL": jnp.asarray(tail_log_BL, jnp.float32)}
  else:
    settings |= {"teacher_BLD": teacher_BLD, "teacher_head_DV": teacher_head_DV}
  return loss.sums(
    student_BLD, head_DV, target_BL, weight_BL, temperature=temperature, **settings
  )


def all_cases(function, student_BLD, head_DV):
  """Returns sums and gradients of every case."""
  def one(settings):
    def scalar(*arrays):
      sums = function(*arrays, **settings)
      return sums["loss"], sums

    return jax.grad(scalar, (0, 1), has_aux=True)(student_BLD, head_DV)

  return {name: one(settings) for name, settings in CASES.items()}


@functools.cache
def definitions():
  """Returns every case by its definition, in float64."""
  with jax.enable_x64(True):
    wide = (x.astype(np.float64) for x in inputs()[:2])
    return jax.device_get(jax.jit(functools.partial(all_cases, dense))(*wide))


def assert_close(found, expected, where=""):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max(), where


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param(
      sizes, id=name,
      marks=() if name in ("one device", "fsdp 2 tensor 2 sequence 2") else pytest.mark.slow,
    )
    for name, sizes in MESHES.items()
  ],
)
def test_every_loss_is_its_dense_float64_form_in_value_and_gradient(sizes):
  student_BLD, head_DV = inputs()[:2]
  program = jax.jit(functools.partial(all_cases, chunked))
  found = on(sizes, program, student_BLD, head_DV) if sizes else program(student_BLD, head_DV)
  for name, expected in definitions().items():
    assert_close(found[name], expected, name)


def on(sizes, program, *arrays):
  """Returns what a program finds with a mesh of these sizes in force."""
  kinds = (AxisType.Auto,) * len(sizes)
  with jax.set_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)):
    return jax.device_get(program(*arrays))


def test_in_float64_sums_and_gradients_are_exact():
  with jax.enable_x64(True):
    wide = [jnp.asarray(x.astype(np.float64)) for x in inputs()[:2]]

    def scalar(student_BLD, head_DV):
      _, _, weight_BL, teacher_BLD, teacher_head_DV, target_BL, _ = inputs()
      sums = loss.sums(
        student_BLD, head_DV, jnp.asarray(target_BL), jnp.asarray(weight_BL), ce=0.4, kl=0.7,
        temperature=2.5, vocabulary=REAL, teacher_BLD=jnp.asarray(teacher_BLD, np.float64),
        teacher_head_DV=jnp.asarray(teacher_head_DV, np.float64),
      )
      return sums["loss"], sums

    grads, sums = jax.device_get(jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(*wide))
  expected_grads, expected = definitions()["forward, hot, of other weights"]
  pairs = zip((*grads, sums["loss"]), (*expected_grads, expected["loss"]), strict=True)
  for found, wanted in pairs:
    assert np.asarray(found).dtype == np.float64
    assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()


def soft(logits_V):
  logits_BQV = jnp.asarray(logits_V, jnp.float32)[None, None]
  columns = vocabulary.Vocabulary(logits_BQV.shape[2], logits_BQV.shape[2])
  return vocabulary.softmax(logits_BQV, columns.max(logits_BQV), 1.0, columns), columns


@functools.partial(jax.jit, static_argnames=("name", "count"))
def of_top(p_V, q_V, *, name, count):
  """Returns what is stored of a teacher; values and slopes in full, of it and without a rest."""
  (p, columns), (q, _) = soft(p_V), soft(q_V)
  top = divergences.top_of(p, count, columns)
  found = [divergences.TABLE[name](p, q, total=columns.sum, skew=0.1)]
  for each in (top, (*top[:2], jnp.full((1, 1), -jnp.inf))):
    found.append(divergences.of_top(name, each, q, vocabulary=columns, skew=0.1))
  return top, [(value[0, 0, 0], slope()[0, 0]) for value, slope in found]


def test_the_bucket_of_all_other_tokens_has_its_mass_where_what_is_missing_to_one_is_nothing():
  logits = [30.0, 2.0, 1.0, 0.0, 1.0], [28.0, 1.0, -2.0, 0.5, 0.0]  # 1e-13 of the mass is left
  top, (_, (value, slope_V), _) = of_top(*map(jnp.array, logits), name="reverse_kl", count=2)
  exact_p, exact_q = (np.exp(x) / np.exp(x).sum() for x in map(np.float64, logits))
  p, q = (np.array([x[0], x[1], x[2:].sum()]) for x in (exact_p, exact_q))
  np.testing.assert_allclose(np.exp(np.float64(top[2][0, 0])), p[2], rtol=1e-5)
  gap = np.log(q / p)
  np.testing.assert_allclose(slope_V[2:], exact_q[2:] * (gap[2] - q @ gap), rtol=1e-4)
  assert float(value) == pytest.approx(q @ gap, abs=1e-6)


@pytest.mark.parametrize("name", divergences.TABLE)
def test_top_tokens_of_the_whole_vocabulary_are_the_full_divergence(name):
  logits = jnp.array([3.0, 1.0, 0.5, -1.0, 0.0]), jnp.array([1.0, 2.0, 0.5, 0.0, -3.0])
  top, (full, *tops) = of_top(*logits, name=name, count=5)
  np.testing.assert_array_equal(top[0][0, 0], [0, 1, 2, 4, 3])
  for value, slope_V in tops:  # as a store has it, the second one has no rest at all
    np.testing.assert_allclose(value, full[0], rtol=1e-5)
    np.testing.assert_allclose(slope_V, full[1], atol=1e-6)


def test_the_gradient_of_the_head_goes_between_devices_once_and_not_once_a_chunk():
  student_BLD, head_DV = inputs()[:2]

  def program(student_BLD, head_DV):
    return jax.grad(lambda *x: chunked(*x)["loss"], (0, 1))(student_BLD, head_DV)

  text = on({"data": 2, "fsdp": 2, "tensor": 2}, lambda *x: jax.jit(program).lower(*x).compile()
            .as_text(), student_BLD, head_DV)
  loops, entry = text.split("ENTRY")[0], text.split("ENTRY")[1]
  columns = (REAL + 1) // 2  # heads of 31 and 37 rows are both cut to what two devices can share
  reduced = rf"f32\[\d+,{columns}\]\S* (all-reduce|reduce-scatter)(-start)?\("
  assert re.search(reduced, entry)
  assert not re.search(reduced, loops)
  assert "all-reduce" in loops  # maxima and sums over the vocabulary


@pytest.mark.parametrize("settings", [CASES["reverse"], CASES["jensen_shannon"], CASES["stored"],
                                      CASES["top"]])
def test_no_divergence_holds_all_logits(settings):
  student_BLD, head_DV = inputs()[:2]
  program = jax.grad(lambda *x: chunked(*x, **settings)["loss"], (0, 1))
  sizes = {math.prod(shape) for shape in shapes(jax.make_jaxpr(program)(student_BLD, head_DV))}
  assert sizes & {B * 5 * REAL, B * 5 * ROWS}  # a chunk's logits
  assert max(sizes) <= B * 25 * TEACHER_D < B * L * REAL  # the largest: the teacher's states


def shapes(jaxpr):
  """Yields the shape of every value inside a program, nested programs included."""
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    yield from (getattr(variable.aval, "shape", ()) for variable in equation.outvars)
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    ):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from shapes(inner)


@pytest.mark.parametrize(
  "settings,message",
  [
    ({"divergence": "forward"}, "divergence='forward' is not one of forward_kl, reverse_kl"),
    ({"skew": 1.0}, "skew=1.0 must lie between 0 and 1"),
    ({"top_k": 30}, "top_k=30 must lie in 1..29"),
    ({"top_k": 0}, "top_k=0 must lie in 1..29"),
    ({"stored": 4, "stay": True}, "goes with no other, and with neither stay_V nor top_k"),
    ({"stored": 4, "top_k": 3}, "goes with no other, and with neither stay_V nor top_k"),
    ({"top_id_BLT": jnp.zeros((B, L, 3), int)}, "top_id_BLT and top_log_BLT and tail_log_BL"),
  ],
)
def test_impossible_divergences_are_refused_by_value(settings, message):
  with pytest.raises(ValueError, match=message):
    chunked(*map(jnp.asarray, inputs()[:2]), **settings)


@pytest.mark.parametrize(
  "sizes,message",
  [({"data": 8}, "B=7 is not a multiple of the devices along data=8"),
   ({"data": 1, "sequence": 8}, "L=23 is not a multiple of the devices along sequence=8")],
)
def test_tokens_that_the_devices_do_not_divide_are_refused(sizes, message):
  ones = (jnp.ones((7, 23, D)), jnp.ones((D, ROWS)), jnp.zeros((7, 23), int), jnp.ones((7, 23)))
  with pytest.raises(ValueError, match=message):
    on(sizes, lambda *x: loss.sums(*x, kl=0.0, ce=1.0), *ones)
