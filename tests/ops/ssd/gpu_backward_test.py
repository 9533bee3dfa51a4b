"""The Hopper backward kernels: their arithmetic, what they take and refuse, and that they lower."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import gpu_backward_twin as twin
from cases import gpu_emulator, gpu_forward_twin
from cases import ssd as cases
from hybridlm.ops.ssd import chunked, pallas_gpu, reference, vjp
from hybridlm.ops.ssd.pallas_gpu import backward, backward_tiles, table

FLOAT32 = [name for name, case in cases.CASES.items() if case.dtype == "float32"]
GRADIENTS = cases.rounding(cases.L, cases.N, cases.H, cases.P)


def chunked_forward(*arrays, chunk, keep):
  """Returns what `chunked.forward` does, with the states as the kernels keep them."""
  y_BLGHP, state_BGHPN, kept = chunked.forward(*arrays, chunk=chunk, keep=keep)
  return y_BLGHP, state_BGHPN, tuple(v_BCGNHP.transpose(1, 0, 2, 4, 5, 3) for v_BCGNHP in kept)


EXACT = vjp.Passes(chunked_forward, twin.backward, least=2)
ROUNDED = vjp.Passes(gpu_forward_twin.forward, twin.backward)
# Published models: groups, heads a group, channels, states.
MODELS = {
  "8b": (8, 16, 64, 128), "4b": (8, 14, 64, 128), "56b": (8, 32, 64, 256),
  "nano": (8, 16, 80, 128), "nano_pruned": (8, 12, 80, 128), "hymba": (1, 50, 64, 16),
  "one_group": (1, 16, 64, 128), "two_heads": (8, 2, 64, 128),
}


def gradients(scan, arguments):
  """Returns the gradient of weighted outputs of `scan` for every float argument, by name."""
  given = {name: jnp.asarray(v) for name, v in arguments.items() if v is not None}
  segment_BL = given.pop("segment_BL", None)
  rng = np.random.default_rng(9)
  B, _, G, H, P = arguments["x_BLGHP"].shape
  weight_BLGHP = rng.standard_normal(arguments["x_BLGHP"].shape).astype(np.float32)
  shape = B, G, H, P, arguments["b_BLGN"].shape[-1]
  weight_BGHPN = rng.standard_normal(shape).astype(np.float32)

  def loss(given):
    y_BLGHP, state_BGHPN = scan(**given, segment_BL=segment_BL)
    return jnp.sum(y_BLGHP * weight_BLGHP) + jnp.sum(state_BGHPN * weight_BGHPN)

  return jax.jit(jax.grad(loss))(given)


def close(got, want, tolerance):
  """Asserts that two arrays agree up to `tolerance` of the largest entry wanted, or of 0.1."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 0.1))


def check(arguments, passes, tolerance, want=None):
  """Asserts that the passes' gradients are the reference's."""
  want = gradients(reference.ssd, arguments if want is None else want)
  got = gradients(functools.partial(vjp.ssd, passes=passes, chunk=8), arguments)
  assert set(got) == set(want)
  for name in want:
    assert got[name].dtype == arguments[name].dtype
    close(got[name], want[name], tolerance)


@pytest.mark.parametrize("name", FLOAT32)
def test_gradients_of_the_kernels_arithmetic_are_those_of_the_reference(name):
  check(cases.make(cases.CASES[name]), EXACT, GRADIENTS)


def test_tokens_without_time_have_their_gradients_too():
  arguments = cases.make(dataclasses.replace(cases.CASES["rare_resets"], seed=11))
  rng = np.random.default_rng(12)
  arguments["dt_BLGH"] *= rng.random(arguments["dt_BLGH"].shape) < 0.5
  check(arguments, EXACT, GRADIENTS)


def test_in_float64_nothing_is_lost():
  with jax.enable_x64(True):
    case = cases.make(cases.CASES["rare_resets"])
    wide = {k: v if v is None or v.dtype.kind == "i" else np.float64(v) for k, v in case.items()}
    check(wide, EXACT, 1e-13)


@pytest.mark.parametrize("name", ["bfloat16", "steep_decay"])
def test_in_bfloat16_only_the_operands_rounding_is_lost(name):
  arguments = cases.make(dataclasses.replace(cases.CASES[name], dtype="bfloat16"))
  wide = {k: v if v is None or v.dtype.kind == "i" else np.float32(v) for k, v in arguments.items()}
  # y_bar, mix, states, scaled rows and results are rounded: five errors of half a unit.
  check(arguments, ROUNDED, 2**-8 * np.sqrt(5), wide)


