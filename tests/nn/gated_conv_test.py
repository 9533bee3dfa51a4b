"""A Mamba block without its state trains like any other: spread over a mesh, saved, and served."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import hybridlm
from cases import models
from hybridlm import axes
from hybridlm.train import mesh, optim, state, step

SGD = optim.Optimizer(*optax.sgd(0.5), optax.constant_schedule(0.5))
SIZES = {"fsdp": 4, "tensor": 2}
CFG = models.make("untied", "C-", V=32)


def test_eight_devices_make_the_same_step_as_one_and_every_leaf_moves():
  grid, params = mesh.make(SIZES), models.params(CFG, 5.0)
  batch = models.batches(CFG, 1, (8, 13))[0]
  run = hybridlm.language_loss(CFG)
  one, alone = step.make_step(run, SGD)(state.create(params, SGD), None, batch)
  start = state.create(params, SGD)
  where = mesh.shardings(grid, start, mesh.RULES)
  sharded = step.make_step(run, SGD, shardings=where)
  many, spread = sharded(mesh.place(start, where), None, mesh.shard_batch(grid, batch))
  for (path, a), (_, b) in zip(axes.leaves(many.params), axes.leaves(one.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=path)
  assert float(spread["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-5)
  for path, before in axes.leaves(params):
    after = dict(axes.leaves(one.params))[path]
    assert not np.allclose(before, after, rtol=0, atol=1e-6), path


def test_leaves_are_split_by_their_letters():
  grid = mesh.make(SIZES)
  specs = {path: where.spec for path, where in axes.leaves(
    mesh.shardings(grid, models.params(CFG, 5.0), mesh.RULES))}
  assert specs["blocks/00/w_x_DGHP"] == PartitionSpec("fsdp", "tensor", None, None)
  assert specs["blocks/00/w_out_GHPD"] == PartitionSpec("tensor", None, None, "fsdp")
  assert specs["blocks/00/conv_x_WGHP"] == PartitionSpec(None, "tensor", None, None)
  assert specs["blocks/00/skip_GH"] == PartitionSpec("tensor", None)


def test_a_saved_model_comes_back_and_generates_what_it_did(tmp_path):
  params, prompt_BL = models.params(CFG, 5.0), models.tokens(CFG, (2, 5))
  hybridlm.save(tmp_path / "model", CFG, params)
  cfg, read = hybridlm.load(tmp_path / "model")
  assert cfg == CFG
  jax.tree.map(np.testing.assert_array_equal, read, params)
  got = hybridlm.generate(cfg, read, prompt_BL, steps=6)
  token_BL = np.asarray(prompt_BL)
  for _ in range(6):  # the whole text again for every token
    next_B = np.asarray(hybridlm.forward(CFG, params, token_BL))[:, -1].argmax(-1)
    token_BL = np.concatenate([token_BL, next_B[:, None]], axis=1)
  np.testing.assert_array_equal(np.asarray(got)[:, -6:], token_BL[:, -6:])
