"""Scores are folds over taps: right by formula, the same for any batch split, data on disk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import api
from hybridlm.prune import scores as scoring
from hybridlm.prune.scores import Scores
from hybridlm.train import mesh as meshes

CFG = models.make(pattern="M-*")
SHAPE = (3, 19)


def split(batches, rows):
  """Returns the same rows in batches of other sizes."""
  joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
  total = joined["token_BL"].shape[0]
  return [{k: v[i : i + rows] for k, v in joined.items()} for i in range(0, total, rows)]


def test_scores_are_the_root_of_the_weighted_mean_square_of_row_means():
  params, batches = models.params(CFG), models.batches(CFG, 2, SHAPE)
  scores = hybridlm.calibrate(CFG, params, batches)
  want, weight = {}, 0.0
  for batch in batches:
    _, taps = api.apply(
      CFG,
      params,
      batch["token_BL"],
      batch["segment_BL"],
      taps=("x_BLGHP", "head_BLKJE", "up_BLF", "norm_BLD"),
    )
    for row, real in enumerate(batch["weight_BL"].astype(bool)):
      share = real.sum() / real.size
      weight += share
      arrays = {
        "00/score_GHP": np.abs(taps["00"]["x_BLGHP"][row, real]),
        "02/score_KJ": np.sqrt(np.square(taps["02"]["head_BLKJE"][row, real]).sum(-1)),
        "01/score_F": np.abs(taps["01"]["up_BLF"][row, real]),
        "02/score_D": np.abs(taps["02"]["norm_BLD"][row, real]),
      }
      for path, a in arrays.items():
        want[path] = want.get(path, 0) + share * np.asarray(a, np.float64).mean(0) ** 2
  assert scores.weight == pytest.approx(weight)
  for path, total in want.items():
    np.testing.assert_allclose(scores.get(path), np.sqrt(total / weight), rtol=1e-5, err_msg=path)
  width = sum(scores.get(f"{index:02d}/score_D") for index in range(3))
  np.testing.assert_allclose(scores.width(), width)


@pytest.mark.parametrize("depth", ["kl", "influence"])
def test_scores_do_not_depend_on_the_batch_split(depth):
  params, batches = models.params(CFG, 3.0), models.batches(CFG, 2, SHAPE)
  want = hybridlm.calibrate(CFG, params, batches, depth=depth)
  for rows in (1, 6):
    got = hybridlm.calibrate(CFG, params, split(batches, rows), depth=depth)
    assert got.weight == want.weight and got.meta == want.meta and got.rows == want.rows
    for path, value in want.sums.items():
      # A block's divergence is a difference of logarithms: its error is one of the whole sum's.
      close = {"rtol": 2e-5, "atol": 2e-6 * np.abs(value).max()}
      np.testing.assert_allclose(got.sums[path], value, **close, err_msg=path)


SPECS = {
  "activations": "activation,F=flap,K=energy,E=wanda,N=ghost",
  "gradients": "taylor,N=fisher,E=fisher",
}
MESHES = ({"data": 1, "tensor": 8}, {"fsdp": 8, "tensor": 1}, {"data": 2, "tensor": 4})


@functools.cache
def shared(name):
  """Returns a model whose G, K, F, V and D eight devices divide, batches, scores and a plan."""
  cfg = models.make(pattern="M*-", V=32, K=8, G=8, H=3, P=2)
  params, batches = models.params(cfg, 6.0), models.batches(cfg, 2, (8, 11))
  return cfg, params, batches, *measured(name, cfg, params, batches)


def measured(name, cfg, params, batches, **arguments):
  scores = hybridlm.calibrate(
    cfg, params, batches, estimator=SPECS[name], axes="HPGFDJKENV", depth="kl", noop="kl",
    **arguments)
  targets = {"D": 9, "F": 13, "H": 2, "P": 1, "J": 2, "E": 6, "N": 3, "blocks": 2}
  return scores, hybridlm.plan(cfg, scores, targets)


@pytest.mark.parametrize("name", ["activations", pytest.param("gradients", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_scores_and_plans_are_the_same_on_every_mesh_and_after_an_interruption(
  sizes, name, tmp_path
):
  cfg, params, batches, want, plan = shared(name)
  grid = meshes.make(sizes)
  params = meshes.place(params, meshes.shardings(grid, params, meshes.RULES))
  calls = []

  def place(batch):
    calls.append(batch)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return meshes.shard_batch(grid, batch)

  arguments = {"store": tmp_path / "scores.npz", "every": 1, "place": place}
  with jax.set_mesh(grid):
    with pytest.raises(KeyboardInterrupt):
      measured(name, cfg, params, batches, **arguments)
    got, same = measured(name, cfg, params, batches, **arguments)
  assert len(calls) == 3  # one batch was saved, and is not computed again
  assert same == plan and got.meta == want.meta
  for path in want.sums:
    value = want.get(path)
    # Sums of both signs are right to the size of their terms, divergences to that of the logits'.
    signed = name == "gradients" or path == "score_ssm_X"
    near = 1e-6 * (want.get("score_X") if path == "score_ssm_X" else value).max() * signed
    np.testing.assert_allclose(got.get(path), value, rtol=1e-6, atol=near, err_msg=path)


def test_padding_never_counts():
  params, batches = models.params(CFG, 3.0), models.batches(CFG, 1, SHAPE)
  noisy = {**batches[0], "token_BL": batches[0]["token_BL"].copy()}
  noisy["token_BL"][batches[0]["weight_BL"] == 0] = 7
  one, two = (hybridlm.calibrate(CFG, params, [b], depth="kl") for b in (batches[0], noisy))
  for path in one.sums:
    np.testing.assert_allclose(one.sums[path], two.sums[path], rtol=1e-6, err_msg=path)


def test_merged_runs_equal_one_run(tmp_path):
  params, batches = models.params(CFG, 3.0), models.batches(CFG, 3, SHAPE)
  first = hybridlm.calibrate(CFG, params, batches[:1], depth="influence", data="a")
  first.save(tmp_path / "scores.npz")
  rest = hybridlm.calibrate(CFG, params, batches[1:], depth="influence", data="b")
  both = Scores.load(tmp_path / "scores.npz").merge(rest)
  want = hybridlm.calibrate(CFG, params, batches, depth="influence")
  assert both.meta["tokens"] == want.meta["tokens"] and both.meta["data"] == "a+b"
  for path in want.sums:
    np.testing.assert_allclose(both.get(path), want.get(path), rtol=1e-5, err_msg=path)


def test_scores_of_other_parameters_or_estimators_do_not_merge():
  one = hybridlm.calibrate(CFG, models.params(CFG), models.batches(CFG, 1, SHAPE))
  other = hybridlm.calibrate(CFG, models.params(CFG, seed=1), models.batches(CFG, 1, SHAPE))
  with pytest.raises(ValueError, match="differ in parameters"):
    one.merge(other)
  gate = hybridlm.calibrate(
    CFG, models.params(CFG), models.batches(CFG, 1, SHAPE), estimator="activation_z"
  )
  with pytest.raises(ValueError, match="differ in estimator"):
    one.merge(gate)
  depths = [
    hybridlm.calibrate(
      CFG, models.params(CFG), models.batches(CFG, 1, SHAPE), axes="F", depth=depth)
    for depth in ("kl", "influence")
  ]
  with pytest.raises(ValueError, match="differ in depth: kl and influence"):
    depths[0].merge(depths[1])
  draw = hybridlm.calibrate(CFG, models.params(CFG), [], estimator="random")
  with pytest.raises(ValueError, match="do not merge"):
    draw.merge(draw)
  part = hybridlm.calibrate(CFG, models.params(CFG), models.batches(CFG, 1, SHAPE), axes="F")
  with pytest.raises(ValueError, match="differ in axes"):
    one.merge(part)


def test_a_channel_that_is_never_active_scores_zero():
  params = models.params(CFG)
  leaves = params["blocks"]["01"]
  silent = {**leaves, "w_up_DF": leaves["w_up_DF"].at[:, 5].set(0.0)}
  params = {**params, "blocks": {**params["blocks"], "01": silent}}
  score_F = hybridlm.calibrate(CFG, params, models.batches(CFG, 1, SHAPE)).get("01/score_F")
  assert score_F[5] == 0.0 and np.delete(score_F, 5).min() > 0


def test_heads_can_be_scored_on_each_projection():
  params, batches = models.params(CFG), models.batches(CFG, 1, SHAPE)
  found = {
    name: hybridlm.calibrate(CFG, params, batches, estimator=name, axes="H").get("00/score_GHP")
    for name in ("activation", "activation_z", "activation_out")
  }
  taps = api.apply(
    CFG, params, batches[0]["token_BL"], batches[0]["segment_BL"], taps=("z_BLGHP", "y_BLGHP")
  )[1]["00"]
  weight_BL = jnp.asarray(batches[0]["weight_BL"])
  total = weight_BL.sum() / weight_BL.shape[1]
  for name, tap in (("activation_z", "z_BLGHP"), ("activation_out", "y_BLGHP")):
    want = jnp.sqrt(scoring.row_statistic(taps[tap], weight_BL).sum(0) / total)
    np.testing.assert_allclose(found[name], want, rtol=1e-5)
  assert not np.allclose(found["activation"], found["activation_z"])


def test_magnitude_is_the_norm_of_the_weights_an_entry_owns():
  cfg = models.make(pattern="M-", activation="swiglu")
  params = models.params(cfg)
  scores = hybridlm.calibrate(cfg, params, [], estimator="magnitude")
  leaves = params["blocks"]["01"]
  total = sum(np.square(leaves[name]).sum(0) for name in ("w_up_DF", "w_gate_DF"))
  want = np.sqrt(total + np.square(leaves["w_down_FD"]).sum(1))
  np.testing.assert_allclose(scores.get("01/score_F"), want, rtol=1e-5)
  assert scores.get("00/score_GHP").shape == (2, 4, 6)


def test_random_scores_follow_their_seed():
  params = models.params(CFG)
  one, same, other = (
    hybridlm.calibrate(CFG, params, [], estimator="random", seed=seed).get("00/score_GHP")
    for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)


def test_scores_survive_a_file(tmp_path):
  scores = hybridlm.calibrate(CFG, models.params(CFG), models.batches(CFG, 1, SHAPE), data="text")
  scores.save(tmp_path / "scores.npz")
  again = Scores.load(tmp_path / "scores.npz")
  assert again.meta == scores.meta and again.weight == scores.weight
  assert set(again.sums) == set(scores.sums)
  for path in scores.sums:
    np.testing.assert_array_equal(again.sums[path], scores.sums[path])
  assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"{}"])
def test_a_file_that_holds_no_scores_is_refused(tmp_path, content):
  (tmp_path / "scores.npz").write_bytes(content)
  with pytest.raises(ValueError, match="not a score file"):
    Scores.load(tmp_path / "scores.npz")
  with pytest.raises(FileNotFoundError, match="no such file"):
    Scores.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"estimator": "hessian"}, "estimator 'hessian' is not one of"),
    ({"axes": "HZ"}, "axes 'HZ': choose from"),
    ({"axes": ""}, "axes ''"),
    ({"depth": "perplexity"}, "depth estimator 'perplexity' is not one of"),
  ],
)
def test_unknown_names_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    hybridlm.calibrate(CFG, models.params(CFG), models.batches(CFG, 1, SHAPE), **arguments)


def test_activations_that_are_not_finite_are_named():
  params = models.params(CFG)
  broken = {**params["blocks"]["01"]}
  broken["w_up_DF"] = broken["w_up_DF"].at[0, 0].set(jnp.nan)
  params = {**params, "blocks": {**params["blocks"], "01": broken}}
  with pytest.raises(ValueError, match="batch 0: activations of 01/score_F are not finite"):
    hybridlm.calibrate(CFG, params, models.batches(CFG, 1, SHAPE), axes="F")


def test_batches_without_a_real_token_or_with_a_foreign_one_are_refused():
  batch = models.batches(CFG, 1, SHAPE)[0]
  empty = {**batch, "weight_BL": np.zeros_like(batch["weight_BL"])}
  with pytest.raises(ValueError, match="no batch holds a real token"):
    hybridlm.calibrate(CFG, models.params(CFG), [empty])
  foreign = {**batch, "token_BL": np.full_like(batch["token_BL"], 31)}
  with pytest.raises(ValueError, match="batch 0: token id 31 is outside"):
    hybridlm.calibrate(CFG, models.params(CFG), [foreign])
  below = {**batch, "token_BL": np.full_like(batch["token_BL"], -1)}
  with pytest.raises(ValueError, match="batch 0: token id -1 is outside"):
    hybridlm.calibrate(CFG, models.params(CFG), [below])
  with pytest.raises(ValueError, match="depth scores need some"):
    hybridlm.calibrate(CFG, models.params(CFG), [], estimator="magnitude", depth="kl")
