"""Laws of decoding: token by token, ragged, windowed, fused, it is the forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import mixed, models
from hybridlm.config import Llama3Scaling, Rope
from hybridlm.nn import cache as caches
from hybridlm.nn import serve
from hybridlm.ops.conv import causal_conv, causal_conv_step
from hybridlm.ops.ssd import step as recurrence
from hybridlm.ops.ssd.api import ssd
from hybridlm.prune import cut as cutting

LENGTHS = (4, 13, 1)
TOTAL = 24
TOLERANCE = 1e-5
SCALED = Rope(base=500.0, rotary=6, scaling=Llama3Scaling(factor=4.0, low=1.0, high=4.0, context=8))
CASES = {
  **{name: {"variant": name} for name in models.VARIANTS},
  "one group, no window": {"pattern": "*M", "G": 1, "rope": SCALED, "dt_limits": (0.01, 0.05)},
  "one tap, padded vocabulary": {"pattern": "MM*", "W": 1, "vocabulary": 29},
  "llama": {"variant": "swiglu", "pattern": "*-", "rope": Rope()},
  "no state": {"pattern": "CC-", "conv_bias": False, "W": 3},
}
# What is cut of a variant, every axis once: decoding must follow the blocks' own sizes.
CUT = {
  "layernorm, cut": ("layernorm", {
    "P": 5, "D": 11, "V": 19, "E": 8,
    0: {"H": 3, "N": 3, "G": 1}, 1: {"F": 5}, 2: {"N": 0, "H": 2}, 3: {"K": 1, "J": 2},
  }),
  "swiglu, cut": ("swiglu", {"G": 1, "N": 2, "E": 4, "K": 1, "F": 13, "X": (0, 2, 3, 4)}),
}
# Attention and SSM side by side, windows, shared keys, meta tokens: configs by name.
GROUPS = {"global_layers": (0,), "kv_groups": ((1, 2),)}
SIDE_BY_SIDE = {
  "every form": mixed.make,
  "shared keys, no meta tokens": lambda: models.make(
    pattern="***", window=9, U=7, kv_groups=((0, 1),), rope=SCALED),
  "hymba": lambda: models.hymba("mamba2", pattern="===", **GROUPS),
  "hymba of mamba-1": lambda: models.hymba("mamba1", pattern="===", **GROUPS),
}
SIDES = [pytest.param(name, marks=pytest.mark.slow if name.startswith("hymba") else ())
         for name in SIDE_BY_SIDE]
prefill = jax.jit(serve.prefill, static_argnames=("cfg", "size"))
step = jax.jit(serve.step, static_argnames="cfg")
fuse = jax.jit(serve.fuse, static_argnames="cfg")


@functools.cache
def case(name):
  """Returns config, parameters, their fused form, tokens and the logits of the forward pass."""
  if name in CUT:
    variant, sizes = CUT[name]
    whole = models.make(variant, **({"rope": Rope(base=50.0)} if variant == "swiglu" else {}))
    tree = models.params(whole, 5.0)
    cfg, params = cutting.cut(whole, tree, models.plan(whole, tree, sizes))
    token_BL = models.tokens(cfg, (len(LENGTHS), TOTAL))
    return cfg, params, fuse(cfg, params), token_BL, hybridlm.forward(cfg, params, token_BL)
  cfg = SIDE_BY_SIDE[name]() if name in SIDE_BY_SIDE else plain(name)
  params = mixed.params(cfg) if name in SIDE_BY_SIDE else models.params(cfg, 5.0)
  token_BL = models.tokens(cfg, (len(LENGTHS), TOTAL))
  return cfg, params, fuse(cfg, params), token_BL, hybridlm.forward(cfg, params, token_BL)


def plain(name):
  """Returns a variant's config without the fields that no block of its pattern has."""
  fields = dict(CASES[name])
  variant = fields.pop("variant", "untied")
  dropped = () if "M" in fields.get("pattern", models.PATTERN) else ("conv_bias",)
  kept = {key: value for key, value in models.VARIANTS[variant].items() if key not in dropped}
  used = fields.pop("pattern", models.PATTERN)
  return models.make("untied", pattern=used, **(kept | fields))


