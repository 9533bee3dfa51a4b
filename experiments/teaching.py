"""Stages that train: the teacher, its correction, the small model's distillation, the baseline."""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import hybridlm
from experiments import (
  artefacts,
  exchange,
  lessons,
  losses,
  precision,
  settings,
  storing,
  training,
)
from experiments.settings import Setup
from experiments.stages import Inputs, Stage

# Keys of a training run that change how it is watched and saved, not what comes out.
WATCHING = (
  "validate_every", "validate_batches", "save_every", "keep", "store", "stages", "profile"
)


def recipe(run: ConfigDict) -> dict[str, Any]:
  """Returns the values of a training run that decide its result."""
  return {key: value for key, value in settings.plain(run).items() if key not in WATCHING}


def float32(params: Any) -> Any:
  """Returns parameters as the optimiser needs them; imported weights may be bfloat16."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def teacher(s: Setup) -> Stage:
  """Returns the stage that brings the teacher from elsewhere, or pretrains it into the cache."""
  run = s.c.teacher
  if s.source is not None:
    source = s.source

    def bring(folder: pathlib.Path, inputs: Inputs) -> None:
      exchange.bring(folder, source, s.cfg)

    values = {"files": exchange.fingerprints(source), "model": s.cfg.to_dict()}
    return Stage("teacher", values, bring, version=2)

  def pretrain(folder: pathlib.Path, inputs: Inputs) -> None:
    laid = s.cfg.replace(layout=s.c.mesh.layout)
    made = training.Recipe(
      cfg=s.cfg, params=hybridlm.init(s.cfg, seed=s.c.seed),
      loss_fn=hybridlm.language_loss(laid), frozen=None, computes=laid,
      train=s.train_batches(run, s.c.seed), valid=s.validation(run),
    )
    training.train(folder, made, run, s.grid, guarded=training.guarded(s.c))

  values = {
    "model": s.cfg.to_dict(), "training": recipe(run), "seed": s.c.seed,
    "data": s.train_data(run, s.c.seed),
  }
  return Stage("teacher", values, pretrain, version=2, home=s.cache, together=True)


def correct(s: Setup) -> Stage | None:
  """Returns the stage that trains the teacher on, on the student's data; None: there is none.

  The teacher is first fitted to the text it is to teach (arXiv 2408.11796, section 3). Where it was
  pretrained on the same text this is more of the same.
  """
  run = s.c.correct
  if run.run == "none":
    return None
  seed = s.c.seed + 2  # rows in another order than the teacher and the student see them

  def fit(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.read_model(inputs["teacher"])
    like = inputs["teacher"] / exchange.LIKE
    if like.is_dir():  # it stands in for the teacher, with all that lies beside it
      shutil.copytree(like, folder / exchange.LIKE, dirs_exist_ok=True)
    laid = cfg.replace(layout=s.c.mesh.layout)
    made = training.Recipe(
      cfg=cfg, params=float32(params), loss_fn=hybridlm.language_loss(laid), frozen=None,
      train=s.train_batches(run, seed), valid=s.validation(run), like=like, computes=laid,
    )
    training.train(folder, made, run, s.grid, guarded=training.guarded(s.c))

  # Whether it is there before or beside decides who reads it, not what comes out.
  values = {
    "training": {key: value for key, value in recipe(run).items() if key != "run"},
    "data": s.train_data(run, seed),
  }
  return Stage("correct", values, fit, needs=("teacher",), home=s.cache, together=True)


def distil(s: Setup, plans: Sequence[str] = ("plan",)) -> Stage:
  """Returns the stage that trains the cut model towards the teacher, or towards its store.

  What it starts from may also be the model that the run before it left. `plans`: the stages whose
  plans lead from the teacher to the student, in order; read where intermediate activations count.
  """
  run, found = s.c.distil, storing.opened(s)
  read = losses.plans(s.cfg, run, plans)

  def learn(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.read_model(inputs["cut"])
    student = precision.student(cfg, run).replace(layout=s.c.mesh.layout)
    made = training.Recipe(
      cfg=cfg, params=float32(params), loss_fn=None, frozen=None,
      train=s.train_batches(run, s.c.seed + 1), valid=s.validation(run),
      like=inputs["teacher"] / exchange.LIKE, computes=student,
    )
    if found is None:
      teacher_cfg, held = precision.teacher(*artefacts.read_model(inputs["teacher"]), run)
      teacher_cfg = teacher_cfg.replace(layout=s.c.mesh.teacher_layout or s.c.mesh.layout)
      made = made._replace(
        loss_fn=losses.online(student, teacher_cfg, run, [inputs[name] for name in read]),
        frozen=held, teacher=teacher_cfg,
      )
    else:
      storing.verify(found, inputs["teacher"])
      made = made._replace(
        loss_fn=losses.stored(student, run), train=made.train.joined(found),
        valid=[found.join_valid(batch) for batch in made.valid],
      )
    training.train(folder, made, run, s.grid, guarded=training.guarded(s.c))
    lessons.go_on(folder, inputs["cut"])

  values = {"training": recipe(run), "data": s.train_data(run, s.c.seed + 1)}
  return Stage(
    "distil", values | storing.values(found), learn, needs=("teacher", "cut", *read), version=2,
    together=True)


def scratch(s: Setup, *, goes_on: bool = False) -> Stage | None:
  """Returns the stage that trains the small config on the tokens distillation saw, from nothing.

  None: the baseline is left out. `goes_on`: from what the stage `before` left.
  """
  run, peak = s.c.distil, s.c.scratch.peak
  if s.c.scratch.run != "same":
    return None
  # Sizes follow from targets; only which blocks stay is known after the cut.
  decided = s.small is None or s.c.plan.path or settings.chosen(settings.targets(s.c))
  needs = ("before",) if goes_on else ("cut",) if decided else ()

  def learn(folder: pathlib.Path, inputs: Inputs) -> None:
    if goes_on:
      cfg, params = artefacts.read_model(inputs["before"])
    else:
      cfg = artefacts.load_model_config(inputs["cut"]) if needs else s.small
      params = hybridlm.init(cfg, seed=s.c.seed + 1)
    student = precision.student(cfg, run).replace(layout=s.c.mesh.layout)
    made = training.Recipe(
      cfg=cfg, params=params, loss_fn=hybridlm.language_loss(student), frozen=None,
      train=s.train_batches(run, s.c.seed + 1), valid=s.validation(run), computes=student,
    )
    training.train(
      folder, made, run, s.grid, peak=peak, guarded=training.guarded(s.c))
    if goes_on:
      lessons.go_on(folder, inputs["before"])

  own = (*losses.KEYS, "peak", "teacher_precision")
  values = {
    "training": {key: value for key, value in recipe(run).items() if key not in own},
    "peak": peak, "seed": s.c.seed + 1, "data": s.train_data(run, s.c.seed + 1),
    "model": None if needs else s.small.to_dict(),
  }
  return Stage("scratch", values, learn, needs=needs, version=2, together=True)
