r"""Times the real block kinds on this device, and holds their sum against whole models.

python -m experiments.timings --config=configs/quickstart.py \
  [--cuts="D=160,F=288,H=4;D=96,F=128"] [--contexts=256,1024] [--batches=1,4] [--turns=9] \
  [--out=docs/results/latency.md]

Models are the config's teacher and cuts of it; their weights are constants, as times do not depend
on values. A block's time is what three more copies of it add to a one-block model, each with
weights and state of its own, divided by three; the head's is what a one-block model takes beyond
its block, the decoding loop and its calls included. Timings are kept in the cache, by device, dtype
and versions.
"""

import functools
import pathlib
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import base
from experiments import (
  artefacts,
  bench_decode,
  cli,
  console,
  evaluation,
  exchange,
  memory,
  roofline,
  settings,
)
from experiments.scan_report import table as rows_of
from hybridlm import axes, config
from hybridlm.config import Block, ModelConfig
from hybridlm.decode import loop, sampling
from hybridlm.nn import cache as caches
from hybridlm.nn import serve
from hybridlm.prune import cost, latency, select
from hybridlm.prune.devices import Device
from hybridlm.prune.latency import PHASES, Entry, Table

COPIES, STEPS, TURNS = 3, 32, 7
LEAST = 0.1  # of a program's time over its blocks: what noise may take a block's time down to
SMALL_V = 16  # rows of the head of one-block models


class Case(NamedTuple):
  """One thing to time: a block of a model, or None for its head, in a phase."""

  cfg: ModelConfig
  block: Block | None
  phase: str
  context: int
  batch: int


def identity(dtype: str) -> dict[str, Any]:
  """Returns what timings depend on beside the model."""
  return {
    "device": evaluation.machine(), "dtype": dtype, "hybridlm": metadata.version("hybridlm"),
    "jaxlib": metadata.version("jaxlib"), "copies": COPIES, "steps": STEPS,
  }


def table(
  cache: pathlib.Path, cfgs: Sequence[ModelConfig], *, contexts: Sequence[int],
  batches: Sequence[int], turns: int,
) -> Table:
  """Returns the timings of this device with every block of some models in it, kept in `cache`.

  Measures what is not there yet; what was measured before a kill is not lost.
  """
  meta = identity(cfgs[0].dtype)
  path = cache / "timings" / f"{artefacts.digest(meta)[:12]}.json"
  found = Table.load(path) if path.is_file() else Table(meta)
  for case in cases(cfgs, contexts, batches):
    if not found.has(**case._asdict()):
      found = found.add([measure(case, found, turns)])
      found.save(path)
  return found


def cases(
  cfgs: Iterable[ModelConfig], contexts: Iterable[int], batches: Iterable[int]
) -> Iterator[Case]:
  """Yields every distinct block of some models, and their heads after them, in both phases."""
  places = [(phase, c, b) for phase in PHASES for c in contexts for b in batches]
  for cfg in cfgs:
    for block in (*(block for block, _ in cost.distinct(cfg)), None):
      for place in places:
        yield Case(cfg, block, *place)


def measure(case: Case, found: Table, turns: int) -> Entry:
  """Returns the timing of one block, or of a head where its model's blocks are in `found`."""
  cfg, block, phase, context, batch = case
  options = {"phase": phase, "context": context, "batch": batch}
  if block is None:
    first = min((latency.owning(b) for b, _ in cost.distinct(cfg)),
                key=lambda b: latency.seconds(cfg, b, found, **options))
    (both,) = whole([cfg.replace(blocks=(first,))], turns=turns, **options)
    taken = max(both - latency.seconds(cfg, first, found, **options), LEAST * abs(both))
  else:
    alone = cfg.replace(V=SMALL_V, vocabulary=None, tied=False)
    own = latency.owning(block)  # what reads another block's keys is timed behind one that has some
    runs = {
      copies: program(alone.replace(blocks=(own, *[block] * (copies - 1))), phase, context, batch)
      for copies in (1, 1 + COPIES)
    }
    seconds = roofline.take_turns(runs, turns)
    pairs = zip(seconds[1], seconds[1 + COPIES], strict=True)
    taken = statistics.median((many - one) / COPIES for one, many in pairs)
    taken = max(taken, LEAST * statistics.median(seconds[1 + COPIES]) / (1 + COPIES))
  work = latency.work(cfg, block, phase, context, batch)
  kind = latency.HEAD if block is None else block.symbol
  own = latency.sizes(cfg, block)
  return Entry(kind, own, phase, context, batch, taken, *map(float, work))