def error(got_BV, want_BV):
  real = np.isfinite(want_BV)
  assert (np.isfinite(got_BV) == real).all()
  return models.error(jnp.where(real, got_BV, 0), jnp.where(real, want_BV, 0))


@pytest.mark.parametrize("name", [*CASES, *CUT, *SIDES])
def test_prefill_and_steps_of_a_ragged_batch_are_the_forward_pass(name):
  cfg, _, fused, token_BL, want_BLV = case(name)
  length_B, rows_B = np.array(LENGTHS), np.arange(len(LENGTHS))
  logits_BV, cache = prefill(cfg, fused, token_BL[:, : max(LENGTHS)], length_B, size=TOTAL)
  assert error(logits_BV, want_BLV[rows_B, length_B - 1]) < TOLERANCE
  for count in range(TOTAL - max(LENGTHS)):
    logits_BV, cache = step(cfg, fused, cache, token_BL[rows_B, length_B + count])
    assert error(logits_BV, want_BLV[rows_B, length_B + count]) < TOLERANCE, count
  np.testing.assert_array_equal(cache.length_B, length_B + TOTAL - max(LENGTHS))


@pytest.mark.parametrize("name", ["untied", "layernorm", *SIDES])
def test_padding_changes_no_state_and_no_logit(name):
  cfg, _, fused, token_BL, _ = case(name)
  token_BL, length_B = token_BL[:, : max(LENGTHS)], np.array(LENGTHS)
  padding_BL = np.arange(max(LENGTHS)) >= length_B[:, None]
  other_BL = jnp.where(padding_BL, (token_BL + 7) % cfg.V, token_BL)
  one, two = (prefill(cfg, fused, each, length_B, size=TOTAL) for each in (token_BL, other_BL))
  for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", ["swiglu", "layernorm", "no state", *SIDES])
def test_the_state_after_prefill_is_that_of_steps_from_nothing(name):
  cfg, _, fused, token_BL, _ = case(name)
  length_B = np.full(len(LENGTHS), 11)
  _, want = prefill(cfg, fused, token_BL[:, :13], length_B, size=TOTAL)
  _, got = prefill(cfg, fused, token_BL[:, :13], np.ones_like(length_B), size=TOTAL)
  for position in range(1, 11):
    _, got = step(cfg, fused, got, token_BL[:, position])
  for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SIDES)
def test_a_cache_holds_no_slot_twice_and_what_meta_tokens_leave_once(name):
  cfg, _, fused, token_BL, _ = case(name)
  _, cache = prefill(cfg, fused, token_BL[:, : max(LENGTHS)], np.array(LENGTHS), size=TOTAL)
  held, want = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (
    (cache.blocks, fused.get("prefixes", {})),
    (caches.empty(cfg, len(LENGTHS), TOTAL).blocks, caches.before(cfg)),
  ))
  assert held == want
  assert caches.nbytes(cfg, len(LENGTHS), TOTAL) == hybridlm.cost(
    cfg, batch=len(LENGTHS), context=TOTAL).state_bytes
  shared = [index for index, owner in enumerate(cfg.owners) if owner not in (None, index)]
  assert shared and not any(
    isinstance(part, caches.AttentionState)
    for index in shared for part in (cache.blocks[index], *(cache.blocks[index] or ())))


def test_a_ring_of_the_window_is_as_good_as_a_cache_of_all_positions():
  cfg, _, fused, token_BL, want_BLV = case("layernorm")
  window = cfg.blocks[3].window
  length_B = np.array([3, 11, 8])
  logits = {}
  for size in (window, TOTAL):  # the larger size keeps no more
    logits_BV, cache = prefill(cfg, fused, token_BL[:, :13], length_B, size=size)
    assert cache.blocks[3].k_BKSE.shape[2] == window
    for count in range(11):
      logits_BV, cache = step(cfg, fused, cache, token_BL[np.arange(3), length_B + count])
    logits[size] = logits_BV
  np.testing.assert_array_equal(logits[window], logits[TOTAL])
  # Past positions did leave the window, and leaving them in would be seen.
  full = hybridlm.forward(cfg.replace(blocks=tuple(
    block if block.symbol != "*" else type(block)(K=2, J=3, E=10, rope=block.rope, bias=True)
    for block in cfg.blocks
  )), models.params(cfg, 5.0), token_BL)
  assert error(full[np.arange(3), length_B + 10], want_BLV[np.arange(3), length_B + 10]) > 1e-3


