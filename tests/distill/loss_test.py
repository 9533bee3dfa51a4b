"""Laws of the chunked loss: it is the dense one, and never holds the dense one's logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.distill import loss

B, L, D, TEACHER_D, V = 2, 37, 16, 20, 31


def inputs(seed=0, *, rows=V, teacher_rows=V, real=V, dtype=jnp.float32, batch=B, length=L):
  """Returns student, head, target, weight, teacher and teacher's head; logits of a few units."""
  keys = jax.random.split(jax.random.key(seed), 6)
  student_BLD = jax.random.normal(keys[0], (batch, length, D), dtype)
  head_DV = jax.random.normal(keys[1], (D, rows), dtype) / 2
  teacher_BLD = jax.random.normal(keys[2], (batch, length, TEACHER_D), dtype)
  teacher_head_DV = jax.random.normal(keys[3], (TEACHER_D, teacher_rows), dtype) / 2
  target_BL = jax.random.randint(keys[4], (batch, length), 0, real)
  weight_BL = jax.random.uniform(keys[5], (batch, length)) * (target_BL % 5 > 0)
  return student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV


def chunked(arrays, **settings):
  student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV = arrays
  return loss.sums(
    student_BLD, head_DV, target_BL, weight_BL,
    teacher_BLD=teacher_BLD, teacher_head_DV=teacher_head_DV, **settings,
  )


totals = jax.jit(
  chunked, static_argnames=("temperature", "kl", "ce", "vocabulary", "chunk")
)


def dense(arrays, *, temperature=1.0, kl=1.0, ce=0.0, vocabulary=V):
  """The definition, in float32, with all logits at once and JAX's own log_softmax."""
  student_BLD, head_DV, target_BL, weight_BL, teacher_BLD, teacher_head_DV = arrays
  wide = [x.astype(jnp.float32) for x in (student_BLD, head_DV, teacher_BLD, teacher_head_DV)]
  logits_BLV = (wide[0] @ wide[1])[..., :vocabulary]
  teacher_BLV = (wide[2] @ wide[3])[..., :vocabulary]
  log_p_BLV = jax.nn.log_softmax(teacher_BLV / temperature)
  log_q_BLV = jax.nn.log_softmax(logits_BLV / temperature)
  kl_BL = temperature**2 * (jnp.exp(log_p_BLV) * (log_p_BLV - log_q_BLV)).sum(-1)
  log_BLV = jax.nn.log_softmax(logits_BLV)
  ce_BL = -jnp.take_along_axis(log_BLV, target_BL[..., None], -1)[..., 0]
  choice_BL = logits_BLV.argmax(-1)
  return {
    "loss": (weight_BL * (kl * kl_BL + ce * ce_BL)).sum(),
    "weight": weight_BL.sum(),
    "kl": (weight_BL * kl_BL).sum(),
    "ce": (weight_BL * ce_BL).sum(),
    "agree": (weight_BL * (choice_BL == teacher_BLV.argmax(-1))).sum(),
    "correct": (weight_BL * (choice_BL == target_BL)).sum(),
  }


def value_and_gradient(sums, arrays, **settings):
  def scalar(student_BLD, head_DV):
    out = sums((student_BLD, head_DV, *arrays[2:]), **settings)
    return out["loss"] / 3, out

  (_, out), grads = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(*arrays[:2])
  return out, grads


