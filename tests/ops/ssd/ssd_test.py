"""The laws of the scan: every implementation against the recurrence, and against itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cases import programs
from cases import ssd as cases
from hybridlm.ops.ssd import api

FLOAT32 = [name for name, case in cases.CASES.items() if case.dtype == "float32"]
# What float32 loses: values are sums over positions and states, gradients over channels too.
VALUES = cases.rounding(cases.L, cases.N)
GRADIENTS = cases.rounding(cases.L, cases.N, cases.H, cases.P)
WAYS = [("reference", None), ("chunked", 8), (None, None)]


def run(arguments, **options):
  """Returns y and state of a compiled call; arguments of None are left out."""
  arguments = {name: v for name, v in arguments.items() if v is not None}
  return jax.jit(lambda given: api.ssd(**given, **options))(arguments)


def probe(arguments, *, seed=9):
  """Returns random weights of y and of the state, so that no gradient is hidden by symmetry."""
  rng = np.random.default_rng(seed)
  B, _, G, H, P = arguments["x_BLGHP"].shape
  N = arguments["b_BLGN"].shape[-1]
  return (
    rng.standard_normal(arguments["x_BLGHP"].shape).astype(np.float32),
    rng.standard_normal((B, G, H, P, N)).astype(np.float32),
  )


def gradients(arguments, **options):
  """Returns the gradient of weighted outputs for every float argument, by name."""
  floats = {
    name: jnp.asarray(v)
    for name, v in arguments.items()
    if v is not None and name != "segment_BL"
  }
  weight_BLGHP, weight_BGHPN = probe(arguments)
  segment_BL = arguments["segment_BL"]
  segment_BL = None if segment_BL is None else jnp.asarray(segment_BL)

  def loss(floats):
    y_BLGHP, state_BGHPN = api.ssd(**floats, segment_BL=segment_BL, **options)
    return jnp.sum(y_BLGHP * weight_BLGHP) + jnp.sum(state_BGHPN * weight_BGHPN)

  return jax.jit(jax.grad(loss))(floats)


@functools.cache
def reference_gradients(name):
  """Returns the reference's gradients of a case."""
  return gradients(cases.make(cases.CASES[name]), impl="reference")


