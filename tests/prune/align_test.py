"""Index alignment: what a plan keeps of leaves it keeps of activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import models
from hybridlm import bind
from hybridlm.prune import align, cut
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

KINDS = ("out", "mix", "state")
TAPS = tuple(tap for tap, _ in align.TAPS.values())
CFG = models.make(pattern="M*M")


def taps(cfg, params, kept=None):
  token_BL = models.tokens(CFG)
  return bind.apply(cfg, params, token_BL, kept=kept, taps=TAPS, output="hidden")[1]


@pytest.fixture(scope="module")
def plans():
  """Returns plans of two cuts, one after the other."""
  params = models.params(CFG)
  first = models.plan(CFG, params, {"D": 11, "X": (0, 2), "H": 3, "P": 4, "N": 3, 2: {"G": 1}})
  return first, models.plan(first.small_config(), params, {"D": 7, "X": (1,), "H": 2, "N": 2}, 1)


def test_the_masked_teacher_has_the_student_s_activations_at_the_aligned_places(plans):
  params = models.params(CFG)
  middle, between = cut.cut(CFG, params, plans[0])
  shown, seen = taps(CFG, *cut.mask(CFG, params, plans[0])), taps(middle, between)
  pairs = align.pairs(middle, CFG, plans[0], KINDS)
  assert [(pair.student, pair.teacher) for pair in pairs if pair.kind == "out"] == [
    ("00", "00"), ("01", "02")
  ]
  assert {pair.student for pair in pairs if pair.kind == "state"} == {"00", "01"}
  for pair in pairs:
    ours, theirs = seen[pair.student][pair.tap], pair.of_teacher(shown[pair.teacher][pair.tap])
    assert models.error(ours, theirs) < 1e-5, pair


def test_cuts_one_after_the_other_align_as_their_indices_do(plans):
  small, rng = plans[1].small_config(), np.random.default_rng(0)
  for pair in align.pairs(small, CFG, plans, KINDS):
    old, letters = int(pair.teacher), pair.tap.rpartition("_")[2]
    assert plans[0].blocks[plans[1].blocks[int(pair.student)]] == old
    sizes = {"B": 2, "L": 3} | CFG.sizes(old)
    array = jnp.asarray(rng.normal(size=[sizes[letter] for letter in letters]))
    if pair.kind == "state":
      assert pair.of_teacher(array).shape[1:] == tuple(
        small.sizes(int(pair.student))[letter] for letter in "GHPN"
      )
    else:
      keep_D = plans[0].array("keep_D")[plans[1].array("keep_D")]
      np.testing.assert_array_equal(pair.of_teacher(array), array[..., keep_D])


def test_without_a_plan_models_of_equal_sizes_stand_for_each_other():
  for pair in align.pairs(CFG, CFG, None, KINDS):
    assert pair.student == pair.teacher
    array = jax.random.normal(jax.random.key(0), (2, 3, CFG.D))
    np.testing.assert_array_equal(pair.of_teacher(array), array)


def test_what_cannot_be_aligned_is_refused(plans):
  first, second = plans
  middle, small = (plan.small_config() for plan in plans)
  plain = models.make(pattern="-*")
  nothing = Plan(plain, tree_hash({"a_D": np.ones(1)}), {})
  for message, *arguments in (
    ("'hidden' is not one of out, mix, state", CFG, CFG, None, ("hidden",)),
    ("0 plans leave 'M[*]M' with D=16 of the teacher; the student", small, CFG, None, KINDS),
    ("1 plans leave 'MM' with D=11", small, CFG, first, KINDS),
    ("plan 1 of 2 cuts a model of other sizes than the teach", small, CFG, (second, first), KINDS),
    ("plan 2 of 2 cuts a model of other sizes than the plan", middle, CFG, (first, first), KINDS),
    ("'state': no block of '-[*]' has one", plain, plain, nothing, ("state",)),
  ):
    with pytest.raises(ValueError, match=message):
      align.pairs(*arguments)
