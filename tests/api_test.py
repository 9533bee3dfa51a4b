"""The face: every example in its docstrings runs, one after the other, as a user types them."""

import doctest

import jax
import jax.numpy as jnp
import pytest

import hybridlm
from cases import models

ORDER = (
  "init", "forward", "calibrate", "plan", "mask", "cut", "language_loss", "distillation_loss",
  "cost",
)


def test_every_example_of_the_face_runs():
  cfg = models.make(pattern="M-")
  names = {"hybridlm": hybridlm, "jnp": jnp}
  names |= {"batches": models.batches(cfg), "token_BL": models.tokens(cfg)}
  for name in ORDER:
    found = doctest.DocTestFinder(recurse=False).find(getattr(hybridlm, name), name, globs=names)
    assert found and found[0].examples, name
    found[0].globs = names
    result = doctest.DocTestRunner().run(found[0], clear_globs=False)
    assert result.failed == 0, name


def test_the_face_offers_what_it_says():
  assert set(ORDER) | {"ModelConfig", "Plan", "Scores"} == set(hybridlm.__all__)
  assert hybridlm.config.PRESETS["nemotron_h_8b"].pattern.startswith("M-M-")
  assert callable(hybridlm.ops.ssd.api.ssd)


def test_forward_can_be_compiled_and_differentiated():
  cfg = models.make(pattern="M-")
  params, token_BL = models.params(cfg), models.tokens(cfg)
  compiled = jax.jit(lambda tree, ids: hybridlm.forward(cfg, tree, ids))
  want = hybridlm.forward(cfg, params, token_BL)
  assert models.error(compiled(params, token_BL), want) < 1e-5


def test_a_teacher_of_another_vocabulary_is_refused():
  with pytest.raises(ValueError, match="student predicts 31 tokens, teacher 29"):
    hybridlm.distillation_loss(models.make(), models.make(vocabulary=29))
