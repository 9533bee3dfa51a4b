"""Stages between scores and training: the plan, the verified cut, and its repair."""

import functools
import pathlib
from collections.abc import Mapping

import hybridlm
from experiments import artefacts, exchange, settings, teaching
from experiments.mistakes import about
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm import api, bind
from hybridlm.prune import repair as repairing
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

REPAIRED = "repaired.json"


def plan(s: Setup) -> Stage:
  """Returns the stage that leaves `plan.json`: of targets, of a manifest, or the search's best."""
  wanted, path = settings.targets(s.c), s.c.plan.path
  if path == settings.SEARCH:

    def take(folder: pathlib.Path, inputs: Inputs) -> None:
      Plan.load(inputs["search"] / "plan.json").save(folder / "plan.json")

    return Stage("plan", {}, take, needs=("search",))
  if path:

    def replay(folder: pathlib.Path, inputs: Inputs) -> None:
      cfg, params = artefacts.load_model(inputs["teacher"])
      with about(f"plan {path}"):
        made = Plan.load(path)
        hybridlm.mask(cfg, params, made)
      made.save(folder / "plan.json")

    manifest = {"manifest": artefacts.file_hash(pathlib.Path(path))}
    return Stage("plan", manifest, replay, needs=("teacher",))

  def choose(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg = artefacts.load_model_config(inputs["teacher"])
    scores = Scores.load(inputs["calibrate"] / "scores.npz")
    hybridlm.plan(cfg, scores, wanted).save(folder / "plan.json")

  values = {"targets": settings.written(wanted)}
  return Stage("plan", values, choose, needs=("teacher", "calibrate"))


def cut(s: Setup) -> Stage:
  """Returns the stage that cuts as the plan says, and verifies it against the masked model."""

  def slice_(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["teacher"])
    made = Plan.load(inputs["plan"] / "plan.json")
    with about("export"):
      exchange.check(made.small_config(), s.c.export.format, s.c.export.family)
    small_cfg, small = hybridlm.cut(cfg, params, made)
    artefacts.save_model(folder, small_cfg, small, like=_beside(inputs["teacher"]))
    error = api.verify(cfg, params, made, small_cfg, small)
    artefacts.write_json(folder / "verified.json", {"masked_against_cut": error})

  return Stage("cut", {}, slice_, needs=("teacher", "plan"), version=2)


def _beside(folder: pathlib.Path) -> pathlib.Path:
  """Returns where a stage's model has its tokenizer files: the student of a round has no `like`."""
  like = folder / exchange.LIKE
  return like if like.is_dir() else folder / artefacts.MODEL


def repair(s: Setup) -> Stage | None:
  """Returns the stage that fits the cut model's output projections; None: there is none.

  It computes in float32, whatever the model does.
  """
  run = s.c.repair
  if run.run == "none":
    return None
  how = {key: run[key] for key in ("ridge", "order", "target", "gain")}

  def fit(folder: pathlib.Path, inputs: Inputs) -> None:
    made = Plan.load(inputs["plan"] / "plan.json")
    small = _side(inputs["cut"])
    params, fits = repairing.repair(
      made, _side(inputs["teacher"]), small._replace(params=teaching.float32(small.params)),
      s.held_out(s.inside, run.split, run, run.batches), **how,
    )
    cfg = artefacts.load_model_config(inputs["cut"])
    artefacts.save_model(folder, cfg, params, like=inputs["cut"] / artefacts.MODEL)
    artefacts.write_json(folder / REPAIRED, {name: each._asdict() for name, each in fits.items()})

  values = {"run": run.run, **how, "data": s.held_out_data(s.inside, run.split, run, run.batches)}
  return Stage("repair", values, fit, needs=("teacher", "plan", "cut"))


def _side(folder: pathlib.Path) -> repairing.Side:
  """Returns the model of a stage's folder as repair reads it."""
  cfg, params = artefacts.load_model(folder)
  exact = cfg.replace(dtype="float32")
  apply, hidden = (functools.partial(f, exact) for f in (bind.apply_taps, bind.apply_hidden))
  return repairing.Side(apply, hidden, params)


def repaired(folder: pathlib.Path) -> str:
  """Returns what a repair did, in words, from its stage's folder."""
  fits: Mapping[str, Mapping[str, float]] = artefacts.read_json(folder / REPAIRED)
  before, after = (
    sum(fit[key] for fit in fits.values()) / len(fits) for key in ("before", "after")
  )
  return (
    f"least squares of {len(fits)} output projections; what they lack of the parent's, squared: "
    f"{before:.1%} before, {after:.1%} after, on average over blocks"
  )
