"""Laws of documents that all begin with one state: each is a scan of its own from there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.ops.conv import causal_conv
from hybridlm.ops.ssd import restart
from hybridlm.ops.ssd.api import ssd

C, L, G, H, P, N, W = 3, 7, 2, 3, 4, 5, 4  # C documents of L positions


def normal(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def test_every_document_of_a_scan_starts_from_the_same_state():
  x, dt, b, c, state, a = normal(
    (C, L, G, H, P), (C, L, G, H), (C, L, G, N), (C, L, G, N), (G, H, P, N), (G, H))
  segment_BL = jnp.repeat(jnp.arange(1, C + 1), L)[None]

  @jax.jit
  def run(x, dt, b, c, a, state):
    scan, dt, a = functools.partial(ssd, chunk=4), jax.nn.softplus(dt), -jnp.exp(a)
    rows = [v.reshape(1, C * L, *v.shape[2:]) for v in (x, dt, b, c)]
    before = jnp.stack([3 * state, state, state])
    how = {"segment_BL": segment_BL, "restart_GHPN": state}
    return (
      scan(x, dt, a, b, c, restart_GHPN=state), scan(*rows[:2], a, *rows[2:], **how),
      scan(x, dt, a, b, c, state_BGHPN=before),
      scan(*rows[:2], a, *rows[2:], state_BGHPN=before[:1], **how),
    )

  # The second pair: a document that a state of its own continues does not start anew.
  alone, packed, first, continued = run(x, dt, b, c, a, state)
  for (want, lasts), (got, last) in ((alone, packed), (first, continued)):
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last[0], lasts[-1], rtol=1e-4, atol=1e-5)


def test_every_document_of_a_convolution_continues_the_same_inputs():
  lengths = (2, 9, 3)
  x, taps, before = normal((1, sum(lengths), H, P), (W, H, P), (W - 1, H, P), seed=1)
  segment_BL = jnp.asarray(np.repeat([1, 2, 3], lengths))[None]
  got = jax.jit(causal_conv)(x, taps, None, segment_BL=segment_BL, restart_W=before)
  want, start = [], 0
  for length in lengths:
    padded = np.concatenate([before, x[0, start : start + length]])
    want += [(taps * padded[i : i + W]).sum(0) for i in range(length)]
    start += length
  np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5)
  one = causal_conv(x, taps[:1], None, segment_BL=segment_BL, restart_W=before[:0])
  np.testing.assert_allclose(one, taps[0] * x, rtol=1e-6)


def test_what_is_left_of_a_state_is_as_exact_in_the_last_document_as_in_the_first():
  rate_BL = -jnp.asarray(np.random.default_rng(2).uniform(0, 300, (1, 500)), jnp.float32)
  rate_BL = rate_BL.at[:, 490:].divide(100)
  fresh_BL = jnp.zeros((1, 500), bool).at[0, 0].set(True).at[0, 490].set(True)

  @jax.jit
  def both(rate_BL):
    got, back = jax.vjp(lambda rate_BL: restart.decay(rate_BL, fresh_BL), rate_BL)
    return got, back(jnp.ones_like(got))[0]

  want = np.exp(np.cumsum(np.asarray(rate_BL, np.float64)[0, 490:]))
  got, bar_BL = both(rate_BL)
  np.testing.assert_allclose(got[0, 490:], want, rtol=1e-6)
  np.testing.assert_allclose(bar_BL[0, 490:], np.cumsum(want[::-1])[::-1], rtol=1e-5)