def program(cfg: ModelConfig, phase: str, context: int, batch: int):
  """Returns a function that runs one phase of a model once and gives its seconds.

  Prefill: the compiled `nn.serve.prefill`. Decode: a step of `nn.serve.step`, the mean of `STEPS`
  in one compiled loop, the state full up to `context`.
  """
  weights = constants(cfg)
  size = loop.bucket(context + STEPS)
  if phase == "prefill":
    token_BL = jnp.zeros((batch, context), jnp.int32)
    length_B = jnp.full(batch, context, jnp.int32)
    return lambda: roofline.timed(lambda: _prefill(cfg, weights, token_BL, length_B, size=size))
  held = [caches.empty(cfg, batch, size)]

  def steps() -> float:
    held[0] = held[0]._replace(length_B=jnp.full(batch, context, jnp.int32))

    def run():
      held[0], token_B = _steps(cfg, weights, held[0], jnp.zeros(batch, jnp.int32))
      return token_B

    return roofline.timed(run) / STEPS

  return steps


_prefill = jax.jit(serve.prefill, static_argnums=0, static_argnames="size")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _steps(cfg, weights, cache, token_B):
  def step(_, carry):
    logits_BV, cache = serve.step(cfg, weights, *carry)
    return cache, sampling.greedy(logits_BV)

  # The token comes back too: a model without a state would have nothing to compute for.
  return jax.lax.fori_loop(0, STEPS, step, (cache, token_B))


def constants(cfg: ModelConfig) -> dict[str, Any]:
  """Returns fused weights of a model, all 0.01: quick to make, and as fast as any others."""
  made: dict[str, Any] = {}
  for path, shape in axes.leaves(config.shapes(cfg)):
    *folders, name = path.split("/")
    place = made
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = jnp.full(shape, 0.01, jnp.float32)
  return jax.jit(serve.fuse, static_argnums=0)(cfg, made)


def whole(
  cfgs: Sequence[ModelConfig], phase: str, context: int, batch: int, turns: int
) -> list[float]:
  """Returns the seconds of whole models, which take turns, as decoding runs them.

  Decode: what 32 more tokens of `decode.loop.generate` take, divided by 32.
  """
  if phase == "prefill":
    runs = {index: program(cfg, phase, context, batch) for index, cfg in enumerate(cfgs)}
    seconds = roofline.take_turns(runs, turns)
    return [statistics.median(seconds[index]) for index in runs]
  prompt_BL = np.zeros((batch, context), np.int32)
  made = [functools.partial(_generate, cfg, constants(cfg)) for cfg in cfgs]
  return [ms / 1e3 for ms in bench_decode.step_times(made, prompt_BL, STEPS, turns)]


def _generate(cfg, weights, prompt_BL, steps):
  return loop.generate(serve.prefill, serve.step, cfg, weights, prompt_BL, steps=steps)


def without(timed: Table, cfg: ModelConfig) -> Table:
  """Returns the timings of other sizes than a model's own."""
  own = {latency.sizes(cfg, block) for block in (*cfg.blocks, None)}
  return Table(timed.meta, tuple(entry for entry in timed.entries if entry.sizes not in own))


def this_device(dtype: str, turns: int) -> Device:
  """Returns this device by its measured rates of products and memory."""
  peaks = roofline.measure(dtype, turns)
  return Device({dtype: peaks.matmul}, peaks.memory, 0.0)


def compare(
  models: dict[str, ModelConfig], timed: Table, *, contexts: Sequence[int], batches: Sequence[int],
  turns: int,
) -> list[list[str]]:
  """Returns a row a model, phase and place: measured, then each prediction and its error."""
  cfgs = list(models.values())
  bound = this_device(cfgs[0].dtype, turns)
  rows = []
  for phase in PHASES:
    for context in contexts:
      for batch in batches:
        options = {"phase": phase, "context": context, "batch": batch}
        measured = whole(cfgs, turns=turns, **options)
        for (name, cfg), found in zip(models.items(), measured, strict=True):
          sources = (timed, without(timed, cfg), bound)
          guesses = [latency.estimate(cfg, source, **options) for source in sources]
          cells = [f"{1e3 * guess:.2f} ({guess / found - 1:+.0%})" for guess in guesses]
          rows.append([name, phase, f"{batch} × {context}", f"{1e3 * found:.2f}", *cells])
  return rows


