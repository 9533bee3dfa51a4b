"""The Hopper forward kernel: its arithmetic, what it takes and refuses, and that it lowers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import gpu_emulator
from cases import gpu_forward_twin as twin
from cases import ssd as cases
from hybridlm.ops.ssd import pallas_gpu, vjp
from hybridlm.ops.ssd.pallas_gpu import table

CASES = {
  **{name: dataclasses.replace(case, dtype="bfloat16") for name, case in cases.CASES.items()},
  "three whole chunks": dataclasses.replace(cases.CASES["bfloat16"], L=24, resets=None),
}
# Published models: groups, heads a group, channels, states.
MODELS = {
  "8b": (8, 16, 64, 128), "4b": (8, 14, 64, 128), "56b": (8, 32, 64, 256),
  "nano": (8, 16, 80, 128), "nano_pruned": (8, 12, 80, 128), "hymba": (1, 50, 64, 16),
  "one_group": (1, 16, 64, 128), "two_heads": (8, 2, 64, 128),
}


def close(got, want, terms):
  """Asserts that errors are those of sums over `terms` arrays that were rounded to bfloat16.

  Twice its unit roundoff, of the largest entry, times the root of their number.
  """
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  share = 2**-8 * np.sqrt(terms)
  np.testing.assert_allclose(got, want, rtol=0, atol=share * max(np.abs(want).max(), 0.1))


def shapes(B, L, G, H, P, N, fresh=True, dtype=jnp.bfloat16):
  """Returns the arguments of `forward` as shapes and dtypes."""
  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  b_BLGN = array(B, L, G, N, dtype=dtype)
  return (
    array(B, L, G, H, P, dtype=dtype), array(B, L, G, H), array(G, H), b_BLGN, b_BLGN, array(G, H),
    array(B, L, dtype=jnp.bool_) if fresh else None, array(B, G, H, P, N),
  )


def refusal(arguments, *, chunk):
  """Returns the package's refusal of arrays of these shapes."""
  x_BLGHP, b_BLGN = (jnp.zeros(v.shape, v.dtype) for v in (arguments[0], arguments[3]))
  return pallas_gpu.refusal(x_BLGHP, b_BLGN, chunk=chunk)


@pytest.mark.parametrize("name", CASES)
def test_the_arithmetic_of_the_kernel_is_that_of_the_recurrence(name):
  arguments = cases.make(CASES[name])
  given = {k: jnp.asarray(v) for k, v in arguments.items() if v is not None}
  scan = functools.partial(vjp.ssd, passes=vjp.Passes(twin.forward, None), chunk=8)
  y_BLGHP, state_BGHPN = jax.jit(lambda given: scan(**given))(given)
  want_y, want_state = cases.recurrence(**arguments)
  # y is rounded itself, and sums what was: mix x over a chunk and states.
  close(y_BLGHP, want_y, 3)
  close(state_BGHPN, want_state, 1)


def test_kept_states_are_those_that_the_scan_of_the_tokens_before_ends_in():
  chunk, case = 8, dataclasses.replace(CASES["rare_resets"], L=24)
  arguments = cases.make(case)
  fresh_BL = np.diff(arguments["segment_BL"], axis=1, prepend=arguments["segment_BL"][:, :1]) != 0
  names = ("x_BLGHP", "dt_BLGH", "a_GH", "b_BLGN", "c_BLGN", "skip_GH")
  given = (*(arguments[name] for name in names), fresh_BL, arguments["state_BGHPN"])
  _, _, (kept_CBGHPN,) = jax.jit(functools.partial(twin.forward, chunk=chunk))(*given)
  assert kept_CBGHPN.shape[0] == 3
  for i, kept_BGHPN in enumerate(kept_CBGHPN):
    cut = {k: v[:, : i * chunk] for k, v in arguments.items() if v is not None and "_BL" in k}
    close(kept_BGHPN, cases.recurrence(**(arguments | cut))[1], 2)


# Each row of the table, upright and not; chunks enough to go around every ring.
BODIES = {
  "narrow": (2, 384, 3, 2, 64, 16), "tight": (1, 448, 1, 3, 80, 128),
  "wide": (1, 256, 1, 1, 64, 256), "widest": (1, 256, 1, 1, 80, 256),
  "one chunk": (1, 64, 1, 2, 64, 48),
}