def test_the_canonical_tree_serves_as_well_as_the_fused_one():
  cfg, params, fused, token_BL, _ = case("swiglu")
  length_B = np.array(LENGTHS)
  assert serve.fuse(cfg, fused).keys() == fused.keys()
  results = []
  for weights in (params, fused):
    logits_BV, cache = prefill(cfg, weights, token_BL[:, :13], length_B, size=TOTAL)
    results.append(step(cfg, weights, cache, jnp.argmax(logits_BV, axis=1))[0])
  assert error(*results) < TOLERANCE


def test_bfloat16_decoding_stays_near_the_bfloat16_forward_pass():
  cfg, params, _, token_BL, _ = case("untied")
  cfg = cfg.replace(dtype="bfloat16")
  want_BLV = hybridlm.forward(cfg, params, token_BL)
  logits_BV, cache = prefill(
    cfg, fuse(cfg, params), token_BL[:, :13], np.array([13] * 3), size=TOTAL
  )
  assert error(logits_BV, want_BLV[:, 12]) < 0.03
  assert cache.blocks[0].ssm_BGHPN.dtype == jnp.float32
  assert cache.blocks[3].k_BKSE.dtype == jnp.bfloat16
  logits_BV, _ = step(cfg, fuse(cfg, params), cache, token_BL[:, 13])
  assert 0 < error(logits_BV, want_BLV[:, 13]) < 0.03


@pytest.mark.slow
def test_bfloat16_decoding_of_parallel_blocks_stays_near_the_forward_pass():
  cfg, params, _, token_BL, exact_BLV = case("hymba of mamba-1")
  cfg = cfg.replace(dtype="bfloat16")
  want_BLV, fused = hybridlm.forward(cfg, params, token_BL), fuse(cfg, params)
  logits_BV, cache = prefill(cfg, fused, token_BL[:, :13], np.array([13] * 3), size=TOTAL)
  assert error(logits_BV, want_BLV[:, 12]) < 0.03 and error(want_BLV, exact_BLV) < 0.1
  held = {leaf.dtype for leaf in jax.tree.leaves(cache.blocks)}
  assert held == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
  logits_BV, _ = step(cfg, fused, cache, token_BL[:, 13])
  assert 0 < error(logits_BV, want_BLV[:, 13]) < 0.03


def test_the_step_size_is_clipped_in_decoding_as_in_the_forward_pass():
  cfg, _, fused, token_BL, want_BLV = case("one group, no window")
  free = cfg.replace(blocks=tuple(
    block if block.symbol != "M" else type(block)(G=1, H=4, P=6, N=5) for block in cfg.blocks
  ))
  _, cache = prefill(cfg, fused, token_BL[:, :13], np.array([13] * 3), size=TOTAL)
  assert error(step(cfg, fused, cache, token_BL[:, 13])[0], want_BLV[:, 13]) < TOLERANCE
  assert error(step(free, fused, cache, token_BL[:, 13])[0], want_BLV[:, 13]) > 1e-4


def test_one_step_of_the_scan_is_the_scan_of_one_token():
  rng = np.random.default_rng(0)

  def drawn(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  x, b, c = drawn(3, 1, 2, 4, 6), drawn(3, 1, 2, 5), drawn(3, 1, 2, 5)
  dt, a, state = jnp.abs(drawn(3, 1, 2, 4)), -jnp.abs(drawn(2, 4)), drawn(3, 2, 4, 6, 5)
  want_y, want_state = ssd(x, dt, a, b, c, state_BGHPN=state, impl="reference")
  got_y, got_state = recurrence.step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
  np.testing.assert_allclose(got_y, want_y[:, 0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got_state, want_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("W", [1, 4])
def test_one_step_of_the_convolution_is_the_convolution_of_one_token(W):
  rng = np.random.default_rng(0)
  x, taps, bias = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 9, 7), (W, 7), (7,))
  )
  want = causal_conv(x, taps, bias)
  state = jnp.zeros((3, W - 1, 7))
  for position in range(9):
    y, state = causal_conv_step(x[:, position], taps, bias, state)
    np.testing.assert_allclose(y, want[:, position], rtol=1e-5, atol=1e-5)