def assert_close(found, expected, *, bound):
  """Compares with the largest element as the scale: rounding follows the sum, not the entry."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.parametrize("chunk", [1, 8, 37, 64, None])
def test_chunked_loss_is_the_dense_loss_in_value_and_gradient(chunk):
  arrays = inputs()
  found = value_and_gradient(chunked, arrays, chunk=chunk)
  assert_close(found, value_and_gradient(dense, arrays), bound=1e-5)


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": 2.5},
    {"temperature": 0.4, "ce": 0.3},
    {"ce": 0.7, "kl": 0.2},
    {"ce": 1.3, "kl": 0.0},
  ],
)
def test_temperature_and_cross_entropy_mix_match_the_dense_loss(settings):
  arrays = inputs(1)
  found = value_and_gradient(chunked, arrays, chunk=8, **settings)
  assert_close(found, value_and_gradient(dense, arrays, **settings), bound=1e-5)


@pytest.mark.parametrize(
  "rows,teacher_rows,temperature", [(31, 31, 1.0), (40, 31, 1.0), (31, 40, 2.0), (33, 40, 1.0)]
)
def test_padded_vocabulary_rows_count_for_nothing(rows, teacher_rows, temperature):
  real, settings = 29, {"temperature": temperature, "ce": 0.5, "vocabulary": 29}
  arrays = inputs(2, rows=rows, teacher_rows=teacher_rows, real=real)
  # Padding that would win every argmax and swallow every softmax if it counted.
  arrays = (arrays[0], arrays[1].at[:, real:].mul(50), *arrays[2:5], arrays[5].at[:, real:].mul(50))
  found = value_and_gradient(chunked, arrays, chunk=8, **settings)
  expected = value_and_gradient(dense, arrays, **settings)
  assert_close(found, expected, bound=1e-5)
  assert not np.asarray(found[1][1])[:, real:].any()


def test_bfloat16_inputs_stay_close_to_float32_sums():
  arrays = inputs(3, dtype=jnp.bfloat16)
  found = value_and_gradient(chunked, arrays, chunk=8, ce=0.3)
  assert all(out.dtype == jnp.float32 for out in found[0].values())
  assert [grad.dtype for grad in found[1]] == [jnp.bfloat16] * 2
  expected = value_and_gradient(dense, arrays, ce=0.3)
  # Only the products' inputs are bfloat16 (8 bits): sums are exact, gradients off by 2^-7.
  assert_close(found[0], expected[0], bound=1e-5)
  assert_close(found[1], expected[1], bound=2**-7)


def test_without_a_teacher_the_loss_is_cross_entropy():
  arrays = inputs(4)
  out = loss.sums(*arrays[:4], ce=0.6, chunk=8)
  expected = dense(arrays, kl=0.0, ce=0.6)
  assert sorted(out) == ["ce", "correct", "loss", "weight"]
  assert_close(out, {name: expected[name] for name in out}, bound=1e-5)


def test_without_differentiation_the_sums_are_the_same():
  arrays = inputs(5)
  plain = totals(arrays, chunk=8, temperature=1.5)
  assert_close(plain, dense(arrays, temperature=1.5), bound=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_of_a_model_from_itself_is_zero_and_so_is_its_gradient(temperature):
  student_BLD, head_DV, target_BL, weight_BL, _, _ = inputs(6)
  arrays = (student_BLD, head_DV, target_BL, weight_BL, student_BLD, head_DV)
  out, grads = value_and_gradient(chunked, arrays, chunk=8, temperature=temperature)
  # To rounding: compilers may sum the two softmaxes in different orders.
  assert abs(float(out["kl"])) < 1e-6 * float(weight_BL.sum())
  assert float(out["agree"]) == pytest.approx(float(weight_BL.sum()), rel=1e-6)
  _, scale = value_and_gradient(chunked, inputs(6), chunk=8, temperature=temperature)
  for grad, usual in zip(grads, scale, strict=True):
    assert np.abs(grad).max() < 1e-6 * np.abs(usual).max()


def test_divergence_keeps_its_scale_when_the_temperature_rises():
  # For hot softmaxes T²·KL tends to half the variance, over the vocabulary, of t − s: no T left.
  arrays = inputs(7)
  student_BLD, head_DV, _, weight_BL, teacher_BLD, teacher_head_DV = arrays
  gap_BLV = teacher_BLD @ teacher_head_DV - student_BLD @ head_DV
  limit = float((weight_BL * gap_BLV.var(-1)).sum() / 2)
  hot, hotter = (float(totals(arrays, temperature=t)["kl"]) for t in (200.0, 400.0))
  assert hot == pytest.approx(limit, rel=0.02)
  assert hotter == pytest.approx(limit, rel=0.02)


def test_sums_do_not_depend_on_how_the_batch_is_split():
  arrays = inputs(8, batch=5)
  whole = totals(arrays, ce=0.3)

  def rows(part):
    return (arrays[0][part], arrays[1], *(x[part] for x in arrays[2:5]), arrays[5])

  parts = [totals(rows(part), ce=0.3, chunk=8) for part in (slice(0, 2), slice(2, 5))]
  assert_close({k: parts[0][k] + parts[1][k] for k in whole}, whole, bound=1e-6)


def test_nothing_flows_to_the_teacher_or_through_the_other_sums():
  arrays = inputs(9)

  def scalar(name, student_BLD, head_DV, teacher_BLD, teacher_head_DV):
    full = (student_BLD, head_DV, *arrays[2:4], teacher_BLD, teacher_head_DV)
    return chunked(full, ce=0.3, chunk=8)[name]

  floats = (*arrays[:2], *arrays[4:])
  grads = jax.grad(scalar, (1, 2, 3, 4))("loss", *floats)
  assert np.asarray(grads[0]).any() and np.asarray(grads[1]).any()
  assert not np.asarray(grads[2]).any() and not np.asarray(grads[3]).any()
  assert not any(np.asarray(g).any() for g in jax.grad(scalar, (1, 2, 3, 4))("kl", *floats))


def test_target_and_hidden_state_of_a_position_without_weight_do_not_count():
  arrays = inputs(10)
  student_BLD, head_DV, target_BL, weight_BL, *teacher = arrays
  weight_BL = weight_BL.at[:, 5].set(0.0)
  before = totals((student_BLD, head_DV, target_BL, weight_BL, *teacher), ce=0.3, chunk=8)
  moved = (student_BLD.at[:, 5].mul(-3), head_DV, target_BL.at[:, 5].set(-100), weight_BL, *teacher)
  assert_close(totals(moved, ce=0.3, chunk=8), before, bound=0.0)


def test_a_weighted_target_outside_the_vocabulary_makes_the_sum_nan_not_wrong():
  student_BLD, head_DV, target_BL, weight_BL, *teacher = inputs(11)
  weight_BL = weight_BL.at[0, 3].set(1.0)
  for outside in (-1, 29, V + 4):
    arrays = (student_BLD, head_DV, target_BL.at[0, 3].set(outside), weight_BL, *teacher)
    assert math.isnan(float(totals(arrays, ce=0.3, vocabulary=29)["ce"]))


def test_equal_logits_choose_the_first_token_as_argmax_does():
  student_BLD, head_DV, target_BL, weight_BL, *teacher = inputs(12)
  target_BL, weight_BL = target_BL % 3, weight_BL + 0.5
  out = totals((student_BLD, head_DV * 0, target_BL, weight_BL, *teacher), chunk=8)
  expected = float((weight_BL * (target_BL == 0)).sum())
  assert expected > 0
  assert float(out["correct"]) == pytest.approx(expected, rel=1e-6)


def largest_array(jaxpr):
  """Returns the most elements that any value inside a program has, nested programs included."""
  largest = 0
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      largest = max(largest, math.prod(getattr(variable.aval, "shape", ())))
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        largest = max(largest, largest_array(inner))
  return largest


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_array_of_all_logits_exists_for_either_model(temperature):
  rows, length, chunk = 2000, 256, 16
  arrays = inputs(13, rows=rows, teacher_rows=rows, real=rows, length=length)

  def program(sums):
    settings = {"temperature": temperature, "ce": 0.5}
    settings |= {"chunk": chunk} if sums is chunked else {"vocabulary": rows}
    return jax.jit(lambda *arrays: value_and_gradient(sums, arrays, **settings))

  logits = B * length * rows
  assert largest_array(jax.make_jaxpr(program(dense))(*arrays).jaxpr) == logits
  # The largest is a chunk's logits.
  assert largest_array(jax.make_jaxpr(program(chunked))(*arrays).jaxpr) == B * chunk * rows
  compiled = program(chunked).lower(*arrays).compile().memory_analysis()
  assert compiled.temp_size_in_bytes < 4 * logits
  assert program(dense).lower(*arrays).compile().memory_analysis().temp_size_in_bytes > 4 * logits


@pytest.mark.parametrize(
  "settings,message",
  [
    ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ({"temperature": math.nan}, "temperature=nan must be positive"),
    ({"kl": -1.0}, "factors kl=-1.0 and ce=0.0 must not be negative"),
    ({"kl": 0.0}, "nothing to minimise with kl=0.0, ce=0.0 and a teacher"),
    ({"chunk": 0}, "chunk 0 must be at least 1"),
    ({"vocabulary": 32}, "vocabulary=32 must lie in 1..31"),
    ({"vocabulary": 0}, "vocabulary=0 must lie in 1..31"),
  ],
)
def test_impossible_settings_are_refused_by_value(settings, message):
  with pytest.raises(ValueError, match=message):
    chunked(inputs(14), **settings)


def test_a_loss_without_any_term_is_refused():
  with pytest.raises(ValueError, match="nothing to minimise with kl=1.0, ce=0.0 and no teacher"):
    loss.sums(*inputs(15)[:4])


def test_heads_of_different_rows_need_the_number_of_real_ones():
  with pytest.raises(ValueError, match="student's head has 31 rows and the teacher's 33"):
    chunked(inputs(16, teacher_rows=33))


def test_a_teacher_without_its_head_is_refused():
  with pytest.raises(ValueError, match="come together or not at all"):
    loss.sums(*inputs(17)[:4], teacher_BLD=inputs(17)[4])


def staying():
  """Returns arrays whose targets stay, the mask of 19 of 29 real tokens, and their ids."""
  arrays = inputs(4, rows=33, teacher_rows=37, real=29)
  token_V = np.sort(np.random.default_rng(5).permutation(29)[:19])
  stay_V = np.isin(np.arange(33), [*token_V, 30, 31])  # padded rows never stay, whatever is said
  target_BL = jnp.asarray(token_V)[arrays[2] % len(token_V)]
  return (*arrays[:2], target_BL, *arrays[3:]), jnp.asarray(stay_V), token_V


def test_tokens_that_do_not_stay_are_out_of_both_models_as_if_cut():
  arrays, stay_V, token_V = staying()
  factors = {"kl": 0.7, "ce": 0.4, "temperature": 2.0}
  got, gradient = value_and_gradient(chunked, arrays, vocabulary=29, stay_V=stay_V, **factors)
  cut = list(arrays)
  cut[1], cut[5] = arrays[1][:, token_V], arrays[5][:, token_V]
  cut[2] = jnp.searchsorted(jnp.asarray(token_V), arrays[2])
  want, wanted = value_and_gradient(chunked, tuple(cut), **factors)
  assert_close(got, want, bound=1e-5)
  assert_close(gradient[0], wanted[0], bound=1e-5)
  assert_close(gradient[1][:, token_V], wanted[1], bound=1e-5)
  np.testing.assert_array_equal(np.delete(gradient[1], token_V, axis=1), 0)
  whole = chunked(arrays, vocabulary=29, **factors)
  assert abs(whole["kl"] - want["kl"]) > 0.01 * want["kl"]


def test_tokens_that_stay_are_an_argument_and_cost_no_program():
  arrays, stay_V, _ = staying()
  totals(arrays, vocabulary=29, stay_V=stay_V)
  before = totals._cache_size()
  totals(arrays, vocabulary=29, stay_V=~stay_V)
  totals(arrays, vocabulary=29, stay_V=stay_V | True)
  assert totals._cache_size() == before
  everything = totals(arrays, vocabulary=29, stay_V=stay_V | True)
  assert_close(everything, totals(arrays, vocabulary=29), bound=1e-6)


def test_a_target_that_does_not_stay_is_infinitely_unlikely_and_padding_still_does_not_count():
  arrays, stay_V, token_V = staying()
  gone = next(token for token in range(29) if token not in token_V)
  target_BL, weight_BL = arrays[2].at[0, 3].set(gone), arrays[3].at[0, 3].set(0.5)
  arrays = (*arrays[:2], target_BL, weight_BL, *arrays[4:])
  assert np.isposinf(chunked(arrays, vocabulary=29, stay_V=stay_V)["ce"])
  silent = (*arrays[:3], weight_BL.at[0, 3].set(0.0), *arrays[4:])
  assert np.isfinite(chunked(silent, vocabulary=29, stay_V=stay_V, ce=1.0)["loss"])


def test_a_mask_of_another_number_of_tokens_is_refused():
  arrays, stay_V, _ = staying()
  with pytest.raises(ValueError, match="stay_V has 32 entries, head_DV 33 rows"):
    chunked(arrays, vocabulary=29, stay_V=stay_V[:32])
