"""The laws of the selective scan: the chunked scan against the recurrence, and against itself."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cases import selective as cases
from cases.ssd import rounding
from hybridlm.ops.selective import api, chunked
from hybridlm.ops.selective import step as recurrence

# What float32 loses: values are sums over positions and states, gradients over channels too.
VALUES = rounding(cases.L, cases.N)
GRADIENTS = rounding(cases.L, cases.N, cases.H)
SCANS = {
  "reference": functools.partial(api.selective, impl="reference"),
  # Several chunks with a ragged one last, and as few as there may be.
  "steps": functools.partial(chunked.selective, chunk=8, inside="steps"),
  "tree": functools.partial(chunked.selective, chunk=64, inside="tree"),
}


@functools.cache
def program(scan):
  """Returns a compiled scan: `(arguments, weights) -> ((y, state), gradients by name)`."""

  def loss(floats, segment_BL, weights):
    segments = {} if segment_BL is None else {"segment_BL": segment_BL}
    outputs = SCANS[scan](**floats, **segments)
    return sum(jnp.sum(v * w) for v, w in zip(outputs, weights, strict=True)), outputs

  both = jax.jit(jax.grad(loss, has_aux=True))

  def run(arguments, weights=None):
    floats = {name: jnp.asarray(v) for name, v in arguments.items()}
    segment_BL = floats.pop("segment_BL", None)
    gradients, outputs = both(floats, segment_BL, probe(arguments) if weights is None else weights)
    return outputs, gradients

  return run


def probe(arguments, seed=9):
  """Returns random weights of y and of the state, so that no gradient is hidden by symmetry."""
  rng = np.random.default_rng(seed)
  B, _, H = arguments["x_BLH"].shape
  shapes = (arguments["x_BLH"].shape, (B, H, arguments["a_HN"].shape[1]))
  return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@functools.cache
def made(name, scan):
  """Returns outputs and gradients of a case by one of the scans."""
  return program(scan)(cases.make(cases.CASES[name]))


def close(got, want, tolerance, label=""):
  """Asserts that two arrays agree up to `tolerance` of the largest entry wanted, or of 0.1."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  limit = tolerance * max(np.abs(want).max(), 0.1)
  np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=label)


def part(arguments, span):
  """Returns the arguments of some of the positions."""
  return {name: v[:, span] if "BL" in name else v for name, v in arguments.items()}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", cases.CASES)
def test_the_scan_agrees_with_a_recurrence_in_float64(name, scan):
  (y_BLH, state_BHN), _ = made(name, scan)
  want_y, want_state = cases.recurrence(**cases.make(cases.CASES[name]))
  assert y_BLH.dtype == state_BHN.dtype == jnp.float32
  close(y_BLH, want_y, VALUES)
  close(state_BHN, want_state, VALUES)


@pytest.mark.parametrize("scan", ["steps", "tree"])
@pytest.mark.parametrize("name", cases.CASES)
def test_gradients_of_the_chunked_scan_are_those_of_the_reference(name, scan):
  (_, got), (_, want) = made(name, scan), made(name, "reference")
  assert set(got) == set(want) == set(cases.make(cases.CASES[name])) - {"segment_BL"}
  for leaf in want:
    close(got[leaf], want[leaf], GRADIENTS, leaf)


def test_gradients_of_the_reference_are_the_slopes_of_the_float64_recurrence():
  arguments, (_, got) = cases.make(cases.CASES["rare_resets"]), made("rare_resets", "reference")
  weights, rng = probe(arguments), np.random.default_rng(3)
  for name in got:
    direction = rng.standard_normal(arguments[name].shape)

    def loss(step, name=name, direction=direction):
      moved = arguments | {name: arguments[name].astype(np.float64) + step * direction}
      return sum(np.sum(v * w) for v, w in zip(cases.recurrence(**moved), weights, strict=True))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert np.sum(got[name] * direction) == pytest.approx(slope, rel=2e-4)


