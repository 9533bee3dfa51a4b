"""A run over stacked blocks leaves the model that block by block leaves, also when it is cut."""

import json

import jax
import pytest
from jax.sharding import AxisType

import hybridlm
from cases import models
from configs import base
from experiments import artefacts, training

STEPS = 2


class Interrupted(Exception):
  """Stands for whatever kills a run."""


class Stream:
  """The same batch, so many times."""

  def __init__(self, batch, left):
    self.batch, self.left = batch, left

  def __next__(self):
    if not self.left:
      raise Interrupted
    self.left -= 1
    return self.batch

  def get_state(self):
    return {}

  def set_state(self, position):
    pass


def run(folder, cfg, left=STEPS):
  """Trains a small student of a teacher of its own form, and leaves its model in a folder.

  It is interrupted where it asks for more than `left` batches.
  """
  folder.mkdir(exist_ok=True)
  teacher, batch = cfg.replace(D=12), models.batches(cfg, 1)[0]
  values = base.training(steps=STEPS, peak=1e-2)
  values.update(warmup=0, save_every=1)
  grid = jax.make_mesh(
    (1, 1), ("data", "tensor"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
  recipe = training.Recipe(
    cfg=cfg, params=models.params(cfg), frozen=models.params(teacher), teacher=teacher,
    train=Stream(batch, left), loss_fn=hybridlm.distillation_loss(cfg, teacher), valid=[batch],
  )
  training.train(folder, recipe, values, grid)


def test_a_stacked_run_and_its_checkpoints_hold_the_model_of_a_run_block_by_block(
  tmp_path, monkeypatch
):
  cfg = models.make(pattern="----")
  run(tmp_path / "each", cfg)
  want = artefacts.load_model(tmp_path / "each")[1]
  stacked, folder = cfg.replace(stack="units"), tmp_path / "stacked"
  with pytest.raises(Interrupted):
    run(folder, stacked, left=1)
  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    patch.setattr(training, "log", lambda history: (_ for _ in ()).throw(Interrupted))
    run(folder, stacked, left=STEPS - 1)  # from the first step on, with its moments
  steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [each["step"] for each in steps if each["split"] == "train"] == [1, 2]
  assert hybridlm.load(folder / "checkpoints")[0] == stacked
  found = (artefacts.load_model(folder)[1], hybridlm.load(folder / "checkpoints")[1])
  for tree in found:
    errors = jax.tree.map(models.error, tree, want)
    assert max(jax.tree.leaves(errors)) < 1e-4
  moved = jax.tree.map(lambda one, two: bool((one != two).any()), want, models.params(cfg))
  assert all(jax.tree.leaves(moved))
