"""Laws of keys and values that blocks share: the same as copies, one by one or in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import config
from hybridlm.config import Rope
from hybridlm.nn import lm, stack
from hybridlm.nn.stack import Loop

PAIRS = ((0, 1), (2, 3))


def make(pattern, groups, **changes):
  return models.make(pattern=pattern, kv_groups=groups, window=7, rope=Rope(), **changes)


def test_shared_keys_are_those_of_a_copy_where_nothing_lies_between():
  shared = make("**", ((0, 1),), meta=3)
  own = shared.replace(blocks=(shared.blocks[0],) * 2)
  params, token_BL = models.params(shared, 5.0), models.tokens(shared)
  first, second = (dict(params["blocks"][name]) for name in ("00", "01"))
  # The first adds nothing, and both norms are one: the second would make the same keys itself.
  first["w_o_KJED"] = 0 * first["w_o_KJED"]
  second["norm_gain_D"] = first["norm_gain_D"]
  copied = {**second, "w_k_DKE": first["w_k_DKE"], "w_v_DKE": first["w_v_DKE"]}

  def logits(cfg, folder):
    return hybridlm.forward(cfg, {**params, "blocks": {"00": first, "01": folder}}, token_BL)

  np.testing.assert_allclose(logits(shared, second), logits(own, copied), rtol=1e-5, atol=1e-6)


def test_a_loop_holds_whole_groups_only():
  def items(pattern, groups, **changes):
    return stack.program(make(pattern, groups, **changes))

  assert items("*-*-*-*-", PAIRS) == (Loop(2, (0, 1, 2, 3)),)
  assert items("****", ((0, 1, 2, 3),)) == (0, 1, 2, 3)  # not three readers
  assert items("*****", ((3, 4),)) == (Loop(3, (0,)), 3, 4)  # not four that have keys
  assert items("*---*", ((0, 1),)) == (0, 1, 2, 3, 4)  # keys pass by all three
  cfg = config.PRESETS["hymba_1p5b"]
  for first, own in stack.members(stack.program(cfg)).items():
    gaps = {index - (cfg.owners[index] or 0) for index in own}
    assert cfg.owners[first] is None or len(gaps) == 1
  assert len(stack.members(stack.program(cfg))) == 20


def in_a_loop(pattern, remat):
  """Returns a model of two equal units that the config runs by a loop, its parameters and ids."""
  cfg = make(pattern, PAIRS, meta=3, stack="units", remat=remat)
  assert stack.program(cfg) == (Loop(2, tuple(range(len(pattern) // 2))),)
  batch = models.batches(cfg, 1, (2, 19))[0]
  ids = (jnp.asarray(batch["token_BL"]), jnp.asarray(batch["segment_BL"]))
  return cfg, models.params(cfg, 5.0), ids


def run(cfg, params, ids):
  return lm.forward(
    cfg, stack.stacked(cfg, params), ids[0], segment_BL=ids[1], taps=("k_BLKE", "out_BLD"))


def assert_alike(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, one), (_, two) in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want), strict=True
  ):
    assert models.error(one, two) < 2e-5, path


def test_groups_in_a_loop_give_the_outputs_of_each_by_itself():
  cfg, params, ids = in_a_loop("****", "none")
  got, want = (
    jax.jit(run, static_argnums=0)(each, params, ids) for each in (cfg, cfg.replace(stack="none")))
  assert_alike(got, want)
  np.testing.assert_array_equal(want[1]["01"]["k_BLKE"], want[1]["00"]["k_BLKE"])
  assert models.error(want[1]["02"]["k_BLKE"], want[1]["00"]["k_BLKE"]) > 0.1


@pytest.mark.slow
def test_groups_in_a_loop_give_the_gradients_of_each_by_itself_whatever_is_computed_again():
  cfg, params, ids = in_a_loop("****", "unit")
  got, want = (
    jax.jit(jax.grad(lambda params, each=each: jnp.sum(jnp.sin(run(each, params, ids)[0]))))(params)
    for each in (cfg, cfg.replace(stack="none", remat="block")))
  assert_alike(got, want)
  assert got["embed"]["meta_MD"].shape == (3, cfg.D)
