"""Models of one size, trained alike, each a change to another: one table, one picture.

python -m experiments.roadmap --config=configs/evidence/hymba.py [--config.KEY=VALUE] [--workdir=..]

The models are `assess.members`, a sweep of `experiments.assess`, for `assess.seeds` seeds; what is
finished is not done again. Decoding is timed at the end, all models taking turns.
"""

import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import (
  artefacts,
  assess,
  cli,
  console,
  evaluation,
  members,
  memory,
  plots,
  report,
  settings,
  sweep,
  sweep_table,
  sweeping,
)
from hybridlm import api, config
from hybridlm.config import ModelConfig
from hybridlm.decode import loop
from hybridlm.nn import serve

RESULTS = pathlib.Path("docs", "results")
SECONDS = "teacher.log.summary.seconds"
HEADER = ("model", "parameters", "bits/byte", "recall", "state, MB", "decode tokens/s",
          "training s")


class Row(NamedTuple):
  """One model over its seeds: parameters, and values of every seed.

  state: bytes of its decode state.  speed: decoded tokens a second.
  """

  name: str
  parameters: int
  bits: tuple[float, ...]
  recall: tuple[float, ...]
  state: int
  seconds: tuple[float, ...]
  speed: float


def main(argv: Sequence[str]) -> None:
  """Trains what is missing and writes the table and the picture into `docs/results`.

  Raises:
    ValueError: models of other sizes, or a value that is out of range, before anything runs; or
      members that failed.
    FileNotFoundError: there is no such config.
  """
  job = cli.parse(argv)
  if job is None:
    return
  run = job.config.assess
  if not run.members:
    raise ValueError("assess.members is empty: name models as --sweep takes them, 'list:..'")
  if not run.recall:
    raise ValueError("assess.recall is empty: name a source of kind 'recall'")
  rest = [arg for arg in argv[1:] if arg.partition("=")[0] not in sweep.PLACES]
  seeds = ",".join(str(job.config.seed + number) for number in range(run.seeds))
  found = sweeping.members([run.members])
  models = {each.name: _model(rest, each) for each in found}
  check_pairs(run.pairs, models)
  print(sizes(models, run.tolerance, run.context))
  columns = _columns(run.recall[0])
  sweep.main([
    argv[0], *(arg for arg in rest if not arg.startswith("--config.seed=")),
    "--command=assess", f"--sweep={run.members}", f"--sweep=seed={seeds}",
    f"--columns={','.join(columns.values())}", f"--workdir={job.workdir}",
    f"--cache_dir={job.cache}", *(["--dry_run"] if job.dry_run else []),
  ])
  if not job.dry_run:
    speeds = decode_speeds(_trained(job, found), run.context, run.steps, run.turns)
    table = artefacts.read_json(job.workdir / sweep.PLAIN)
    rows = [row(each.name, models[each.name], table, columns, run.context, speeds[each.name])
            for each in found]
    line = shlex.join(["python", "-m", "experiments.roadmap", *argv[1:]])
    print(write(job, rows, line))


def _columns(source: str) -> dict[str, str]:
  """Returns the columns of the sweep's table by what they are here."""
  return {"bits": "assess.text.bits_per_byte", "recall": f"assess.recall.{source}.accuracy",
          "seconds": SECONDS}


def _model(rest: Sequence[str], member: sweeping.Member) -> ModelConfig:
  """Returns the config of a member's model; nothing is computed.

  Raises:
    ValueError: values that make no model.
  """
  line = [member.name, *rest, *(f"--config.{key}={value}" for key, value in member.settings)]
  c = cli.parse(line).config
  return settings.model(c, settings.corpus(c).tokenizer.V)


def sizes(models: Mapping[str, ModelConfig], tolerance: float, context: int) -> str:
  """Returns a table of the models' sizes.

  Raises:
    ValueError: parameters that differ by more than a share of the fewest.
  """
  counts = {name: config.parameters(cfg) for name, cfg in models.items()}
  least, most = (pick(counts, key=counts.get) for pick in (min, max))
  if counts[most] > (1 + tolerance) * counts[least]:
    raise ValueError(
      f"assess.members: {most} has {counts[most]:,} parameters, {least} {counts[least]:,}; for a "
      f"comparison they may differ by assess.tolerance={tolerance}")
  rows = []
  for name, cfg in models.items():
    held = assess.state(cfg, context)["state_bytes"]
    rows.append([name, report.sizes(cfg), f"{held:,}"])
  return report.table(["model", "sizes", f"bytes behind {context:,} tokens"], rows)


def check_pairs(pairs: Sequence[Sequence[str]], models: Mapping[str, Any]) -> None:
  """Raises unless pairs are two names of models each.

  Raises:
    ValueError: names the pair.
  """
  for pair in pairs:
    if isinstance(pair, str) or len(pair) != 2 or not set(pair) <= set(models):
      raise ValueError(f"assess.pairs={tuple(pairs)}: {pair!r} is no pair of models; there are "
                       + ", ".join(models))


