"""The laws of the causal convolution, against a loop in numpy."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from hybridlm.ops.conv import causal_conv

B, L, W = 3, 13, 4
CHANNELS = {"heads": (2, 5, 6), "groups": (2, 7), "one axis": (9,)}


def make(channels, *, seed=0, width=W):
  """Returns x, taps, bias, segments and state as arrays; ids come back after a gap."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  segment_BL = jnp.asarray(np.cumsum(rng.random((B, L)) < 0.3, axis=1) % 2, jnp.int32)
  state = normal(B, width - 1, *channels)
  return normal(B, L, *channels), normal(width, *channels), normal(*channels), segment_BL, state


def loop(x_BL, taps_W, bias, segment_BL, state):
  """Returns the convolution in float64, one position and tap at a time."""
  x_BL, taps_W, bias, state = (np.asarray(v, np.float64) for v in (x_BL, taps_W, bias, state))
  width = taps_W.shape[0]
  y_BL = np.zeros_like(x_BL)
  for row, t in np.ndindex(*x_BL.shape[:2]):
    y_BL[row, t] = bias + taps_W[-1] * x_BL[row, t]
    for back in range(1, width):
      first = max(t - back + 1, 1)
      steps = segment_BL[row, first : t + 1] != segment_BL[row, first - 1 : t]
      if np.any(steps):
        break
      source = x_BL[row, t - back] if t >= back else state[row, t - back]
      y_BL[row, t] += taps_W[-1 - back] * source
  return y_BL


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
def test_the_convolution_is_a_loop_over_taps_of_the_same_run(channels):
  x_BL, taps_W, bias, segment_BL, state = make(channels)
  y_BL = jax.jit(causal_conv)(x_BL, taps_W, bias, segment_BL=segment_BL, state=state)
  np.testing.assert_allclose(y_BL, loop(x_BL, taps_W, bias, segment_BL, state), atol=2e-6)


@pytest.mark.parametrize("width", [1, 2, 17])
def test_any_number_of_taps_works_also_more_than_tokens(width):
  x_BL, taps_W, bias, segment_BL, state = make((3, 5), width=width)
  y_BL = causal_conv(x_BL, taps_W, bias, segment_BL=segment_BL, state=state)
  np.testing.assert_allclose(y_BL, loop(x_BL, taps_W, bias, segment_BL, state), atol=4e-6)


def test_left_out_arguments_are_zeros_and_one_segment():
  x_BL, taps_W, bias, segment_BL, state = make((2, 5))
  plain = causal_conv(x_BL, taps_W, None)
  zeros = loop(x_BL, taps_W, 0 * bias, 0 * segment_BL, 0 * state)
  np.testing.assert_allclose(plain, zeros, atol=2e-6)


def test_gradients_are_the_slopes_of_the_loop():
  x_BL, taps_W, bias, segment_BL, state = make((2, 5))
  rng = np.random.default_rng(1)
  weight = rng.standard_normal(x_BL.shape)

  def loss(x_BL, taps_W, bias, state):
    return jnp.sum(weight * causal_conv(x_BL, taps_W, bias, segment_BL=segment_BL, state=state))

  floats = [x_BL, taps_W, bias, state]
  slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*floats)
  for i, slope in enumerate(slopes):
    direction = rng.standard_normal(floats[i].shape)

    def moved(step, i=i, direction=direction):
      arrays = [np.asarray(v, np.float64) for v in floats]
      arrays[i] = arrays[i] + step * direction
      x_BL, taps_W, bias, state = arrays
      return np.sum(weight * loop(x_BL, taps_W, bias, np.asarray(segment_BL), state))

    want = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert np.sum(slope * direction) == pytest.approx(want, rel=1e-5)


def test_bfloat16_loses_only_the_rounding_of_inputs_and_result():
  x_BL, taps_W, bias, segment_BL, state = make((2, 5))
  x_BL, taps_W, state = (v.astype(jnp.bfloat16) for v in (x_BL, taps_W, state))
  y_BL = causal_conv(x_BL, taps_W, bias, segment_BL=segment_BL, state=state)
  assert y_BL.dtype == jnp.bfloat16
  want = loop(x_BL, taps_W, bias, segment_BL, state)
  np.testing.assert_allclose(np.float64(y_BL), want, rtol=2**-8, atol=1e-6)
  slope = jax.grad(lambda v: jnp.sum(causal_conv(v, taps_W, bias)))(x_BL)
  assert slope.dtype == jnp.bfloat16


def test_a_convolution_in_two_halves_is_the_convolution_in_one():
  x_BL, taps_W, bias, segment_BL, state = make((2, 5))
  cut = 6
  segment_BL = segment_BL.at[:, cut - W + 1 : cut + 1].set(7)
  y_BL = causal_conv(x_BL, taps_W, bias, segment_BL=segment_BL, state=state)
  first = causal_conv(x_BL[:, :cut], taps_W, bias, segment_BL=segment_BL[:, :cut], state=state)
  second = causal_conv(
    x_BL[:, cut:], taps_W, bias, segment_BL=segment_BL[:, cut:], state=x_BL[:, cut - W + 1 : cut]
  )
  np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), y_BL, atol=1e-6)


def test_later_tokens_never_change_earlier_outputs():
  x_BL, taps_W, bias, _, _ = make((2, 5))
  at = 8
  slope = jax.grad(lambda x: jnp.sum(causal_conv(x, taps_W, bias)[:, at]))(x_BL)
  reached_L = np.flatnonzero(np.abs(slope).sum(axis=(0, 2, 3)))
  assert reached_L.tolist() == list(range(at - W + 1, at + 1))


def test_packed_documents_give_what_each_gives_alone():
  x_BL, taps_W, bias, _, _ = make((2, 5))
  edges = [0, 1, 3, 8, L]
  row_L = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.diff(jnp.array(edges)), total_repeat_length=L)
  y_BL = causal_conv(x_BL, taps_W, bias, segment_BL=jnp.broadcast_to(row_L, (B, L)))
  for start, stop in zip(edges[:-1], edges[1:], strict=True):
    alone = causal_conv(x_BL[:, start:stop], taps_W, bias)
    np.testing.assert_allclose(y_BL[:, start:stop], alone, atol=1e-6)


BAD = {
  "taps": ({"taps_W": np.ones((4, 2, 6))}, r"taps has shape \(4, 2, 6\).* ask for \(4, 2, 5\)"),
  "bias": ({"bias": np.ones((5, 2))}, "bias has shape"),
  "segments": ({"segment_BL": np.ones((3, 12), np.int32)}, "segment_BL has shape"),
  "state": ({"state": np.ones((3, 4, 2, 5))}, r"state has shape .* ask for \(3, 3, 2, 5\)"),
  "nothing": ({"x_BL": np.ones((3, 0, 2, 5))}, "sequence of 0 tokens in causal_conv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  x_BL, taps_W, bias, _, _ = make((2, 5))
  changes, message = BAD[case]
  with pytest.raises(ValueError, match=message) as caught:
    causal_conv(**({"x_BL": x_BL, "taps_W": taps_W, "bias": bias} | changes))
  assert "\n" not in str(caught.value)
