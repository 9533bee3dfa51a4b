"""A step of distillation against its parts: the student's own step and the teacher's forward.

python -m experiments.bench_distil [--shape=quickstart] [--turns=9] [--out=docs/results/x.md]
python -m experiments.bench_distil --shape=nemotron_h --blocks=10 --batch=4 --length=8192

The three take turns on one device, so that whatever else the machine does slows all of them; times
are medians. How long a step waits for its data is taken from the training loop itself, on the text
of the quickstart. Then a few steps are traced: the largest costs are by file and pass.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

import hybridlm
from configs import quickstart, quickstart_toy
from experiments import artefacts, console, costs, evaluation, observing, report, roofline, settings
from hybridlm.config import PRESETS, ModelConfig
from hybridlm.prune import devices, select
from hybridlm.train import loop, observe, optim, state, step

# Times (1 + teacher / student) that a step of distillation may take, and share of it for data.
BOUND, WAIT = 1.10, 0.02
TRACED = 3  # steps
# The published 4B (arXiv 2504.11409, Table 1); `heads` a block.
PUBLISHED = {"D": 3072, "F": 12288, "heads": 112}
# Its trained model is 16 bytes a parameter, the teacher's weights are bfloat16.
SHAPES = ("quickstart", "nemotron_h", "toy")


class Pair(NamedTuple):
  """A teacher, a student, and batches for them."""

  teacher: ModelConfig
  student: ModelConfig
  batches: Any


class Steps(NamedTuple):
  """Functions without arguments that run until their result is there, by name; and the program of
  the distillation step."""

  calls: Mapping[str, Callable[[], Any]]
  program: Any


def main(argv: Sequence[str]) -> None:
  """Measures, prints the report, and writes it to `--out`.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_enum("shape", "quickstart", SHAPES, "Sizes of the two models.", flag_values=values)
  flags.DEFINE_integer("blocks", 10, "First blocks of nemotron_h.", 1, flag_values=values)
  flags.DEFINE_integer("batch", None, "Rows; unset: the config's.", 1, flag_values=values)
  flags.DEFINE_integer("length", None, "Tokens a row; unset: the config's.", 1, flag_values=values)
  flags.DEFINE_integer("turns", 9, "Times that each is measured.", 1, flag_values=values)
  flags.DEFINE_integer("steps", 20, "Steps of the loop.", 2, flag_values=values)
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  with tempfile.TemporaryDirectory() as folder:
    made = pair(values.shape, pathlib.Path(folder), values.blocks, values.batch, values.length)
    lines = measured(made, pathlib.Path(folder), values.turns, values.steps)
  command = " ".join(["python -m experiments.bench_distil", *argv[1:]])
  title = ["# A step of distillation", "", f"`{command}` on {evaluation.machine()}.", ""]
  text = "\n".join([*title, *lines, ""])
  print(text)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())


def pair(
  shape: str, cache: pathlib.Path, blocks: int, batch: int | None, length: int | None
) -> Pair:
  """Returns models of a shape and endless batches of the quickstart's text.

  Raises:
    ValueError: as `published` does.
  """
  c = (quickstart_toy if shape == "toy" else quickstart).get_config()
  c.distil.batch = batch or c.distil.batch
  c.data.length = length or c.data.length
  text = settings.corpus(c, folder=cache)
  both = published(blocks) if shape == "nemotron_h" else models(c, text.tokenizer.V)
  data = settings.data.train_batches(text, batch=c.distil.batch, length=c.data.length, seed=c.seed)
  return Pair(*both, data)


def models(c: ConfigDict, vocabulary: int) -> tuple[ModelConfig, ModelConfig]:
  """Returns the teacher and the student of a config."""
  teacher = settings.model(c, vocabulary)
  return teacher, select.sized(teacher, settings.targets(c))


def published(blocks: int) -> tuple[ModelConfig, ModelConfig]:
  """Returns the first blocks of the published 8B, and the same blocks of its 4B.

  Raises:
    ValueError: more blocks than there are.
  """
  whole = PRESETS["nemotron_h_8b"]
  if blocks > len(whole.blocks):
    raise ValueError(f"blocks={blocks}: the preset has {len(whole.blocks)}")
  teacher = whole.replace(blocks=whole.blocks[:blocks], dtype="bfloat16")
  return teacher, select.sized(teacher, PUBLISHED)


def measured(made: Pair, folder: pathlib.Path, turns: int, count: int) -> list[str]:
  """Returns the report of a pair, in Markdown."""
  optimizer = optim.make(peak=1e-4, steps=10**6)
  teach = hybridlm.distillation_loss(made.student, made.teacher)
  advance = step.make_step(teach, optimizer)
  frozen = jax.tree.map(
    lambda leaf: leaf.astype(made.teacher.dtype), hybridlm.init(made.teacher, seed=0))
  start = state.create(hybridlm.init(made.student, seed=1), optimizer)
  batch = jax.device_put(next(made.batches))
  turned = take_turns(made, optimizer, advance, start, frozen, batch)
  calls = {
    name: functools.partial(roofline.timed, call) for name, call in turned.calls.items()}
  found = {
    name: statistics.median(spent) for name, spent in roofline.take_turns(calls, turns).items()}
  largest, program = traced(turned, folder), turned.program
  del turned, calls  # the state they train
  split = looped(made, program, optimizer, frozen, count)
  return [*sizes(made, batch), "", *verdict(found, split), "",
          *speed(made, batch, found["distillation"]), "", *largest]


