"""A training stage that is killed at its very end loses nothing."""

import shutil

import jax
import pytest
from jax.sharding import AxisType

import hybridlm
from cases import commands, models
from configs import base
from experiments import artefacts, training
from hybridlm.train import loop

WEIGHTS = "model/model.safetensors"


class Interrupted(Exception):
  """Stands for whatever kills a run."""


class Stream:
  """The same batch for ever."""

  def __init__(self, cfg):
    self.batch, self.at = models.batches(cfg, 1)[0], 0

  def __next__(self):
    self.at += 1
    return self.batch

  def get_state(self):
    return {"at": self.at}

  def set_state(self, position):
    self.at = position["at"]


def run(folder, *, steps=2):
  """Trains a small model for two steps in a folder; returns the bytes of its files."""
  cfg = models.make(pattern="-")
  values = base.training(steps=steps, peak=1e-2)
  values.update(warmup=0, save_every=1)
  grid = jax.make_mesh(
    (1, 1), ("data", "tensor"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
  stream = Stream(cfg)
  recipe = training.Recipe(cfg=cfg, params=models.params(cfg), frozen=None, train=stream,
                           loss_fn=hybridlm.language_loss(cfg), valid=[stream.batch])
  training.train(folder, recipe, values, grid)
  return commands.files(folder)


def test_a_run_killed_while_its_checkpoints_went_is_not_trained_again(tmp_path, monkeypatch):
  def half(path, **_):
    for manifest in path.rglob("manifest.json"):
      manifest.write_text("half")
    raise Interrupted

  folder = tmp_path / "distil.partial"
  folder.mkdir()
  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    patch.setattr(shutil, "rmtree", half)
    run(folder)
  before = {
    name: data for name, data in commands.files(folder).items() if not name.startswith("checkp")}
  monkeypatch.setattr(loop, "run", lambda *_, **__: pytest.fail("it trains again"))
  assert run(folder) == before
  assert {"model/model.json", WEIGHTS, "log.json"} <= before.keys()


def test_a_run_killed_before_its_log_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
  calm, killed = tmp_path / "calm", tmp_path / "killed"
  calm.mkdir()
  killed.mkdir()
  want = run(calm)[WEIGHTS]
  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    patch.setattr(training, "log", lambda history: (_ for _ in ()).throw(Interrupted))
    run(killed)
  assert (killed / "checkpoints").is_dir()
  found = run(killed)
  assert found[WEIGHTS] == want and "log.json" in found
  assert not (killed / "checkpoints").exists()
  assert artefacts.read_json(killed / "log.json")["summary"]["steps"] == 2


def test_a_run_that_has_not_ended_can_be_loaded_from_its_checkpoints(tmp_path, monkeypatch):
  def stop(*_, **__):
    raise Interrupted

  monkeypatch.setattr(training.artefacts, "save_model", stop)
  folder = tmp_path / "distil.partial"
  folder.mkdir()
  with pytest.raises(Interrupted):
    run(folder, steps=3)
  monkeypatch.undo()
  cfg, params = hybridlm.load(folder / "checkpoints")
  assert cfg == models.make(pattern="-")
  start = models.params(cfg)
  moved = jax.tree.map(lambda one, two: bool((one != two).any()), params, start)
  assert all(jax.tree.leaves(moved))
  shutil.rmtree(folder)
  folder.mkdir()
  run(folder, steps=3)
  ended = hybridlm.load(folder / "model")[1]
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, ended)))