@pytest.mark.parametrize("scan", ["reference", "steps"])
def test_bfloat16_inputs_lose_only_the_rounding_of_inputs_and_results(scan):
  arguments = cases.make(cases.BFLOAT16)
  wide = {name: v if v.dtype.kind == "i" else np.float32(v) for name, v in arguments.items()}
  _, want = program("reference")(wide)
  want_y, want_state = cases.recurrence(**arguments)
  (y_BLH, state_BHN), got = program(scan)(arguments)
  assert (y_BLH.dtype, state_BHN.dtype) == (jnp.bfloat16, jnp.float32)
  close(y_BLH, want_y, 2**-8)
  close(state_BHN, want_state, VALUES)
  for name, leaf in got.items():
    assert leaf.dtype == arguments[name].dtype
    # The cotangent of y is rounded to bfloat16 before it comes in, and some go out so.
    close(leaf, want[name], 2**-7, name)


def test_the_scan_runs_in_float64_when_its_inputs_do():
  case = cases.make(cases.CASES["rare_resets"])
  with jax.enable_x64(True):
    wide = {name: jnp.asarray(v, None if name == "segment_BL" else jnp.float64)
            for name, v in case.items()}
    want = cases.recurrence(**{name: np.asarray(v) for name, v in wide.items()})
    for scan in ("steps", "tree"):
      for got, v in zip(jax.jit(SCANS[scan])(**wide), want, strict=True):
        close(got, v, 1e-13)


@pytest.mark.parametrize("scan", SCANS)
def test_a_scan_in_two_halves_is_the_scan_in_one(scan):
  arguments, cut = cases.make(cases.CASES["rare_resets"]), cases.L // 2
  # The second half starts inside a segment: the state is all it knows of the first.
  arguments["segment_BL"][:, cut] = arguments["segment_BL"][:, cut - 1]
  (y_BLH, state_BHN), _ = program(scan)(arguments)
  (first_BLH, middle_BHN), _ = program(scan)(part(arguments, slice(cut)))
  rest = part(arguments, slice(cut, None)) | {"state_BHN": middle_BHN}
  (second_BLH, last_BHN), _ = program(scan)(rest)
  close(np.concatenate([first_BLH, second_BLH], axis=1), y_BLH, VALUES)
  close(last_BHN, state_BHN, VALUES)


@pytest.mark.parametrize("scan", SCANS)
def test_later_tokens_never_change_earlier_outputs(scan):
  arguments, at = cases.make(cases.CASES["one_document"]), 19
  weight_BLH, weight_BHN = (np.zeros_like(v) for v in probe(arguments))
  weight_BLH[:, at] = probe(arguments)[0][:, at]
  _, slope = program(scan)(arguments, (weight_BLH, weight_BHN))
  for name in ("x_BLH", "dt_BLH", "b_BLN"):
    size_L = np.abs(slope[name]).sum(axis=(0, 2))
    assert np.all(size_L[at + 1 :] == 0), name
    assert np.all(size_L[: at + 1] > 0), name
  assert np.flatnonzero(np.abs(slope["c_BLN"]).sum(axis=(0, 2))).tolist() == [at]


@pytest.mark.parametrize("scan", SCANS)
def test_packed_documents_give_what_each_gives_alone_from_the_restart(scan):
  arguments = cases.make(cases.CASES["one_document"])
  # Three documents share a chunk, one is longer than a chunk, and padding ends the row.
  edges = [0, 3, 4, 11, 30, cases.L]
  row_L = np.repeat([1, 2, 3, 4, 0], np.diff(edges)).astype(np.int32)
  arguments["segment_BL"] = np.broadcast_to(row_L, (cases.B, cases.L))
  (y_BLH, state_BHN), _ = program(scan)(arguments)
  for start, stop in zip(edges[:-1], edges[1:], strict=True):
    alone = part(arguments, slice(start, stop))
    if start:  # what stands before the row is of its first document alone
      alone["state_BHN"] = None
    want_BLH, last_BHN = cases.recurrence(**alone)
    close(y_BLH[:, start:stop], want_BLH, VALUES)
  close(state_BHN, last_BHN, VALUES)