def take_turns(made: Pair, optimizer, advance, start, frozen, batch) -> Steps:
  """Returns the three calls that are compared; both kinds of step train the same student."""
  alone = step.make_step(hybridlm.language_loss(made.student), optimizer)
  forward = jax.jit(hybridlm.language_loss(made.teacher))
  program = advance.lower(start, frozen, batch).compile()
  held = [start]

  def call(function, *rest):
    after, values = function(held.pop(), *rest)
    held.append(after)
    return after, values

  return Steps({
    "distillation": lambda: call(program, frozen, batch),
    "student": lambda: call(alone, None, batch),
    "teacher": lambda: forward(frozen, None, batch),
  }, program)


def traced(turned: Steps, folder: pathlib.Path) -> list[str]:
  """Returns the three largest costs of the distillation step, from a trace."""
  with jax.profiler.trace(str(folder / "trace")):
    for _ in range(TRACED):
      jax.block_until_ready(turned.calls["distillation"]())
  (path,) = (folder / "trace").rglob("*.xplane.pb")
  try:
    found = costs.largest(path, turned.program.as_text(), 3)
  except ValueError as error:  # what was measured until here is worth printing
    return [str(error)]
  rows = [[place, f"{share:.1%}"] for place, share in found]
  return ["The largest costs, of the time the device computes; forward: of both models.", "",
          report.table(["where", "share"], rows)]


def looped(made: Pair, program, optimizer, frozen, count: int) -> dict[str, Any]:
  """Returns the split of `count` steps of the training loop, whose results nobody looks at before
  the last; a step before them is left out."""
  after, history = state.create(hybridlm.init(made.student, seed=2), optimizer), []
  for steps in (1, 1 + count):
    after, history = loop.run(
      program, after, made.batches, steps=steps, frozen=frozen, log_every=steps, progress="off",
    )
  return observing.split(history)


def sizes(made: Pair, batch) -> list[str]:
  """Returns the two models and the batch in words."""
  rows, length = batch["token_BL"].shape
  return [f"* {name}: {report.sizes(cfg)}, {cfg.dtype}" for name, cfg in
          (("teacher", made.teacher), ("student", made.student))] + [
            f"* {rows} rows of {length} tokens; AdamW in float32"]


def verdict(found: Mapping[str, float], split: Mapping[str, Any]) -> list[str]:
  """Returns the times, their ratio beside its bound, and the share that waits for data."""
  ideal = 1 + found["teacher"] / found["student"]
  ratio, wait = found["distillation"] / found["student"], split["data"] / split["stepping"]
  rows = [
    ["student's own step (ms)", f"{1e3 * found['student']:.2f}", ""],
    ["teacher's forward and loss (ms)", f"{1e3 * found['teacher']:.2f}", ""],
    ["distillation step (ms)", f"{1e3 * found['distillation']:.2f}", ""],
    ["distillation / student's step", f"{ratio:.3f}",
     f"{BOUND:.2f} × (1 + teacher / student) = {BOUND * ideal:.3f}"],
    ["data wait of a step in the loop", f"{wait:.2%}", f"{WAIT:.0%}"],
  ]
  over = [name for name, kept in (("step", ratio <= BOUND * ideal), ("wait", wait < WAIT))
          if not kept]
  judged = f"Over its bound: {' and '.join(over)}." if over else "Both bounds are kept."
  return [report.table(["", "measured", "at most"], rows), "",
          f"Distillation takes {ratio / ideal:.3f} of its parts' sum. {judged}"]


def speed(made: Pair, batch, seconds: float) -> list[str]:
  """Returns tokens a second of the distillation step, and the share of the device's peak."""
  rows, length = batch["token_BL"].shape
  watch = observing.watch(made.student, made.teacher, ())
  chip = devices.of_kind(jax.devices()[0].device_kind)
  peak = None if chip is None else chip.flops.get(made.student.dtype)
  used = observe.utilisation(watch._replace(peak=peak), [(rows, length)], seconds)
  text = f"{rows * length / seconds:,.0f} tokens a second"
  if "mfu" in used:
    text += (f"; MFU {used['mfu']:.1%} for the student's forward and backward, and "
             f"{used['teacher_mfu']:.1%} for the teacher's forward")
  else:
    text += "; the device has no published peak here, so no MFU"
  lines = [text + "."]
  if jax.default_backend() != "gpu":
    lines += ["", "Tokens a second, MFU and costs on a GPU: not measured on a GPU."]
  return lines


if __name__ == "__main__":
  jnp.zeros(()).block_until_ready()  # the backend starts before anything is timed
  sys.exit(console.call(main, sys.argv))
