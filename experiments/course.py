"""The short distillation of a search's finalists: all on the same batches, rung by rung."""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import hybridlm
from experiments import losses, precision, settings, teaching, training
from experiments.ledger import Ledger
from experiments.settings import Setup
from hybridlm.config import ModelConfig
from hybridlm.prune.plan import Plan
from hybridlm.train import checkpoint, loop, state, step
from hybridlm.train import mesh as meshes


class Runner(NamedTuple):
  """What one finalist trains with: the compiled update, the evaluation and the optimiser."""

  advance: Callable[..., Any]
  evaluate: Callable[..., dict[str, float]]
  optimizer: Any


def schedule(run: ConfigDict, total: int) -> ConfigDict:
  """Returns a training run shrunk to `total` steps: warm-up and decay keep their shares."""
  short = ConfigDict(run.to_dict())
  for key in ("warmup", "decay"):
    short[key] = min(total - 1, round(run[key] * total / run.steps))
  short.steps = total
  return short


class Course:
  """Trains finalists on `distil`'s recipe and data, on one schedule that ends at the last rung.

  A finalist stops at a rung in the middle of that schedule and goes on from its checkpoint.

  Args:
    s: the job.
    teacher: its config and parameters.
    folder: where runs keep their checkpoints, one folder a finalist.
    ledger: takes the results of each rung.
    held: name of a measure -> batches it is taken on at the end of a rung.
  """

  def __init__(
    self, s: Setup, teacher: tuple[ModelConfig, Mapping[str, Any]], folder: pathlib.Path,
    ledger: Ledger, held: Mapping[str, Any],
  ):
    self._s, self._folder, self._ledger = s, folder, ledger
    self._cfg, self._params = teacher
    self._run = schedule(s.c.distil, s.c.search.rungs[-1])
    self._held = {
      name: [meshes.shard_batch(s.grid, batch) for batch in batches]
      for name, batches in held.items()
    }
    self._frozen: Any = None
    self._runners: dict[str, Runner] = {}

  def train(self, name: str, plan: Callable[[], Plan], steps: int) -> dict[str, float]:
    """Returns what a finalist is worth after `steps` in all: "ce" and "kl" on every measure.

    Args:
      name: of the finalist.
      plan: gives its plan, asked for only where something is left to be done.
      steps: of the schedule.
    """
    return self._ledger.once(
      f"{name}@{steps}", lambda: {"steps": steps, **self._train(name, plan, steps)}
    )

  def clear(self) -> None:
    """Removes all checkpoints: the results are in the ledger."""
    self._runners.clear()
    shutil.rmtree(self._folder, ignore_errors=True)

  def _runner(self, name: str, cfg: ModelConfig, params: Mapping[str, Any]) -> Runner:
    """Returns a finalist's runner, the one of the rung before where there was one."""
    if name not in self._runners:
      run = self._run
      pair = (precision.student(cfg, run), precision.teacher_config(self._cfg, run))
      loss_fn = losses.online(*pair, run)
      judge = hybridlm.distillation_loss(*pair, temperature=run.temperature)
      optimizer = settings.optimizer(run)
      shape = jax.eval_shape(lambda: state.create(params, optimizer))
      advance = step.make_step(
        loss_fn, optimizer, accumulate=run.accumulate,
        shardings=meshes.shardings(self._s.grid, shape, meshes.RULES),
      )
      self._runners[name] = Runner(advance, step.make_eval(judge), optimizer)
    return self._runners[name]

  def _train(self, name: str, plan: Callable[[], Plan], steps: int) -> dict[str, float]:
    run, s, folder = self._run, self._s, self._folder / name
    if self._frozen is None:
      _, frozen = precision.teacher(self._cfg, self._params, run)
      self._frozen = jax.device_put(frozen, meshes.shardings(s.grid, frozen, meshes.RULES))
    # Cut anew at every rung: the parameters of all finalists at once may be too much to keep.
    cfg, params = hybridlm.cut(self._cfg, self._params, plan())
    params = teaching.float32(params)
    runner = self._runner(name, cfg, params)
    checkpoint.name_model(folder / loop.CHECKPOINTS, cfg)
    start = training.placed(state.create(params, runner.optimizer), s.grid)
    del params
    data = training.Spread(s.train_batches(run, s.c.seed + 1), s.grid)
    with jax.set_mesh(s.grid):
      end, _ = loop.run(
        runner.advance, start, data, steps=steps, frozen=self._frozen, workdir=folder,
        save_every=run.save_every, keep=run.keep, progress="auto",
      )
      found = {
        key: runner.evaluate(end.params, self._frozen, batches)
        for key, batches in self._held.items()
      }
    return {f"{key}_{loss}": means[loss] for key, means in found.items() for loss in ("ce", "kl")}
