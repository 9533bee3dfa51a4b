"""The small model of a config trained in float32, bfloat16 and FP8, and held in fewer bits.

python -m experiments.bench_precision --config=configs/evidence/precision.py [--config.seed=0]

Every run starts from the same parameters a seed and sees the same batches; only
`distil.precision` differs. The float32 model of the first seed is then held in fewer bits, as a
teacher may be. A run that is there already is not done again. Where the packages that compile for
an H200 are installed, one MLP of the 8B is compiled for it, forward and backward.
"""

import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import hybridlm
from experiments import (
  ahead,
  artefacts,
  cli,
  evaluation,
  plots,
  precision,
  settings,
  teaching,
  training,
)
from experiments.settings import Setup
from hybridlm.config import PRESETS
from hybridlm.nn import lm, mlp
from hybridlm.nn.held import hold
from hybridlm.train import step

RESULT = pathlib.Path("docs", "results", "fp8.md")
PRECISIONS = ("float32", "bfloat16", "fp8")
SEEDS = 2
TAIL = 0.25  # share of the tokens whose training loss is averaged, at the end: a batch is noise
# Tokens of the step that is compiled for an H200.
ROWS, LENGTH = 1, 8192


def main(job: cli.Job) -> None:
  """Trains what is missing and writes `docs/results/fp8.md` below the working directory.

  Raises:
    ValueError: a value of the config that is out of range.
  """
  c = job.config
  s = settings.setup(c, settings.mesh(c), cache=job.cache)
  if s.small is None:
    raise ValueError("plan.path='search': name the small model's sizes in targets instead")
  precision.student(s.small, _run(c, "fp8"))
  logs = {}
  for seed, name in itertools.product(range(SEEDS), PRECISIONS):
    folder = job.workdir / f"{name}_{seed}"
    train(s, folder, _run(c, name), c.seed + seed)
    logs[name, seed] = artefacts.read_json(folder / training.LOG)
    print(f"{name}, seed {seed}: {_final(logs[name, seed]):.4f}", flush=True)
  RESULT.parent.mkdir(parents=True, exist_ok=True)
  picture = plots.curves(
    {f"seed {seed}": [_curve(name, logs[name, seed]) for name in PRECISIONS]
     for seed in range(SEEDS)},
    {}, RESULT.with_suffix(".png"), y_label="cross-entropy, nats a token",
  )
  lines = [
    "# fp8", "", f"    python -m experiments.bench_precision --config={job.file}", "",
    f"Made on {evaluation.machine()}.", "", *curves_table(c, s, logs), "",
    f"![loss curves]({picture.name})", "", *held_table(s, job.workdir / f"{PRECISIONS[0]}_0"), "",
    *ahead_table(),
  ]
  artefacts.write_bytes(RESULT, ("\n".join(lines) + "\n").encode())
  print("\n".join(lines))


def _run(c: ConfigDict, name: str) -> ConfigDict:
  """Returns the values of a run in a precision."""
  run = ConfigDict(c.distil.to_dict())
  run.precision = name
  return run


def train(s: Setup, folder: pathlib.Path, run: ConfigDict, seed: int) -> None:
  """Trains the small model on text from parameters that the seed draws, in a run's precision."""
  student = precision.student(s.small, run)
  recipe = training.Recipe(
    cfg=s.small, params=hybridlm.init(s.small, seed=seed), loss_fn=hybridlm.language_loss(student),
    frozen=None, train=s.train_batches(run, seed), valid=s.validation(run), computes=student,
  )
  values = {"training": teaching.recipe(run), "seed": seed, "model": s.small.to_dict()}
  folder.mkdir(parents=True, exist_ok=True)
  same = artefacts.digest(values)
  if (folder / "run.json").is_file() and artefacts.read_json(folder / "run.json") != same:
    raise ValueError(f"{folder} holds a run of other values; delete it or choose another workdir")
  artefacts.write_json(folder / "run.json", same)
  training.train(folder, recipe, run, s.grid)


def _final(log: Mapping[str, Any]) -> float:
  return log["valid"][-1]["ce"]


def _tail(log: Mapping[str, Any]) -> float:
  """Returns the mean loss of the last tokens; each point is the mean since the one before it."""
  points = log["train"]
  last = [
    (point["ce"], point["tokens"] - before["tokens"])
    for before, point in itertools.pairwise(points)
    if before["tokens"] >= (1 - TAIL) * points[-1]["tokens"]
  ]
  return sum(ce * tokens for ce, tokens in last) / sum(tokens for _, tokens in last)


def _curve(name: str, log: Mapping[str, Any]) -> plots.Curve:
  train, valid = ([(p["tokens"], p["ce"]) for p in log[key]] for key in ("train", "valid"))
  return plots.Curve(name, train, valid)


def _spread(values: Sequence[float]) -> str:
  return f"{statistics.fmean(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"


