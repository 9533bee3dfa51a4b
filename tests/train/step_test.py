"""One update: what it equals, what it measures, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cases import tiny
from hybridlm.train import optim, state, step

SGD = optim.Optimizer(*optax.sgd(0.5), optax.constant_schedule(0.5))


@functools.cache
def stepper(accumulate=1, optimizer=SGD, loss_fn=tiny.distillation):
  return step.make_step(loss_fn, optimizer, accumulate=accumulate)


def advance(params, batch, accumulate=1, optimizer=SGD):
  teacher = tiny.init(1, width=20)
  return stepper(accumulate, optimizer)(state.create(params, optimizer), teacher, batch)


def assert_close(left, right, rtol):
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.abs(b).max()))


def test_a_step_of_gradient_descent_moves_against_the_gradient_of_the_weighted_mean():
  params, teacher = tiny.init(), tiny.init(1, width=20)
  batch = jax.tree.map(jnp.asarray, tiny.batch(0))
  after, metrics = advance(params, batch)
  assert int(after.step) == 1

  def mean(params):
    sums = tiny.distillation(params, teacher, batch)
    return sums["loss"] / sums["weight"]

  value, grads = jax.value_and_grad(mean)(params)
  assert_close(after.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), 1e-6)
  assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
  assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
  assert float(metrics["weight"]) == batch["weight_BL"].sum()
  assert float(metrics["learning_rate"]) == 0.5
  assert bool(metrics["finite"]) and int(metrics["culprit"]) == -1


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_accumulating_micro_batches_equals_one_batch(accumulate):
  # Rows of very different weight: a mean of the micro-batches' means would be another number.
  batch = tiny.batch(0, rows=6)
  batch["weight_BL"] = batch["weight_BL"] * (np.arange(6)[:, None] ** 2 + 0.1).astype(np.float32)
  whole, parts = (advance(tiny.init(), batch, k) for k in (1, accumulate))
  assert_close(parts[0].params, whole[0].params, 1e-6)
  for name in whole[1]:
    assert float(parts[1][name]) == pytest.approx(float(whole[1][name]), rel=1e-5), name


def test_rows_that_do_not_split_are_refused():
  with pytest.raises(ValueError, match="batch of 4 rows is not a multiple of accumulate=3"):
    advance(tiny.init(), tiny.batch(0), 3)
  with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
    step.make_step(tiny.distillation, SGD, accumulate=0)


def test_the_learning_rate_reported_is_the_one_that_moved_the_parameters():
  rate = optim.schedule("wsd", peak=0.8, steps=8, warmup=3, decay=2)
  optimizer = optim.Optimizer(*optax.sgd(rate), rate)
  now = state.create(tiny.init(), optimizer)
  run = step.make_step(tiny.distillation, optimizer)
  teacher = tiny.init(1)
  for number in range(8):
    before = np.asarray(now.params["head"]["w_head_DV"])
    now, metrics = run(now, teacher, tiny.batch(number))
    moved = float(np.sqrt(((np.asarray(now.params["head"]["w_head_DV"]) - before) ** 2).sum()))
    assert float(metrics["learning_rate"]) == pytest.approx(float(rate(number)), rel=1e-6)
    assert 0 < moved < float(metrics["learning_rate"]) * float(metrics["grad_norm"]) * 1.0001


def test_a_step_destroys_its_state_and_nothing_else():
  params, teacher, batch = tiny.init(), tiny.init(1), jax.device_put(tiny.batch(0))
  copies = jax.tree.map(np.array, (params, teacher))
  before = state.create(params, SGD)
  stepper()(before, teacher, batch)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
  assert tiny.same((params, teacher), copies)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))


def test_the_teacher_has_no_moments():
  optimizer = optim.make(peak=0.1, steps=4)
  moments = state.create(tiny.init(), optimizer).opt_state
  sizes = sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim)
  assert sizes == 2 * sum(leaf.size for leaf in jax.tree.leaves(tiny.init()))


def test_a_state_sharing_memory_with_the_teacher_is_refused_by_name():
  teacher = tiny.init(1)
  good = state.create(teacher, SGD)
  state.check_apart(good, teacher)
  shared = good._replace(params=good.params | {"head": teacher["head"]})
  with pytest.raises(ValueError, match="params/head/w_head_DV and frozen head/w_head_DV share"):
    state.check_apart(shared, teacher)


def test_a_state_sharing_memory_with_itself_is_refused_by_name():
  good = state.create(tiny.init(), SGD)
  head = good.params["head"]["w_head_DV"]
  twice = good._replace(params=good.params | {"other": {"w_head_DV": head}})
  with pytest.raises(ValueError, match="params/head/w_head_DV and state params/other/w_head_DV"):
    state.check_apart(twice, None)


def test_parameters_and_moments_of_a_new_state_all_have_their_own_memory():
  params = tiny.init()
  optimizer = optim.make(peak=0.1, steps=4)
  state.check_apart(state.create(params, optimizer), params)


def spiked(params, frozen, batch):
  sums = tiny.distillation(params, frozen, batch)
  spike = batch["spike_B"].sum() * params["head"]["w_head_DV"]
  return sums | {"loss": sums["loss"] + spike.sum()}


def test_the_culprit_is_the_one_leaf_whose_gradient_is_not_finite():
  params = tiny.init()
  batch = tiny.batch(0) | {"spike_B": np.array([0, np.inf, 0, 0], np.float32)}
  _, metrics = stepper(loss_fn=spiked)(state.create(params, SGD), tiny.init(1), batch)
  assert not metrics["finite"]
  assert step.culprit(params, int(metrics["culprit"])) == "gradient of head/w_head_DV"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_culprit_is_the_poisoned_parameter_though_it_poisons_every_gradient(accumulate):
  params = tiny.init()
  params["blocks"]["00"]["w_up_DF"] = params["blocks"]["00"]["w_up_DF"].at[3, 5].set(jnp.nan)
  _, metrics = advance(params, tiny.batch(0), accumulate)
  assert not metrics["finite"]
  assert step.culprit(params, int(metrics["culprit"])) == "parameter blocks/00/w_up_DF"


def test_evaluation_is_the_weighted_mean_over_all_batches():
  params, teacher = tiny.init(), tiny.init(1)
  batches = [tiny.batch(0, rows=4), tiny.batch(1, rows=4)]
  batches[1]["weight_BL"] = batches[1]["weight_BL"] * 0.01
  found = step.make_eval(tiny.distillation)(params, teacher, iter(batches))
  joined = {name: jnp.concatenate([b[name] for b in batches]) for name in batches[0]}
  sums = tiny.distillation(params, teacher, joined)
  assert found["weight"] == pytest.approx(float(sums["weight"]), rel=1e-6)
  for name in set(sums) - {"weight"}:
    assert found[name] == pytest.approx(float(sums[name] / sums["weight"]), rel=1e-5), name


def test_an_evaluation_of_nothing_is_refused():
  evaluate = step.make_eval(tiny.distillation)
  with pytest.raises(ValueError, match="no batch to evaluate on"):
    evaluate(tiny.init(), tiny.init(1), [])
  empty = tiny.batch(0) | {"weight_BL": np.zeros((tiny.BATCH, tiny.LENGTH), np.float32)}
  with pytest.raises(ValueError, match="1 batches of weight 0.0"):
    evaluate(tiny.init(), tiny.init(1), [empty])