HEADER = ("model", "phase", "batch × context", "measured, ms", "sum of its blocks",
          "from other sizes", "roofline of measured rates")


def page(rows: Sequence[Sequence[str]], models: dict[str, ModelConfig], command: str) -> str:
  """Returns the report as Markdown."""
  lines = [f"* {name}: D={cfg.D}, `{cfg.pattern}`, {config.parameters(cfg):,} parameters, "
           f"{cfg.dtype}" for name, cfg in models.items()]
  errors = [[abs(float(row[at].split("(")[1].rstrip("%)"))) for row in rows] for at in (4, 5)]
  said = [f"{statistics.median(each):.0f} % in the median, {max(each):.0f} % at most"
          for each in errors]
  about = (
    f"Error of the sum of a model's own blocks: {said[0]}. Error where no block of the model's "
    f"sizes was measured, and a + b FLOPs + c bytes was fitted to the other models': {said[1]}."
  )
  return "\n".join(["# Latency: predicted and measured", "", f"`{command}` on "
                    f"{evaluation.machine()}.", "", *lines, "", *rows_of(HEADER, rows), "", about,
                    ""])


def cuts(text: str) -> list[dict[str, int]]:
  """Returns the targets of `D=160,F=288;D=96`.

  Raises:
    ValueError: an entry that is not a name and a whole number.
  """
  made = []
  for part in filter(None, text.split(";")):
    pairs = [entry.strip().partition("=")[::2] for entry in part.split(",")]
    if not all(value.isdigit() for _, value in pairs):
      raise ValueError(f"--cuts={part!r}: not entries like D=160, joined by commas")
    made.append({name: int(value) for name, value in pairs})
  return made


def _numbers(name: str, given: Sequence[str]) -> list[int]:
  if not given or not all(value.isdigit() and int(value) for value in given):
    raise ValueError(f"--{name}={','.join(given)}: not whole numbers of at least 1")
  return [int(value) for value in given]


def main(argv: Sequence[str]) -> None:
  """Measures what is not in the cache, prints the comparison, and writes it to `--out`.

  Raises:
    FileNotFoundError: a config or a teacher that is not there.
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("cuts", "", "Targets of cuts beside the config's.", flag_values=values)
  flags.DEFINE_list("contexts", ["256", "1024"], "Tokens a sequence.", flag_values=values)
  flags.DEFINE_list("batches", ["1", "4"], "Sequences.", flag_values=values)
  flags.DEFINE_integer("turns", TURNS, "Times that each is measured.", flag_values=values)
  flags.DEFINE_string("cache_dir", "workdir/cache", "Where timings are kept.", flag_values=values)
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if cli.read(values, argv, like=base.get_config()) is None:
    return
  if values.turns < 1:
    raise ValueError(f"--turns={values.turns} must be at least 1")
  place = {"contexts": _numbers("contexts", values.contexts),
           "batches": _numbers("batches", values.batches), "turns": values.turns}
  models = named(values.config, cuts(values.cuts))
  timed = table(pathlib.Path(values.cache_dir), list(models.values()), **place)
  command = " ".join(["python -m experiments.timings", *argv[1:]])
  text = page(compare(models, timed, **place), models, command)
  print(text)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())


def named(c: Any, more: Sequence[dict[str, int]]) -> dict[str, ModelConfig]:
  """Returns a config's teacher, the cut that its targets ask for, and others, by name.

  Raises:
    ValueError: targets that the teacher cannot meet.
  """
  ids = settings.corpus(c).tokenizer.V
  source = exchange.located("teacher.path", c.teacher.path) if c.teacher.path else None
  cfg = settings.model(c, ids) if source is None else settings.imported(c, source, ids)
  own = {name: value for name, value in settings.targets(c).items() if value is not None}
  made = {"teacher": cfg}
  for targets in ([own] if own else []) + list(more):
    said = " ".join(f"{name}={value}" for name, value in targets.items())
    made[said] = select.sized(cfg, targets)
  return made


if __name__ == "__main__":
  memory.keep_freed()
  sys.exit(console.call(main, sys.argv))