def curves_table(
  c: ConfigDict, s: Setup, logs: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[str]:
  """Returns a row a precision: its losses at the end, and how far from bfloat16's, seed by seed."""
  run, seeds, emulated = c.distil, range(SEEDS), jax.default_backend() == "cpu"
  inside = len(s.small.blocks) - 2 * run.wide_ends
  lines = [
    f"`{s.small.pattern}` of {hybridlm.config.parameters(s.small):,} parameters on text, "
    f"{run.steps} steps of {run.batch} × {c.data.length} tokens, {SEEDS} seeds; FP8 in {inside} of "
    f"{len(s.small.blocks)} blocks, the others and all that is no projection in bfloat16. Losses "
    f"are nats a token: validation at the last step, and the mean of the last {TAIL:.0%} of the "
    "training tokens. Differences are seed by seed, with the smallest and the largest.", "",
    "| precision | validation | minus bfloat16 | training | minus bfloat16 | tokens/s |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  for name in PRECISIONS:
    cells = [name]
    for measure in (_final, _tail):
      mine = [measure(logs[name, seed]) for seed in seeds]
      base = [measure(logs["bfloat16", seed]) for seed in seeds]
      cells += [
        f"{statistics.fmean(mine):.4f}",
        "–" if name == "bfloat16" else _spread([a - b for a, b in zip(mine, base, strict=True)]),
      ]
    speeds = [logs[name, seed]["summary"]["tokens_per_second"] for seed in seeds]
    cells.append("–" if emulated else f"{statistics.median(speeds):,.0f}")
    lines.append(f"| {' | '.join(cells)} |")
  if emulated:
    lines += ["", "A CPU emulates eight bits: speed is not measured here. On a GPU it is."]
  return lines


def held_table(s: Setup, folder: pathlib.Path) -> list[str]:
  """Returns a row for each way to hold a trained model: bytes, loss, and KL to the whole one."""
  cfg, params = artefacts.load_model(folder)
  batches = s.validation(s.c.distil)
  lines = [
    "The float32 model of the first seed, held as a teacher may be (one scale an output channel; "
    "embedding and head in bfloat16), on the same validation text:", "",
    "| weights | bytes | share | loss | KL to float32 |", "| --- | ---: | ---: | ---: | ---: |",
  ]
  for name in ("", *precision.TEACHERS[1:]):
    run = ConfigDict({"teacher_precision": name})
    held_cfg, tree = precision.teacher(cfg, params, run)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    whole = size if not name else whole
    evaluate = step.make_eval(hybridlm.distillation_loss(held_cfg, cfg, ce=1.0))
    found = evaluate(tree, params, batches)
    lines.append(
      f"| {name or 'float32'} | {size:,} | {size / whole:.2f} | {found['ce']:.4f} | "
      f"{max(found['kl'], 0):.1e} |"
    )
  return lines


def program(*, quantize: str):
  """Returns `(fn, argument shapes)` of an MLP of the 8B with its gradients: what compilers get."""
  cfg = PRESETS["nemotron_h_8b"].replace(dtype="bfloat16", quantize=quantize)
  block = next(block for block in cfg.blocks if block.symbol == "-")
  sizes = {"D": cfg.D, "F": block.F}
  shapes = {
    name: jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in name[-2:]), jnp.float32)
    for name in block.leaves
  }
  x_BLD = jax.ShapeDtypeStruct((ROWS, LENGTH, cfg.D), jnp.bfloat16)

  def gradients(leaves, x_BLD, y_bar_BLD):
    y_BLD, back = jax.vjp(lambda *a: mlp.mix(cfg, block, *a)[0], leaves, x_BLD)
    return y_BLD, *back(y_bar_BLD)

  return gradients, (shapes, x_BLD, x_BLD)


def teacher_program(*, held: str, blocks: int):
  """Returns `(fn, argument shapes)` of the forward pass of MLPs of the 8B with held weights."""
  cfg = PRESETS["nemotron_h_8b"]
  block = next(block for block in cfg.blocks if block.symbol == "-")
  cfg = cfg.replace(blocks=(block,) * blocks, V=1024, dtype="bfloat16", held=held)
  tree = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    hybridlm.config.shapes(cfg.replace(held="float32")), is_leaf=lambda v: isinstance(v, tuple),
  )
  token_BL = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

  def hidden(params, token_BL):
    return lm.forward(cfg, params, token_BL, output="hidden")[0][0]

  return hidden, (jax.eval_shape(lambda params: hold(cfg, params), tree), token_BL)


def ahead_table() -> list[str]:
  """Returns what parts of the 8B are compiled to for an H200: products, and bytes of memory."""
  absent = ahead.missing("h200")
  if absent is not None:
    return [f"Not compiled for an H200: {absent}"]
  names, here = ("none", "fp8"), "experiments.bench_precision"
  teachers = [(held, blocks) for held in precision.TEACHERS[1:] for blocks in (2, 6)]
  jobs = [ahead.Job(f"{here}:program", {"quantize": name}) for name in names]
  jobs += [
    ahead.Job(f"{here}:teacher_program", {"held": held, "blocks": blocks})
    for held, blocks in teachers
  ]
  reports = ahead.compile_jobs("h200", jobs)
  for job, report in zip(jobs, reports, strict=True):
    if "error" in report:
      raise RuntimeError(f"{job.options} does not compile for an H200: {report['error']}")
  lines = [
    f"An MLP of the 8B, {ROWS} × {LENGTH} tokens, forward and backward, compiled for an H200:", "",
    "| quantize | products | temporaries, MiB |", "| --- | --- | ---: |",
  ]
  for name, report in zip(names, reports, strict=False):
    products = ", ".join(f"{count} of {what}" for what, count in sorted(report["products"].items()))
    lines.append(f"| {name} | {products} | {math.ceil(report['temporaries'] / 2**20)} |")
  lines += [
    "", "Only the forward pass of such MLPs, as a teacher runs them: what is restored in full does "
    "not grow with the blocks.", "",
    "| weights | MLPs | arguments, MiB | temporaries, MiB |", "| --- | ---: | ---: | ---: |",
  ]
  for (held, blocks), report in zip(teachers, reports[len(names):], strict=True):
    sizes = (math.ceil(report[key] / 2**20) for key in ("arguments", "temporaries"))
    lines.append(f"| {held} | {blocks} | {' | '.join(map(str, sizes))} |")
  return lines


if __name__ == "__main__":
  cli.start(main)
