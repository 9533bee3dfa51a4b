"""Every estimator is its formula, computed here anew in numpy float64, token by token."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api, bind
from hybridlm.prune import depth, store
from hybridlm.prune import scores as scoring
from hybridlm.prune.estimators import fold, ghost, table
from hybridlm.prune.estimators.base import Seen

AXES = "HPGFDJKEN"
# The rotary variant with biases, window and LayerNorm1P; every kind of block once.
CFG = models.make("layernorm", pattern="M-*")
ALL_TAPS = (
  "u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH", "y_BLGHP", "act_BLF", "q_BLKJE", "k_BLKE", "head_BLKJE",
  "norm_BLD", "up_BLF",
)
SPECS = {
  "flap": "activation,H=flap,F=flap,J=flap,E=flap,N=ghost",
  "wanda": "activation,H=wanda,F=wanda,K=energy,E=wanda",
  "fisher": "taylor,N=fisher,F=fisher",
}


def params():
  return models.params(CFG, 3.0)


@functools.cache
def batches():
  return models.batches(CFG, 2, (3, 13))


@functools.cache
def scored(name):
  return hybridlm.calibrate(CFG, params(), batches(), estimator=SPECS[name], axes=AXES)


@functools.cache
def rows():
  """Returns each row's taps and document ids at its real tokens, and w = real tokens / L."""
  found = []
  for batch in batches():
    taps = api.apply(CFG, params(), batch["token_BL"], batch["segment_BL"], taps=ALL_TAPS)[1]
    for row, real in enumerate(batch["weight_BL"].astype(bool)):
      mine = {path: {tap: np.asarray(a[row, real], np.float64) for tap, a in folder.items()}
              for path, folder in taps.items()}
      found.append((mine, batch["segment_BL"][row, real], real.mean()))
  return found


def leaf(name, index):
  return np.asarray(params()["blocks"][f"{index:02d}"][name], np.float64)


def tokens(name, tap):
  """Returns a tap at all real tokens, and the root of the mean of |a|^2 rows weigh alike."""
  return np.concatenate([taps[name][tap] for taps, _, _ in rows()])


def mean(values):
  """Returns the mean of row statistics, weighted by w."""
  return sum(w * v for (_, _, w), v in zip(rows(), values, strict=True)) / sum(
    w for _, _, w in rows())


def tied(score_E):
  """Returns channel scores squared, pairs (i, i + 2) of the four rotary channels averaged."""
  made = np.array(score_E)
  for i in (0, 1):
    made[[i, i + 2]] = (score_E[i] + score_E[i + 2]) / 2
  return made


PLACES = {  # path -> tap, output projection, axes summed away
  "00/score_GHP": ("y_BLGHP", "w_out_GHPD", ()),
  "01/score_F": ("act_BLF", "w_down_FD", ()),
  "02/score_KJ": ("head_BLKJE", "w_o_KJED", 2),
  "02/score_E": ("head_BLKJE", "w_o_KJED", (0, 1)),
}


@pytest.mark.parametrize("path", PLACES)
def test_flap_is_the_deviation_over_tokens_times_the_norm_of_the_output_weights(path):
  tap, name, away = PLACES[path]
  norm = np.square(leaf(name, int(path[:2]))).sum(-1)
  want = (tokens(path[:2], tap).var(0) * norm).sum(away)
  want = np.sqrt(tied(want) if path.endswith("_E") else want)
  np.testing.assert_allclose(scored("flap").get(path), want, rtol=2e-5)


@pytest.mark.parametrize("path", [path for path in PLACES if not path.endswith("KJ")])
def test_wanda_is_the_root_mean_square_times_the_norm_of_the_output_weights(path):
  tap, name, away = PLACES[path]
  norm = np.square(leaf(name, int(path[:2]))).sum(-1)
  want = (np.square(tokens(path[:2], tap)).mean(0) * norm).sum(away)
  want = np.sqrt(tied(want) if path.endswith("_E") else want)
  np.testing.assert_allclose(scored("wanda").get(path), want, rtol=2e-5)


