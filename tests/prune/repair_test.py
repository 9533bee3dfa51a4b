"""Laws of the repair: it changes nothing that is whole, never makes a fit worse, and is exact."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from hybridlm import axes, bind
from hybridlm.prune import cut as cutting
from hybridlm.prune import repair as repairing
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

KEEP = {
  "keep_D": list(range(0, 16, 2)) + [1, 3, 5],
  "00": {"keep_GH": [[0, 2, 3], [0, 1, 3]], "keep_P": [0, 1, 3, 4]},
  "01": {"keep_F": list(range(3, 20))},
  "03": {"keep_KJ": [[0, 2], [1, 2]]},
}
KEEP["keep_D"].sort()
NORM = {"norm_gain_D", "norm_bias_D"}


@functools.cache
def case(variant="layernorm", whole=False, less=False):
  """Returns the plan, the parent's side, the cut model's side and batches; `less`: a block less."""
  cfg = models.make(variant)
  params = models.params(cfg, 3.0)
  keep = {} if whole else dict(KEEP) | ({"keep_X": [0, 1, 3, 4]} if less else {})
  plan = Plan(cfg, tree_hash(params), keep)
  small_cfg, small = cutting.cut(cfg, params, plan)
  return plan, side(cfg, params), side(small_cfg, small), models.batches(cfg)


def side(cfg, params):
  """Returns a model as repair reads it."""
  apply, hidden = (functools.partial(f, cfg) for f in (bind.apply_taps, bind.apply_hidden))
  return repairing.Side(apply, hidden, params)


@functools.cache
def repaired(**how):
  """Returns what repair makes of the standard case."""
  plan, parent, small, batches = case()
  return repairing.repair(plan, parent, small, batches, ridge=1e-4, **how)


def lacking(plan, parent, small, params, batches, target="mix_BLD"):
  """Returns, block by block, the squared distance to the parent on kept channels, in float64."""
  keep_D = plan.array("keep_D")
  found = {}
  for batch in batches:
    mine = small.apply(params, batch, (target,))
    theirs = parent.apply(parent.params, batch, (target,))
    for new, old in enumerate(plan.blocks):
      apart = np.asarray(theirs[f"{old:02d}"][target], np.float64)[..., keep_D] - np.asarray(
        mine[f"{new:02d}"][target], np.float64)
      real = np.asarray(batch["weight_BL"], np.float64)
      found[new] = found.get(new, 0.0) + float((real[..., None] * apart**2).sum())
  return found


def energy(plan, parent, batches, target="mix_BLD"):
  """Returns, block by block, the squared length of the parent's tap on kept channels."""
  found = {}
  for batch in batches:
    taps = parent.apply(parent.params, batch, (target,))
    for new, old in enumerate(plan.blocks):
      out = np.asarray(taps[f"{old:02d}"][target], np.float64)[..., plan.array("keep_D")]
      real = np.asarray(batch["weight_BL"], np.float64)
      found[new] = found.get(new, 0.0) + float((real[..., None] * out**2).sum())
  return found


@pytest.mark.parametrize("how", [{"target": "out"}, {"order": "together"}, {"gain": "rescale"}])
def test_a_model_that_nothing_was_cut_from_stays_as_it_is(how):
  plan, parent, small, batches = case(whole=True)
  # The two models may be compiled to round differently; a smaller ridge fits that too.
  params, fits = repairing.repair(plan, parent, small, batches, ridge=1e-3, **how)
  for (path, one), (_, two) in zip(axes.leaves(small.params), axes.leaves(params), strict=True):
    np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-6, err_msg=path)
  assert all(fit.before < 1e-10 and fit.after <= fit.before for fit in fits.values())


