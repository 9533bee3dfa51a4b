"""The TPU kernels, interpreted on a CPU, against the recurrence and the reference; their limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend import core

from cases import ssd as cases
from hybridlm.ops.ssd import pallas_tpu, reference, vjp
from hybridlm.ops.ssd.pallas_tpu import table, tile

PASSES = vjp.Passes(
  functools.partial(pallas_tpu.forward, interpret=True),
  functools.partial(pallas_tpu.backward, interpret=True),
)
# Two chunks of two tiles each, the last one ragged.
LONG, CHUNK = 420, 256
CASES = {
  "plain": cases.CASES["plain"],
  "one_token": cases.CASES["one_token"],
  "steep_decay": cases.CASES["steep_decay"],
  "long": dataclasses.replace(cases.CASES["rare_resets"], L=LONG),
  "long_bfloat16": dataclasses.replace(cases.CASES["bfloat16"], L=LONG),
}
# Published models: groups, heads a group, channels, states.
MODELS = {
  "8b": (8, 16, 64, 128), "4b": (8, 14, 64, 128), "56b": (8, 32, 64, 256),
  "nano": (8, 16, 80, 128), "nano_pruned": (8, 12, 80, 128), "hymba": (1, 50, 64, 16),
  "one_group": (1, 16, 64, 128), "two_heads": (8, 2, 64, 128),
}


def outputs_and_gradients(scan, arguments):
  """Returns y, the state and the gradient of their weighted sum for every float argument."""
  rng = np.random.default_rng(9)
  B, _, G, H, P = arguments["x_BLGHP"].shape
  weight_BLGHP = rng.standard_normal(arguments["x_BLGHP"].shape).astype(np.float32)
  weight_BGHPN = rng.standard_normal((B, G, H, P, cases.N)).astype(np.float32)
  given = {name: jnp.asarray(v) for name, v in arguments.items() if v is not None}
  segment_BL = given.pop("segment_BL", None)

  def loss(given):
    y_BLGHP, state_BGHPN = scan(**given, segment_BL=segment_BL)
    total = jnp.sum(y_BLGHP * weight_BLGHP) + jnp.sum(state_BGHPN * weight_BGHPN)
    return total, (y_BLGHP, state_BGHPN)

  (_, outputs), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
  return outputs, slopes


def wide(arguments):
  """Returns the arguments with floats in float32."""
  return {k: v if v is None or v.dtype.kind == "i" else np.float32(v) for k, v in arguments.items()}


@functools.cache
def wanted(name):
  """Returns y and the state of the float64 recurrence, and the reference's gradients in float32."""
  arguments = cases.make(CASES[name])
  _, slopes = outputs_and_gradients(reference.ssd, wide(arguments))
  return cases.recurrence(**arguments), slopes


def check(name, **options):
  """Asserts that the kernels give what is wanted in a case; bfloat16 rounds what it multiplies."""
  case, arguments = CASES[name], cases.make(CASES[name])
  (y_BLGHP, state_BGHPN), slopes = outputs_and_gradients(
    functools.partial(vjp.ssd, passes=PASSES, **options), arguments)
  (want_BLGHP, want_BGHPN), want = wanted(name)
  values = cases.rounding(case.L, cases.N)
  gradients = cases.rounding(case.L, cases.N, cases.H, cases.P)
  if case.dtype == "bfloat16":
    values = gradients = 2.0**-7
  assert (y_BLGHP.dtype, state_BGHPN.dtype) == (case.dtype, "float32")
  close(y_BLGHP, want_BLGHP, values)
  close(state_BGHPN, want_BGHPN, values)
  assert set(slopes) == set(want)
  for leaf, slope in slopes.items():
    assert slope.dtype == arguments[leaf].dtype
    close(slope, want[leaf], gradients)


