"""Laws of attention and SSM heads side by side, with windows, shared keys and meta tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import by_hand, models
from hybridlm import axes, bind
from hybridlm.config import Attention, Fusion, Mamba, Parallel
from hybridlm.nn import lm, parallel
from hybridlm.train import mesh

KINDS = ("mamba2", "mamba1")
# Shorter than a convolution reaches, longer than the window, about as long.
LENGTHS = (2, 22, 13)
L = sum(LENGTHS)


@functools.cache
def hymba(kind, pattern="==-"):
  """Returns a model whose first two layers share keys of a window, and its parameters."""
  # Fewer than the meta tokens, which see each other whatever the window.
  cfg = models.hymba(kind, pattern=pattern, global_layers=(), kv_groups=((0, 1),), window=7)
  assert cfg.kv_groups == ((0, 1),) and cfg.meta > 7
  return cfg, models.params(cfg, 5.0)


@functools.cache
def rows():
  """Returns three documents packed, as one, and each by itself with padding behind."""
  token_L = np.asarray(models.tokens(hymba("mamba2")[0], (1, L)))[0]
  token_BL, segment_BL = np.tile(token_L, (5, 1)), np.ones((5, L), np.int32)
  segment_BL[0] = np.repeat([1, 2, 3], LENGTHS)
  for row, (start, length) in enumerate(zip(starts(), LENGTHS, strict=True), 2):
    token_BL[row] = np.roll(token_L, -start)
    segment_BL[row, length:] = 0
  return jnp.asarray(token_BL), jnp.asarray(segment_BL)


def starts():
  return np.cumsum([0, *LENGTHS[:-1]])


def logits(cfg, params):
  """Returns logits of `rows`: one program for every test of a model."""
  return run(cfg, params)[0]


def run(cfg, params):
  return bind.apply(cfg, params, *rows(), taps=("head_BLKJU", "y_BLGHP", "mix_BLD"))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_the_same_documents_one_by_one(kind):
  packed, whole, *alone = logits(*hymba(kind))
  for want, start, length in zip(alone, starts(), LENGTHS, strict=True):
    assert models.error(packed[start : start + length], want[:length]) < 1e-5
    assert start == 0 or models.error(whole[start : start + length], want[:length]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_formulas_taken_token_by_token(kind):
  cfg, params = hymba(kind)
  token_BL, _ = rows()
  want, prefixes = by_hand.walk(cfg, params, token_BL[1])
  assert models.error(logits(cfg, params)[1], want) < 1e-5
  found = jax.jit(lm.prefixes, static_argnums=0)(cfg, params)
  assert sorted(found) == ["00", "01"]
  for name, prefix in found.items():
    keys, values, inputs, state = prefixes[int(name)]
    assert (prefix.attention is None) == (name == "01") == (not keys)
    if keys:
      assert models.error(prefix.attention.k_BMKE[0], np.array(keys)) < 1e-5
      assert models.error(prefix.attention.v_BMKE[0], np.array(values)) < 1e-5
    flat = np.concatenate([np.reshape(inputs[stem], (3, -1)) for stem in inputs], axis=1)
    assert models.error(prefix.ssm.conv_BW[0], flat) < 1e-5
    assert models.error(prefix.ssm.state[0].reshape(state.shape), state) < 1e-5


@pytest.mark.parametrize("kind", ["mamba2", pytest.param("mamba1", marks=pytest.mark.slow)])
def test_later_tokens_never_change_earlier_logits(kind):
  cfg, params = hymba(kind, "==")
  sized, rest = cfg.replace(V=23, tied=False), {
    **params, "head": {"w_head_DV": params["embed"]["w_embed_VD"][:23].T}}

  @jax.jit
  @jax.grad
  def earlier(embed_VD, position):
    # The embedding of each position apart: the gradient says which positions were seen.
    tree = {**rest, "embed": {**params["embed"], "w_embed_VD": embed_VD}}
    row_LV = lm.forward(sized, tree, jnp.arange(23)[None])[0][0]
    return jnp.sum(row_LV[position] * jnp.arange(1.0, 24.0))

  # On both sides of a chunk's edge, and behind the window.
  for position in (7, 8, 22):
    size_L = jnp.abs(earlier(params["embed"]["w_embed_VD"][:23], position)).max(-1)
    np.testing.assert_array_equal(size_L[position + 1 :], 0.0)
    assert size_L[: position + 1].min() > 0


def moved(cfg, tree, index, letter, order):
  """Returns the tree with one axis of one branch reordered, and not where the branches meet."""
  folder = dict(tree["blocks"][f"{index:02d}"])
  w_out_YD = folder.pop("w_out_YD")
  tree = models.permute(cfg, {"blocks": {f"{index:02d}": folder}}, index, letter, order)["blocks"]
  return {f"{index:02d}": {**tree[f"{index:02d}"], "w_out_YD": w_out_YD}}


def moves(kind, rng):
  """Yields what is permuted, and how: steps (blocks, letter, order) and the order of Y there.

  Branches that meet in a mean move together: heads of Mamba-1 follow any order of Y, groups of
  Mamba-2 follow key heads where both are two.
  """
  cfg = hymba(kind)[0]
  block = cfg.blocks[0]
  K, J, U = block.K, block.J, block.U
  channel_KJU = np.arange(K * J * U).reshape(K, J, U)
  swap, order_U = np.arange(K)[::-1], rng.permutation(U)
  order_KJ = np.stack([rng.permutation(J) for _ in range(K)])
  order_GN = np.stack([rng.permutation(block.N) for _ in range(block.G)])
  yield "N", [((1,), "N", order_GN if kind == "mamba2" else order_GN[0])], None
  if kind == "mamba2":
    yield "K", [((0, 1), "K", swap), ((0, 1), "G", swap)], channel_KJU[swap].ravel()
    return
  yield "R", [((0,), "R", rng.permutation(block.R))], None
  for letter, where, order, order_KJU in (
    ("K", (0, 1), swap, channel_KJU[swap]),
    ("J", (1,), order_KJ, np.take_along_axis(channel_KJU, order_KJ[..., None], 1)),
    ("U", (0, 1), order_U, channel_KJU[..., order_U]),
  ):
    yield letter, [(where, letter, order), (where, "H", order_KJU.ravel())], order_KJU.ravel()


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_what_meets_in_step_changes_nothing(kind):
  cfg, params = hymba(kind)
  want = logits(cfg, params)
  for name, steps, order_Y in moves(kind, np.random.default_rng(3)):
    tree = params
    for indices, letter, order in steps:
      for index in indices:
        tree = {**tree, "blocks": tree["blocks"] | moved(cfg, tree, index, letter, order)}
    if order_Y is not None:
      assert models.error(logits(cfg, tree), want) > 1e-4, name
      for index in steps[0][0]:
        tree = models.permute(cfg, tree, index, "Y", order_Y)
    changed = [path for (path, one), (_, two) in zip(
      axes.leaves(params), axes.leaves(tree), strict=True) if not np.array_equal(one, two)]
    assert changed and models.error(logits(cfg, tree), want) < 1e-5, name


def test_heads_of_one_branch_move_freely_where_the_other_gives_nothing():
  cfg, params = hymba("mamba2")
  rng, block = np.random.default_rng(5), cfg.blocks[1]
  order_GH = np.stack([rng.permutation(block.H) for _ in range(block.G)])
  order_P = rng.permutation(block.P)
  folder = params["blocks"]["01"]
  silent = {**folder, "attention_gain_KJU": 0 * folder["attention_gain_KJU"]}
  tree = {**params, "blocks": {**params["blocks"], "01": silent}}
  channel_GHP = np.arange(block.Y).reshape(block.G, block.H, block.P)
  order_GHP = np.take_along_axis(channel_GHP, order_GH[..., None], 1)[..., order_P]
  other = tree
  for letter, order in (("H", order_GH), ("P", order_P)):
    other = {**tree, "blocks": tree["blocks"] | moved(cfg, other, 1, letter, order)}
  other = models.permute(cfg, other, 1, "Y", order_GHP.ravel())
  assert models.error(logits(cfg, other), logits(cfg, tree)) < 1e-5


def one_block(cfg, block, leaves, x_BLD, taps=()):
  return lm.apply_block(cfg, block, leaves, x_BLD, taps=taps)


def test_a_sum_is_its_branches_by_themselves_and_a_branch_that_is_off_counts_as_zeros():
  cfg = models.make(pattern="=*M", fusion="sum", U=8, gate="before", bias=True, chunk=8)
  mean = models.hymba(pattern="=", meta=0)
  params, leaves = models.params(cfg, 5.0)["blocks"], models.params(mean, 5.0)["blocks"]["00"]
  folder, block = params["00"], mean.blocks[0]
  parts = [
    {name: folder[name] for name in (*part.leaves, "norm_gain_D")} for part in cfg.blocks[1:]]
  off = {"attention": dataclasses.replace(block, attention=None),
         "ssm": dataclasses.replace(block, ssm=None)}
  gains = {"attention": "attention_gain_KJU", "ssm": "ssm_gain_GHP"}

  @jax.jit
  def both(x_BLD):
    both_BLD, seen = one_block(cfg, cfg.blocks[0], folder, x_BLD, ("head_BLKJU", "y_BLGHP"))
    alone = [one_block(cfg, part, own, x_BLD)[0]
             for part, own in zip(cfg.blocks[1:], parts, strict=True)]
    halves = {}
    for name, without in off.items():
      silent = {**leaves, gains[name]: 0 * leaves[gains[name]]}
      kept = {own: leaves[own] for own in (*without.leaves, "norm_gain_D")}
      halves[name] = (one_block(mean, without, kept, x_BLD)[0],
                      one_block(mean, block, silent, x_BLD)[0])
    return both_BLD, alone, seen, halves

  x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 13, cfg.D)), jnp.float32)
  both_BLD, (heads_BLD, ssm_BLD), seen, halves = both(x_BLD)
  assert set(seen) == {"head_BLKJU", "y_BLGHP"}
  assert models.error(both_BLD - x_BLD, heads_BLD - x_BLD + ssm_BLD - x_BLD) < 1e-5
  for without, silent in halves.values():
    np.testing.assert_allclose(without, silent, rtol=1e-6, atol=1e-6)


def test_channels_of_branches_cut_apart_meet_in_their_places():
  fusion = Fusion("mean", 12, attention=((0, 4), (6, 8)), ssm=((3, 12),))
  block = Parallel(Attention(K=1, J=2, E=4, U=3), Mamba(G=1, H=3, P=3, N=2, gate="none"), fusion)
  rng, cfg = np.random.default_rng(1), models.make(pattern="M")
  heads, channels, w_YD = (rng.normal(size=shape).astype(np.float32) for shape in (
    (2, 5, 1, 2, 3), (2, 5, 1, 3, 3), (12, 7)))

  def fused(heads, channels, w_YD):
    return parallel.fuse(cfg, block, w_YD, attention=heads, ssm=channels)

  want = np.zeros((2, 5, 12))
  want[..., [0, 1, 2, 3, 6, 7]] += heads.reshape(2, 5, 6)
  want[..., 3:] += channels.reshape(2, 5, 9)
  bar = rng.normal(size=(2, 5, 7)).astype(np.float32)
  got, back = jax.vjp(fused, heads, channels, w_YD)
  np.testing.assert_allclose(got, want / 2 @ w_YD, rtol=1e-5, atol=1e-5)
  heads_bar, channels_bar, _ = back(bar)
  bar_Y = bar @ w_YD.T / 2
  np.testing.assert_allclose(heads_bar.reshape(2, 5, 6), bar_Y[..., [0, 1, 2, 3, 6, 7]], rtol=1e-4,
                             atol=1e-5)
  np.testing.assert_allclose(channels_bar.reshape(2, 5, 9), bar_Y[..., 3:], rtol=1e-4, atol=1e-5)


def test_the_channels_that_are_tapped_are_those_that_meet():
  cfg, params = hymba("mamba2")
  seen = models.wide(run(cfg, params)[1]["01"])
  met_BLY = (seen["head_BLKJU"].reshape(5, L, -1) + seen["y_BLGHP"].reshape(5, L, -1)) / 2
  want = met_BLY @ models.wide(params["blocks"]["01"]["w_out_YD"])
  assert models.error(seen["mix_BLD"], want) < 1e-5


def test_a_block_that_shares_keys_does_not_run_alone():
  cfg, params = hymba("mamba2")
  with pytest.raises(ValueError, match="shares keys and values was given none"):
    lm.apply_block(cfg, cfg.blocks[1], params["blocks"]["01"], jnp.zeros((1, 3, cfg.D)))


@pytest.mark.slow
def test_eight_devices_make_the_gradient_of_one():
  cfg = models.hymba(pattern="=", V=32, global_layers=())
  params, batch = models.params(cfg, 5.0), models.batches(cfg, 1, (4, 24))[0]

  @jax.jit
  def learn(params):
    def loss(params):
      ids = (jnp.asarray(batch["token_BL"]), jnp.asarray(batch["segment_BL"]))
      return jnp.sum(jnp.sin(lm.forward(cfg, params, ids[0], segment_BL=ids[1])[0]))

    return jax.value_and_grad(loss)(params)

  one = learn(params)
  with jax.set_mesh(mesh.make({"data": 2, "fsdp": 2, "tensor": 2})):
    many = learn(params)
  for (path, a), (_, b) in zip(
    jax.tree.leaves_with_path(many), jax.tree.leaves_with_path(one), strict=True
  ):
    assert models.error(np.asarray(a), np.asarray(b)) < 1e-4, path


@pytest.mark.slow
def test_bfloat16_compute_stays_near_float32():
  cfg, params = hymba("mamba2", "==")
  got = logits(cfg.replace(dtype="bfloat16"), params)
  assert got.dtype == jnp.float32
  assert 0 < models.error(got, logits(cfg, params)) < 0.1
