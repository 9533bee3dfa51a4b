"""Laws of keys and values that blocks share: the same as copies, one by one or in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import axes, config
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


def outputs(cfg, params, token_BL, segment_BL):
  """Returns logits, taps and the gradient of a sum of sines, from one program."""

  @jax.jit
  def run(params):
    def loss(params):
      found = lm.forward(
        cfg, params, token_BL, segment_BL=segment_BL, taps=("k_BLKE", "out_BLD"))
      return jnp.sum(jnp.sin(found[0])), found

    return jax.grad(loss, has_aux=True)(params)

  gradient, found = run(stack.stacked(cfg, params))
  return found, stack.unstacked(cfg, gradient)


@pytest.mark.parametrize("remat, pattern", [
  ("unit", "****"), pytest.param("block", "*M-*-*M-*-", marks=pytest.mark.slow)])
def test_groups_in_a_loop_give_the_outputs_and_gradients_of_each_by_itself(remat, pattern):
  plain = make(pattern, PAIRS, meta=3, **({"chunk": 8} if "M" in pattern else {}))
  cfg = plain.replace(stack="units", remat=remat)
  assert stack.program(cfg) == (Loop(2, tuple(range(len(pattern) // 2))),)
  params, batch = models.params(plain, 5.0), models.batches(plain, 1, (2, 19))[0]
  ids = (jnp.asarray(batch["token_BL"]), jnp.asarray(batch["segment_BL"]))
  got, want = outputs(cfg, params, *ids), outputs(plain, params, *ids)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, one), (_, two) in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want), strict=True
  ):
    assert models.error(one, two) < 2e-5, path
  reader = plain.kv_groups[0][1]
  taps = want[0][1]
  np.testing.assert_array_equal(taps[f"{reader:02d}"]["k_BLKE"], taps["00"]["k_BLKE"])
  assert dict(axes.leaves(want[1]))["embed/meta_MD"].shape == (3, plain.D)