def test_energy_is_what_a_group_writes_shared_among_its_queries():
  head, w = tokens("02", "head_BLKJE"), leaf("w_o_KJED", 2)
  alone = np.einsum("tkje,kjed->tkjd", head, w)
  group_K = np.square(alone.sum(2)).sum(-1).mean(0)
  score_KJ = scored("wanda").get("02/score_KJ")
  np.testing.assert_allclose(np.linalg.norm(score_KJ, axis=-1), np.sqrt(group_K), rtol=2e-5)
  energies = [np.square(np.einsum("lkje,kjed->lkjd", t["02"]["head_BLKJE"], w)).sum((0, 3))
              for t, _, _ in rows()]
  groups = [np.square(np.einsum("lkje,kjed->lkd", t["02"]["head_BLKJE"], w)).sum((0, 2))
            for t, _, _ in rows()]
  want = sum(g[:, None] * e / e.sum(1, keepdims=True)
             for g, e in zip(groups, energies, strict=True)) / len(head)
  np.testing.assert_allclose(score_KJ, np.sqrt(want), rtol=2e-5)


def test_activation_of_a_state_is_how_it_is_written_times_how_it_is_read():
  values = [(np.abs(t["00"]["b_BLGN"]).mean(0) * np.abs(t["00"]["c_BLGN"]).mean(0)) ** 2
            for t, _, _ in rows()]
  np.testing.assert_allclose(scored("wanda").get("00/score_GN"), np.sqrt(mean(values)), rtol=2e-5)


def test_activation_of_a_channel_is_its_share_of_logits_and_of_output():
  scores = hybridlm.calibrate(CFG, params(), batches(), axes="E")

  def share(v):
    return v / v.sum()

  values = []
  for taps, _, _ in rows():
    q, k, head = (np.abs(taps["02"][n]).mean(0) ** 2 for n in ("q_BLKJE", "k_BLKE", "head_BLKJE"))
    logits = np.einsum("kje,ke->e", q, k)
    values.append((share(logits) + share(head.sum((0, 1)))) / 2)
  want = np.sqrt(tied(mean(values)))
  np.testing.assert_allclose(scores.get("02/score_E"), want, rtol=2e-5)


def recurrence(taps, segment_L, at):
  """Returns the sum over positions `at` of |h|^2 o by state, one token at a time: [G, N]."""
  u, b, c, dt = (taps[n] for n in ("u_BLGHP", "b_BLGN", "c_BLGN", "dt_BLGH"))
  a = -np.exp(leaf("a_log_GH", 0))
  length, state, total = len(u), np.zeros((*u.shape[1:], b.shape[-1])), 0.0
  for t in range(length):
    if t and segment_L[t] != segment_L[t - 1]:
      state = np.zeros_like(state)
    write = np.einsum("gh,ghp,gn->ghpn", dt[t], u[t], b[t])
    state = np.exp(dt[t] * a)[..., None, None] * state + write
    if t not in at:
      continue
    left, read = state, 0.0
    for s in range(t, length):
      if segment_L[s] != segment_L[t]:
        break
      left = np.exp(dt[s] * a)[..., None, None] * left if s > t else left
      read = read + np.square(left * c[s][:, None, None]).sum((1, 2))
    total = total + read
  return total


