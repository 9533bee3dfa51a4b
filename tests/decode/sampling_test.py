"""Laws of drawing a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.decode import sampling

V, ROWS = 11, 4000
PROBABILITY_V = np.array([0.02, 0.3, 0.05, 0.25, 0.0, 0.04, 0.2, 0.03, 0.01, 0.0, 0.1])


@functools.cache
def shares(temperature=1.0, top_k=None, top_p=None, seed=0):
  """Returns how often each token is drawn from the logarithm of PROBABILITY_V."""
  with np.errstate(divide="ignore"):
    logits_BV = jnp.asarray(np.tile(np.log(PROBABILITY_V), (ROWS, 1)), jnp.float32)
  draw = jax.jit(sampling.draw, static_argnames="top_k")
  key_B = sampling.keys(seed, jnp.arange(ROWS))
  token_B = draw(logits_BV, key_B, temperature=temperature, top_k=top_k, top_p=top_p)
  return np.bincount(token_B, minlength=V) / ROWS


def test_tokens_are_drawn_as_often_as_the_softmax_says():
  np.testing.assert_allclose(shares(), PROBABILITY_V, atol=0.03)
  assert shares()[[4, 9]].max() == 0  # minus infinity never comes


def test_temperature_flattens_by_its_power():
  want_V = PROBABILITY_V**0.5 / np.sum(PROBABILITY_V**0.5)
  np.testing.assert_allclose(shares(temperature=2.0), want_V, atol=0.03)


@pytest.mark.parametrize(
  "top_k, kept", [(1, [1]), (3, [1, 3, 6]), (V, np.flatnonzero(PROBABILITY_V))]
)
def test_top_k_keeps_the_k_largest(top_k, kept):
  want_V = np.zeros(V)
  want_V[kept] = PROBABILITY_V[kept] / PROBABILITY_V[kept].sum()
  np.testing.assert_allclose(shares(top_k=top_k), want_V, atol=0.03)


@pytest.mark.parametrize("top_p, kept", [(0.2, [1]), (0.5, [1, 3]), (0.56, [1, 3, 6])])
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, kept):
  want_V = np.zeros(V)
  want_V[kept] = PROBABILITY_V[kept] / PROBABILITY_V[kept].sum()
  np.testing.assert_allclose(shares(top_p=top_p), want_V, atol=0.03)


def test_top_p_is_taken_of_what_top_k_leaves():
  # Of 0.3, 0.25 and 0.2 the first two hold 0.73 of the sum.
  assert np.flatnonzero(shares(top_k=3, top_p=0.72)).tolist() == [1, 3]
  assert np.flatnonzero(shares(top_k=3, top_p=0.74)).tolist() == [1, 3, 6]


def test_among_equal_logits_the_first_stay():
  logits_BV = jnp.zeros((64, V))
  key_B = sampling.keys(0, jnp.arange(64))
  token_B = sampling.draw(logits_BV, key_B, temperature=1.0, top_k=3)
  assert set(np.asarray(token_B).tolist()) == {0, 1, 2}
  np.testing.assert_array_equal(sampling.greedy(logits_BV), 0)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_small_temperature_takes_the_largest(options):
  logits_BV = jax.random.normal(jax.random.key(3), (64, V))
  key_B = sampling.keys(0, jnp.arange(64))
  want_B = np.argmax(logits_BV, axis=1)
  np.testing.assert_array_equal(sampling.greedy(logits_BV), want_B)
  token_B = sampling.draw(logits_BV, key_B, temperature=1e-30, **options)
  np.testing.assert_array_equal(token_B, want_B)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_rows_draw_does_not_depend_on_the_others(options):
  logits_BV = jax.random.normal(jax.random.key(3), (8, V))
  draw = functools.partial(sampling.draw, temperature=1.3, **options)
  whole_B = draw(logits_BV, sampling.keys(5, jnp.arange(8)))
  some_B = draw(logits_BV[2:5], sampling.keys(5, jnp.arange(2, 5)))
  np.testing.assert_array_equal(whole_B[2:5], some_B)
  assert (whole_B != draw(logits_BV, sampling.keys(6, jnp.arange(8)))).any()


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_logits_that_are_not_numbers_give_no_token(options):
  logits_BV = jnp.zeros((2, V)).at[1, 4].set(jnp.nan)
  token_B = sampling.draw(logits_BV, sampling.keys(0, jnp.arange(2)), temperature=1.0, **options)
  assert token_B[0] < V and token_B[1] == V
  assert sampling.greedy(logits_BV).tolist() == [0, V]


@pytest.mark.parametrize(
  "wrong", [{"temperature": -0.5}, {"temperature": 1e-46}, {"temperature": float("nan")},
            {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_numbers_that_describe_no_draw_are_refused(wrong):
  (name, value), = wrong.items()
  with pytest.raises(ValueError, match=f"{name}={value}"):
    sampling.check(**({"temperature": 1.0, "top_k": None, "top_p": None} | wrong))
