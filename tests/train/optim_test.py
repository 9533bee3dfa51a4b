"""Values of the schedules, which leaves decay, and what AdamW makes of a gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import tiny
from hybridlm import config
from hybridlm.train import optim


def values(rate, *steps):
  return [float(rate(step)) for step in steps]


def test_cosine_rises_in_a_line_and_falls_to_its_floor():
  rate = optim.schedule("cosine", peak=0.8, steps=24, warmup=4, floor=0.2)
  assert values(rate, 0, 1, 3, 4) == pytest.approx([0.16, 0.32, 0.64, 0.8], rel=1e-6)
  # A quarter, half and all of the way from step 4 to 24.
  quarter = 0.2 + 0.6 * (1 + math.cos(math.pi / 4)) / 2
  assert values(rate, 9, 14, 24, 30) == pytest.approx([quarter, 0.5, 0.2, 0.2], rel=1e-6)


def test_wsd_stays_at_its_peak_and_falls_in_a_line_at_the_end():
  rate = optim.schedule("wsd", peak=0.8, steps=24, warmup=3, decay=8, floor=0.4)
  assert values(rate, 0, 2, 3, 10, 16) == pytest.approx([0.2, 0.6, 0.8, 0.8, 0.8], rel=1e-6)
  assert values(rate, 18, 20, 23, 24) == pytest.approx([0.7, 0.6, 0.45, 0.4], rel=1e-6)


def test_wsd_without_a_decay_never_falls():
  rate = optim.schedule("wsd", peak=0.8, steps=10, warmup=3)
  assert values(rate, 3, 9, 10, 11) == pytest.approx([0.8] * 4, rel=1e-6)


def test_a_warm_up_of_the_whole_run_only_rises():
  for name in optim.SHAPES:
    rate = optim.schedule(name, peak=0.8, steps=7, warmup=7)
    assert values(rate, 0, 6) == pytest.approx([0.1, 0.7], rel=1e-6)


def test_no_update_of_a_run_has_a_rate_of_zero():
  rate = optim.schedule("cosine", peak=0.8, steps=9, warmup=2)
  assert min(values(rate, *range(9))) > 0


@pytest.mark.parametrize(
  "change,message",
  [
    ({"warmup": 25}, "warmup=25 is longer than the run of steps=24"),
    ({"warmup": 20, "decay": 5, "name": "wsd"}, "warmup=20 and decay=5 exceed steps=24"),
    ({"decay": 5}, "decay=5 belongs to wsd"),
    ({"steps": 0}, "steps=0 must be positive"),
    ({"warmup": -1}, "warmup=-1"),
    ({"peak": -0.1}, "peak=-0.1"),
    ({"peak": 0.0}, "peak=0.0"),
    ({"peak": math.nan}, "peak=nan"),
    ({"floor": -0.1}, "floor=-0.1"),
    ({"floor": 0.9}, "floor=0.9"),
    ({"name": "linear"}, "schedule 'linear' is not one of cosine, wsd"),
    ({"beta1": 1.0}, "beta1=1.0 must lie in"),
    ({"beta2": -0.1}, "beta2=-0.1 must lie in"),
    ({"eps": 0.0}, "eps=0.0 must be positive"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0 not negative"),
    ({"clip": 0.0}, "clip=0.0 must be positive"),
  ],
)
def test_an_impossible_optimiser_is_refused_by_value(change, message):
  with pytest.raises(ValueError, match=message) as error:
    optim.make(**({"peak": 0.8, "steps": 24} | change))
  assert "\n" not in str(error.value)


def test_weight_decay_spares_gains_biases_and_the_scan_s_own_parameters():
  cfg = config.ModelConfig.from_pattern(
    "M-*S", V=31, D=16, F=24, K=2, J=3, E=10, G=2, H=4, P=6, N=5, W=4, R=7, bias=True, meta=9,
    norm="layernorm1p", activation="swiglu",
  )
  mask = optim.decay_mask(config.leaf_names(cfg))
  decayed = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(mask) if yes}
  spared = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(mask) if not yes}
  assert spared == set(
    "norm_gain_D norm_bias_D conv_bias_x_GHP conv_bias_b_GN conv_bias_c_GN dt_bias_GH a_log_GH "
    "skip_GH gate_gain_GHP b_up_F b_gate_F b_down_D b_q_KJE b_k_KE b_v_KE b_o_D a_log_GHN "
    "rank_gain_R b_gain_GN c_gain_GN".split()
  )
  assert decayed == set(
    "w_embed_VD w_head_DV w_z_DGHP w_x_DGHP w_b_DGN w_c_DGN w_dt_DGH w_out_GHPD conv_x_WGHP "
    "conv_b_WGN conv_c_WGN w_q_DKJE w_k_DKE w_v_DKE w_o_KJED w_up_DF w_gate_DF w_down_FD "
    "in_rank_GHPR in_b_GHPN in_c_GHPN in_dt_RGH meta_MD".split()
  )


def test_a_stacked_leaf_decays_like_its_layers():
  assert optim.decays("w_up_XDF") and not optim.decays("norm_gain_XD")


def test_one_update_is_adamw_s_formula_with_clipping_before_the_moments():
  params = tiny.init()
  grads = jax.tree.map(lambda leaf: jnp.cos(leaf) * 3, params)
  settings = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.5, "clip": 2.0}
  optimizer = optim.make(peak=0.1, steps=10, warmup=1, **settings)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
  for (path, update), grad, leaf in zip(
    jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(grads), jax.tree.leaves(params),
    strict=True,
  ):
    clipped = np.asarray(grad) * 2.0 / norm
    # After one step both moments' bias corrections cancel their decay.
    expected = clipped / (np.abs(clipped) + 1e-3)
    if path[-1].key.startswith("w_"):
      expected += 0.5 * np.asarray(leaf)
    np.testing.assert_allclose(update, -0.05 * expected, rtol=2e-5, atol=1e-8)


def test_without_clipping_a_large_gradient_is_kept():
  params = {"a": {"b_up_F": jnp.zeros(24)}}
  optimizer = optim.make(peak=1.0, steps=10, clip=None, beta1=0.0, beta2=0.0, eps=100.0)
  updates, _ = optimizer.update(
    {"a": {"b_up_F": jnp.full(24, 300.0)}}, optimizer.init(params), params
  )
  np.testing.assert_allclose(updates["a"]["b_up_F"], -0.75, rtol=1e-5)


def test_moments_of_bfloat16_parameters_are_float32():
  optimizer = optim.make(peak=0.1, steps=10)
  params = tiny.init(dtype=jnp.bfloat16)
  opt_state = optimizer.init(params)
  grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  _, after = optimizer.update(grads, opt_state, params)
  for tree in (opt_state, after):
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.ndim}
    assert kinds == {"float32"}