def shapes(B, L, G, H, P, N, fresh=True, dtype=jnp.bfloat16, kept=jnp.bfloat16):
  """Returns the arguments of `backward` as shapes and dtypes."""
  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  x_BLGHP, b_BLGN = array(B, L, G, H, P, dtype=dtype), array(B, L, G, N, dtype=dtype)
  return (
    x_BLGHP, array(B, L, G, H), array(G, H), b_BLGN, b_BLGN, array(G, H),
    array(B, L, dtype=jnp.bool_) if fresh else None, (array(L // 64, B, G, H, P, N, dtype=kept),),
    x_BLGHP, array(B, G, H, P, N),
  )


@pytest.mark.parametrize(
  ("P", "N", "fresh", "kept"),
  [(64, 128, True, jnp.bfloat16), (80, 128, False, jnp.float32), (64, 256, True, jnp.bfloat16),
   (64, 16, False, jnp.bfloat16)],
)
def test_the_kernels_lower_for_cuda_without_a_gpu(P, N, fresh, kept):
  B, L, G, H = 2, 192, 3, 5
  arguments = shapes(B, L, G, H, P, N, fresh, kept=kept)
  lowered = jax.jit(functools.partial(pallas_gpu.backward, chunk=64)).trace(*arguments).lower(
    lowering_platforms=("cuda",)
  )
  results = [(v.shape, v.dtype) for v in lowered.out_info]
  assert results == [(arguments[i].shape, arguments[i].dtype) for i in (0, 1, 2, 3, 4, 5, 9)]
  assert len(re.findall("custom_call @mosaic_gpu", lowered.as_text())) == 2


# Every path: batch, length, groups, heads, channels, states. Rings are 3, 2, 4 and 2 heads deep;
# the states' cotangents read 4 chunks ahead.
BODIES = {
  "turns of every ring": (1, 128, 2, 5, 64, 128), "overlapping tiles": (2, 64, 1, 3, 80, 128),
  "fewer heads than a ring": (1, 320, 1, 1, 64, 16), "wide": (1, 64, 1, 5, 64, 256),
  "wide, one head": (1, 128, 1, 1, 80, 192), "an odd number of tiles": (1, 64, 1, 1, 64, 48),
}
# Steps and rates, log-uniform: huge steps alone and among small ones, steep rates, all sizes.
EXTREMES = {
  "steps": ((1e3, 1e8), (0.5, 2)), "some steps": ((1e-3, 1e8), (0.5, 2)),
  "rates": ((0.01, 1), (1e6, 1e12)), "all sizes": ((1e-12, 1e6), (1e-6, 1e6)),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_steps_and_rates_have_the_gradients_of_the_recurrence(name):
  arguments, rng = cases.make(cases.CASES["given_state"]), np.random.default_rng(13)
  dt_BLGH, a_GH = (
    np.exp(rng.uniform(*np.log(limits), arguments[name].shape)).astype(np.float32)
    for name, limits in zip(("dt_BLGH", "a_GH"), EXTREMES[name], strict=True)
  )
  arguments |= {"dt_BLGH": dt_BLGH, "a_GH": -a_GH}
  with jax.enable_x64(True):
    wide = {k: v if v is None else np.float64(v) for k, v in arguments.items()}
    want = gradients(reference.ssd, wide)
  got = gradients(functools.partial(vjp.ssd, passes=EXACT, chunk=8), arguments)
  # A decay is as exact as the chunk's sum of logarithms, none of them below -104.
  tolerance = GRADIENTS + 8 * 104 * float(np.finfo(np.float32).eps)
  for leaf, v in got.items():
    close(v, want[leaf], tolerance)


@pytest.mark.parametrize(("name", "fresh"), [(name, i % 2 == 0) for i, name in enumerate(BODIES)])
def test_the_bodies_of_the_kernels_do_that_arithmetic_however_late_copies_are(
  name, fresh, monkeypatch
):
  monkeypatch.setattr(twin, "TILE", 64)
  rng = np.random.default_rng(sum(BODIES[name]))
  given = list(jax.tree.map(
    lambda v: jnp.asarray(rng.standard_normal(v.shape), v.dtype), shapes(*BODIES[name])
  ))
  given[1], given[2] = 0.1 * jnp.abs(given[1]), -jnp.abs(given[2])
  given[6] = jnp.asarray(rng.random(given[6].shape) < 0.03) if fresh else None
  with gpu_emulator.emulated():
    got = backward(*given, chunk=64)
  want = jax.jit(functools.partial(twin.backward, chunk=64))(*given)
  for one, other in zip(got, want, strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    close(one, other, 2**-8)


@pytest.mark.parametrize("name", MODELS)
def test_every_published_shape_fits_with_a_head_loaded_ahead(name):
  _, H, P, N = MODELS[name]
  plan = backward_tiles.make_plan(H, P, N)
  assert backward_tiles.shared_bytes(plan) <= table.SHARED_BYTES
  assert plan.x_depth >= plan.state_depth >= 2
  # Three warpgroups begin with 168 registers a thread, which they only pass to each other.
  assert sum(backward_tiles.REGISTERS[plan.wide]) <= 3 * 168


def test_tiles_of_rows_see_every_row_once():
  for rows in (64, 80, 112, 128):
    tiles = backward_tiles.row_tiles(rows)
    new = [i for start, seen in tiles for i in range(start + seen, start + 64)]
    assert new == list(range(rows))


BAD = {
  "dtype": ({"dtype": jnp.float32}, 64, "dtypes float32 of x and float32 of b are not bfloat16"),
  "chunk": ({}, 32, "chunk 32 is not 64 in pallas_gpu's way back"),
  "channels": ({"P": 48}, 64, "P = 48 is not a multiple of 16 from 64 to 128"),
  "state": ({"N": 96}, 64, "N = 96 is not a multiple of 16 up to 64 or of 64 up to 256"),
  "memory": ({"P": 80, "N": 256}, 64, "P = 80 and N = 256 need more than the 232448 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_kernels_cannot_run_is_refused_in_one_line(case):
  changes, chunk, message = BAD[case]
  arguments = shapes(**(dict(B=1, L=128, G=2, H=3, P=64, N=128) | changes))
  with pytest.raises(ValueError, match=message) as caught:
    jax.eval_shape(functools.partial(backward, chunk=chunk), *arguments)
  assert "\n" not in str(caught.value)
