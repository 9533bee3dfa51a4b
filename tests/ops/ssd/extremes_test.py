"""The scan where numbers are hard: steps near zero and huge, steep rates, 32768 tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import ssd as cases
from hybridlm.ops.ssd import api, pallas_tpu, vjp

B, L, G, H, P, N = 1, 300, 2, 3, 4, 5
LONG = 32768
# Range of dt (log-uniform), of -a, and the number of tokens.
EXTREMES = {
  "steps near zero": ((1e-38, 1e-20), (0.5, 2), L),
  "huge steps": ((1e3, 1e8), (0.5, 2), L),
  "steep rates": ((0.01, 1), (1e6, 1e12), L),
  "steps of all sizes": ((1e-12, 1e6), (1e-6, 1e6), L),
  "slow decay over 32768 tokens": ((1e-4, 1e-3), (0.01, 0.1), LONG),
}


TPU = vjp.Passes(
  functools.partial(pallas_tpu.forward, interpret=True),
  functools.partial(pallas_tpu.backward, interpret=True),
)
SCANS = {"chunked": api.ssd, "pallas_tpu": functools.partial(vjp.ssd, passes=TPU, chunk=256)}
# The kernels are interpreted: 32768 tokens would take them a minute.
WAYS = [(name, scan) for name in EXTREMES for scan in SCANS
        if EXTREMES[name][2] == L or scan == "chunked"]
# float32 cannot tell smaller numbers from zero.
TINY = float(np.finfo(np.float32).tiny)


def close(got, want, tolerance, label):
  """Asserts agreement up to a share of the largest entry wanted of each head; all is finite.

  `label` ends in axis letters. Heads differ in size by as much as their rates do.
  """
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.all(np.isfinite(got)), label
  letters = label.rpartition("_")[2]
  others = tuple(i for i, letter in enumerate(letters) if letter not in "GH")
  error = np.abs(got - want).max(axis=others)
  limit = tolerance * np.abs(want).max(axis=others) + TINY
  assert np.all(error <= limit), (label, error / limit)


def rounding(name, *sizes):
  """Returns what float32 loses in sums of these sizes.

  Where steps of all sizes share a chunk, logarithms down to -104 stand in one sum, and a decay is
  as exact as that sum: eight such steps in a chunk of 32.
  """
  logs = 8 * 104 * float(np.finfo(np.float32).eps) if name == "steps of all sizes" else 0
  return cases.rounding(*sizes) + logs


@functools.cache
def arguments(name):
  """Returns the arguments of a case in float32."""
  (low, high), rates, length = EXTREMES[name]
  rng = np.random.default_rng(sorted(EXTREMES).index(name))

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  dt_BLGH = np.exp(rng.uniform(np.log(low), np.log(high), (B, length, G, H)))
  return {
    "x_BLGHP": normal(B, length, G, H, P),
    "dt_BLGH": dt_BLGH.astype(np.float32),
    "a_GH": -np.exp(rng.uniform(*np.log(rates), (G, H))).astype(np.float32),
    "b_BLGN": normal(B, length, G, N),
    "c_BLGN": normal(B, length, G, N),
    "skip_GH": normal(G, H),
    "state_BGHPN": normal(B, G, H, P, N),
  }


def loss(scan, given, weights):
  y_BLGHP, state_BGHPN = scan(**given)
  weight_BLGHP, weight_BGHPN = weights
  return jnp.sum(y_BLGHP * weight_BLGHP) + jnp.sum(state_BGHPN * weight_BGHPN)


def weights_of(given):
  """Returns random weights of y and of the state."""
  rng = np.random.default_rng(9)
  return tuple(
    rng.standard_normal(given[name].shape).astype(np.float32)
    for name in ("x_BLGHP", "state_BGHPN")
  )


@pytest.mark.parametrize(("name", "scan"), WAYS)
def test_extreme_steps_and_rates_give_what_float64_gives(name, scan):
  given = {name: jnp.asarray(v) for name, v in arguments(name).items()}
  y_BLGHP, state_BGHPN = jax.jit(SCANS[scan])(**given)
  want_y, want_state = cases.recurrence(**arguments(name))
  tolerance = rounding(name, y_BLGHP.shape[1], N)
  close(y_BLGHP, want_y, tolerance, "y_BLGHP")
  close(state_BGHPN, want_state, tolerance, "state_BGHPN")


@pytest.mark.parametrize(("name", "scan"), WAYS)
def test_extreme_steps_and_rates_have_the_gradients_of_the_recurrence(name, scan):
  given = {name: jnp.asarray(v) for name, v in arguments(name).items()}
  weights = weights_of(given)
  got = jax.jit(jax.grad(lambda v: loss(SCANS[scan], v, weights)))(given)
  with jax.enable_x64(True):
    wide = {name: jnp.asarray(v, jnp.float64) for name, v in arguments(name).items()}
    reference = functools.partial(api.ssd, impl="reference")
    want = jax.jit(jax.grad(lambda v: loss(reference, v, weights)))(wide)
  tolerance = rounding(name, given["x_BLGHP"].shape[1], N, H, P)
  for leaf, v in got.items():
    close(v, want[leaf], tolerance, leaf)


def test_memory_of_a_long_scan_and_its_gradient_is_far_below_the_naive_one():
  B, L, G, H, P, N = 1, 8192, 8, 16, 64, 128
  shapes = [(B, L, G, H, P), (B, L, G, H), (G, H), (B, L, G, N), (B, L, G, N)]
  floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

  def loss(*arrays):
    return jnp.sum(api.ssd(*arrays)[0] ** 2)

  for program in (lambda *arrays: api.ssd(*arrays), jax.grad(loss, argnums=tuple(range(5)))):
    memory = jax.jit(program).lower(*floats).compile().memory_analysis()
    # Unfused, every pair of positions of a chunk of 128 holds N products a head.
    naive = 4 * B * L * 128 * G * H * N
    assert 0 < memory.temp_size_in_bytes < naive / 20
