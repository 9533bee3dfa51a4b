"""One training run as a stage: from a loss and parameters to a folder with a model and its log."""

import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import artefacts, evaluation, observing, settings
from hybridlm import layout
from hybridlm.config import ModelConfig
from hybridlm.data.pipeline import Batch, Batches
from hybridlm.nn import stack
from hybridlm.train import checkpoint, guard, loop, metrics, state, step
from hybridlm.train import mesh as meshes

LOG = "log.json"
# What a run's checkpoints must have in common with the run that goes on from them.
DECIDING = ("steps", "batch", "schedule", "floor", "warmup", "decay", "weight_decay", "clip",
            "beta1", "beta2")
LossFn = Callable[[Any, Any, Any], dict[str, Any]]


class Recipe(NamedTuple):
  """What a run trains, on what, and towards what.

  cfg: the model.  params: where it starts.  loss_fn: `(params, frozen, batch) -> sums`.  frozen:
  what the loss reads and nothing changes, e.g. the teacher's parameters.  train: batches with a
  position.  valid: batches the loss is watched on.  like: a folder whose tokenizer files lie beside
  the weights, see `artefacts.save_model`.  teacher: what the loss runs forward with `frozen`.
  computes: the model as the loss runs it, in other precision or layout; None: as `cfg` says.
  """

  cfg: ModelConfig
  params: Mapping[str, Any]
  loss_fn: LossFn
  frozen: Any
  train: Batches
  valid: Sequence[Batch]
  like: pathlib.Path | None = None
  teacher: ModelConfig | None = None
  computes: ModelConfig | None = None

  @property
  def running(self) -> ModelConfig:
    """The config that the loss runs: it says which blocks are alike enough to be stacked."""
    return self.computes or self.cfg


class Spread:
  """Batches laid out on a mesh by rows and positions; where it stands is the inner one's."""

  def __init__(self, inner: Batches, grid: Mesh):
    self._inner, self._grid = inner, grid

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> dict[str, jax.Array]:
    return meshes.shard_batch(self._grid, next(self._inner))

  def get_state(self) -> dict:
    """Returns the position, for JSON."""
    return self._inner.get_state()

  def set_state(self, position: Mapping[str, Any]) -> None:
    """Moves to a position that `get_state` gave."""
    self._inner.set_state(position)


def placed(tree: Any, grid: Mesh) -> Any:
  """Returns copies of a parameter tree or train state, laid out on a mesh by the house's rules."""
  return meshes.place(tree, meshes.shardings(grid, tree, meshes.RULES))


def guarded(c: ConfigDict) -> guard.Guard:
  """Returns what the runs of a config do about bad steps."""
  return guard.Guard(**c.guard)


def train(
  folder: pathlib.Path, recipe: Recipe, run: ConfigDict, grid: Mesh, *, peak: float | None = None,
  guarded: guard.Guard = guard.STOP,
) -> None:
  """Trains until `run.steps` and leaves the model, its metrics and its log in a folder.

  A run that was killed goes on from its newest good checkpoint there. The log is written last, and
  only then are checkpoints removed: where there is a log, the run is over. Several processes train
  together, and process 0 writes.

  Args:
    folder: of the stage.
    recipe: model, loss and data.
    run: steps, optimiser and intervals, as `configs.base.training` has them.
    grid: the devices.
    peak: replaces the run's peak learning rate.
    guarded: what is done about bad steps.

  Raises:
    ValueError: as `train.loop.run` does.
  """
  if not (folder / LOG).is_file():
    _train(folder, recipe, run, grid, peak, guarded)
  if jax.process_index() == 0:
    shutil.rmtree(folder / loop.CHECKPOINTS, ignore_errors=True)


def _train(
  folder: pathlib.Path, recipe: Recipe, run: ConfigDict, grid: Mesh, peak: float | None,
  guarded: guard.Guard,
) -> None:
  optimizer = settings.optimizer(run, peak=peak)
  frozen, start = _laid_out(recipe, optimizer, grid)
  valid = [meshes.shard_batch(grid, batch) for batch in recipe.valid]
  evaluate = step.make_eval(recipe.loss_fn)
  advance = step.make_step(
    recipe.loss_fn, optimizer, accumulate=run.accumulate,
    shardings=meshes.shardings(grid, start, layout.LAYOUTS[recipe.running.layout].parameters),
    bad="skip" if guarded.action == "skip" else "make",
  )
  writes = jax.process_index() == 0
  if writes:
    checkpoint.name_model(folder / loop.CHECKPOINTS, recipe.cfg)
  with jax.set_mesh(grid):  # kernels divide their work over it
    end, history = loop.run(
      advance, start, Spread(recipe.train, grid), steps=run.steps, frozen=frozen, workdir=folder,
      validate=lambda params: evaluate(params, frozen, valid), validate_every=run.validate_every,
      save_every=run.save_every, keep=run.keep, progress="auto" if writes else "off",
      watch=observing.watch(recipe.running, recipe.teacher, run.profile), guard=guarded,
      config=_decided(recipe, run, peak),
    )
  params = stack.unstacked(recipe.running, meshes.fetch(end.params))
  if writes:
    artefacts.save_model(folder, recipe.cfg, params, like=recipe.like)
    artefacts.write_json(folder / LOG, log(history))


def _decided(recipe: Recipe, run: ConfigDict, peak: float | None) -> dict[str, Any]:
  """Returns what checkpoints are compared by, whatever the devices are."""
  return {
    "model": recipe.cfg.to_dict(), "peak": run.peak if peak is None else peak,
    **{key: run[key] for key in DECIDING},
  }


def _laid_out(recipe: Recipe, optimizer: Any, grid: Mesh) -> tuple[Any, state.TrainState]:
  """Returns what is frozen, and the state to start from, on the mesh and stacked.

  No device holds more of them than its part at any time.
  """
  def spread(make: Callable[[Any], Any], params: Any, name: str) -> Any:
    rules = layout.LAYOUTS[name].parameters
    params = meshes.put(params, meshes.shardings(grid, params, rules))
    where = meshes.shardings(grid, jax.eval_shape(make, params), rules)
    return jax.jit(make, out_shardings=where)(params)

  frozen = recipe.frozen
  if frozen is not None and recipe.teacher is not None:
    taught = recipe.teacher
    frozen = spread(lambda params: stack.stacked(taught, params), frozen, taught.layout)
  elif frozen is not None:  # nothing donates it, so it may stay in the buffers it has
    frozen = meshes.put(frozen, meshes.shardings(grid, frozen, meshes.RULES))
  start = spread(
    lambda params: state.create(stack.stacked(recipe.running, params), optimizer), recipe.params,
    recipe.running.layout,
  )
  return frozen, start


def log(history: Sequence[metrics.Record]) -> dict[str, Any]:
  """Returns what the report needs of a run's records: losses by tokens seen, and speed."""
  seen, seconds = 0.0, 0.0
  points: dict[str, list[dict[str, float]]] = {"train": [], "valid": []}
  for record in history:
    if record["split"] == "train":
      seen += record["weight"]
      seconds += record["weight"] / record["tokens_per_second"]
    if record["split"] in points:
      points[record["split"]].append({"tokens": int(seen), "ce": record["ce"]})
  return points | {
    "summary": {
      "steps": history[-1]["step"],
      "tokens": int(seen),
      "seconds": seconds,
      "tokens_per_second": seen / seconds,
      "machine": evaluation.machine(),
      "time": observing.split(history),
    },
  }