@pytest.mark.parametrize("positions", [16, 4])
def test_ghost_is_the_energy_that_the_recurrence_goes_on_to_write(positions, monkeypatch):
  monkeypatch.setattr(ghost, "POSITIONS", positions)
  length = batches()[0]["token_BL"].shape[1]
  step = -(-length // positions)
  at = range(step - 1, length, step)
  block = CFG.blocks[0]
  got = []
  for batch in batches():
    taps = api.apply(CFG, params(), batch["token_BL"], batch["segment_BL"], taps=ALL_TAPS)[1]["00"]
    seen = Seen(block, params()["blocks"]["00"], taps, jnp.asarray(batch["weight_BL"]),
                jnp.asarray(batch["segment_BL"]))
    got += list(np.asarray(ghost.GHOST.statistics["score_GN"].fold(seen)))
  for row, (taps, segment_L, _) in enumerate(rows()):
    want = recurrence(taps["00"], segment_L, at) * step / length
    np.testing.assert_allclose(got[row], want, rtol=2e-5, atol=1e-12)
  if positions == 16:
    want = np.sqrt(sum(got) / scored("flap").weight)
    np.testing.assert_allclose(scored("flap").get("00/score_GN"), want, rtol=1e-5)


@functools.cache
def gradients():
  """Returns weight times gradient of each row's mean cross-entropy, from dense logits."""
  def loss(p, token_L, segment_L, target_L, weight_L):
    logits = api.forward(CFG, p, token_L[None], segment_L[None])[0]
    ce_L = -jnp.take_along_axis(jax.nn.log_softmax(logits), target_L[:, None], 1)[:, 0]
    return (ce_L * weight_L).sum() / weight_L.sum()

  found, grad = [], jax.jit(jax.grad(loss))
  for batch in batches():
    for row in range(len(batch["token_BL"])):
      names = ("token_BL", "segment_BL", "target_BL", "weight_BL")
      got = grad(params(), *(jnp.asarray(batch[name][row]) for name in names))
      products = jax.tree.map(lambda w, g: np.asarray(w * g, np.float64), params(), got)
      found.append(products["blocks"])
  return found


def test_taylor_is_the_signed_sum_of_weight_times_gradient():
  heads = [wg["02"]["w_q_DKJE"].sum((0, 3)) + wg["02"]["w_o_KJED"].sum((2, 3))
           for wg in gradients()]
  want = np.sqrt(mean([np.square(v) for v in heads]))
  np.testing.assert_allclose(scored("fisher").get("02/score_KJ"), want, rtol=2e-4)
  inner = [wg["00"]["w_z_DGHP"].sum(0) + wg["00"]["w_x_DGHP"].sum(0) + wg["00"]["w_out_GHPD"].sum(3)
           for wg in gradients()]
  want = np.sqrt(mean([np.square(v) for v in inner]))
  np.testing.assert_allclose(scored("fisher").get("00/score_GHP"), want, rtol=2e-3)


def test_fisher_of_a_state_is_the_square_of_weight_times_gradient_in_b_and_c():
  states = [np.square(wg["00"]["w_b_DGN"]).sum(0) + np.square(wg["00"]["w_c_DGN"]).sum(0)
            for wg in gradients()]
  got = scored("fisher").get("00/score_GN")
  np.testing.assert_allclose(got, np.sqrt(mean(states)), rtol=2e-4)


def test_counts_of_tokens_are_those_of_real_tokens():
  scores = hybridlm.calibrate(CFG, params(), batches(), axes="V")
  real = np.concatenate([b["token_BL"][b["weight_BL"] > 0] for b in batches()])
  np.testing.assert_array_equal(scores.get("score_V"), np.bincount(real, minlength=CFG.V))


@pytest.mark.parametrize("name", [*SPECS, "magnitude", "random"])
def test_both_channels_of_a_rotary_pair_carry_one_score(name):
  scores = scored(name) if name in SPECS else hybridlm.calibrate(
    CFG, params(), [], estimator=name, axes="E")
  score_E = scores.get("02/score_E")
  np.testing.assert_array_equal(score_E[:2], score_E[2:4])
  assert len(np.unique(score_E)) == 8


def assert_same(got, name):
  for path in got.sums:
    one, two = got.get(path), scored(name).get(path)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6 * two.max(), err_msg=path)


@pytest.mark.parametrize("name", SPECS)
def test_padding_never_counts(name):
  noisy = []
  for batch in batches():
    token_BL, real_BL = batch["token_BL"], batch["weight_BL"] > 0
    noisy.append({**batch, "token_BL": np.where(real_BL, token_BL, 7).astype(np.int32)})
  assert_same(hybridlm.calibrate(CFG, params(), noisy, estimator=SPECS[name], axes=AXES), name)


def test_the_batch_split_changes_nothing():
  joined = {key: np.concatenate([b[key] for b in batches()]) for key in batches()[0]}
  got = hybridlm.calibrate(CFG, params(), [joined], estimator=SPECS["flap"], axes=AXES)
  assert_same(got, "flap")


PERMUTED = {"F": (1, "01/score_F", 0), "P": (0, "00/score_GHP", 2), "N": (0, "00/score_GN", 1),
            "J": (2, "02/score_KJ", 1), "K": (2, "02/score_KJ", 0), "G": (0, "00/score_GHP", 0)}


