"""How fast candidates are scored as one masked program, beside building and compiling each of them.

python -m experiments.bench_search --config=configs/evidence/search.py

Random candidates of the config's space are scored as a search does it. Some of them, spread over
the range of losses, are then really cut, and their own programs compiled and run on the same
batches; the two losses must be equal. Compiled programs are not kept between runs.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import artefacts, cli, evaluation, pipeline, report, settings
from hybridlm import bind
from hybridlm.distill import loss
from hybridlm.prune import cut, select, space
from hybridlm.prune.scores import Scores
from hybridlm.prune.search import masked

SAMPLE = 10
RESULT = pathlib.Path("docs", "results", "search.md")


class Found(NamedTuple):
  """What both ways gave: losses (kl, ce) and seconds, and how many programs the masks needed."""

  masked: dict[str, np.ndarray]
  cut: dict[str, np.ndarray]
  sample: np.ndarray
  first: float
  rest: float
  apart: list[float]
  programs: int


def main(job: cli.Job) -> None:
  """Measures, prints the result and writes it below the working directory."""
  folders = pipeline.execute(job, "calibrate")
  if not folders:
    return
  jax.config.update("jax_enable_compilation_cache", False)
  c = job.config
  s = settings.setup(c, settings.mesh(c), cache=job.cache)
  model = artefacts.load_model(folders["teacher"])
  scores = Scores.load(folders["calibrate"] / "scores.npz")
  run = c.search
  batches = s.held_out(s.inside, run.split, run, run.batches)
  sizes = space.Uniform(space.check(model[0], run.space.to_dict()))
  draws = space.draws(sizes, c.seed)
  targets = [sizes.targets(next(draws)) for _ in range(min(run.candidates, sizes.size))]
  found = measure(model, scores, batches, targets, SAMPLE)
  command = f"python -m experiments.bench_search --config={job.file}"
  tokens = sum(batch["token_BL"].size for batch in batches)
  text = markdown(found, command, tokens, sizes.size)
  print(text)
  artefacts.write_bytes(RESULT, text.encode())
  print(f"written: {RESULT}")


def measure(model, scores: Scores, batches, targets: Sequence[Any], sample: int) -> Found:
  """Returns losses and seconds of all candidates masked, and of `sample` of them cut.

  Args:
    model: config and parameters of the teacher.
    scores: of the teacher.
    batches: what candidates are scored on.
    targets: of the candidates.
    sample: candidates that are really cut, spread evenly over the ranks of the masked losses.
  """
  cfg, params = model
  before, start = masked.programs(), time.perf_counter()
  scorer = masked.Scorer(cfg, bind.apply_hidden, params, batches)
  results = [scorer(select.plan(cfg, scores, targets[0]))]
  middle = time.perf_counter()
  results += [scorer(select.plan(cfg, scores, each)) for each in targets[1:]]
  end = time.perf_counter()
  losses = {name: np.array([each[name] for each in results]) for name in ("kl", "ce")}
  ranks = np.argsort(losses["kl"], kind="stable")
  picked = ranks[np.linspace(0, len(ranks) - 1, min(sample, len(ranks))).astype(int)]
  teacher = [bind.apply_hidden(cfg, params, batch) for batch in batches]
  pairs = [_apart(model, scores, batches, teacher, targets[index]) for index in picked]
  return Found(
    losses, {name: np.array([each[name] for each, _ in pairs]) for name in ("kl", "ce")}, picked,
    middle - start, end - middle, [seconds for _, seconds in pairs], masked.programs() - before,
  )


def _apart(model, scores, batches, teacher, targets) -> tuple[dict[str, float], float]:
  """Returns the losses of one candidate cut and compiled, and the seconds that took."""
  cfg, params = model
  start = time.perf_counter()
  small_cfg, small = cut.cut(cfg, params, select.plan(cfg, scores, targets))

  def sums(small, batch, teacher):
    return loss.sums(
      *bind.apply_hidden(small_cfg, small, batch), batch["target_BL"], batch["weight_BL"],
      teacher_BLD=teacher[0], teacher_head_DV=teacher[1], ce=1.0,
      vocabulary=small_cfg.real_vocabulary,
    )

  program = jax.jit(sums)
  parts = [
    jax.device_get(program(small, jax.tree.map(jnp.asarray, dict(batch)), each))
    for batch, each in zip(batches, teacher, strict=True)
  ]
  seconds = time.perf_counter() - start
  weight = sum(float(part["weight"]) for part in parts)
  return {name: sum(float(part[name]) for part in parts) / weight for name in ("kl", "ce")}, seconds


def markdown(found: Found, command: str, tokens: int, size: int) -> str:
  """Returns the result as a page: speeds, their ratio, and how well the losses agree."""
  count = len(found.masked["kl"])
  ours = 60 * count / (found.first + found.rest)
  theirs = 60 * len(found.apart) / sum(found.apart)
  rows = [
    ["masked, one program", f"{count}", f"{found.programs}", f"{found.first + found.rest:.1f}",
     f"{ours:.0f}"],
    ["cut, each with its own program", f"{len(found.apart)}", f"{len(found.apart)}",
     f"{sum(found.apart):.1f}", f"{theirs:.1f}"],
  ]
  lines = [
    "# search", "", f"    {command}", "", f"Made on {evaluation.machine()}.", "",
    f"{count} random candidates of {size:,} are scored on {tokens:,} tokens, plan and mask "
    f"included. Every time includes compilation ({found.first:.1f} s for the masks' program with "
    "the teacher's hidden states and the first candidate).", "",
    report.table(["way", "candidates", "programs", "seconds", "candidates a minute"], rows), "",
    f"One program is {ours / theirs:.1f} times as fast, and "
    f"{60 * (count - 1) / found.rest / theirs:.1f} times once it is compiled.", "",
  ]
  for name, words in (("kl", "KL to the teacher"), ("ce", "cross-entropy")):
    one, other = found.masked[name][found.sample], found.cut[name]
    rank = stats.spearmanr(one, other).statistic
    lines.append(
      f"* {words}: {one.min():.3f} to {one.max():.3f} nats; masked and cut losses differ by at "
      f"most {np.abs(one - other).max():.1e} nats, Spearman {rank:.4f} over {len(other)} models."
    )
  return "\n".join([*lines, ""])


if __name__ == "__main__":
  cli.start(main)
