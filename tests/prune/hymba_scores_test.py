"""Scores of parallel blocks, Mamba-1, shared keys and meta tokens: formulas, or what is lost."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api
from hybridlm.config import Fusion
from hybridlm.prune import depth, store
from hybridlm.prune.estimators import table
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

SPEC = store.Spec("flap,U=activation,E=activation,N=ghost", "HKUENR")
TAPS = (
  "head_BLKJU", "y_BLGHP", "mix_BLD", "q_BLKJE", "k_BLKE", "u_BLGHP", "b_BLGN", "c_BLGN",
  "dt_BLGH", "rank_BLR",
)
NAMES = ("00", "01")


@functools.cache
def model():
  """Returns two parallel blocks: branches of the first, with Mamba-2, meet in part; the second,
  with Mamba-1, reads its keys."""
  given = {"global_layers": (), "window": 5, "meta": 3}
  cfg = models.hymba("mamba2", "==", kv_groups=((0, 1),), **given)
  first = dataclasses.replace(
    cfg.blocks[0], fusion=Fusion("mean", 60, ((0, 24), (36, 60)), ((12, 60),)))
  second = dataclasses.replace(
    cfg.blocks[1], ssm=models.hymba("mamba1", "=", **given).blocks[0].ssm)
  return cfg.replace(blocks=(first, second))


@functools.cache
def params(scale=0.1):
  return models.numbers(model(), scale)


@functools.cache
def batches():
  return models.batches(model(), 2, (2, 13))


def order(letter):
  """Returns an order of an axis of the second block."""
  return np.roll(np.arange(model().sizes(1)[letter]), 2)


@functools.cache
def tree(letter=""):
  """Returns the parameters, one axis of the second block in another order."""
  return models.permute(model(), params(), 1, letter, order(letter)) if letter else params()


@functools.cache
def seen(letter=""):
  """Returns the taps of each batch."""
  return [api.apply(model(), tree(letter), b["token_BL"], b["segment_BL"], taps=TAPS)[1]
          for b in batches()]


def measured(given, letter=""):
  """Returns the scores of batches by their taps, which one program makes for all tests here."""
  def place(batch):
    return {**batch, "taps": next(
      taps for each, taps in zip(batches(), seen(letter), strict=True) if each is batch)}

  side = store.Model(model(), tree(letter), given_taps, place=place)
  return store.calibrate(side, given, SPEC)


def given_taps(params, batch, taps):
  return batch["taps"]


@functools.cache
def scored():
  return measured(batches())


@functools.cache
def rows():
  """Returns each row's taps and document ids at its real tokens, and w = real tokens / L."""
  found = []
  for batch, taps in zip(batches(), seen(), strict=True):
    for row, real in enumerate(batch["weight_BL"].astype(bool)):
      mine = {path: {tap: np.asarray(a[row, real], np.float64) for tap, a in folder.items()}
              for path, folder in taps.items()}
      found.append((mine, batch["segment_BL"][row, real], real.mean()))
  return found


def tokens(name, tap):
  return np.concatenate([taps[name][tap] for taps, _, _ in rows()])


def written(name):
  """Returns what each channel of attention and of the SSM writes: halved rows of the projection."""
  block = model().blocks[int(name)]
  w_YD = np.asarray(params()["blocks"][name]["w_out_YD"], np.float64)
  halves = (w_YD[list(block.fusion.places(branch))] / 2 for branch in ("attention", "ssm"))
  shapes = ([getattr(block, letter) for letter in letters] for letters in ("KJU", "GHP"))
  return tuple(w.reshape(*shape, -1) for w, shape in zip(halves, shapes, strict=True))


