"""Intermediate losses: definitions, exact zeros, and a weight that follows the divergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm import axes, bind
from hybridlm.distill import intermediate
from hybridlm.prune import align, cut
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

KINDS = ("out", "mix", "state")
CFG = models.make(pattern="M*M")


def definition(name, s, t, vector):
  """Returns distances over the last `vector` axes, in float64."""
  s, t = (x.reshape(*x.shape[: x.ndim - vector], -1) for x in (s, t))
  if name == "mse":
    return ((s - t) ** 2).mean(-1)
  if name == "normalized_mse":
    return ((s - t) ** 2).sum(-1) / (t**2).sum(-1)
  return 1 - (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum(-1))


@pytest.mark.parametrize("name", intermediate.TABLE)
def test_distances_are_their_definitions_weighted_by_tokens_or_by_rows(name):
  rng = np.random.default_rng(0)
  weight_BL = rng.uniform(size=(2, 3))
  out, state = (rng.normal(size=(2, *shape)) for shape in ((2, 3, 7), (2, 2, 4, 3, 5)))
  total = functools.partial(intermediate.total, loss=name)
  found = total(*map(jnp.asarray, (*out, weight_BL)), axes="BLD", vector="D")
  want = (weight_BL * definition(name, *out, 1)).sum()
  assert float(found) == pytest.approx(want, rel=1e-5)
  found = total(*map(jnp.asarray, (*state, weight_BL)), axes="BGHPN", vector="PN")
  want = (weight_BL.sum(1) * definition(name, *state, 2).mean((1, 2))).sum()
  assert float(found) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", intermediate.TABLE)
def test_equal_and_empty_vectors_are_at_distance_zero_with_no_gradient(name):
  x_BLD = jax.random.normal(jax.random.key(0), (2, 3, 7)).at[0, 0].set(0.0)

  def distance(own):
    return intermediate.total(own, x_BLD, jnp.ones((2, 3)), axes="BLD", vector="D", loss=name)

  value, grad = jax.value_and_grad(distance)(x_BLD)
  assert float(value) == 0.0
  np.testing.assert_array_equal(grad, 0.0)


def reordered(params):
  """Returns a plan that keeps all of every axis, one by one, and the model that it cuts."""
  keep = {"keep_D": range(CFG.D), "keep_X": range(len(CFG.blocks))}
  inner = {"M": ("GH", "P", "GN", "G"), "-": ("F",), "*": ("KJ", "K", "E")}
  for index, block in enumerate(CFG.blocks):
    keep[f"{index:02d}"] = {
      f"keep_{letters}": [list(range(getattr(block, letters[-1])))] * getattr(block, letters[0])
      if len(letters) == 2 else range(getattr(block, letters))
      for letters in inner[block.symbol]
    }
  plan = Plan(CFG, tree_hash(params), {k: _listed(v) for k, v in keep.items()})
  return plan, cut.cut(CFG, params, plan)


def _listed(value):
  if isinstance(value, dict):
    return {key: _listed(each) for key, each in value.items()}
  return list(value)


@pytest.mark.parametrize("name", intermediate.TABLE)
def test_before_the_first_step_a_plan_that_only_reorders_costs_exactly_nothing(name):
  params = models.params(CFG)
  plan, (small, student) = reordered(params)
  loss_fn = hybridlm.distillation_loss(
    small, CFG, plan=plan, intermediate=KINDS, intermediate_loss=name,
  )
  # Not one program: a compiler may round what it has to differentiate in another way.
  sums = loss_fn(student, params, batch())
  assert float(sums["intermediate"]) == 0.0
  assert abs(float(sums["loss"])) < 1e-6 * float(sums["weight"])


def batch():
  """Returns a batch of which `models.tokens` are the tokens."""
  return models.batches(CFG, 1, shape=(2, 37))[0] | {"token_BL": models.tokens(CFG)}


def test_channels_in_another_order_are_aligned_to_rounding():
  params, rng = models.params(CFG), np.random.default_rng(3)
  order_D, order_P = rng.permutation(CFG.D), rng.permutation(CFG.P)
  order_GH = np.stack([rng.permutation(CFG.H) for _ in range(CFG.G)])
  order_GN = np.stack([rng.permutation(CFG.N) for _ in range(CFG.G)])
  moved = models.permute(CFG, params, None, "D", order_D)
  for index in (0, 2):
    for letter, order in (("P", order_P), ("H", order_GH), ("N", order_GN)):
      moved = models.permute(CFG, moved, index, letter, order)
  keeps = {"keep_D": order_D, "keep_P": order_P, "keep_GH": order_GH, "keep_GN": order_GN}
  taps = tuple(tap for tap, _ in align.TAPS.values())
  shown, seen = (
    bind.apply(CFG, tree, batch()["token_BL"], batch()["segment_BL"], taps=taps, output="hidden")[1]
    for tree in (params, moved)
  )
  for pair in align.pairs(CFG, CFG, None, KINDS):
    own, theirs = seen[pair.student][pair.tap], shown[pair.teacher][pair.tap]
    arrays = (own, pair._replace(keeps=(keeps,)).of_teacher(theirs), jnp.ones((2, 37)))
    letters = {"axes": axes.of(pair.tap), "vector": align.TAPS[pair.kind][1]}
    assert intermediate.total(*arrays, **letters, loss="cosine") < 1e-9
    apart = intermediate.total(own, theirs, arrays[2], **letters, loss="cosine")
    assert apart > 1  # what it would be by position


def test_the_weight_makes_the_intermediate_loss_as_large_as_the_divergence():
  params = models.params(CFG, scale=10.0)  # so that the models are far apart
  plan = models.plan(CFG, params, {"X": (0, 2)})
  small, student = cut.cut(CFG, params, plan)
  make = functools.partial(
    hybridlm.distillation_loss, small, CFG, plan=plan, kl=0.6, ce=0.2, divergence="reverse_kl",
  )
  alone, dynamic, fixed = (
    make(**settings)(student, params, batch())
    for settings in ({}, {"intermediate": KINDS},
                     {"intermediate": KINDS, "intermediate_weight": 3.0})
  )
  assert float(fixed["intermediate"]) > 0
  more = [float(each["loss"] - alone["loss"]) for each in (dynamic, fixed)]
  assert more[0] == pytest.approx(0.6 * float(alone["reverse_kl"]), rel=1e-3)
  assert more[1] == pytest.approx(3 * float(fixed["intermediate"]), rel=1e-3)


def test_the_weight_that_follows_the_divergence_has_no_gradient_and_none_of_nothing():
  def loss(x, factor):
    sums = {"loss": x**3, "kl": 0.0}
    return intermediate.added(sums, factor * x**2, weight=None, logits=x**3)["loss"]

  value, grad = jax.value_and_grad(loss)(2.0, 5.0)
  assert (float(value), float(grad)) == (16.0, 12.0 + (8 / 20) * 20)
  assert jax.value_and_grad(loss)(2.0, 0.0) == (8.0, 12.0)


@pytest.mark.parametrize(
  "settings,message",
  [
    ({"intermediate": ("out", "out")}, "names a kind twice"),
    ({"intermediate": ("out",), "intermediate_loss": "l2"}, "intermediate_loss='l2' is not one of"),
    ({"intermediate": ("out",), "intermediate_weight": 0.0}, "intermediate_weight=0.0 must be pos"),
    ({"intermediate": ("out",), "kl": 0.0, "ce": 1.0}, "must be set with kl=0"),
    ({"intermediate": ("hidden",)}, "'hidden' is not one of out, mix, state"),
    ({"top_k": 32}, "top_k=32 must lie in 1..31"),
  ],
)
def test_impossible_ways_to_compare_are_refused_before_anything_runs(settings, message):
  with pytest.raises(ValueError, match=message):
    hybridlm.distillation_loss(CFG, CFG, **settings)