def check_body(sizes, fresh):
  """Asserts that the kernel, emulated, returns what the twin does."""
  rng = np.random.default_rng(sum(sizes))
  given = [jnp.asarray(rng.standard_normal(v.shape), v.dtype) for v in shapes(*sizes)]
  given[1], given[2] = 0.1 * jnp.abs(given[1]), -jnp.abs(given[2])
  given[6] = jnp.asarray(rng.random(given[6].shape) < 0.01) if fresh else None
  with gpu_emulator.emulated():
    got = pallas_gpu.forward(*given, chunk=64)
  want = jax.jit(functools.partial(twin.forward, chunk=64))(*given)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    close(one, other, 1)


@pytest.mark.parametrize(("name", "fresh"), [(name, name != "wide") for name in BODIES])
def test_the_body_of_the_kernel_does_that_arithmetic_however_late_copies_are(name, fresh):
  check_body(BODIES[name], fresh)


@pytest.mark.parametrize(("P", "fresh"), [(64, True), (80, False)])
def test_segments_that_are_walked_side_by_side_give_what_one_walk_gives(P, fresh, monkeypatch):
  monkeypatch.setattr(table, "segments", lambda heads, chunks: 3)
  check_body((2, 384, 1, 2, P, 64), fresh)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [1, 7, 8, 24, 512])
def test_segments_divide_the_chunks_and_fit_on_the_card_together(name, chunks):
  G, H, _, _ = MODELS[name]
  count = table.segments(G * H, chunks)
  assert chunks % count == 0
  assert count == 1 or G * H * count <= table.MULTIPROCESSORS
  if chunks == 512:  # cut once more, they would not fit, or nothing is left to gain
    assert count == 8 or G * H * count * 2 > table.MULTIPROCESSORS


@pytest.mark.parametrize(
  ("L", "P", "fresh", "keep", "walks"), [(192, 64, True, True, 1), (512, 80, False, False, 2)]
)
def test_the_kernel_lowers_for_cuda_without_a_gpu(L, P, fresh, keep, walks):
  B, G, H, N = 2, 3, 5, 128
  forward = functools.partial(pallas_gpu.forward, chunk=64, keep=keep)
  lowered = jax.jit(forward).trace(*shapes(B, L, G, H, P, N, fresh)).lower(
    lowering_platforms=("cuda",)
  )
  y, last, kept = lowered.out_info
  assert (y.shape, y.dtype) == ((B, L, G, H, P), jnp.bfloat16)
  assert (last.shape, last.dtype) == ((B, G, H, P, N), jnp.float32)
  assert [v.shape for v in kept] == [(L // 64, B, G, H, P, N)] * keep
  assert len(re.findall("custom_call @mosaic_gpu", lowered.as_text())) == walks


@pytest.mark.parametrize("name", MODELS)
def test_every_published_shape_has_a_row_that_fits(name):
  G, H, P, N = MODELS[name]
  row = table.TABLE["NVIDIA H200", G, H, P, N]
  assert refusal(shapes(1, 1, G, H, P, N), chunk=64) is None
  assert table.tiles(G, H, P, N) == row == table.tiles(G + 1, H, P, N)
  assert table.shared_bytes(row, P, N) <= table.SHARED_BYTES
  assert row.stages % row.readers == row.copies % row.readers == 0
  spent = row.readers * row.reader_registers + row.state_registers + table.FETCH_REGISTERS
  # Warpgroups begin with equal shares, in eights, and pass on what is theirs.
  share = table.REGISTERS // (row.readers + 2) // 8 * 8
  assert spent <= share * (row.readers + 2)


BAD = {
  "dtype": ({"dtype": jnp.float32}, 64, "x_BLGHP has dtype float32, but pallas_gpu takes bfloat16"),
  "chunk": ({}, 32, "chunk 32 is not 64, the one that pallas_gpu has"),
  "channels": ({"P": 72}, 64, "P = 72 and N = 128 must be multiples of 16"),
  "neither whole": ({"P": 80, "N": 16}, 64, "P = 80 and N = 16 must be .* one of them of 64"),
  "state": ({"P": 128, "N": 256}, 64, "P = 128 and N = 256 are too large for the registers"),
  "rest": ({"L": 96}, 64, "sequence 96 is not a multiple of the chunk 64 in pallas_gpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_kernel_cannot_run_is_refused_in_one_line(case):
  changes, chunk, message = BAD[case]
  arguments = shapes(**(dict(B=1, L=128, G=2, H=3, P=64, N=128) | changes))
  with pytest.raises(ValueError, match=message) as caught:
    jax.eval_shape(functools.partial(pallas_gpu.forward, chunk=chunk), *arguments)
  assert "\n" not in str(caught.value)
  assert refusal(arguments, chunk=chunk) == (None if case == "rest" else str(caught.value))
