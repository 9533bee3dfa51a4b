"""The causal convolution against a loop over positions, and its own backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.ops.conv import causal_conv

B, L, W = 3, 17, 4
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 11, [1] * 17, [4] * 2 + [2] * 9 + [0] * 6])


def inputs(channels, dtype=np.float32, seed=0):
  """Returns x, taps, bias and the inputs before position 0."""
  rng = np.random.default_rng(seed)
  shapes = ((B, L, *channels), (W, *channels), channels, (B, W - 1, *channels))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def by_position(x, taps, bias, segment_BL, state):
  """Returns the convolution in float64, one position and one tap at a time."""
  x, taps, bias, state = (np.asarray(a, np.float64) for a in (x, taps, bias, state))
  y = np.zeros_like(x)
  for row in range(x.shape[0]):
    for t in range(x.shape[1]):
      y[row, t] = bias
      for i in range(W):
        source = t - i
        if (segment_BL[row, max(source, 0) : t + 1] != segment_BL[row, t]).any():
          break
        past = x[row, source] if source >= 0 else state[row, W - 1 + source]
        y[row, t] += taps[W - 1 - i] * past
  return y


@pytest.mark.parametrize("channels", [(5,), (2, 3), (2, 4, 6)])
@pytest.mark.parametrize("segments", ["none", "documents"])
def test_it_equals_the_loop_over_positions(channels, segments):
  x, taps, bias, state = inputs(channels)
  segment_BL = SEGMENTS if segments == "documents" else np.ones((B, L), int)
  given = jnp.asarray(segment_BL) if segments == "documents" else None
  want = by_position(x, taps, bias, segment_BL, state)
  got = causal_conv(x, taps, bias, segment_BL=given, state=state)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  plain = causal_conv(x, taps, None, segment_BL=given)
  want = by_position(x, taps, np.zeros(channels), segment_BL, np.zeros_like(state))
  np.testing.assert_allclose(plain, want, rtol=1e-5, atol=1e-5)


def test_its_backward_is_the_gradient():
  # Float64 finite differences through the loop, along one random direction for each argument.
  arguments = inputs((2, 3))
  rng = np.random.default_rng(1)
  cotangent = rng.normal(size=(B, L, 2, 3))

  def value(*arrays):
    return float((by_position(*arrays[:3], SEGMENTS, arrays[3]) * cotangent).sum())

  def loss(*arrays):
    y = causal_conv(*arrays[:3], segment_BL=jnp.asarray(SEGMENTS), state=arrays[3])
    return jnp.sum(y * jnp.asarray(cotangent, jnp.float32))

  gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)
  exact = [np.asarray(a, np.float64) for a in arguments]
  for index, gradient in enumerate(gradients):
    along = rng.normal(size=exact[index].shape)
    ahead, behind = (
      value(*[a + sign * 0.5 * along if i == index else a for i, a in enumerate(exact)])
      for sign in (1, -1)
    )
    # The loop is linear in each argument: the difference is the derivative.
    assert float((np.asarray(gradient) * along).sum()) == pytest.approx(ahead - behind, rel=1e-4)


def test_two_halves_with_the_state_handed_over_equal_one_pass():
  x, taps, bias, state = inputs((2, 3))
  segment_BL = jnp.asarray(SEGMENTS)
  whole = causal_conv(x, taps, bias, segment_BL=segment_BL, state=state)
  # Rows 1 and 2 go on within their document at position 9.
  first = causal_conv(x[1:, :9], taps, bias, segment_BL=segment_BL[1:, :9], state=state[1:])
  after = x[1:, 9 - (W - 1) : 9]
  second = causal_conv(x[1:, 9:], taps, bias, segment_BL=segment_BL[1:, 9:], state=after)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole[1:], rtol=1e-5, atol=1e-6)


def test_packed_documents_equal_the_same_documents_one_by_one():
  x, taps, bias, _ = inputs((5,))
  packed = causal_conv(x[:1], taps, bias, segment_BL=jnp.asarray(SEGMENTS[:1]))
  for start, stop in ((0, 5), (5, 6), (6, 17)):
    alone = causal_conv(x[:1, start:stop], taps, bias)
    np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-5, atol=1e-6)


def test_bfloat16_in_gives_bfloat16_out_near_the_float32_result():
  x, taps, bias, _ = inputs((5,), jnp.bfloat16)
  got = causal_conv(x, taps, bias)
  assert got.dtype == jnp.bfloat16
  want = causal_conv(*(a.astype(jnp.float32) for a in (x, taps, bias)))
  np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"x": (B, 0, 5)}, "0 tokens"),
    ({"taps": (W, 6)}, "taps has shape"),
    ({"bias": (6,)}, "bias has shape"),
    ({"segment_BL": (B, L + 1)}, "segment_BL has shape"),
    ({"state": (B, W, 5)}, "state has shape"),
  ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
  shapes = {"x": (B, L, 5), "taps": (W, 5), "bias": (5,), "state": (B, W - 1, 5)}
  shapes |= {"segment_BL": (B, L)} | change
  made = {name: jnp.zeros(s, jnp.int32 if name == "segment_BL" else jnp.float32)
          for name, s in shapes.items()}
  inner = getattr(causal_conv, "__wrapped__", causal_conv)
  with pytest.raises((ValueError, TypeError), match=f"{message}|shape|Type-check"):
    inner(made.pop("x"), made.pop("taps"), made.pop("bias"), **made)
