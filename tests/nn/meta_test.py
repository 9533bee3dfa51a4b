"""Laws of meta tokens: what stands before every document, and what of it the text can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import axes
from hybridlm.config import Rope
from hybridlm.nn import flow, lm
from hybridlm.train import mesh

M = 5
LENGTHS = (2, 14)


def weights(cfg):
  return np.random.default_rng(7).normal(size=(sum(LENGTHS), cfg.V)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def learn(cfg, params, token_BL, segment_BL, weight_BLV):
  """Returns logits and the gradient of a weighted sum of them."""

  def loss(params):
    logits_BLV = lm.forward(cfg, params, token_BL, segment_BL=segment_BL)[0]
    return jnp.sum(weight_BLV * logits_BLV), logits_BLV

  return jax.grad(loss, has_aux=True)(params)


@pytest.mark.slow
@pytest.mark.parametrize("pattern, ssm", [("=*", "mamba2"), ("C=", "mamba1")])
def test_meta_tokens_are_tokens_of_their_own_before_every_document(pattern, ssm):
  cfg = models.hymba(
    ssm, pattern, meta=M, window=None, tied=False, global_layers=(),
    **({"G": 1, "H": 48, "P": 1} if "C" in pattern else {}))
  params = models.params(cfg, 5.0)
  embed_VD, meta_MD = params["embed"]["w_embed_VD"], params["embed"]["meta_MD"]
  # The same model without them reads M more ids, whose vectors they are, in rows of one document.
  plain = cfg.replace(meta=0, V=cfg.V + M, vocabulary=cfg.V)
  head_DV = jnp.pad(params["head"]["w_head_DV"], [(0, 0), (0, M)])
  wide = {**params, "embed": {"w_embed_VD": jnp.concatenate([embed_VD, meta_MD])},
          "head": {"w_head_DV": head_DV}}
  token_L = np.asarray(models.tokens(cfg, (1, sum(LENGTHS))))[0]
  segment_BL = np.repeat([1, 2], LENGTHS)[None]
  token_BS = np.zeros((2, M + max(LENGTHS)), np.int32)
  weight_BSV = np.zeros((*token_BS.shape, plain.V), np.float32)
  alone_BS = np.zeros_like(token_BS)
  start = 0
  for row, length in enumerate(LENGTHS):
    real = slice(M, M + length)
    token_BS[row, :M], token_BS[row, real] = cfg.V + np.arange(M), token_L[start : start + length]
    weight_BSV[row, real, : cfg.V] = weights(cfg)[start : start + length]
    alone_BS[row, : M + length] = 1
    start += length
  got_bar, got = learn(cfg, params, token_L[None], segment_BL, weights(cfg)[None])
  # What is never predicted is minus infinity, of which a weight of zero makes no number.
  want_bar, want = learn(
    plain.replace(vocabulary=None), wide, token_BS, alone_BS, weight_BSV)
  want = [want[row, M : M + length, : cfg.V] for row, length in enumerate(LENGTHS)]
  assert models.error(got[0], jnp.concatenate(want)) < 1e-5
  bars = {**want_bar, "embed": {
    "w_embed_VD": want_bar["embed"]["w_embed_VD"][: cfg.V],
    "meta_MD": want_bar["embed"]["w_embed_VD"][cfg.V :]}}
  bars["head"] = {"w_head_DV": want_bar["head"]["w_head_DV"][:, : cfg.V]}
  for (path, one), (_, two) in zip(axes.leaves(got_bar), axes.leaves(bars), strict=True):
    if jnp.abs(two).max() > 1e-6:  # a bias of all keys alike moves nothing
      assert models.error(one, two) < 1e-4, path


def test_meta_tokens_are_seen_beyond_the_window_and_other_tokens_are_not():
  cfg = models.make(pattern="*", window=3, meta=M, rope=Rope())
  params, token_BL = models.params(cfg, 5.0), np.array(models.tokens(cfg, (1, 12)))
  run = jax.jit(lambda params, token_BL: lm.forward(cfg, params, token_BL)[0][0])
  want = run(params, token_BL)
  meta_MD = params["embed"]["meta_MD"]
  other = {**params, "embed": {**params["embed"], "meta_MD": meta_MD.at[0].add(1.0)}}
  assert (jnp.abs(run(other, token_BL) - want).max(-1) > 1e-5).all()
  token_BL[0, 4] = (token_BL[0, 4] + 1) % cfg.V
  moved_L = jnp.abs(run(params, token_BL) - want).max(-1) > 0
  np.testing.assert_array_equal(np.flatnonzero(moved_L), [4, 5, 6])


@pytest.mark.slow
def test_meta_tokens_that_go_leave_the_model_that_never_had_them():
  cfg = models.make(pattern="MC*", window=3, meta=M, rope=Rope(), chunk=8)
  params, batch = models.params(cfg, 5.0), models.batches(cfg, 1, (2, 13))[0]
  ids = (jnp.asarray(batch["token_BL"]), jnp.asarray(batch["segment_BL"]))
  run = jax.jit(lambda stay_M: lm.forward(
    cfg, params, ids[0], segment_BL=ids[1], kept={"stay_M": stay_M})[0])
  for stay in ([1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5):
    stay_M = np.array(stay, bool)
    small = cfg.replace(meta=int(stay_M.sum()))
    own = {"meta_MD": params["embed"]["meta_MD"][stay_M]} if small.meta else {}
    tree = {**params, "embed": {"w_embed_VD": params["embed"]["w_embed_VD"], **own}}
    assert models.error(run(stay_M), hybridlm.forward(small, tree, *ids)) < 1e-5, stay


def test_positions_that_a_mesh_divides_are_refused_with_meta_tokens():
  cfg = models.make(pattern="*", meta=M)
  params, token_BL = models.params(cfg), models.tokens(cfg, (2, 8))
  with jax.set_mesh(mesh.make({"sequence": 8})):
    with pytest.raises(ValueError, match="meta=5 tokens .* mesh axis sequence=8"):
      jax.eval_shape(lambda: lm.forward(cfg, params, token_BL))


def test_positions_count_within_each_document():
  segment_BL = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
  want = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
  np.testing.assert_array_equal(flow.positions(segment_BL), want)
