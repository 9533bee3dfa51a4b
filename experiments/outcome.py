"""Stages that say what came out: baselines, measurements, the study of heads, export, report."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import artefacts, evaluation, exchange, findings, pruning, report, rounds
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm import config
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores


def ngrams(s: Setup) -> Stage | None:
  """Returns the stage that counts n-grams; None: they are left out."""
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


def evaluate(
  s: Setup, name: str, models: Mapping[str, str], *, timed: Mapping[str, str] | None = None
) -> Stage:
  """Returns a stage that measures models (name in the report -> stage that made it).

  `timed` are those whose speed is measured, taking turns; by default the same. Among them is the
  teacher, or its correction, from which distances are measured: see `report.reference`.
  """
  run, timed = s.c.evaluate, models if timed is None else timed

  def measure(folder: pathlib.Path, inputs: Inputs) -> None:
    loaded = {key: artefacts.load_model(inputs[stage]) for key, stage in timed.items()}
    teacher = loaded[report.reference(loaded)]
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
  return Stage(name, values, measure, needs=tuple(timed.values()), version=2)


def export(s: Setup) -> Stage | None:
  """Returns the stage that writes a folder others load; None: nothing is exported."""
  if s.c.export.format == "none":
    return None

  def publish(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["distil"])
    exchange.export(
      folder, cfg, params, family=s.c.export.family, like=inputs["teacher"] / exchange.LIKE
    )

  values = {"format": s.c.export.format, "family": s.c.export.family}
  return Stage("export", values, publish, needs=("teacher", "distil"))


def study(s: Setup) -> Stage | None:
  """Returns the stage that studies how heads are best chosen, and how many can go.

  On the masked teacher. None: there is none.
  """
  run = s.c.findings
  if not run.heads:
    return None
  seeds = [s.c.seed + 1000 + index for index in range(run.seeds)]

  def measure(folder: pathlib.Path, inputs: Inputs) -> None:
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
  return Stage("findings", values, measure, needs=("teacher",), version=findings.VERSION)


def write_report(s: Setup, made: Sequence[Stage], models: Mapping[str, str]) -> Stage:
  """Returns the stage that writes the report.

  Args:
    s: what the config describes.
    made: all stages before it.
    models: name in the report -> stage that made it, of every model.
  """
  names = tuple(stage.name for stage in made)

  def write(folder: pathlib.Path, inputs: Inputs) -> None:
    speed = artefacts.read_json(inputs["evaluate_end"] / "speed.json")
    results = {
      name: result | {"forward_tokens_per_second": speed[name]}
      for key in ("evaluate_cut", "evaluate_end")
      for name, result in artefacts.read_json(inputs[key] / "results.json").items()
    }
    logs = {
      name: artefacts.read_json(inputs[stage] / "log.json") for name, stage in models.items()
      if (inputs[stage] / "log.json").is_file()
    }
    counted = {}
    if "ngrams" in inputs:
      counted = artefacts.read_json(inputs["ngrams"] / "ngrams.json")
    studied = ""
    if "findings" in inputs:
      studied = (inputs["findings"] / "findings.md").read_text(encoding="utf-8")
    report.write(
      folder, title=f"hybridlm: {s.c.name}", results=results, ngrams=counted, logs=logs,
      findings=studied,
      scores=Scores.load(inputs["calibrate"] / "scores.npz"),
      plan=Plan.load(inputs["plan"] / "plan.json"), facts=_facts(s, inputs, logs, results),
    )

  return Stage("report", {"name": s.c.name}, write, needs=names, version=4)


def _facts(s: Setup, inputs: Inputs, logs, results) -> dict[str, str]:
  """Returns what a reader needs to know beside the table."""
  measured = results["distilled"]["inside"]
  facts = {"Teacher": report.sizes(s.cfg)}
  for number in range(1, len(s.rounds) + 1):
    facts |= _cut_facts(inputs, rounds.label(number))
  facts |= _cut_facts(inputs, "")
  facts |= {
    "Scores": f"estimator `{s.c.calibrate.estimator}` on {s.c.calibrate.batches} × "
              f"{s.c.calibrate.batch} rows of {s.c.data.length} tokens",
    "Measured on": f"{measured['tokens']:,.0f} tokens ({measured['bytes']:,} bytes) of the "
                   f"{s.c.evaluate.split} split in domain",
  }
  for name, log in logs.items():
    made = log["summary"]
    facts[f"Training, {report.label(name)}"] = (
      f"{made['steps']} steps, {made['tokens']:,} tokens in {made['seconds']:.0f} s of "
      f"computing (compilation, validation and saves left out) on {made['machine']}"
    )
  if "correct" in inputs:
    facts["Corrected teacher"] = CORRECTED[s.c.correct.run]
  if "export" in inputs:
    made = artefacts.read_json(inputs["export"] / "export.json")
    facts["Exported"] = (
      f"a Hugging Face folder of family `{made['family']}`, {made['parameters']:,} parameters; "
      f"read back, its logits differ by {made['difference']:.1e} of the largest"
    )
  facts["Forward speed measured on"] = results["distilled"]["machine"]
  return facts


CORRECTED = {
  "before": "scored, cut and distilled from; agreement and KL are measured against it",
  "beside": "distilled from, the teacher itself was scored and cut; agreement and KL are measured "
            "against the corrected one",
}


def _cut_facts(inputs: Mapping[str, pathlib.Path], prefix: str) -> dict[str, Any]:
  """Returns what one cut left, how it was verified and repaired; a prefix is a round's label."""
  name = f"{prefix}_" if prefix else ""
  what = report.label(f"{name}pruned").partition(":")[0] + ": " if prefix else ""
  folder = inputs[f"{name}cut"]
  error = artefacts.read_json(folder / "verified.json")["masked_against_cut"]
  facts = {
    f"{what}Small model": report.sizes(artefacts.load_model_config(folder)),
    f"{what}Verified": f"masked and cut logits differ by at most {error:.1e} of the largest",
  }
  if f"{name}repair" in inputs:
    facts[f"{what}Repaired"] = pruning.repaired(inputs[f"{name}repair"])
  return facts
