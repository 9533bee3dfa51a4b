"""Students of a depth cut, distilled by logits alone and by activations too, over seeds.

python -m experiments.bench_intermediate --config=configs/evidence/intermediate.py

Every seed pretrains a teacher and cuts it to `targets.blocks`; its students start from the same
parameters, see the same batches and differ in `distil.intermediate` alone. What is finished is in
the workdir and not done again.
"""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import hybridlm
from experiments import artefacts, cli, evaluation, settings, training
from experiments.settings import Setup
from hybridlm.config import ModelConfig
from hybridlm.nn import stack
from hybridlm.prune import trees
from hybridlm.prune.plan import Plan
from hybridlm.train import loop, state, step

RESULT = pathlib.Path("docs", "results", "intermediate.md")
VARIANTS = {
  "logits": (), "logits, out": ("out",), "logits, out, mix, state": ("out", "mix", "state"),
}
SEEDS = 3
Found = Mapping[str, Mapping[str, float]]


class Programs(NamedTuple):
  """What is compiled once for all seeds.

  teach, learn: training steps of the teacher, and of its students.  alone, judge: means over test
  batches of the teacher, and of a student beside it.
  """

  teach: Callable[..., Any]
  learn: Mapping[str, Callable[..., Any]]
  alone: Callable[..., Mapping[str, float]]
  judge: Callable[..., Mapping[str, float]]


def main(job: cli.Job) -> None:
  """Trains what is missing and writes `docs/results/intermediate.md` below the working directory.

  Raises:
    ValueError: a value of the config that is out of range, or blocks that are not listed.
  """
  c = job.config
  if not isinstance(c.targets.blocks, tuple):
    raise ValueError(f"targets.blocks={c.targets.blocks!r}: list the blocks that stay")
  s = settings.setup(c, settings.mesh(c), cache=job.cache)
  if job.dry_run:
    return
  made, results = programs(s), []
  same = artefacts.digest(settings.plain(c))
  for seed in range(SEEDS):
    path = job.workdir / f"seed{seed}.json"
    results.append(once(path, same, lambda seed=seed: one_seed(s, made, seed)))
    print(f"seed {seed}: {results[-1]}", flush=True)
  command = f"python -m experiments.bench_intermediate --config={job.file}"
  text = "\n".join([f"# {c.name}", "", f"    {command}", "", *page(s, results), ""])
  artefacts.write_bytes(RESULT, text.encode())
  print(text)


def once(path: pathlib.Path, same: str, make: Callable[[], Any]) -> Any:
  """Returns what a file holds, made where there is none.

  Raises:
    ValueError: it holds what values of another digest than `same` gave.
  """
  if not path.is_file():
    artefacts.write_json(path, {"config": same, "found": make()})
  kept = artefacts.read_json(path)
  if kept.get("config") != same:
    raise ValueError(f"{path} holds results of other values; delete it or choose another workdir")
  return kept["found"]


def plan(s: Setup, params: Any) -> Plan:
  """Returns the cut: the blocks of the config, whole."""
  return Plan(s.cfg, trees.tree_hash(params), {"keep_X": s.c.targets.blocks})


def programs(s: Setup) -> Programs:
  """Returns the programs of a config: no seed changes a shape."""
  cut = Plan(s.cfg, "", {"keep_X": s.c.targets.blocks})
  small, run = cut.small_config(), s.c.distil

  def student(kinds: Sequence[str]) -> Callable[..., Any]:
    return hybridlm.distillation_loss(
      small, s.cfg, plan=cut, intermediate=kinds, intermediate_loss=run.intermediate_loss,
      intermediate_weight=run.intermediate_weight,
    )

  language = hybridlm.language_loss(s.cfg)
  return Programs(
    step.make_step(language, settings.optimizer(s.c.teacher)),
    {name: step.make_step(student(kinds), settings.optimizer(run))
     for name, kinds in VARIANTS.items()},
    step.make_eval(language), step.make_eval(student(())),
  )


def one_seed(s: Setup, made: Programs, seed: int) -> dict[str, dict[str, float]]:
  """Returns "kl" and "ce" on the test split of the cut model and of its students."""
  test = s.held_out(s.inside, s.c.evaluate.split, s.c.evaluate, s.c.evaluate.batches)
  whole = trained(s, s.cfg, s.c.teacher, made.teach, hybridlm.init(s.cfg, seed=seed), None, seed)
  params = stack.unstacked(s.cfg, whole)
  small, cut = hybridlm.cut(s.cfg, params, plan(s, params))
  found = {"teacher": made.alone(whole, None, test)}
  found["cut"] = made.judge(stack.stacked(small, cut), whole, test)
  for name, learn in made.learn.items():
    learnt = trained(s, small, s.c.distil, learn, cut, whole, seed + SEEDS)
    found[name] = made.judge(learnt, whole, test)
  return {name: {key: each[key] for key in ("kl", "ce") if key in each}
          for name, each in found.items()}


def trained(
  s: Setup, cfg: ModelConfig, run: ConfigDict, advance: Callable[..., Any], params: Any,
  frozen: Any, seed: int,
) -> Any:
  """Returns parameters, stacked as the config says, after a training run."""
  start = state.create(stack.stacked(cfg, params), settings.optimizer(run))
  data = training.Spread(s.train_batches(run, seed), s.grid)
  with jax.set_mesh(s.grid):
    end, _ = loop.run(
      advance, start, data, steps=run.steps, frozen=frozen, log_every=50, progress="off"
    )
  return end.params


def page(s: Setup, results: Sequence[Found]) -> list[str]:
  """Returns the table: means and standard deviations over seeds, and differences within one."""
  small = Plan(s.cfg, "", {"keep_X": s.c.targets.blocks}).small_config()
  lines = [
    f"A teacher `{s.cfg.pattern}` of {hybridlm.cost(s.cfg).parameters:,} parameters, "
    f"{s.c.teacher.steps} steps, cut to `{small.pattern}` of "
    f"{hybridlm.cost(small).parameters:,}, {s.c.distil.steps} steps; {len(results)} seeds. "
    f"Made on {evaluation.machine()}.", "",
    "KL to the teacher and cross-entropy, nats a token of the test split: mean and standard "
    "deviation over seeds. Recovered: the share of the cross-entropy lost by the cut. Against "
    "logits: the difference of KL within a seed.", "",
    "| compared | KL | cross-entropy | recovered | KL against logits |", "|---|---|---|---|---|",
  ]
  for name in ("cut", *VARIANTS):
    kl, ce = ([each[name][key] for each in results] for key in ("kl", "ce"))
    lost = [(each["cut"]["ce"] - each[name]["ce"]) / (each["cut"]["ce"] - each["teacher"]["ce"])
            for each in results]
    gap = [each[name]["kl"] - each["logits"]["kl"] for each in results]
    lines.append(f"| {name} | {_over(kl)} | {_over(ce)} | {statistics.mean(lost):.1%} | "
                 f"{', '.join(f'{each:+.4f}' for each in gap)} |")
  return lines


def _over(values: Sequence[float]) -> str:
  return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
  cli.start(main)