@pytest.mark.parametrize("scan", SCANS)
def test_a_step_of_zero_leaves_the_state_and_has_the_right_slope(scan):
  arguments = cases.make(cases.CASES["one_document"])
  arguments["dt_BLH"][:, 5:] = 0
  (_, state_BHN), got = program(scan)(arguments)
  close(state_BHN, cases.recurrence(**part(arguments, slice(5)))[1], VALUES)
  moved = arguments | {"dt_BLH": arguments["dt_BLH"].astype(np.float64)}

  def loss(step):
    moved["dt_BLH"][0, 7, 2] = step
    pairs = zip(cases.recurrence(**moved), probe(arguments), strict=True)
    return sum(np.sum(v * w) for v, w in pairs)

  slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
  assert got["dt_BLH"][0, 7, 2] == pytest.approx(slope, rel=1e-4)


def test_a_scan_of_one_chunk_reads_only_what_was_written():
  arguments, (_, want) = cases.make(cases.CASES["bare"]), made("bare", "reference")
  # Every compilation finds other rubbish in the memory it is given.
  for size in (1000, 3000, 6000):
    jax.block_until_ready(jnp.full(size, 7e30) * 2)
    program.cache_clear()
    for leaf, v in program("tree")(arguments)[1].items():
      close(v, want[leaf], GRADIENTS, leaf)


def test_one_step_is_the_scan_of_one_token():
  arguments = cases.make(cases.CASES["one_token"]) | {"skip_H": np.zeros(cases.H, np.float32)}
  want_y, want_state = cases.recurrence(**arguments)
  x_BH, dt_BH, b_BN, c_BN = (
    jnp.asarray(arguments[name][:, 0]) for name in ("x_BLH", "dt_BLH", "b_BLN", "c_BLN"))
  a_HN, state_BHN = (jnp.asarray(arguments[name]) for name in ("a_HN", "state_BHN"))
  y_BH, state_BHN = recurrence.step(x_BH, dt_BH, a_HN, b_BN, c_BN, state_BHN)
  close(y_BH, want_y[:, 0], VALUES)
  close(state_BHN, want_state, VALUES)


BAD = {
  "name": ({"impl": "pallas_tpu"}, "selective implementation 'pallas_tpu' is not one of reference"),
  "chunk": ({"chunk": 0}, "chunk 0 is not a whole number of 1 or more tokens in selective"),
  "part of a token": ({"chunk": 8.0}, "chunk 8.0 is not a whole number"),
  "reference chunk": ({"impl": "reference", "chunk": 4}, "chunk 4 has no meaning"),
  "channels": ({"dt_BLH": np.ones((3, 38, 7))}, r"dt_BLH has shape \(3, 38, 7\), but x_BLH"),
  "states": ({"b_BLN": np.ones((3, 38, 6))}, r"b_BLN has shape \(3, 38, 6\)"),
  "restart": ({"restart_HN": np.ones((3, 6, 5))}, r"restart_HN has shape \(3, 6, 5\)"),
  "first state": ({"state_BHN": np.ones((3, 5, 6))}, "state_BHN has shape"),
  "torn segment": (
    {"segment_BL": np.repeat([[7] * 20 + [5] * 10 + [7] * 8], 3, 0)},
    "segment 7 of row 0 comes back after a gap in selective 'chunked'",
  ),
  "kind": ({"c_BLN": np.ones((3, 38, 5), np.int32)}, "c_BLN has dtype int32, which is not one of"),
  "axes": ({"x_BLH": np.ones((3, 38, 6, 1))}, "must have axes BLH"),
  "nothing": ({"x_BLH": np.ones((3, 0, 6))}, "sequence of 0 tokens in selective 'chunked'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, monkeypatch):
  # As a user runs it: type checks on imports exist under pytest only.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  changes, message = BAD[case]
  arguments = cases.make(cases.CASES["bare"])
  with pytest.raises(ValueError, match=message) as caught:
    api.selective(**(arguments | changes))
  assert "\n" not in str(caught.value)