def _trained(job: cli.Job, found: Sequence[sweeping.Member]) -> dict[str, Any]:
  """Returns the first seed's trained models, by name."""
  made = {}
  for member in found:
    folder = job.workdir / f"{member.name},seed={job.config.seed}" / members.JOB
    teacher = sweep_table.folders(folder, job.cache)["teacher"]
    made[member.name] = artefacts.load_model(teacher)
  return made


def decode_speeds(
  models: Mapping[str, tuple[ModelConfig, Any]], context: int, steps: int, turns: int
) -> dict[str, float]:
  """Returns tokens a second of decoding one sequence up to a context, medians of turns.

  Whatever else the machine does slows all models alike.
  """
  streams, seconds = {}, {name: [] for name in models}
  total = steps * (turns + 2)
  for name, (cfg, params) in models.items():
    shape = (1, max(context - total, 1))
    prompt_BL = np.random.default_rng(0).integers(0, cfg.real_vocabulary, shape).astype(np.int32)
    streams[name] = loop.stream(
      serve.prefill, serve.step, cfg, api.fuse(cfg, params), prompt_BL, steps=total, every=steps)
    next(streams[name])
  for turn in range(turns + 1):
    for name, each in streams.items():
      start = time.perf_counter()
      next(each)
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return {name: steps / statistics.median(taken) for name, taken in seconds.items()}


def row(
  name: str, cfg: ModelConfig, table: Mapping[str, Any], columns: Mapping[str, str], context: int,
  speed: float,
) -> Row:
  """Returns a model's row out of the sweep's table."""
  mine = [each["values"] for each in table["members"] if each["name"].split(",")[0] == name]
  values = {key: tuple(each[column] for each in mine) for key, column in columns.items()}
  held = assess.state(cfg, context)["state_bytes"]
  return Row(name, config.parameters(cfg), state=held, speed=speed, **values)


def over(values: Sequence[float], form: str) -> str:
  """Returns the mean, and its standard deviation over seeds where there are several."""
  mean = format(statistics.fmean(values), form)
  return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def verdict(one: Row, other: Row, chance: float) -> str:
  """Returns how a model stands against another: seed by seed, and the bytes that it holds.

  Where neither recalls twice as often as by chance, nothing is said of recall.
  """
  bits, recalled = (
    [a - b for a, b in zip(getattr(one, key), getattr(other, key), strict=True)]
    for key in ("bits", "recall")
  )
  said = f"{', '.join(f'{each:+.1%}' for each in recalled)} recall"
  if max(statistics.fmean(each.recall) for each in (one, other)) < 2 * chance:
    said = "recall of both is near chance, so nothing is said of it"
  return (f"{one.name} against {other.name}: {', '.join(f'{each:+.3f}' for each in bits)} bits a "
          f"byte; {said}; {other.state / one.state:.2f} times fewer bytes of decode state.")


def write(job: cli.Job, rows: Sequence[Row], line: str) -> str:
  """Writes `NAME_study.md` and its picture; returns the page."""
  c, named = job.config, {each.name: each for each in rows}
  run, source = c.assess, c.data.sources[c.assess.recall[0]]
  chance = assess.chance(c, run.recall[0])
  cells = [
    [each.name, f"{each.parameters:,}", over(each.bits, ".3f"), over(each.recall, ".1%"),
     f"{each.state / 1e6:.3f}", f"{each.speed:,.0f}", over(each.seconds, ".0f")] for each in rows]
  path = RESULTS / f"{c.name}_study.md"
  path.parent.mkdir(parents=True, exist_ok=True)
  axes = {"bits/byte of text": {each.name: (each.state, statistics.fmean(each.bits))
                                for each in rows},
          "recall": {each.name: (each.state, statistics.fmean(each.recall)) for each in rows}}
  picture = plots.points(axes, path.with_suffix(".png"),
                         x_label=f"bytes of decode state behind {run.context:,} tokens")
  tokens = c.teacher.steps * c.teacher.batch * c.data.length
  mixed = "; ".join(
    f"from step {step} {', '.join(f'{name} {share:g}' for name, share in weights)}"
    for step, weights in c.data.phases)
  text = [
    f"# {c.name}_study", "", f"    {line}", "", f"Made on {evaluation.machine()}.", "",
    f"{tokens:,} tokens each ({mixed}), rows of {c.data.length}; {run.seeds} "
    f"{'seed' if run.seeds == 1 else 'seeds, mean ± standard deviation'}. Recall: {source.pairs} "
    f"pairs, asked for {source.distance} symbols later and more, {chance:.1%} by chance. "
    f"State: what decoding remembers behind {run.context:,} tokens, 16 bits a number. Decoding: "
    f"one sequence up to there, float32, all models taking turns.", "",
    report.table(HEADER, cells), "",
    *(f"* {verdict(named[one], named[other], chance)}" for one, other in run.pairs), "",
    f"![worth against decode state]({picture.name})", "",
  ]
  artefacts.write_bytes(path, "\n".join(text).encode())
  return "\n".join([*text, f"table: {path}"])


def start(argv: Sequence[str]) -> int:
  """Returns the exit code of the command."""
  memory.keep_freed()
  return console.call(main, argv)


if __name__ == "__main__":
  sys.exit(start(sys.argv))
