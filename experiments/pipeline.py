"""The stages of the main job: teacher, scores, plan, cut, distillation, baselines, evaluation."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import hybridlm
from experiments import (
  artefacts,
  cli,
  evaluation,
  exchange,
  findings,
  report,
  settings,
  stages,
  training,
)
from experiments.mistakes import about
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm import api, config
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

# Keys of a training run that change how it is watched and saved, not what comes out.
WATCHING = ("validate_every", "validate_batches", "save_every")


# Models before distillation: name in the report -> stage that makes it.
BEFORE = {"teacher": "teacher", "pruned": "cut"}


def build(s: Setup) -> list[Stage]:
  """Returns the stages of the main job, in order."""
  # A manifest that is replayed needs no scores: a wrong one is found before they are computed.
  planned = [_plan(s), _calibrate(s)] if s.c.plan.path else [_calibrate(s), _plan(s)]
  made = [
    _teacher(s), *planned, _cut(s), _ngrams(s),
    _evaluate(s, "evaluate_cut", BEFORE), _distil(s), _export(s),
  ]
  trained = {"distilled": "distil"}
  if s.c.scratch.run == "same":
    made.append(_scratch(s))
    trained["scratch"] = "scratch"
  if s.c.findings.heads:
    made.append(_findings(s))
  made = [stage for stage in made if stage is not None]
  made.append(_evaluate(s, "evaluate_end", trained, timed=BEFORE | trained))
  return [*made, _report(s, made)]


def until(made: list[Stage], *names: str) -> list[Stage]:
  """Returns the named stages and everything they need, in order."""
  wanted = set(names)
  for stage in reversed(made):
    if stage.name in wanted:
      wanted |= set(stage.needs)
  return [stage for stage in made if stage.name in wanted]


def _recipe(run: ConfigDict) -> dict[str, Any]:
  """Returns the values of a training run that decide its result."""
  return {key: value for key, value in settings.plain(run).items() if key not in WATCHING}


def _teacher(s: Setup) -> Stage:
  run = s.c.teacher
  if s.source is not None:
    source = s.source

    def bring(folder: pathlib.Path, inputs: Inputs) -> None:
      exchange.bring(folder, source, s.cfg)

    values = {"files": exchange.fingerprints(source), "model": s.cfg.to_dict()}
    return Stage("teacher", values, bring, version=2)

  def pretrain(folder: pathlib.Path, inputs: Inputs) -> None:
    recipe = training.Recipe(
      cfg=s.cfg, params=hybridlm.init(s.cfg, seed=s.c.seed),
      loss_fn=hybridlm.language_loss(s.cfg), frozen=None,
      train=s.train_batches(run, s.c.seed),
      valid=s.validation(run),
    )
    training.train(folder, recipe, run, s.grid)

  values = {
    "model": s.cfg.to_dict(), "training": _recipe(run), "seed": s.c.seed,
    "data": s.train_data(run, s.c.seed),
  }
  return Stage("teacher", values, pretrain, version=2, home=s.cache)


def _calibrate(s: Setup) -> Stage:
  run = s.c.calibrate
  fingerprint = s.held_out_data(s.inside, run.split, run, run.batches)

  def calibrate(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["teacher"])
    scores = hybridlm.calibrate(
      cfg, params, s.held_out(s.inside, run.split, run, run.batches), estimator=run.estimator,
      axes=run.axes, depth=run.depth, data=fingerprint, seed=s.c.seed,
    )
    scores.save(folder / "scores.npz")

  values = {
    "estimator": run.estimator, "axes": run.axes, "depth": run.depth, "data": fingerprint,
    "seed": s.c.seed,
  }
  return Stage("calibrate", values, calibrate, needs=("teacher",))


def _plan(s: Setup) -> Stage:
  wanted, path = settings.targets(s.c), s.c.plan.path
  if path:

    def replay(folder: pathlib.Path, inputs: Inputs) -> None:
      cfg, params = artefacts.load_model(inputs["teacher"])
      with about(f"plan {path}"):
        plan = Plan.load(path)
        hybridlm.mask(cfg, params, plan)
      plan.save(folder / "plan.json")

    manifest = {"manifest": artefacts.file_hash(pathlib.Path(path))}
    return Stage("plan", manifest, replay, needs=("teacher",))

  def plan(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg = artefacts.load_model_config(inputs["teacher"])
    scores = Scores.load(inputs["calibrate"] / "scores.npz")
    hybridlm.plan(cfg, scores, wanted).save(folder / "plan.json")

  return Stage("plan", {"targets": wanted}, plan, needs=("teacher", "calibrate"))


def _cut(s: Setup) -> Stage:
  def cut(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["teacher"])
    plan = Plan.load(inputs["plan"] / "plan.json")
    with about("export"):
      exchange.check(plan.small_config(), s.c.export.format, s.c.export.family)
    small_cfg, small = hybridlm.cut(cfg, params, plan)
    artefacts.save_model(folder, small_cfg, small, like=inputs["teacher"] / exchange.LIKE)
    error = api.verify(cfg, params, plan, small_cfg, small)
    artefacts.write_json(folder / "verified.json", {"masked_against_cut": error})

  return Stage("cut", {}, cut, needs=("teacher", "plan"), version=2)


def _ngrams(s: Setup) -> Stage | None:
  order = s.c.evaluate.ngram
  if order == 0:
    return None
  mixed = sorted({name for _, weights in s.corpus.phases for name, _ in weights})

  def count(folder: pathlib.Path, inputs: Inputs) -> None:
    found = evaluation.ngrams(
      s.corpus, train=mixed, test=s.tests, split=s.c.evaluate.split, order=order
    )
    artefacts.write_json(folder / "ngrams.json", found)

  values = {
    "order": order,
    "train": [s.corpus.fingerprint(name, "train") for name in mixed],
    "test": {
      key: s.corpus.fingerprint(name, s.c.evaluate.split) for key, name in s.tests.items()
    },
  }
  return Stage("ngrams", values, count, home=s.cache)


def _evaluate(
  s: Setup, name: str, models: Mapping[str, str], *, timed: Mapping[str, str] | None = None
) -> Stage:
  """Returns a stage that measures models (name in the report -> stage that made it).

  `timed` are those whose speed is measured, taking turns; by default the same.
  """
  run, timed = s.c.evaluate, models if timed is None else timed

  def evaluate(folder: pathlib.Path, inputs: Inputs) -> None:
    loaded = {key: artefacts.load_model(inputs[stage]) for key, stage in timed.items()}
    teacher = loaded["teacher"]
    batches = {
      key: s.held_out(source, run.split, run, run.batches) for key, source in s.tests.items()
    }
    speed = evaluation.forward_speed(loaded, batches["inside"][0], repeats=run.speed_repeats)
    lengths = s.corpus.tokenizer.byte_lengths_V
    results = {}
    for key in models:
      results[key] = evaluation.quality(loaded[key], teacher, batches, lengths) | {
        "parameters": config.parameters(loaded[key][0]),
        "forward_tokens_per_second": speed[key],
        "machine": evaluation.machine(),
      }
    artefacts.write_json(folder / "results.json", results)
    artefacts.write_json(folder / "speed.json", speed)

  values = {
    key: s.held_out_data(source, run.split, run, run.batches) for key, source in s.tests.items()
  } | {"speed_repeats": run.speed_repeats}
  return Stage(name, values, evaluate, needs=tuple(timed.values()), version=2)


def _distil(s: Setup) -> Stage:
  run = s.c.distil
  loss = {"temperature": run.temperature, "kl": run.kl, "ce": run.ce}

  def distil(folder: pathlib.Path, inputs: Inputs) -> None:
    teacher_cfg, teacher = artefacts.load_model(inputs["teacher"])
    cfg, params = artefacts.load_model(inputs["cut"])
    # Imported weights may be bfloat16; the optimiser needs float32.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    recipe = training.Recipe(
      cfg=cfg, params=params, loss_fn=hybridlm.distillation_loss(cfg, teacher_cfg, **loss),
      frozen=teacher, train=s.train_batches(run, s.c.seed + 1),
      valid=s.validation(run), like=inputs["teacher"] / exchange.LIKE,
    )
    training.train(folder, recipe, run, s.grid)

  values = {"training": _recipe(run), "data": s.train_data(run, s.c.seed + 1)}
  return Stage("distil", values, distil, needs=("teacher", "cut"), version=2)


def _export(s: Setup) -> Stage | None:
  if s.c.export.format == "none":
    return None

  def export(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["distil"])
    exchange.export(
      folder, cfg, params, family=s.c.export.family, like=inputs["teacher"] / exchange.LIKE
    )

  values = {"format": s.c.export.format, "family": s.c.export.family}
  return Stage("export", values, export, needs=("teacher", "distil"))


def _scratch(s: Setup) -> Stage:
  """The small config trained on the tokens distillation saw, from its own initialisation."""
  run, peak = s.c.distil, s.c.scratch.peak
  # Sizes follow from targets; only which blocks stay is known after the cut.
  decided = s.c.targets.blocks is not None or s.c.targets.layers is not None or s.c.plan.path
  needs = ("cut",) if decided else ()

  def scratch(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg = artefacts.load_model_config(inputs["cut"]) if needs else s.small
    recipe = training.Recipe(
      cfg=cfg, params=hybridlm.init(cfg, seed=s.c.seed + 1),
      loss_fn=hybridlm.language_loss(cfg), frozen=None,
      train=s.train_batches(run, s.c.seed + 1),
      valid=s.validation(run),
    )
    training.train(folder, recipe, run, s.grid, peak=peak)

  own = ("temperature", "kl", "ce", "peak")
  values = {
    "training": {key: value for key, value in _recipe(run).items() if key not in own},
    "peak": peak, "seed": s.c.seed + 1, "data": s.train_data(run, s.c.seed + 1),
    "model": None if needs else s.small.to_dict(),
  }
  return Stage("scratch", values, scratch, needs=needs, version=2)


def _findings(s: Setup) -> Stage:
  """How heads are best chosen, and how many can go, on the masked teacher."""
  run = s.c.findings
  seeds = [s.c.seed + 1000 + index for index in range(run.seeds)]

  def study(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["teacher"])
    streams = [s.train_batches(run, seed) for seed in seeds]
    calibration = [[next(stream) for _ in range(run.calibration)] for stream in streams]
    held_out = s.held_out(s.inside, "valid", run, run.batches)
    result = findings.study(cfg, params, calibration, held_out, heads=run.heads)
    artefacts.write_json(folder / "findings.json", result)
    artefacts.write_bytes(folder / "findings.md", findings.markdown(result).encode())

  values = {
    "heads": list(run.heads), "calibration": run.calibration,
    "train": [s.train_data(run, seed) for seed in seeds],
    "data": s.held_out_data(s.inside, "valid", run, run.batches),
  }
  return Stage("findings", values, study, needs=("teacher",), version=findings.VERSION)


def _report(s: Setup, made: list[Stage]) -> Stage:
  names = tuple(stage.name for stage in made)

  def write(folder: pathlib.Path, inputs: Inputs) -> None:
    speed = artefacts.read_json(inputs["evaluate_end"] / "speed.json")
    results = {
      name: result | {"forward_tokens_per_second": speed[name]}
      for key in ("evaluate_cut", "evaluate_end")
      for name, result in artefacts.read_json(inputs[key] / "results.json").items()
    }
    runs = {"teacher": "teacher", "distilled": "distil", "scratch": "scratch"}
    logs = {
      name: artefacts.read_json(inputs[stage] / "log.json") for name, stage in runs.items()
      if stage in inputs and (inputs[stage] / "log.json").is_file()
    }
    ngrams = {}
    if "ngrams" in inputs:
      ngrams = artefacts.read_json(inputs["ngrams"] / "ngrams.json")
    studied = ""
    if "findings" in inputs:
      studied = (inputs["findings"] / "findings.md").read_text(encoding="utf-8")
    report.write(
      folder, title=f"hybridlm: {s.c.name}", results=results, ngrams=ngrams, logs=logs,
      findings=studied,
      scores=Scores.load(inputs["calibrate"] / "scores.npz"),
      plan=Plan.load(inputs["plan"] / "plan.json"), facts=_facts(s, inputs, logs, results),
    )

  return Stage("report", {"name": s.c.name}, write, needs=names, version=3)


def _facts(s: Setup, inputs: Inputs, logs, results) -> dict[str, str]:
  """Returns what a reader needs to know beside the table."""
  small = artefacts.load_model_config(inputs["cut"])
  error = artefacts.read_json(inputs["cut"] / "verified.json")["masked_against_cut"]
  measured = results["distilled"]["inside"]
  facts = {
    "Teacher": report.sizes(s.cfg),
    "Small model": report.sizes(small),
    "Scores": f"estimator `{s.c.calibrate.estimator}` on {s.c.calibrate.batches} × "
              f"{s.c.calibrate.batch} rows of {s.c.data.length} tokens",
    "Verified": f"masked and cut logits differ by at most {error:.1e} of the largest",
    "Measured on": f"{measured['tokens']:,.0f} tokens ({measured['bytes']:,} bytes) of the "
                   f"{s.c.evaluate.split} split in domain",
  }
  for name, log in logs.items():
    made = log["summary"]
    facts[f"Training, {report.NAMES[name]}"] = (
      f"{made['steps']} steps, {made['tokens']:,} tokens in {made['seconds']:.0f} s of "
      f"computing (compilation, validation and saves left out) on {made['machine']}"
    )
  if "export" in inputs:
    made = artefacts.read_json(inputs["export"] / "export.json")
    facts["Exported"] = (
      f"a Hugging Face folder of family `{made['family']}`, {made['parameters']:,} parameters; "
      f"read back, its logits differ by {made['difference']:.1e} of the largest"
    )
  facts["Forward speed measured on"] = results["distilled"]["machine"]
  return facts


def dry_run(s: Setup, made: list[Stage], workdir: pathlib.Path) -> str:
  """Returns what a run would do: stages and why, sizes, parameters and memory. Computes nothing."""
  lines = ["stages:", *("  " + line for line in stages.describe(stages.survey(made, workdir)))]
  models = {"teacher": s.cfg, "small model": s.small}
  sizes = report.forecast(models, length=s.c.data.length, batch=s.c.evaluate.batch)
  return "\n".join([*lines, sizes])


def execute(job: cli.Job, *names: str) -> dict[str, pathlib.Path]:
  """Runs the named stages and what they need, or says what that would do; returns the folders.

  Args:
    job: what the command line asks for.
    *names: stages; none means all of them.

  Raises:
    ValueError: bad input; the workdir is as it was.
    FileNotFoundError: the same, where a file is missing.
  """
  s = settings.setup(job.config, settings.mesh(job.config), cache=job.cache)
  made = build(s)
  made = until(made, *names) if names else made
  owner = {"config": s.c.name, "file": cli.origin(job.file)}
  stages.claim(job.workdir, owner)
  if job.dry_run:
    print(dry_run(s, made, job.workdir))
    return {}
  return stages.run(made, job.workdir, owner=owner, say=_say)


def _say(line: str) -> None:
  print(f"[hybridlm] {line}", flush=True)