def close(got, want, tolerance):
  """Asserts that two arrays agree up to `tolerance` of the largest entry wanted, or of 0.1."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 0.1))


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_with_the_recurrence_and_with_the_reference_gradients(name):
  check(name, chunk=CHUNK)


def test_heads_of_a_group_may_lie_in_several_blocks(monkeypatch):
  monkeypatch.setattr(table, "MOST_HEADS", 2)
  assert table.blocks(cases.H, cases.P, cases.N, "float32", CHUNK).splits == 2
  check("long", chunk=CHUNK)


def test_a_step_of_zero_has_the_slope_of_the_reference():
  arguments = cases.make(cases.CASES["given_state"])
  arguments["dt_BLGH"][:, 5:] = 0
  _, slopes = outputs_and_gradients(
    functools.partial(vjp.ssd, passes=PASSES, chunk=CHUNK), arguments)
  _, want = outputs_and_gradients(reference.ssd, arguments)
  tolerance = cases.rounding(cases.L, cases.N, cases.H, cases.P)
  for leaf, slope in slopes.items():
    close(slope, want[leaf], tolerance)
  assert np.abs(slopes["dt_BLGH"][:, 5:]).min() > 0


def decays(dt_HQ, a_H1, dtype):
  """Returns within_HSQ, first_HQ and last_HQ of one tile as a kernel sees them."""
  H, Q = dt_HQ.shape
  cut = table.Blocks(heads=H, splits=1, tiles=1, P=8, N=8)

  def kernel(dt, a, within, first, last, decay):
    tile.fill(decay, dt, a, None, cut)
    first[...], last[...] = decay.first_MHQ[0], decay.last_MHQ[0]
    for h in range(H):
      within[h] = tile.within(decay, 0, h)

  out_shape = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((H, Q, Q), (H, Q), (H, Q))]
  return pl.pallas_call(
    kernel, out_shape=out_shape, scratch_shapes=[tile.decay_scratch(cut, dtype)], interpret=True,
  )(dt_HQ, a_H1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_decay_exceeds_one_and_none_is_lost_however_steep(dtype):
  rng = np.random.default_rng(4)
  # Heads forget from nothing to everything, in one tile.
  a_H1 = -np.float32([[0], [1e-3], [1], [40], [1e30]])
  dt_HQ = rng.uniform(0, 1, (5, table.TILE)).astype(np.float32)
  within_HSQ, first_HQ, last_HQ = decays(dt_HQ, a_H1, dtype)
  log_HQ = np.cumsum(np.float64(dt_HQ) * np.float64(a_H1), axis=1)
  want_HSQ = np.triu(np.exp(np.minimum(log_HQ[:, None] - log_HQ[:, :, None], 0)))
  tolerance = {"float32": 1e-6, "bfloat16": 1e-3}[dtype]
  for got, want in (
    (within_HSQ, want_HSQ), (first_HQ, np.exp(log_HQ)), (last_HQ, want_HSQ[:, :, -1])
  ):
    assert 0 <= np.min(got) and np.max(got) <= 1
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def kernel_calls(jaxpr):
  """Yields the equations of a program that call kernels."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for inner in core.jaxprs_in_params(equation.params):
        yield from kernel_calls(inner)


def test_states_are_kept_for_the_way_back_only_and_nothing_of_tile_by_tile_size():
  arguments = wide(cases.make(CASES["long"]))
  floats = {k: v for k, v in arguments.items() if v is not None and k != "segment_BL"}

  def loss(floats):
    y_BLGHP, _ = vjp.ssd(**floats, passes=PASSES, chunk=CHUNK)
    return jnp.sum(y_BLGHP)

  kernels = ["ssd_forward", "ssd_backward"]
  for fn, names in ((loss, kernels[:1]), (jax.grad(loss), kernels)):
    calls = list(kernel_calls(jax.make_jaxpr(fn)(floats).jaxpr))
    assert [call.params["name"] for call in calls] == names
    for call in calls:
      for v in call.outvars:
        assert sum(size >= table.TILE for size in v.aval.shape) <= 1, v.aval.shape
    states = [v for v in calls[0].outvars if v.aval.ndim == 5]
    assert len(states) == len(names) - 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_published_models_fit_in_half_the_memory_of_the_smallest_core(model, dtype):
  G, H, P, N = MODELS[model]
  chunk = pallas_tpu.default_chunk(G, H, P, N, dtype)
  cut = table.blocks(H, P, N, dtype, chunk)
  assert chunk == cut.chunk == 512
  assert cut.heads * cut.splits == H
  assert table.vmem_bytes(cut, dtype) <= 48 * 2**20


@pytest.mark.parametrize("model", ["nano_pruned", "56b", "hymba"])
def test_both_kernels_are_lowered_for_a_tpu_where_there_is_none(model):
  (G, H, P, N), L, dtype = MODELS[model], 1000, jnp.bfloat16
  chunk = pallas_tpu.default_chunk(G, H, P, N, dtype)
  passes = vjp.Passes(pallas_tpu.forward, pallas_tpu.backward)

  def loss(x_BLGHP, dt_BLGH, a_GH, b_BLGN, segment_BL):
    y_BLGHP, _ = vjp.ssd(
      x_BLGHP, dt_BLGH, a_GH, b_BLGN, b_BLGN, segment_BL=segment_BL, passes=passes, chunk=chunk)
    return jnp.sum(y_BLGHP.astype(jnp.float32))

  given = [jax.ShapeDtypeStruct(*v) for v in (
    ((2, L, G, H, P), dtype), ((2, L, G, H), jnp.float32), ((G, H), jnp.float32),
    ((2, L, G, N), dtype), ((2, L), jnp.int32))]
  text = jax.jit(jax.grad(loss)).trace(*given).lower(lowering_platforms=("tpu",)).as_text()
  for name in ("ssd_forward", "ssd_backward"):
    assert text.count(f'kernel_name = "{name}"') == 1


def test_what_the_kernels_cannot_run_is_refused_in_one_line():
  def of(P, N, dtype):
    x_BLGHP = jax.ShapeDtypeStruct((3, 37, 2, 4, P), dtype)
    return x_BLGHP, jax.ShapeDtypeStruct((3, 37, 2, N), dtype)

  assert pallas_tpu.refusal(*of(64, 128, jnp.bfloat16), chunk=512) is None
  message = pallas_tpu.refusal(*of(64, 128, jnp.float16), chunk=512)
  assert message == "x_BLGHP has dtype float16, but pallas_tpu takes bfloat16 and float32"
  message = pallas_tpu.refusal(*of(64, 65536, jnp.float32), chunk=512)
  assert message == (
    "a head of P=64 N=65536 float32 with chunk 512 needs more than the 50331648 bytes of VMEM "
    "that pallas_tpu takes")
  with pytest.raises(ValueError, match="P=64 N=65536 float32"):
    table.blocks(4, 64, 65536, "float32", 512)
