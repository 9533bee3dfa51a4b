"""Laws of the model: names, causality, packing, symmetry, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api, axes, config
from hybridlm.config import GatedConv, Rope
from hybridlm.nn import mamba
from hybridlm.ops.ssd.api import ssd
from hybridlm.prune.plan import pairs


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_every_leafs_shape_equals_its_letters_sizes(variant):
  cfg = models.make(variant)
  params = hybridlm.init(cfg)
  config.check(cfg, params)
  for path, leaf in axes.leaves(params):
    place = path.split("/")
    sizes = cfg.sizes(int(place[1])) if place[0] == "blocks" else {"V": cfg.V, "D": cfg.D}
    assert leaf.shape == tuple(sizes[letter] for letter in axes.of(place[-1])), path
    assert leaf.dtype == jnp.float32, path


def test_initialisation_draws_mamba_steps_and_rates_from_their_ranges():
  cfg = models.make(pattern="M", G=8, H=16)
  leaves = hybridlm.init(cfg)["blocks"]["00"]
  dt = jax.nn.softplus(leaves["dt_bias_GH"])
  assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
  a = jnp.exp(leaves["a_log_GH"])
  assert 1.0 <= a.min() < 2.0 and 14.0 < a.max() <= 16.0
  np.testing.assert_array_equal(leaves["skip_GH"], 1.0)


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_later_tokens_never_change_earlier_logits(variant):
  cfg = models.make(variant)
  params = models.params(cfg, 5.0)
  token_BL = models.tokens(cfg, (1, 23))

  @jax.jit
  @jax.grad
  def earlier(embed_LD, position):
    # The embedding of each position apart: the gradient says which positions were seen.
    wide = {**params, "embed": {"w_embed_VD": embed_LD}}
    sized = cfg.replace(V=23, tied=False)
    head = params.get("head", {"w_head_DV": params["embed"]["w_embed_VD"].T})
    wide["head"] = {"w_head_DV": head["w_head_DV"][:, :23]}
    logits = api.apply(sized, wide, jnp.arange(23)[None])[0]
    return jnp.sum(logits[0, position] * jnp.arange(1.0, 24.0))

  # On both sides of a chunk's edge where chunks are 8 long, and within.
  for position in (7, 8, 11, 22):
    gradient_LD = earlier(params["embed"]["w_embed_VD"][token_BL[0]], position)
    size_L = jnp.abs(gradient_LD).max(-1)
    np.testing.assert_array_equal(size_L[position + 1 :], 0.0)
    assert size_L[: position + 1].min() > 0


@pytest.mark.parametrize("variant", models.VARIANTS)
def test_packed_documents_equal_the_same_documents_one_by_one(variant):
  cfg = models.make(variant)
  params = models.params(cfg, 5.0)
  token_BL = models.tokens(cfg, (1, 37))
  lengths = [9, 21, 7]
  segment_BL = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths), total_repeat_length=37)[None]
  packed = hybridlm.forward(cfg, params, token_BL, segment_BL)[0]
  start = 0
  for length in lengths:
    alone = hybridlm.forward(cfg, params, token_BL[:, start : start + length])[0]
    assert models.error(packed[start : start + length], alone) < 1e-5
    start += length
  assert models.error(packed, hybridlm.forward(cfg, params, token_BL)[0]) > 1e-3


ORDERS = [
  ("F", 1), ("J", 3), ("K", 3), ("E", 3), ("P", 0), ("N", 0), ("H", 0), ("G", 2), ("D", None),
]


@pytest.mark.parametrize("variant", models.VARIANTS)
@pytest.mark.parametrize("letter, index", ORDERS)
def test_permuting_a_prunable_axis_changes_nothing(variant, letter, index):
  cfg = models.make(variant)
  params = models.params(cfg, 5.0)
  token_BL = models.tokens(cfg)
  rng = np.random.default_rng(3)
  size = cfg.D if letter == "D" else cfg.sizes(index)[letter]
  order = rng.permutation(size)
  while (order == np.arange(size)).all():
    order = rng.permutation(size)
  if letter in "HNJ":  # of each group its own
    order = np.stack([order, order[::-1]])
  turned = 2 * pairs(cfg.blocks[3])
  if letter == "E" and turned:
    order = np.concatenate([np.arange(turned), turned + rng.permutation(size - turned)])
  moved = models.permute(cfg, params, index, letter, order)
  changed = [
    path
    for (path, one), (_, other) in zip(axes.leaves(params), axes.leaves(moved), strict=True)
    if not np.array_equal(one, other)
  ]
  assert changed
  want = hybridlm.forward(cfg, params, token_BL)
  assert models.error(hybridlm.forward(cfg, moved, token_BL), want) < 1e-5


def test_permuting_rotary_pairs_with_their_frequencies_changes_nothing():
  order = np.array([2, 0, 1])
  kept = Rope(rotary=6, frequency=(1.0, 0.3, 0.01))
  moved = Rope(rotary=6, frequency=tuple(np.array(kept.frequency)[order].tolist()))
  cfg = models.make(rope=kept)
  params, token_BL = models.params(cfg, 5.0), models.tokens(cfg)
  channels = np.concatenate([order, order + 3, np.arange(6, 10)])
  tree = models.permute(cfg, params, 3, "E", channels)
  want = hybridlm.forward(cfg, params, token_BL)
  got = hybridlm.forward(models.make(rope=moved), tree, token_BL)
  assert models.error(got, want) < 1e-5
  assert models.error(hybridlm.forward(cfg, tree, token_BL), want) > 1e-4


@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_permuting_the_vocabulary_renames_tokens_and_nothing_else(variant):
  cfg = models.make(variant)
  params, token_BL = models.params(cfg, 5.0), models.tokens(cfg)
  order = np.random.default_rng(3).permutation(cfg.V)
  moved = models.permute(cfg, params, None, "V", order)
  want = hybridlm.forward(cfg, params, token_BL)[..., order]
  got = hybridlm.forward(cfg, moved, jnp.argsort(jnp.asarray(order))[token_BL])
  assert models.error(got, want) < 1e-5


@pytest.mark.parametrize("conv_bias", [True, False])
def test_a_gated_convolution_is_a_mamba_block_whose_state_takes_nothing_in(conv_bias):
  cfg = models.make(pattern="M-", conv_bias=conv_bias, W=3)
  params = models.params(cfg, 5.0)
  folder = params["blocks"]["00"]
  block = GatedConv(G=2, H=4, P=6, W=3, conv_bias=conv_bias)
  small = cfg.replace(blocks=(block, cfg.blocks[1]))
  leaves = {name: folder[name] for name in config.leaf_names(small)["blocks"]["00"]}
  batch = models.batches(cfg, 1)[0]
  ids = (batch["token_BL"], batch["segment_BL"])
  silent = {**folder, "w_b_DGN": folder["w_b_DGN"] * 0}
  silent |= {name: folder[name] * 0 for name in folder if name == "conv_bias_b_GN"}

  def logits(cfg, folder):
    return hybridlm.forward(cfg, {**params, "blocks": {**params["blocks"], "00": folder}}, *ids)

  want = logits(cfg, silent)
  assert models.error(logits(small, leaves), want) < 1e-6
  assert models.error(logits(cfg, folder), want) > 1e-4
  assert small == hybridlm.ModelConfig.from_dict(small.to_dict()) and small.pattern == "C-"


def test_moving_a_head_to_another_group_changes_the_logits():
  cfg = models.make()
  params = models.params(cfg, 5.0)
  order = np.arange(8)
  order[[1, 6]] = order[[6, 1]]
  moved = models.permute(cfg, params, 0, "H", order, across=True)
  token_BL = models.tokens(cfg)
  got, want = (hybridlm.forward(cfg, tree, token_BL) for tree in (moved, params))
  assert models.error(got, want) > 1e-3


def test_padded_vocabulary_is_never_predicted():
  cfg = models.make(vocabulary=29)
  logits = hybridlm.forward(cfg, models.params(cfg), models.tokens(cfg))
  assert np.isneginf(logits[..., 29:]).all() and np.isfinite(logits[..., :29]).all()


def test_taps_are_what_was_asked_for_and_the_residual_adds_up():
  cfg = models.make()
  params, token_BL = models.params(cfg), models.tokens(cfg)
  _, taps = api.apply(cfg, params, token_BL, taps=("in_BLD", "out_BLD", "act_BLF", "x_BLGHP"))
  assert set(taps["00"]) == {"in_BLD", "out_BLD", "x_BLGHP"}
  assert set(taps["01"]) == {"in_BLD", "out_BLD", "act_BLF"}
  np.testing.assert_array_equal(taps["00"]["out_BLD"], taps["01"]["in_BLD"])
  np.testing.assert_array_equal(taps["00"]["in_BLD"], params["embed"]["w_embed_VD"][token_BL])
  _, mixed = api.apply(cfg, params, token_BL, taps=("mix_BLD", "in_BLD", "out_BLD"))
  for seen in mixed.values():
    np.testing.assert_allclose(seen["in_BLD"] + seen["mix_BLD"], seen["out_BLD"], atol=1e-6)
  added = jnp.einsum("blf,fd->bld", taps["01"]["act_BLF"], params["blocks"]["01"]["w_down_FD"])
  np.testing.assert_allclose(taps["01"]["in_BLD"] + added, taps["01"]["out_BLD"], atol=1e-6)
  assert api.apply(cfg, params, token_BL)[1] == {f"{i:02d}": {} for i in range(5)}
  with pytest.raises(ValueError, match="'y' is not one of"):
    api.apply(cfg, params, token_BL, taps=("y",))


def test_rematerialisation_changes_neither_logits_nor_gradients():
  plain, remat = models.make(), models.make(remat="block")
  params, batch = models.params(plain, 3.0), models.batches(plain, 1)[0]

  def gradient(cfg):
    loss = hybridlm.language_loss(cfg)
    return jax.grad(lambda p: loss(p, None, batch)["loss"])(params)

  for (path, one), (_, two) in zip(
    axes.leaves(gradient(plain)), axes.leaves(gradient(remat)), strict=True
  ):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=path)


def test_bfloat16_compute_stays_near_float32():
  cfg = models.make()
  params, token_BL = models.params(cfg, 3.0), models.tokens(cfg)
  want = hybridlm.forward(cfg, params, token_BL)
  got = hybridlm.forward(cfg.replace(dtype="bfloat16"), params, token_BL)
  assert got.dtype == jnp.float32
  assert 0 < models.error(got, want) < 0.05


def test_the_step_size_is_clipped_after_softplus():
  cfg = models.make(dt_limits=(0.01, 0.02))
  free = models.make()
  params, token_BL = models.params(cfg, 5.0), models.tokens(cfg)
  got, want = (hybridlm.forward(c, params, token_BL) for c in (cfg, free))
  assert models.error(got, want) > 1e-4


@pytest.mark.parametrize("token, message", [(31, "token id 31"), (-1, "token id -1")])
def test_ids_outside_the_vocabulary_are_refused(token, message):
  cfg = models.make()
  with pytest.raises(ValueError, match=message):
    hybridlm.forward(cfg, models.params(cfg), jnp.full((1, 3), token))


def test_an_empty_row_is_refused():
  cfg = models.make()
  with pytest.raises(ValueError, match=r"shape \(1, 0\)"):
    hybridlm.forward(cfg, models.params(cfg), jnp.zeros((1, 0), jnp.int32))


def test_taps_of_the_mixers_are_what_their_last_step_is_made_of():
  cfg = models.make("layernorm", window=None)
  params, token_BL = models.params(cfg, 5.0), models.tokens(cfg, (1, 11))
  names = ("u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH", "y_BLGHP", "z_BLGHP", "q_BLKJE", "k_BLKE",
           "v_BLKE", "head_BLKJE", "mix_BLD")
  _, taps = api.apply(cfg, params, token_BL, taps=names)
  leaves, seen = params["blocks"]["00"], taps["00"]
  y_BLGHP, _ = ssd(
    seen["u_BLGHP"], seen["dt_BLGH"], mamba.rates(leaves), seen["b_BLGN"], seen["c_BLGN"],
    skip_GH=leaves["skip_GH"], impl="reference",
  )
  gated_BLGHP = mamba.gated(cfg, cfg.blocks[0], leaves, y_BLGHP, seen["z_BLGHP"])
  y_BLD = mamba.write(cfg, leaves, gated_BLGHP)
  np.testing.assert_allclose(seen["y_BLGHP"], gated_BLGHP, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(seen["mix_BLD"], y_BLD, rtol=1e-4, atol=1e-5)
  seen = taps["03"]
  logit_BKJLS = jnp.einsum("BLKJE,BSKE->BKJLS", seen["q_BLKJE"], seen["k_BLKE"]) / np.sqrt(cfg.E)
  weight = jax.nn.softmax(jnp.where(jnp.tri(11, dtype=bool), logit_BKJLS, -jnp.inf))
  head_BLKJE = jnp.einsum("BKJLS,BSKE->BLKJE", weight, seen["v_BLKE"])
  np.testing.assert_allclose(seen["head_BLKJE"], head_BLKJE, rtol=1e-4, atol=1e-5)
