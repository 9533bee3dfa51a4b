"""Laws of stacked blocks: the same leaves, outputs and gradients as block by block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import models, programs
from hybridlm import axes, config
from hybridlm.nn import lm, remat, stack
from hybridlm.nn.stack import Loop

# A unit of M, and a run inside it, with a block before and one after.
NESTED = "M---M---M*"


def make(**changes):
  return models.make(pattern=NESTED, stack="units", **changes)


def test_the_published_52_blocks_are_seven_to_compile():
  cfg = config.PRESETS["nemotron_h_8b"]
  units = (Loop(3, (0, 1)), 6, Loop(4, (7, Loop(5, (8, 9)))), 51)
  assert stack.program(cfg) == units
  own = stack.members(units)
  assert len(own) == 7
  assert own[8] == tuple(7 + 11 * turn + 1 + 2 * i for turn in range(4) for i in range(5))
  assert {cfg.pattern[i] for i in own[9]} == {"M"} and {cfg.pattern[i] for i in own[7]} == {"*"}


@pytest.mark.parametrize("name", sorted(config.PRESETS))
def test_a_program_has_every_block_once_and_runs_it_as_its_own_kind(name):
  cfg = config.PRESETS[name]
  own = stack.members(stack.program(cfg))
  assert sorted(itertools.chain(*own.values())) == list(range(len(cfg.blocks)))
  assert all(cfg.blocks[i] == cfg.blocks[first] for first, many in own.items() for i in many)
  order: list[int] = []

  def walk(items, by):
    for item in items:
      if isinstance(item, Loop):
        width = sum(len(v) for v in stack.members(item.body).values())
        for turn in range(item.count):
          walk(item.body, by + turn * width)
      else:
        order.append(item + by)

  walk(stack.program(cfg), 0)
  assert order == list(range(len(cfg.blocks)))


def test_blocks_of_other_sizes_are_other_kinds():
  cfg = models.make(pattern="----")
  wide = cfg.replace(blocks=(*cfg.blocks[:2], config.Mlp(F=40), cfg.blocks[3]))
  assert stack.program(cfg) == (Loop(4, (0,)),)
  assert stack.members(stack.program(wide)) == {0: (0,), 1: (1,), 2: (2,), 3: (3,)}


def test_blocks_at_the_ends_that_stay_wide_are_other_kinds_than_those_in_fp8():
  cfg = models.make(pattern="-" * 9, quantize="fp8", wide_ends=3)
  assert stack.program(cfg) == (Loop(3, (0,)), Loop(3, (3,)), Loop(3, (6,)))


def test_unstacking_gives_back_every_leaf_and_stacks_name_their_axis():
  cfg = make()
  params = models.params(cfg, 3.0)
  tree = stack.stacked(cfg, params)
  assert sorted(tree["blocks"]) == ["00", "01", "08", "09"]
  assert tree["blocks"]["01"]["w_up_XDF"].shape == (6, cfg.D, cfg.F)
  for first, many in stack.members(stack.program(cfg)).items():
    for path, _ in axes.leaves(tree["blocks"][config.block_name(first)]):
      assert (axes.of(path)[0] == "X") == (len(many) > 1), path
  back = stack.unstacked(cfg, tree)
  config.check(cfg, back)
  for (path, one), (_, two) in zip(axes.leaves(params), axes.leaves(back), strict=True):
    np.testing.assert_array_equal(one, two, err_msg=path)
  assert stack.stacked(cfg, tree) == tree and stack.unstacked(cfg, back) == back
  assert stack.stacked(cfg.replace(stack="none"), params) == params


def test_a_tree_that_ran_in_fp8_with_wide_ends_is_unstacked_for_the_plain_model():
  cfg = models.make(pattern="-" * 9, stack="units")
  params = models.params(cfg)
  tree = stack.stacked(cfg.replace(quantize="fp8", wide_ends=3), params)
  back = stack.unstacked(cfg, tree)
  jax.tree.map(np.testing.assert_array_equal, params, back)
  with pytest.raises(ValueError, match="are not those of"):
    stack.unstacked(models.make(pattern="-" * 10), tree)


def test_what_lies_in_host_memory_is_stacked_there():
  cfg = make()
  tree = stack.stacked(cfg, jax.device_get(models.params(cfg, 3.0)))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))


def outputs(cfg, params, kept, batch):
  """Returns logits, taps and a gradient, from one program."""
  names = ("in_BLD", "x_BLGHP", "act_BLF", "head_BLKJE")
  weight_BLV = jnp.asarray(np.random.default_rng(5).normal(size=(3, 19, cfg.V)), jnp.float32)

  @jax.jit
  def both(params, kept):
    def loss(params):
      ids = (jnp.asarray(batch["token_BL"]), jnp.asarray(batch["segment_BL"]))
      logits_BLV, taps = lm.HybridLM(cfg).apply({"params": params}, *ids, kept, names)
      return jnp.sum(weight_BLV * logits_BLV), (logits_BLV, taps)

    gradient, (logits_BLV, taps) = jax.grad(loss, has_aux=True)(params)
    return logits_BLV, taps, stack.unstacked(cfg, gradient)

  return both(params, kept)


def test_stacked_blocks_give_the_logits_taps_and_gradients_of_each_by_itself():
  cfg = make(remat="unit")
  params, batch = models.params(cfg, 3.0), models.batches(cfg, 1, (3, 19))[0]
  many = [index for index, symbol in enumerate(NESTED) if symbol == "M"]
  blocks = {
    config.block_name(i): {"count_G": jnp.asarray([20.0 - i, 13.0 + i])} for i in many
  }
  kept = {"count": jnp.float32(14), "stay_V": jnp.arange(cfg.V) != 3, "blocks": blocks}
  got = outputs(cfg, stack.stacked(cfg, params), kept, batch)
  want = outputs(cfg.replace(stack="none", remat="none"), params, kept, batch)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  finite = np.isfinite(want[0])
  np.testing.assert_allclose(got[0][finite], want[0][finite], rtol=2e-5, atol=2e-5)
  for tree in (1, 2):
    for (path, one), (_, two) in zip(
      axes.leaves(got[tree]), axes.leaves(want[tree]), strict=True
    ):
      assert models.error(one, two) < 2e-5, path


def test_counts_of_only_some_of_the_blocks_that_one_program_runs_are_refused():
  cfg = make()
  with pytest.raises(ValueError, match="block 04 has no counts"):
    stack.counted(cfg, {"00": {"count_G": jnp.ones(2)}})


def test_a_stack_is_passed_whole_to_the_backward_pass_and_not_copied_turn_by_turn():
  cfg = make(remat="block")
  params = jax.eval_shape(lambda: stack.stacked(cfg, models.params(cfg)))
  def residuals(params):
    return jax.vjp(lambda p: lm.forward(cfg, p, models.tokens(cfg))[0], params)[1]

  found = programs.shapes(residuals, params, of="scan")
  assert (2, 3, 2, 37, cfg.D) in found  # the inputs of two loops of blocks are kept, ..
  assert not {shape for shape in found if cfg.F in shape}  # .. their leaves are not


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, form", [("dots", "units"), ("offload", "units"), ("unit", "none")]
)
def test_what_is_computed_again_changes_no_gradient(name, form):
  plain = models.make(pattern="M-M-*-")
  params, token_BL = models.params(plain, 3.0), models.tokens(plain)

  def gradient(cfg):
    def loss(params):
      return jnp.sum(jnp.sin(lm.forward(cfg, params, token_BL)[0]))

    return jax.jit(jax.grad(loss))(stack.stacked(cfg, params))

  cfg = plain.replace(remat=name, stack=form)
  got, want = stack.unstacked(cfg, gradient(cfg)), gradient(plain)
  for (path, one), (_, two) in zip(axes.leaves(got), axes.leaves(want), strict=True):
    assert models.error(one, two) < 1e-5, path


def test_every_name_of_a_remat_is_in_the_table():
  assert set(remat.REMATS) == set(config.REMATS)