def test_only_output_projections_and_their_biases_change_and_the_cut_model_is_left_alone():
  _, _, small, _ = case()
  before = {path: np.asarray(leaf).copy() for path, leaf in axes.leaves(small.params)}
  params, _ = repaired()
  changed = {
    path for path, leaf in axes.leaves(params) if not np.array_equal(leaf, before[path])
  }
  assert changed == {
    "blocks/00/w_out_GHPD", "blocks/01/w_down_FD", "blocks/01/b_down_D", "blocks/02/w_out_GHPD",
    "blocks/03/w_o_KJED", "blocks/03/b_o_D", "blocks/04/w_down_FD", "blocks/04/b_down_D",
  }
  assert all(np.array_equal(leaf, before[path]) for path, leaf in axes.leaves(small.params))
  assert all(leaf.dtype == before[path].dtype for path, leaf in axes.leaves(params))


@pytest.mark.parametrize("target", repairing.TARGETS)
def test_what_a_projection_lacks_shrinks_to_what_the_fit_says(target):
  plan, parent, small, batches = case()
  params, fits = repaired(target=target)
  left = lacking(plan, parent, small, params, batches, f"{target}_BLD")
  scale = energy(plan, parent, batches, f"{target}_BLD")
  for new, fit in enumerate(fits.values()):
    assert fit.after < fit.before
    assert left[new] / scale[new] == pytest.approx(fit.after, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_with_any_ridge_what_is_lacking_never_grows(ridge):
  plan, parent, small, batches = case()
  params, fits = repairing.repair(
    plan, parent, small, batches, ridge=ridge, order="together", gain="none")
  assert all(fit.after <= fit.before for fit in fits.values())
  # The first block's inputs are those of the cut model: nothing else moves them.
  old = lacking(plan, parent, small, small.params, batches)
  new = lacking(plan, parent, small, params, batches)
  assert new[0] <= old[0]


def rows(shift):
  """Returns random inputs and what they lack, with a bias or without, and their sums."""
  rng = np.random.default_rng(3)
  a_TI, r_TD = rng.normal(size=(50, 7)) + shift, rng.normal(size=(50, 4)) + shift
  w_T = (rng.random(50) > 0.3).astype(np.float64)
  r_TD[w_T == 0] = 1e6  # padding
  sums = repairing.Sums(
    aa=(a_TI * w_T[:, None]).T @ a_TI, ar=(a_TI * w_T[:, None]).T @ r_TD, a=w_T @ a_TI,
    r=w_T @ r_TD, rr=w_T @ (r_TD**2).sum(1), tt=np.float64(1), weight=w_T.sum(),
  )
  return a_TI[w_T > 0], r_TD[w_T > 0], sums


@pytest.mark.parametrize("bias", [False, True])
def test_with_hardly_a_ridge_it_is_the_least_squares_of_numpy(bias):
  a_TI, r_TD, sums = rows(shift=2.0)
  change, shift, left = repairing.solve(sums, ridge=1e-13, bias=bias)
  inputs = np.hstack([a_TI, np.ones((len(a_TI), 1))]) if bias else a_TI
  want, rest, *_ = np.linalg.lstsq(inputs, r_TD, rcond=None)
  np.testing.assert_allclose(change, want[:7], rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(shift, want[7] if bias else np.zeros(4), rtol=1e-9, atol=1e-9)
  assert left == pytest.approx(rest.sum(), rel=1e-9)


def test_a_projection_of_one_block_is_the_least_squares_of_numpy_over_real_tokens():
  plan, parent, small, batches = case()
  params, _ = repairing.repair(plan, parent, small, batches, ridge=1e-9, order="together")
  inputs, wants, keep_D = [], [], plan.array("keep_D")
  for batch in batches:
    real = batch["weight_BL"].ravel() > 0
    a = small.apply(small.params, batch, ("act_BLF",))["01"]["act_BLF"]
    t = parent.apply(parent.params, batch, ("mix_BLD",))["01"]["mix_BLD"][..., keep_D]
    inputs.append(np.asarray(a, np.float64).reshape(real.size, -1)[real])
    wants.append(np.asarray(t, np.float64).reshape(real.size, -1)[real])
  a_TI = np.concatenate(inputs)
  whole = np.hstack([a_TI, np.ones((len(a_TI), 1))])
  want, *_ = np.linalg.lstsq(whole, np.concatenate(wants), rcond=None)
  got = np.vstack([params["blocks"]["01"]["w_down_FD"], params["blocks"]["01"]["b_down_D"]])
  np.testing.assert_allclose(whole @ got, whole @ want, atol=1e-4 * np.abs(whole @ want).max())


def test_rows_that_are_padding_do_not_count():
  plan, parent, small, batches = case()
  other = []
  for batch in batches:
    token_BL = np.where(batch["weight_BL"] > 0, batch["token_BL"], 7).astype(np.int32)
    other.append(batch | {"token_BL": token_BL})
  again, _ = repairing.repair(plan, parent, small, other, ridge=1e-4)
  for (path, one), (_, two) in zip(axes.leaves(repaired()[0]), axes.leaves(again), strict=True):
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4, err_msg=path)


def test_rescaled_norms_come_closer_to_the_parents_and_by_one_factor_each():
  plan, parent, small, batches = case()
  params, _ = repaired(gain="rescale", order="together")
  old = lacking(plan, parent, small, small.params, batches, "norm_BLD")
  factors = {}
  for name, folder in params["blocks"].items():
    ratio = np.concatenate([
      np.asarray(folder[leaf] / small.params["blocks"][name][leaf]) for leaf in sorted(NORM)])
    factors[name] = ratio.mean()
    np.testing.assert_allclose(ratio, factors[name], rtol=1e-5)
  assert max(abs(factor - 1) for factor in factors.values()) > 1e-2
  first = {**small.params, "blocks": {**small.params["blocks"], "00": params["blocks"]["00"]}}
  assert lacking(plan, parent, small, first, batches, "norm_BLD")[0] < old[0]
  assert not np.array_equal(params["final"]["norm_gain_D"], small.params["final"]["norm_gain_D"])


def test_a_block_that_went_shifts_the_ones_behind_it_against_the_parents():
  plan, parent, small, batches = case(less=True)
  params, fits = repairing.repair(plan, parent, small, batches, ridge=1e-4)
  left, scale = lacking(plan, parent, small, params, batches), energy(plan, parent, batches)
  assert list(fits) == ["00", "01", "02", "03"] and plan.blocks == (0, 1, 3, 4)
  for new, fit in enumerate(fits.values()):
    assert left[new] / scale[new] == pytest.approx(fit.after, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("change, words", [
  ({"ridge": 0.0}, "ridge=0.0 must be positive"),
  ({"ridge": float("nan")}, "ridge=nan must be positive"),
  ({"order": "last"}, "order='last' is not one of one_by_one, together"),
  ({"target": "in"}, "target='in' is not one of mix, out"),
  ({"order": "together", "target": "out"}, "target='out' needs order='one_by_one'"),
  ({"gain": "half"}, "gain='half' is not one of none, rescale"),
])
def test_a_value_that_no_repair_can_use_is_refused(change, words):
  plan, parent, small, batches = case()
  with pytest.raises(ValueError, match=words):
    repairing.repair(plan, parent, small, batches, **{"ridge": 1e-4, **change})


def test_activations_that_are_not_finite_are_refused_by_the_block_they_are_in():
  plan, parent, small, batches = case()
  blocks = small.params["blocks"]
  bad = {**blocks["02"], "w_x_DGHP": jnp.full_like(blocks["02"]["w_x_DGHP"], jnp.inf)}
  broken = small._replace(params={**small.params, "blocks": {**blocks, "02": bad}})
  with pytest.raises(ValueError, match="block 02, w_out_GHPD: activations are not finite"):
    repairing.repair(plan, parent, broken, batches, ridge=1e-4)
  empty = [batch | {"weight_BL": np.zeros_like(batch["weight_BL"])} for batch in batches]
  with pytest.raises(ValueError, match="no batch holds a real token"):
    repairing.repair(plan, parent, small, empty, ridge=1e-4)