def near(path, want):
  np.testing.assert_allclose(scored().get(path), np.sqrt(want), rtol=2e-5, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_channels_of_both_branches_write_is_what_their_block_adds(name):
  found = sum(np.tensordot(tokens(name, tap), w, 3)
              for tap, w in zip(("head_BLKJU", "y_BLGHP"), written(name), strict=True))
  assert models.error(found, tokens(name, "mix_BLD")) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_scored_by_the_rows_of_the_projection_that_they_write_through(name):
  heads, ssm = (np.square(w).sum(-1) for w in written(name))
  near(f"{name}/score_GHP", tokens(name, "y_BLGHP").var(0) * ssm)
  near(f"{name}/score_KJ", (tokens(name, "head_BLKJU").var(0) * heads).sum(2))


@pytest.mark.parametrize("name", NAMES)
def test_widths_are_scored_by_shares_of_logits_with_the_keys_that_are_read_and_of_output(name):
  weights, want_E, want_U = [w for _, _, w in rows()], 0.0, 0.0
  for taps, _, w in rows():
    q, k, head = (np.square(np.abs(a).mean(0)) for a in (
      taps[name]["q_BLKJE"], taps["00"]["k_BLKE"], taps[name]["head_BLKJU"]))
    logits_E = np.einsum("kje,ke->e", q, k).reshape(2, 5).mean(0)  # rotary pairs share theirs
    want_E = want_E + w * np.tile(logits_E, 2) / (2 * logits_E.sum())
    want_U = want_U + w * head.sum((0, 1)) / head.sum()
  near(f"{name}/score_E", want_E / sum(weights))
  near(f"{name}/score_U", want_U / sum(weights))


def test_the_rank_of_dt_is_scored_by_what_its_projection_writes():
  w_RGH = np.asarray(params()["blocks"]["01"]["in_dt_RGH"], np.float64)
  near("01/score_R", tokens("01", "rank_BLR").var(0) * np.square(w_RGH).sum((1, 2)))


def test_ghost_of_a_mamba_1_mixer_is_what_its_recurrence_goes_on_to_write():
  a_HN = -np.exp(np.asarray(params()["blocks"]["01"]["a_log_GHN"][0], np.float64))
  total = 0.0
  for taps, segment_L, _ in rows():
    u, b, c, dt = (taps["01"][n] for n in ("u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH"))
    u, b, c, dt = u[:, 0, :, 0], b[:, 0], c[:, 0], dt[:, 0]
    state = np.zeros_like(a_HN)
    for t in range(len(u)):
      state = state * np.exp(dt[t][:, None] * a_HN) * (t > 0 and segment_L[t] == segment_L[t - 1])
      state = state + (dt[t] * u[t])[:, None] * b[t]
      left = state
      for s in range(t, len(u)):
        if segment_L[s] == segment_L[t]:
          left = left * np.exp(dt[s][:, None] * a_HN) if s > t else left
          total = total + np.square(left * c[s]).sum(0) / batches()[0]["token_BL"].shape[1]
  near("01/score_GN", total[None] / scored().weight)


def test_scores_of_two_runs_merge_into_those_of_one():
  one, other = (measured([batch]) for batch in batches())
  both = one.merge(other)
  for path in both.sums:
    np.testing.assert_allclose(both.get(path), scored().get(path), rtol=1e-12, err_msg=path)


@pytest.mark.parametrize("letter, path, axis", [("N", "score_GN", 1), ("R", "score_R", 0)])
def test_scores_of_mamba_1_follow_a_permutation_of_their_axis(letter, path, axis):
  got = measured(batches(), letter).get(f"01/{path}")
  want = np.take(scored().get(f"01/{path}"), order(letter), axis=axis)
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5 * want.max())


@functools.cache
def lost():
  """Returns what is lost without each block, branch, state and meta token."""
  return hybridlm.calibrate(model(), params(0.2), batches(), axes="M", depth="kl", noop="kl")


@functools.cache
def logits(gone="{}", silent=()):
  """Returns the logits of each batch without what a plan drops, and without some blocks' output."""
  whole, keep = params(0.2), json.loads(gone)
  masked, kept = hybridlm.mask(model(), whole, Plan(model(), tree_hash(whole), keep))
  masked["blocks"] = {
    name: {**folder, "w_out_YD": folder["w_out_YD"] * (name not in silent)}
    for name, folder in masked["blocks"].items()}
  return [np.asarray(api.forward(model(), masked, b["token_BL"], b["segment_BL"], kept), np.float64)
          for b in batches()]


def divergence(**changes):
  """Returns the mean over real tokens of KL(full || small), from dense logits."""
  total = 0.0
  for full_BLV, small_BLV, batch in zip(logits(), logits(**changes), batches(), strict=True):
    p, q = (v - np.logaddexp.reduce(v, -1, keepdims=True) for v in (full_BLV, small_BLV))
    total += ((np.exp(p) * (p - q)).sum(-1) * batch["weight_BL"]).sum()
  return total / sum(b["weight_BL"].sum() for b in batches())


GONE = {  # score, place -> what a plan keeps
  ("score_X", 1): {"keep_X": [0]},
  ("score_attention_X", 1): {"01": {"keep_K": []}},
  ("score_ssm_branch_X", 0): {"00": {"keep_G": []}},
  ("score_ssm_branch_X", 1): {"01": {"keep_G": []}},
  ("score_ssm_X", 0): {"00": {"keep_GN": [[], []]}},
}


