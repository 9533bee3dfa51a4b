"""Laws of the Mamba-1 mixer: its formulas, packing, symmetry, what comes before, and decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hybridlm
from cases import models
from hybridlm import axes
from hybridlm.nn import flow, mamba1, serve
from hybridlm.train import mesh, optim, state, step

SGD = optim.Optimizer(*optax.sgd(0.5), optax.constant_schedule(0.5))
LENGTHS, TOTAL, TOLERANCE = (4, 13, 1), 19, 1e-5
SIZES = {"pattern": "S-", "R": 7, "chunk": 8}
CFG = models.make(**SIZES)
# A convolution of one tap without a bias, and no norms; what the published Mamba has.
BARE = models.make(pattern="S", R=7, chunk=8, W=1, norms=False, conv_bias=False)
CONFIGS = {"norms": CFG, "no norms": models.make(**SIZES | {"norms": False}), "one tap": BARE}


@functools.cache
def params(cfg):
  """Returns random parameters, also of what reads dt, B and C."""
  tree = models.params(cfg, 5.0)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(
      np.asarray(leaf) * np.float32(5 if path[-1].key.startswith("in_") else 1)), tree)


@functools.cache
def mix(cfg, keep=False):
  """Returns the compiled mixer of a block: `(leaves, x, segments, count, prefix) -> (y, seen)`."""

  def run(leaves, x_BLD, segment_BL=None, count=None, prefix=None):
    place = flow.Place(prefix=prefix, keep=keep)
    return mamba1.mix(
      cfg, cfg.blocks[0], leaves, x_BLD, segment_BL=segment_BL, count=count, place=place)

  return jax.jit(run)


def inputs(cfg, shape=(2, 21), seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, cfg.D)), jnp.float32)


def norm_64(v_R, leaves, gain, eps):
  """Returns RMSNorm of the last axis, where there is such a gain."""
  if gain not in leaves:
    return v_R
  return v_R / np.sqrt(np.mean(v_R**2, -1, keepdims=True) + eps) * leaves[gain].ravel()


def stepped(cfg, leaves, x_LD):
  """Returns output and last state of one row in float64, token by token, from the formulas."""
  block, leaves = cfg.blocks[0], {k: np.asarray(v, np.float64) for k, v in leaves.items()}
  flat = {name: leaves[name].reshape(-1, leaves[name].shape[-1])
          for name in ("in_rank_GHPR", "in_b_GHPN", "in_c_GHPN", "w_out_GHPD", "a_log_GHN")}
  taps_WH = leaves["conv_x_WGHP"].reshape(block.W, block.H)
  bias_H = leaves.get("conv_bias_x_GHP", np.zeros(block.H)).ravel()
  seen_WH, state_HN = np.zeros((block.W, block.H)), np.zeros((block.H, block.N))
  y_LD = []
  for x_D in np.asarray(x_LD, np.float64):
    z_H, x_H = (np.tensordot(x_D, leaves[f"w_{stem}_DGHP"], 1).ravel() for stem in "zx")
    seen_WH = np.concatenate([seen_WH[1:], x_H[None]])
    u_H = bias_H + np.sum(taps_WH * seen_WH, axis=0)
    u_H /= 1 + np.exp(-u_H)
    r_R = norm_64(u_H @ flat["in_rank_GHPR"], leaves, "rank_gain_R", cfg.eps)
    b_N = norm_64(u_H @ flat["in_b_GHPN"], leaves, "b_gain_GN", cfg.eps)
    c_N = norm_64(u_H @ flat["in_c_GHPN"], leaves, "c_gain_GN", cfg.eps)
    dt_H = np.log1p(np.exp(r_R @ leaves["in_dt_RGH"][:, 0] + leaves["dt_bias_GH"][0]))
    decay_HN = np.exp(-dt_H[:, None] * np.exp(flat["a_log_GHN"]))
    state_HN = decay_HN * state_HN + np.outer(dt_H * u_H, b_N)
    y_H = state_HN @ c_N + leaves["skip_GH"][0] * u_H
    y_LD.append((y_H * z_H / (1 + np.exp(-z_H))) @ flat["w_out_GHPD"])
  return np.stack(y_LD), state_HN


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mixer_is_its_formulas_token_by_token(name):
  cfg = CONFIGS[name]
  leaves, x_BLD = params(cfg)["blocks"]["00"], inputs(cfg)
  y_BLD, seen = mix(cfg)(leaves, x_BLD)
  for x_LD, y_LD, state_GHN in zip(x_BLD, y_BLD, seen["state_BGHN"], strict=True):
    want_LD, want_HN = stepped(cfg, leaves, x_LD)
    assert models.error(y_LD, want_LD) < TOLERANCE
    assert models.error(state_GHN[0], want_HN) < TOLERANCE


def test_rates_and_steps_begin_as_the_paper_has_them():
  leaves = models.drawn(CFG)["blocks"]["00"]
  np.testing.assert_allclose(
    np.exp(leaves["a_log_GHN"]), np.broadcast_to(np.arange(1, 6), (1, 4, 5)), rtol=1e-6)
  dt_GH = jax.nn.softplus(leaves["dt_bias_GH"])
  assert 1e-3 <= dt_GH.min() and dt_GH.max() <= 0.1


def test_packed_documents_and_those_alone_begin_with_what_was_before_them():
  leaves, x_BLD = params(CFG)["blocks"]["00"], inputs(CFG, (1, 29))
  # Behind W - 1 meta tokens or more; documents as long as the convolution's reach, and longer.
  for meta in (2, 9):
    meta_BMD = inputs(CFG, (1, meta), seed=1)
    _, seen = mix(CFG, keep=True)(leaves, meta_BMD)
    prefix = seen["prefix"]
    edges = [0, 2, 5, 6, 20, 29]
    segment_BL = jnp.asarray(np.repeat([[1, 2, 3, 4, 0]], 1, 0).repeat(np.diff(edges), axis=1))
    packed_BLD, found = mix(CFG)(leaves, x_BLD, segment_BL, None, prefix)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
      whole_BLD = jnp.concatenate([meta_BMD, x_BLD[:, start:stop]], axis=1)
      want_LD = stepped(CFG, leaves, whole_BLD[0])[0][meta:]
      assert models.error(packed_BLD[0, start:stop], want_LD) < TOLERANCE
    # One document a row needs no ids.
    alone_BLD, last = mix(CFG)(leaves, x_BLD[:, 20:], None, None, prefix)
    assert models.error(packed_BLD[:, 20:], alone_BLD) < TOLERANCE
    assert models.error(found["state_BGHN"], last["state_BGHN"]) < TOLERANCE


def test_a_prefix_of_meta_tokens_that_go_is_that_of_those_that_stay():
  leaves, meta_BMD = params(CFG)["blocks"]["00"], inputs(CFG, (1, 9), seed=1)
  for go in (4, 9):
    segment_BM = jnp.asarray(np.arange(9) >= go, jnp.int32)[None]
    got = mix(CFG, keep=True)(leaves, meta_BMD, segment_BM)[1]["prefix"]
    want = flow.SsmPrefix(jnp.zeros_like(got.conv_BW), jnp.zeros_like(got.state))
    if go < 9:
      want = mix(CFG, keep=True)(leaves, meta_BMD[:, go:])[1]["prefix"]
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_later_tokens_never_change_earlier_outputs():
  leaves, at = params(CFG)["blocks"]["00"], 12

  @jax.jit
  @jax.grad
  def slope(x_BLD):
    y_BLD, _ = mamba1.mix(CFG, CFG.blocks[0], leaves, x_BLD)
    return jnp.sum(y_BLD[:, at] * jnp.arange(1.0, CFG.D + 1))

  size_L = jnp.abs(slope(inputs(CFG))).max(axis=(0, 2))
  np.testing.assert_array_equal(size_L[at + 1 :], 0)
  assert size_L[: at + 1].min() > 0


@pytest.mark.parametrize("letter", "HNR")
def test_permuting_a_prunable_axis_changes_nothing(letter):
  tree = params(CFG)
  size = getattr(CFG.blocks[0], letter)
  moved = models.permute(CFG, tree, 0, letter, np.roll(np.arange(size), 2))
  x_BLD = inputs(CFG)
  want, _ = mix(CFG)(tree["blocks"]["00"], x_BLD)
  assert models.error(mix(CFG)(moved["blocks"]["00"], x_BLD)[0], want) < TOLERANCE
  # A half moved is another model.
  half = tree["blocks"]["00"] | {"skip_GH": moved["blocks"]["00"]["skip_GH"],
                                 "c_gain_GN": moved["blocks"]["00"]["c_gain_GN"],
                                 "rank_gain_R": moved["blocks"]["00"]["rank_gain_R"]}
  assert models.error(mix(CFG)(half, x_BLD)[0], want) > 1e-3


def test_the_norms_average_over_what_survives():
  # In numpy: no shape of a leaf is compiled for.
  leaves = {name: np.array(leaf) for name, leaf in params(CFG)["blocks"]["00"].items()}
  x_BLD = inputs(CFG)
  keep = {"R": np.array([0, 2, 5]), "N": np.array([1, 2, 4])}
  masked, cut = jax.tree.map(np.copy, leaves), dict(leaves)
  for name, leaf in leaves.items():
    for letter, kept in keep.items():
      if name.endswith(letter) or f"_{letter}" in name:
        axis = name.rpartition("_")[2].index(letter)
        cut[name] = np.take(cut[name], kept, axis=axis)
        if "a_log" not in name:
          gone = np.setdiff1d(np.arange(leaf.shape[axis]), kept)
          np.moveaxis(masked[name], axis, 0)[gone] = 0
  small = models.make(**SIZES | {"R": 3, "N": 3})
  count = {f"count_{letter}": jnp.float32(len(kept)) for letter, kept in keep.items()}
  got, _ = mix(CFG)(masked, x_BLD, None, count)
  assert models.error(got, mix(small)(cut, x_BLD)[0]) < TOLERANCE
  assert models.error(mix(CFG)(masked, x_BLD)[0], got) > 1e-3


@functools.cache
def served(cfg):
  """Returns compiled `prefill` and `step` of a config."""
  prefill = jax.jit(functools.partial(serve.prefill, cfg, size=TOTAL))
  return prefill, jax.jit(functools.partial(serve.step, cfg))


@pytest.mark.parametrize("name", ["norms", "one tap"])
def test_prefill_and_steps_of_a_ragged_batch_are_the_forward_pass(name):
  cfg, rows_B, length_B = CONFIGS[name], np.arange(3), np.array(LENGTHS)
  (prefill, decode), token_BL = served(cfg), models.tokens(cfg, (3, TOTAL))
  want_BLV = hybridlm.forward(cfg, params(cfg), token_BL)
  logits_BV, cache = prefill(params(cfg), token_BL[:, : max(LENGTHS)], length_B)
  assert models.error(logits_BV, want_BLV[rows_B, length_B - 1]) < TOLERANCE
  for count in range(TOTAL - max(LENGTHS)):
    logits_BV, cache = decode(params(cfg), cache, token_BL[rows_B, length_B + count])
    assert models.error(logits_BV, want_BLV[rows_B, length_B + count]) < TOLERANCE, count
  assert cache.blocks[0].ssm_BGHN.shape == (3, 1, 4, 5)


def test_bfloat16_stays_near_float32_and_keeps_a_wide_state():
  cfg, token_BL = CFG.replace(dtype="bfloat16"), models.tokens(CFG, (3, TOTAL))
  want_BLV = hybridlm.forward(CFG, params(CFG), token_BL)
  got_BLV = hybridlm.forward(cfg, params(CFG), token_BL)
  assert 0 < models.error(got_BLV, want_BLV) < 0.03
  logits_BV, cache = served(cfg)[0](params(CFG), token_BL[:, :13], np.array([13] * 3))
  assert models.error(logits_BV, got_BLV[:, 12]) < 0.03
  assert cache.blocks[0].ssm_BGHN.dtype == jnp.float32
  assert cache.blocks[0].conv_BW.dtype == jnp.bfloat16


@pytest.mark.slow
def test_eight_devices_make_the_same_step_as_one_and_every_leaf_moves():
  grid, cfg = mesh.make({"fsdp": 2, "tensor": 2, "sequence": 2}), models.make(**SIZES | {"V": 32})
  batch, run = models.batches(cfg, 1, (4, 16))[0], hybridlm.language_loss(cfg)
  one, _ = step.make_step(run, SGD)(state.create(params(cfg), SGD), None, batch)
  start = state.create(params(cfg), SGD)
  where = mesh.shardings(grid, start, mesh.RULES)
  sharded = step.make_step(run, SGD, shardings=where)
  many, _ = sharded(mesh.place(start, where), None, mesh.shard_batch(grid, batch))
  for (path, a), (_, b), (_, before) in zip(
    axes.leaves(many.params), axes.leaves(one.params), axes.leaves(params(cfg)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=path)
    assert not np.allclose(before, b, rtol=0, atol=1e-6), path
