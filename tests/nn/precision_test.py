"""FP8 where a config says so and nowhere else; held weights are the weights they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as extend

import hybridlm
from cases import models
from hybridlm import axes, config
from hybridlm.nn import held, lm, serve, stack

# Projections a block: z x b c dt out, up down, q k v o, z x out.
PROJECTIONS = {"M": 6, "-": 2, "*": 4, "C": 3}
KINDS = ("int8", "fp8")


def products(jaxpr):
  """Yields the dtypes of both operands of every product in a program, inner programs included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield tuple(str(v.aval.dtype) for v in eqn.invars)
    for inner in extend.jaxprs_in_params(eqn.params):
      yield from products(inner)


@pytest.mark.parametrize("variant", ["untied", "swiglu"])
def test_projections_between_the_wide_ends_are_fp8_with_e5m2_gradients_and_nothing_else_is(variant):
  pattern = "-M-*CM-"
  cfg = models.make(variant, pattern, dtype="bfloat16", quantize="fp8", wide_ends=2)
  shapes = jax.eval_shape(lambda: hybridlm.init(cfg, seed=0))
  batch = models.batches(cfg, 1, (2, 8))[0]

  def loss(params):
    return hybridlm.language_loss(cfg)(params, None, batch)["loss"]

  found = list(products(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr))
  inside = sum(PROJECTIONS[symbol] for symbol in pattern[2:-2])
  inside += pattern[2:-2].count("-") * (variant == "swiglu")
  forward, backward = "float8_e4m3fn", "float8_e5m2"
  assert found.count((forward, forward)) == inside
  assert found.count((backward, forward)) == found.count((forward, backward)) == inside
  eight = [pair for pair in found if forward in pair or backward in pair]
  assert len(eight) == 3 * inside < len(found)


def test_repeated_units_are_either_all_fp8_or_all_wide_and_a_stack_of_them_computes_the_same():
  cfg = models.make(pattern="C-C-C-C-", stack="units", quantize="fp8", wide_ends=2)
  for own in stack.members(stack.program(cfg)).values():
    assert len({cfg.at(index).quantize for index in own}) == 1
  params, token_BL = models.params(cfg), models.tokens(cfg, (2, 16))
  running = stack.stacked(cfg, params)
  assert len(running["blocks"]) < len(cfg.blocks)

  @jax.jit
  def logits(token_BL):
    return [lm.forward(cfg, tree, token_BL)[0] for tree in (params, running)]

  plain, scanned = logits(token_BL)
  np.testing.assert_allclose(scanned, plain, atol=2e-5)


def test_held_weights_give_the_logits_of_the_weights_they_stand_for_near_those_of_the_model():
  cfg = models.make(pattern="M*", held="int8")
  params, token_BL = models.params(cfg.replace(held="float32"), 3.0), models.tokens(cfg, (2, 16))
  trees = {kind: held.hold(cfg.replace(held=kind), params) for kind in KINDS}

  @jax.jit
  def logits(trees, token_BL):
    plain = cfg.replace(held="float32")
    made = {"whole": lm.forward(plain, params, token_BL)[0]}
    for kind, tree in trees.items():
      made[kind] = lm.HybridLM(cfg.replace(held=kind)).apply({"params": tree}, token_BL)[0]
      blocks = {name: held.full(leaves, "float32") for name, leaves in tree["blocks"].items()}
      made[f"full {kind}"] = lm.forward(plain, {**tree, "blocks": blocks}, token_BL)[0]
    return made

  found = logits(trees, token_BL)
  errors = {kind: models.error(found[kind], found["whole"]) for kind in KINDS}
  for kind in KINDS:
    np.testing.assert_allclose(found[kind], found[f"full {kind}"], atol=2e-5)
  assert 0 < errors["int8"] < errors["fp8"] < 0.1


def test_held_trees_are_those_of_their_config_with_the_rest_as_it_was():
  cfg = models.make("layernorm")
  params = models.params(cfg)
  wide = {"held": held.hold(cfg, params), "given": params}
  for name, leaf in axes.leaves(wide["held"]):
    assert leaf is dict(axes.leaves(wide["given"]))[name]
  for kind in ("bfloat16", *KINDS):
    tree = held.hold(cfg.replace(held=kind), params)
    config.check(cfg.replace(held=kind), tree)
    for path, leaf in axes.leaves(tree):
      name = path.rpartition("/")[2]
      if name.startswith("w_"):
        inside = path.startswith("blocks/") and kind != "bfloat16"
        assert leaf.dtype == (held.DTYPES[kind] if inside else jnp.bfloat16), path
      else:
        assert leaf.dtype == jnp.float32, path
  w_down_FD = np.asarray(params["blocks"]["01"]["w_down_FD"])
  small = held.hold(cfg.replace(held="int8"), params)["blocks"]["01"]
  np.testing.assert_allclose(small["scale_down_D"], np.abs(w_down_FD).max(0) / 127, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", *KINDS])
def test_a_teacher_in_the_host_s_memory_is_held_there_and_on_no_device(kind):
  cfg = models.make(pattern="-", held=kind)
  params = models.params(cfg.replace(held="float32"))
  here, there = held.hold(cfg, params), held.hold(cfg, jax.tree.map(np.asarray, params))
  for (path, leaf), (_, wanted) in zip(axes.leaves(there), axes.leaves(here), strict=True):
    assert isinstance(leaf, np.ndarray), path
    np.testing.assert_array_equal(leaf, wanted)


def test_decoding_reads_held_weights_and_leaves_fp8_to_training():
  cfg = models.make(pattern="*-", quantize="fp8", wide_ends=0, held="int8")
  params = models.params(cfg.replace(held="float32"))
  tree = held.hold(cfg, params)
  fused = serve.fuse(cfg, tree)["weights"][1]["w_in"]
  np.testing.assert_array_equal(fused, held.full(tree["blocks"]["01"], "float32")["w_up_DF"])
  token_BL, length_B = models.tokens(cfg, (2, 8)), jnp.full(2, 8)
  program = jax.make_jaxpr(lambda *a: serve.prefill(cfg, *a, size=9))(tree, token_BL, length_B)
  assert not any("float8" in str(pair) for pair in products(program.jaxpr))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"quantize": "fp8"}, "quantize='fp8' with wide_ends=4 leaves none of the 5 blocks"),
    ({"quantize": "fp4"}, "quantize='fp4' is not one of none, fp8"),
    ({"wide_ends": -1}, "wide_ends=-1 must be a number of blocks"),
    ({"held": "int4"}, "held='int4' is not one of float32, bfloat16, int8, fp8"),
  ],
)
def test_precisions_that_cannot_be_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    models.make(**changes)


def test_a_leaf_that_is_no_projection_has_no_scales_and_no_other_tree_is_held():
  assert config.scale_name("w_out_GHPD") == "scale_out_D"
  with pytest.raises(ValueError, match="'norm_gain_D' is not a projection"):
    config.scale_name("norm_gain_D")
  cfg = models.make(held="int8")
  with pytest.raises(ValueError, match="parameters lack the leaf 'blocks/00/a_log_GH'"):
    held.hold(cfg, {"blocks": {}})