def close(got, want, tolerance):
  """Asserts that two arrays agree up to `tolerance` of the largest entry wanted, or of 0.1."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 0.1))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", FLOAT32)
def test_the_scan_agrees_with_a_recurrence_in_float64(name, way):
  arguments = cases.make(cases.CASES[name])
  y_BLGHP, state_BGHPN = run(arguments, impl=way[0], chunk=way[1])
  want_y, want_state = cases.recurrence(**arguments)
  assert y_BLGHP.dtype == state_BGHPN.dtype == jnp.float32
  close(y_BLGHP, want_y, VALUES)
  close(state_BGHPN, want_state, VALUES)


@pytest.mark.parametrize(
  ("name", "chunk"), [*itertools.product(FLOAT32, cases.CHUNKS), ("rare_resets", 1)]
)
def test_gradients_of_the_chunked_scan_are_those_of_the_reference(name, chunk):
  arguments, want = cases.make(cases.CASES[name]), reference_gradients(name)
  got = gradients(arguments, impl="chunked", chunk=chunk)
  assert set(got) == set(want)
  for leaf in want:
    close(got[leaf], want[leaf], GRADIENTS)


def test_a_scan_of_one_chunk_reads_only_what_was_written():
  arguments, want = cases.make(cases.CASES["plain"]), reference_gradients("plain")
  # Every compilation finds other rubbish in the memory it is given.
  for size in range(1000, 7000, 1000):
    jax.block_until_ready(jnp.full(size, 7e30) * 2)
    got = gradients(arguments, impl="chunked", chunk=64)
    for leaf in want:
      close(got[leaf], want[leaf], GRADIENTS)


def test_gradients_of_the_reference_are_the_slopes_of_the_float64_recurrence():
  arguments = cases.make(cases.CASES["rare_resets"])
  weight_BLGHP, weight_BGHPN = probe(arguments)
  got = reference_gradients("rare_resets")
  rng = np.random.default_rng(3)
  for name in got:
    direction = rng.standard_normal(arguments[name].shape)

    def loss(step, name=name, direction=direction):
      moved = arguments | {name: arguments[name].astype(np.float64) + step * direction}
      y_BLGHP, state_BGHPN = cases.recurrence(**moved)
      return np.sum(y_BLGHP * weight_BLGHP) + np.sum(state_BGHPN * weight_BGHPN)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert np.sum(got[name] * direction) == pytest.approx(slope, rel=2e-4)


def test_bfloat16_inputs_lose_only_the_rounding_of_inputs_and_results():
  arguments = cases.make(cases.CASES["bfloat16"])
  want_y, want_state = cases.recurrence(**arguments)
  wide = {k: v if v is None or v.dtype.kind == "i" else np.float32(v) for k, v in arguments.items()}
  want = gradients(wide, impl="reference")
  for way in (("reference", None), ("chunked", 8)):
    y_BLGHP, state_BGHPN = run(arguments, impl=way[0], chunk=way[1])
    assert (y_BLGHP.dtype, state_BGHPN.dtype) == (jnp.bfloat16, jnp.float32)
    close(y_BLGHP, want_y, 2**-8)
    close(state_BGHPN, want_state, VALUES)
    got = gradients(arguments, impl=way[0], chunk=way[1])
    for name, leaf in got.items():
      assert leaf.dtype == arguments[name].dtype
      # The cotangent of y is rounded to bfloat16 before it comes in, and some go out so.
      close(leaf, want[name], 2**-7)


def test_the_scan_runs_in_float64_when_its_inputs_do():
  with jax.enable_x64(True):
    case = cases.make(cases.CASES["rare_resets"])
    arguments = {k: v if k == "segment_BL" else np.float64(v) for k, v in case.items()}
    want_y, want_state = cases.recurrence(**arguments)
    for impl in ("reference", "chunked"):
      y_BLGHP, state_BGHPN = run(arguments, impl=impl)
      close(y_BLGHP, want_y, 1e-13)
      close(state_BGHPN, want_state, 1e-13)


@pytest.mark.parametrize("way", [("reference", None), ("chunked", 8)], ids=str)
@pytest.mark.parametrize("cut", [8, 19])
def test_a_scan_in_two_halves_is_the_scan_in_one(cut, way):
  options = {"impl": way[0], "chunk": way[1]}
  arguments = cases.make(cases.CASES["rare_resets"])
  # The second half starts inside a segment: the state is all it knows of the first.
  arguments["segment_BL"][:, cut] = arguments["segment_BL"][:, cut - 1]
  y_BLGHP, state_BGHPN = run(arguments, **options)

  def part(span, state_BGHPN):
    cut_names = ("x_BLGHP", "dt_BLGH", "b_BLGN", "c_BLGN", "segment_BL")
    pieces = {name: arguments[name][:, span] for name in cut_names}
    return run(arguments | pieces | {"state_BGHPN": state_BGHPN}, **options)

  first_BLGHP, middle_BGHPN = part(slice(cut), arguments["state_BGHPN"])
  second_BLGHP, last_BGHPN = part(slice(cut, None), middle_BGHPN)
  close(np.concatenate([first_BLGHP, second_BLGHP], axis=1), y_BLGHP, VALUES)
  close(last_BGHPN, state_BGHPN, VALUES)


@pytest.mark.parametrize("way", [("reference", None), ("chunked", 8)], ids=str)
def test_later_tokens_never_change_earlier_outputs(way):
  arguments = cases.make(cases.CASES["given_state"])
  at = 19
  weight_BGHP = probe(arguments)[0][:, at]

  def output(floats):
    y_BLGHP, _ = api.ssd(**floats, impl=way[0], chunk=way[1])
    return jnp.sum(y_BLGHP[:, at] * weight_BGHP)

  floats = {name: jnp.asarray(v) for name, v in arguments.items() if v is not None}
  slope = jax.jit(jax.grad(output))(floats)
  for name in ("x_BLGHP", "dt_BLGH", "b_BLGN"):
    size_L = np.abs(slope[name]).sum(axis=tuple(i for i in range(slope[name].ndim) if i != 1))
    assert np.all(size_L[at + 1 :] == 0)
    assert np.all(size_L[: at + 1] > 0)
  size_L = np.abs(slope["c_BLGN"]).sum(axis=(0, 2, 3))
  assert np.flatnonzero(size_L).tolist() == [at]


@pytest.mark.parametrize("way", [("reference", None), ("chunked", 16)], ids=str)
def test_packed_documents_give_what_each_gives_alone(way):
  options = {"impl": way[0], "chunk": way[1]}
  arguments = cases.make(cases.CASES["plain"])
  # Three documents share a chunk, one is longer than a chunk, and padding ends the row.
  edges = [0, 3, 4, 11, 30, cases.L]
  lengths = np.diff(edges)
  row_L = np.repeat([1, 2, 3, 4, 0], lengths).astype(np.int32)
  packed = arguments | {"segment_BL": np.broadcast_to(row_L, (cases.B, cases.L))}
  y_BLGHP, state_BGHPN = run(packed, **options)
  for start, stop in zip(edges[:-1], edges[1:], strict=True):
    names = ("x_BLGHP", "dt_BLGH", "b_BLGN", "c_BLGN")
    alone = arguments | {name: arguments[name][:, start:stop] for name in names}
    want_BLGHP, last_BGHPN = run(alone, **options)
    close(y_BLGHP[:, start:stop], want_BLGHP, VALUES)
  close(state_BGHPN, last_BGHPN, VALUES)


@pytest.mark.parametrize("way", [("reference", None), ("chunked", 8)], ids=str)
def test_a_step_of_zero_leaves_the_state_and_has_the_right_slope(way):
  arguments = cases.make(cases.CASES["given_state"])
  arguments["dt_BLGH"][:, 5:] = 0
  y_BLGHP, state_BGHPN = run(arguments, impl=way[0], chunk=way[1])
  early = {k: v[:, :5] for k, v in arguments.items() if k in ("x_BLGHP", "dt_BLGH", "b_BLGN")}
  early["c_BLGN"] = arguments["c_BLGN"][:, :5]
  close(state_BGHPN, run(arguments | early, impl="reference")[1], VALUES)
  got = gradients(arguments, impl=way[0], chunk=way[1])["dt_BLGH"]
  weight_BLGHP, weight_BGHPN = probe(arguments)
  moved = arguments | {"dt_BLGH": arguments["dt_BLGH"].astype(np.float64)}

  def loss(step):
    moved["dt_BLGH"][0, 7, 1, 2] = step
    y_BLGHP, state_BGHPN = cases.recurrence(**moved)
    return np.sum(y_BLGHP * weight_BLGHP) + np.sum(state_BGHPN * weight_BGHPN)

  assert got[0, 7, 1, 2] == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-4)


def test_no_exponential_has_a_positive_argument(monkeypatch):
  arguments, largest, exp = cases.make(cases.CASES["steep_decay"]), [], jnp.exp

  def spy(v):
    jax.debug.callback(lambda top: largest.append(float(top)), jnp.max(v))
    return exp(v)

  monkeypatch.setattr(jnp, "exp", spy)
  jax.block_until_ready(gradients(arguments, impl="chunked", chunk=64))
  jax.effects_barrier()
  # Two of the whole sequence and one in each of two turns, forward and backward.
  assert len(largest) == 8
  assert max(largest) <= 0


def test_the_chunked_scan_never_expands_groups_to_heads_or_chunks_to_the_sequence():
  arguments = cases.make(cases.CASES["plain"])
  floats = {name: v for name, v in arguments.items() if v is not None}
  # Three chunks a turn, two turns.
  chunk, turn, padded = 7, 21, 42

  def loss(floats):
    y_BLGHP, _ = api.ssd(**floats, impl="chunked", chunk=chunk)
    return jnp.sum(jnp.sin(y_BLGHP))

  held = programs.shapes(jax.grad(loss), floats)
  assert (cases.B, turn // chunk, cases.G, cases.H, chunk, chunk) in held
  for shape in held:
    positions = {chunk, turn, padded, cases.L} & set(shape)
    assert not (cases.H in shape and cases.N in shape and positions), shape
    assert not (chunk in shape and padded in shape), shape
    assert shape.count(padded) + shape.count(cases.L) <= 1, shape


BAD = {
  "name": ({"impl": "fast"}, "ssd implementation 'fast' is not one of reference, chunked, pallas"),
  "chunk": ({"chunk": 0}, "chunk 0 is not a whole number of 1 or more tokens"),
  "reference chunk": ({"impl": "reference", "chunk": 4}, "chunk 4 has no meaning"),
  "heads": ({"dt_BLGH": np.ones((3, 37, 2, 5))}, r"dt_BLGH has shape \(3, 37, 2, 5\)"),
  "groups": ({"b_BLGN": np.ones((3, 37, 3, 5))}, r"b_BLGN has shape \(3, 37, 3, 5\)"),
  "head groups": ({"a_GH": np.ones((4, 2))}, r"a_GH has shape \(4, 2\)"),
  "states": ({"c_BLGN": np.ones((3, 37, 2, 6))}, r"c_BLGN has shape \(3, 37, 2, 6\)"),
  "first state": ({"state_BGHPN": np.ones((3, 2, 4, 5, 6))}, "state_BGHPN has shape"),
  "segments": ({"segment_BL": np.ones((3, 36), np.int32)}, "segment_BL has shape"),
  "torn segment": (
    {"segment_BL": np.repeat([[7] * 20 + [5] * 10 + [7] * 7], 3, 0)},
    "segment 7 of row 0 comes back after a gap in ssd 'chunked'",
  ),
  "kind": ({"x_BLGHP": np.ones((3, 37, 2, 4, 6), np.int32)}, "x_BLGHP has dtype int32"),
  "narrow": (
    {"x_BLGHP": np.ones((3, 37, 2, 4, 6), jnp.float8_e4m3fn)},
    "x_BLGHP has dtype float8_e4m3fn, which is not one of bfloat16, float16, .* in ssd",
  ),
  "part of a token": ({"chunk": 8.0}, "chunk 8.0 is not a whole number"),
  "flat segments": ({"segment_BL": np.ones(37, np.int32)}, r"segment_BL has shape \(37,\)"),
  "kinds": (
    {"c_BLGN": np.ones((3, 37, 2, 5), np.float16)},
    "c_BLGN has dtype float16, but x_BLGHP float32, in ssd 'chunked'",
  ),
  "axes": ({"x_BLGHP": np.ones((3, 37, 8, 6))}, "must have axes BLGHP"),
  "nothing": ({"x_BLGHP": np.ones((3, 0, 2, 4, 6))}, "sequence of 0 tokens in ssd 'chunked'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, monkeypatch):
  # As a user runs it: type checks on imports exist under pytest only.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  changes, message = BAD[case]
  arguments = {k: v for k, v in cases.make(cases.Case()).items() if k in cases.ARRAYS}
  with pytest.raises(ValueError, match=message) as caught:
    api.ssd(**(arguments | changes))
  assert "\n" not in str(caught.value)