@pytest.mark.parametrize("letter", PERMUTED)
@pytest.mark.parametrize("name", SPECS)
def test_scores_follow_a_permutation_of_their_axis(letter, name):
  index, path, axis = PERMUTED[letter]
  order = np.random.default_rng(3).permutation(CFG.sizes(index)[letter])
  order = np.roll(order, 1) if (order == np.arange(len(order))).all() else order
  tree = models.permute(CFG, params(), index, letter, order)
  got = hybridlm.calibrate(CFG, tree, batches(), estimator=SPECS[name], axes=AXES).get(path)
  want = np.take(scored(name).get(path), order, axis=axis)
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5 * want.max())


def test_a_state_that_is_never_read_scores_zero():
  inner = dict(params()["blocks"]["00"])
  for name in ("w_c_DGN", "conv_c_WGN", "conv_bias_c_GN"):
    inner[name] = inner[name].at[..., 3].set(0.0)
  tree = {**params(), "blocks": {**params()["blocks"], "00": inner}}
  score_GN = hybridlm.calibrate(CFG, tree, batches(), estimator=SPECS["flap"], axes=AXES).get(
    "00/score_GN")
  assert (score_GN[:, 3] == 0).all() and np.delete(score_GN, 3, 1).min() > 0


def test_variances_of_two_runs_merge_exactly(tmp_path):
  one, two = (hybridlm.calibrate(CFG, params(), [b], estimator=SPECS["flap"], axes=AXES)
              for b in batches())
  one.save(tmp_path / "one.npz")
  both = scoring.Scores.load(tmp_path / "one.npz").merge(two)
  for path in both.sums:
    np.testing.assert_allclose(both.get(path), scored("flap").get(path), rtol=1e-12, err_msg=path)


@pytest.mark.parametrize("name", ["activation,F=flap,K=energy,E=wanda,N=ghost",
                                  "activation,H=wanda,K=flap", "influence"])
def test_no_product_of_a_statistic_rounds_its_factors(name):
  def given(params, batch, taps):
    return batch["taps"]

  batch = batches()[0]
  held = bind.apply_taps(CFG, params(), batch, (*ALL_TAPS, "x_BLGHP", "in_BLD", "out_BLD"))
  if name == "influence":
    program = depth.influence(CFG, given)
  else:
    program = fold.taps(CFG, given, tuple(table.parse(name, "HFDJEN").items()))
  text = str(jax.make_jaxpr(program)(params(), {**batch, "taps": held}))
  whole = re.findall(r"precision=\W*(?:Precision\.)?HIGHEST", text)
  assert text.count("dot_general[") == len(whole) > 1


@pytest.mark.parametrize("spec, letters, message", [
  ("hessian", "F", "estimator 'hessian' is not one of activation"),
  ("activation,F=hessian", "F", "'hessian' is not one of"),
  ("ghost", "NF", "estimator 'ghost' cannot score axis F: take one of activation"),
  ("activation,N=flap", "HN", "estimator 'flap' cannot score axis N"),
  ("wanda", "D", "estimator 'wanda' cannot score axis D"),
  ("activation,F", "F", "'F' is not LETTER=NAME"),
  ("activation,X=flap", "F", "'X=flap' is not LETTER=NAME"),
  ("activation,H=flap,P=wanda", "HP", "P shares score_GHP with an axis that is scored by flap"),
  ("activation,V=flap", "FV", "'V=flap' is not LETTER=NAME"),
  ("activation", "HZ", "axes 'HZ': choose from"),
  ("activation", "", "axes '': choose from"),
])
def test_specs_that_say_nothing_sensible_are_refused(spec, letters, message):
  with pytest.raises(ValueError, match=message):
    table.parse(spec, letters)


def test_letters_that_share_a_score_share_an_exception():
  assert table.parse("activation,P=flap,K=energy", "HJF") == {
    "score_GHP": "flap", "score_KJ": "energy", "score_F": "activation"}


def test_gradients_need_a_loss_and_targets():
  model = store.Model(CFG, params(), lambda p, b, taps: {})
  spec = store.Spec(estimator="activation,F=taylor", axes="F")
  with pytest.raises(ValueError, match="'taylor' reads gradients: it needs a loss"):
    store.calibrate(model, batches(), spec)
  bare = [{k: v for k, v in batches()[0].items() if k != "target_BL"}]
  with pytest.raises(ValueError, match="batch 0 has no target_BL"):
    hybridlm.calibrate(CFG, params(), bare, estimator="fisher", axes="F")
