"""The calibration stage: scores of a teacher under the config's mesh, in a store that goes on."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

import hybridlm
from experiments import artefacts
from experiments.mistakes import about
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm.data import pipeline as data
from hybridlm.prune import depth as depths
from hybridlm.prune import store
from hybridlm.prune.estimators import table
from hybridlm.train import mesh as meshes

SCORES = "scores.npz"


def spec(s: Setup) -> store.Spec:
  """Returns what the config wants measured; the data are named by text and length, not by count."""
  run = s.c.calibrate
  text = data.eval_fingerprint(
    s.corpus, source=s.inside, split=run.split, batch=1, length=s.c.data.length
  )
  return store.Spec(
    estimator=run.estimator, axes=run.axes, depth=run.depth, window=run.window, noop=run.noop,
    data=text, seed=s.c.seed,
  )


def stage(s: Setup) -> Stage:
  """Returns the stage that scores the teacher, whose folder holds `scores.npz`.

  A killed run goes on from the rows it had saved. Where an earlier run scored fewer rows of the
  same text, only the new ones are computed.

  Raises:
    ValueError: estimators that do not fit the teacher, or no batch between saves.
  """
  run, wanted = s.c.calibrate, spec(s)
  if run.save_every < 1:
    raise ValueError(f"calibrate.save_every={run.save_every} must be at least 1")
  with about("calibrate"):
    depths.check(s.cfg, run.depth, run.window, run.noop)
    table.check(s.cfg, dict(wanted.chosen()))

  def calibrate(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["teacher"])
    batches = s.held_out(s.inside, run.split, run, run.batches)
    params = jax.device_put(params, meshes.shardings(s.grid, params, meshes.RULES))
    path = folder / SCORES
    earlier = folder.with_name(folder.name.removesuffix(".partial")) / SCORES
    if not path.is_file() and earlier.is_file():
      _bring(earlier, path, store.fingerprint(cfg, params, wanted), batches)
    with jax.set_mesh(s.grid):  # kernels divide their work over it
      hybridlm.calibrate(
        cfg, params, batches, estimator=wanted.estimator, axes=wanted.axes, depth=wanted.depth,
        window=wanted.window, noop=wanted.noop, data=wanted.data, seed=wanted.seed, store=path,
        every=run.save_every, place=lambda batch: meshes.shard_batch(s.grid, batch),
      )

  values = {
    "estimator": run.estimator, "axes": run.axes, "depth": run.depth, "window": run.window,
    "noop": run.noop, "seed": s.c.seed,
    "data": s.held_out_data(s.inside, run.split, run, run.batches),
  }
  return Stage("calibrate", values, calibrate, needs=("teacher",), version=2)


def _bring(
  earlier: pathlib.Path, path: pathlib.Path, key: Mapping[str, Any], batches: list[data.Batch]
) -> None:
  """Copies an earlier store if it is of this calibration and all it counts is asked for again."""
  with contextlib.suppress(ValueError):
    held = store.held(earlier, key)
    store.rest(batches, held.rows)
    held.save(path)