@pytest.mark.parametrize("score, place", GONE)
def test_a_block_a_branch_and_a_state_are_scored_by_what_the_model_masked_without_them_loses(
  score, place
):
  want = divergence(gone=json.dumps(GONE[score, place]))
  assert lost().get(score)[place] == pytest.approx(want, rel=1e-4)


def test_a_block_whose_keys_are_read_is_scored_by_its_own_output_alone():
  assert lost().get("score_X")[0] == pytest.approx(divergence(silent=("00",)), rel=1e-4)
  assert lost().get("score_ssm_X")[1] == 0.0  # Mamba-1 is nothing without its state
  assert lost().get("score_attention_X")[0] > 0


def test_a_meta_token_is_scored_by_what_the_model_masked_without_it_loses():
  for gone in range(3):
    keep = {"keep_M": [m for m in range(3) if m != gone]}
    want = divergence(gone=json.dumps(keep))
    assert lost().get("score_M")[gone] ** 2 == pytest.approx(want, rel=1e-4)
  magnitude = hybridlm.calibrate(model(), params(), [], estimator="magnitude", axes="M")
  want = np.linalg.norm(params()["embed"]["meta_MD"], axis=1)
  np.testing.assert_allclose(magnitude.get("score_M"), want, rtol=1e-5)


def line(params, batch):
  """Returns a hidden state that every block's output changes by its own share."""
  shares = [(1 + index) * folder["w_out_YD"].sum() for index, folder in
            enumerate(params["blocks"].values())]
  return jnp.full((*batch["token_BL"].shape, 1), sum(shares)), jnp.ones((1, 3)) * jnp.arange(3)


def test_a_block_whose_keys_are_read_goes_after_its_readers():
  cfg = models.hymba(pattern="====", kv_groups=((1, 2),), meta=0)
  made = {"blocks": {f"{i:02d}": {"w_out_YD": jnp.full((2, 1), v)} for i, v in
                     enumerate((0.5, 1e-3, 1e-2, 0.2))}}
  order_X = depth.greedy(cfg, line, made, batches()[:1])
  assert order_X.tolist() == [2, 1, 0, 3]
  of = depth.losses(cfg, line, "window")(made, batches()[0])
  fits = [found is not None for found in depth._windows(cfg, of, 1)]
  assert fits == [True, False, True, True]


@pytest.mark.slow
def test_gradients_score_meta_tokens_and_the_rows_that_branches_write_through():
  cfg = model().replace(blocks=model().blocks[:1])
  whole = models.numbers(cfg)
  scores = hybridlm.calibrate(cfg, whole, batches(), estimator="taylor,M=fisher", axes="HUM")

  def loss(p, token_L, segment_L, target_L, weight_L):
    logits = api.forward(cfg, p, token_L[None], segment_L[None])[0]
    ce_L = -jnp.take_along_axis(jax.nn.log_softmax(logits), target_L[:, None], 1)[:, 0]
    return (ce_L * weight_L).sum() / weight_L.sum()

  grad, want, weight = jax.jit(jax.grad(loss)), {}, 0.0
  for batch, row in ((b, r) for b in batches() for r in range(2)):
    names = ("token_BL", "segment_BL", "target_BL", "weight_BL")
    made = grad(whole, *(jnp.asarray(batch[name][row]) for name in names))
    wg = jax.tree.map(lambda w, g: np.asarray(w * g, np.float64), whole, made)
    block, share = wg["blocks"]["00"], batch["weight_BL"][row].mean()
    rows_Y, places = block["w_out_YD"].sum(1), cfg.blocks[0].fusion.places
    ours, theirs = (rows_Y[list(places(name))] for name in ("attention", "ssm"))
    found = {
      "score_M": np.square(wg["embed"]["meta_MD"]).sum(1),
      "00/score_U": np.square(block["w_v_DKU"].sum((0, 1)) + ours.reshape(6, 8).sum(0)),
      "00/score_GHP": np.square(
        block["w_z_DGHP"].sum(0) + block["w_x_DGHP"].sum(0) + theirs.reshape(2, 4, 6)),
    }
    want = {path: want.get(path, 0) + share * value for path, value in found.items()}
    weight += share
  for path, value in want.items():
    value = np.sqrt(value / weight)
    np.testing.assert_allclose(scores.get(path), value, rtol=2e-3, atol=1e-5 * value.max())


def test_what_an_estimator_cannot_score_is_refused_by_the_block():
  with pytest.raises(ValueError, match="'wanda' cannot score axis E of block 00: its values have"):
    hybridlm.calibrate(model(), params(), batches(), estimator="wanda", axes="E")
  with pytest.raises(ValueError, match="'flap' cannot score axis M: take one of activation"):
    table.parse("flap", "M")
