"""One distillation on one device and on eight, under every kind of mesh: the same numbers.

python -m experiments.bench_meshes [--out=docs/results/meshes.md]

Eight devices of one CPU. A student learns from a teacher of other sizes for ten steps, on packed
rows whose documents cross every border between devices. In float64 AdamW leaves nothing but the
order of sums; in float32 plain SGD does not magnify it, and AdamW is held to its loss curve.
"""

import functools
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

import hybridlm
from experiments import artefacts, console, evaluation
from hybridlm import layout
from hybridlm.config import ModelConfig, Rope
from hybridlm.train import mesh as meshes
from hybridlm.train import optim, state, step

DEVICES, STEPS, ROWS, LENGTH, V = 8, 10, 8, 32, 32
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
HEADER = """# One device and eight

`{command}` on {machine}.

Ten steps of distillation on eight devices of a CPU against the same on one: the largest difference
of a loss as a share of it, and of a parameter. The student has a gated convolution, Mamba-2,
attention with a window and an MLP, the teacher attention and Mamba-2 of other widths (G=2 and K=2:
eight devices of `tensor` divide H and J). Rows of {length} tokens are packed, a third of them has
no weight. Layouts are those of `hybridlm/layout.py`, of the student and of the teacher. Collectives
are those of the float64 step, compiled for CPU with most optimisations off: there a sum whose parts
are wanted on several devices is an all-reduce, not a reduce-scatter.

"""


class Case(NamedTuple):
  """A mesh, and how student and teacher lie on it."""

  sizes: Mapping[str, int]
  student: str = layout.DEFAULT
  teacher: str = layout.DEFAULT

  @property
  def name(self) -> str:
    """The mesh as text: `data=2 × tensor=4`."""
    return " × ".join(f"{axis}={size}" for axis, size in self.sizes.items())


CASES = (
  Case({"data": 8}),
  Case({"fsdp": 8}),
  Case({"tensor": 8}),
  Case({"sequence": 8}),
  Case({"data": 2, "fsdp": 2, "tensor": 2}),
  Case({"data": 2, "tensor": 2, "sequence": 2}),
  Case({"fsdp": 2, "tensor": 2, "sequence": 2}),
  Case({"fsdp": 4, "tensor": 2}, "sharded", "copied"),
  Case({"data": 2, "fsdp": 2, "tensor": 2}, "rows", "sharded"),
  Case({"fsdp": 2, "tensor": 2, "sequence": 2}, "rows", "copied"),
)


class Kind(NamedTuple):
  """A dtype and an optimiser, and how far losses and parameters may be apart; None: any."""

  dtype: str
  optimizer: str
  loss: float
  parameters: float | None


KINDS = {
  "float64 AdamW": Kind("float64", "adamw", 1e-9, 1e-9),
  "float32 SGD": Kind("float32", "sgd", 1e-5, 1e-5),
  "float32 AdamW": Kind("float32", "adamw", 1e-4, None),
}


class Run(NamedTuple):
  """Losses by step, the parameters at the end, and collectives of the program by kind."""

  losses: np.ndarray
  params: Any
  collectives: Mapping[str, int]


PATTERNS = ("CM*-", "*M")  # of student and teacher


def models(patterns: tuple[str, str] = PATTERNS) -> tuple[ModelConfig, ModelConfig]:
  """Returns student and teacher, of different sizes; the student's attention has a window."""
  sizes = {"V": V, "F": 24, "K": 2, "J": 8, "E": 4, "G": 2, "H": 8, "P": 3, "N": 5, "W": 4,
           "rope": Rope(rotary=2), "chunk": 4}

  def make(pattern, **changes):
    letters = {"C": "GHPW", "M": "GHPNW", "*": "KJE", "-": "F"}
    used = {"V", "chunk", *(letter for symbol in pattern for letter in letters[symbol])}
    used |= {"rope"} if "*" in pattern else set()
    given = {name: size for name, size in sizes.items() if name in used}
    return ModelConfig.from_pattern(pattern, **{**given, **changes})

  window = {"window": 7} if "*" in patterns[0] else {}
  return make(patterns[0], D=16, **window), make(patterns[1], D=24, norm="layernorm1p")


@functools.cache
def batches(count: int = STEPS) -> tuple[Mapping[str, np.ndarray], ...]:
  """Returns packed rows: documents of all lengths, a third of the tokens without weight."""
  rng, made = np.random.default_rng(7), []
  for _ in range(count):
    token_BL = rng.integers(0, V, (ROWS, LENGTH + 1), dtype=np.int32)
    made.append({
      "token_BL": token_BL[:, :-1], "target_BL": token_BL[:, 1:],
      "weight_BL": (rng.random((ROWS, LENGTH)) < 0.67).astype(np.float32),
      "segment_BL": np.cumsum(rng.random((ROWS, LENGTH)) < 0.1, axis=1, dtype=np.int32) + 1,
    })
  return tuple(made)


class Either(NamedTuple):
  """The state of an optimiser that is told at run time which of two it is."""

  is_adamw: Any
  adamw: Any


def optimizer(name: str) -> optim.Optimizer:
  """Returns AdamW on a schedule, or plain SGD: the same program, so that it compiles once."""
  adamw = optim.make(peak=1e-3, steps=STEPS, warmup=2)

  def update(grads, now, params):
    updates, after = adamw.update(grads, now.adamw, params)
    chosen = jax.tree.map(
      lambda new, grad: jnp.where(now.is_adamw, new, -0.1 * grad), updates, grads
    )
    return chosen, Either(now.is_adamw, after)

  def init(params):
    return Either(jnp.asarray(name == "adamw"), adamw.init(params))

  return optim.Optimizer(init, update, adamw.schedule)


def train(
  case: Case | None, kinds: Mapping[str, Kind], *, patterns: tuple[str, str] = PATTERNS,
  steps: int = STEPS, **changes: Any,
) -> dict[str, Run]:
  """Returns what runs of kinds of one dtype make on a mesh of all devices, by one program.

  Without a case they are on one device. float64 needs `jax.enable_x64`. `changes` are of the
  student's config.
  """
  (dtype,) = {kind.dtype for kind in kinds.values()}
  student, teacher = (cfg.replace(dtype=dtype) for cfg in models(patterns))
  student = student.replace(**changes)
  params, frozen = (
    jax.tree.map(lambda leaf: leaf.astype(dtype), hybridlm.init(cfg, seed=seed))
    for seed, cfg in enumerate((student, teacher))
  )
  starts = {name: state.create(params, optimizer(kind.optimizer)) for name, kind in kinds.items()}
  grid, spread, where = meshes.make({"data": 1}, jax.devices()[:1]), dict, None
  if case is not None:
    grid = meshes.make(case.sizes)
    student, teacher = student.replace(layout=case.student), teacher.replace(layout=case.teacher)
    rules = [layout.LAYOUTS[name].parameters for name in (case.student, case.teacher)]
    where = meshes.shardings(grid, next(iter(starts.values())), rules[0])
    starts = {name: meshes.place(start, where) for name, start in starts.items()}
    frozen = meshes.place(frozen, meshes.shardings(grid, frozen, rules[1]))
    spread = functools.partial(_spread, grid)
  loss = hybridlm.distillation_loss(student, teacher, temperature=2.0, ce=0.5)
  advance, run, made = step.make_step(loss, optimizer("adamw"), shardings=where), None, {}
  with jax.set_mesh(grid):
    for name, now in starts.items():
      run = run or advance.lower(now, frozen, spread(batches()[0])).compile()
      losses = []
      for batch in batches()[:steps]:
        now, metrics = run(now, frozen, spread(batch))
        losses.append(float(metrics["loss"]))
      params = meshes.fetch(now.params)
      made[name] = Run(np.array(losses), params, collectives(run.as_text()))
  return made


def _spread(grid: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Returns a batch on the mesh, of which every process has the whole."""
  return meshes.put(dict(batch), meshes.batch_shardings(grid, batch))


def runs(case: Case | None) -> dict[str, Run]:
  """Returns what every kind makes on a mesh, or on one device."""
  made = {}
  for dtype in dict.fromkeys(kind.dtype for kind in KINDS.values()):
    with jax.enable_x64(dtype == "float64"):
      made |= train(case, {name: kind for name, kind in KINDS.items() if kind.dtype == dtype})
  return made


def collectives(text: str) -> dict[str, int]:
  """Returns how many collectives of each kind a compiled program has."""
  found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
  return {kind: found[kind] for kind in COLLECTIVES if found[kind]}


def apart(one: Run, many: Run) -> tuple[float, float]:
  """Returns the largest relative difference of a loss, and the largest of a parameter."""
  losses = float(np.max(np.abs(many.losses - one.losses) / np.abs(one.losses)))
  pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True)
  return losses, max(float(np.max(np.abs(a - b))) for a, b in pairs)


def main(argv: Sequence[str]) -> None:
  """Runs every case, prints the table, and writes it to `--out`; exits with 1 where one differs.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", DEVICES)
  jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
  ones = runs(None)
  lines = [
    "| mesh | student, teacher | " + " | ".join(f"{name}: loss, parameters" for name in KINDS)
    + " | collectives |",
    "|---|---|" + "---|" * (len(KINDS) + 1),
  ]
  bad = []
  for case in CASES:
    line, bad_here = row(case, ones)
    print(line, flush=True)
    lines.append(line)
    bad += bad_here
  bounds = ", ".join(
    f"{name} {kind.loss:g}" + ("" if kind.parameters is None else f" and {kind.parameters:g}")
    for name, kind in KINDS.items()
  )
  lines += ["", f"Bounds: {bounds}. " + ("All hold." if not bad else f"Broken: {'; '.join(bad)}.")]
  if values.out:
    command = " ".join(["python -m experiments.bench_meshes", *argv[1:]])
    head = HEADER.format(command=command, machine=evaluation.machine(), length=LENGTH)
    artefacts.write_bytes(pathlib.Path(values.out), (head + "\n".join(lines) + "\n").encode())
  print(lines[-1])
  if bad:
    sys.exit(1)


def row(case: Case, ones: Mapping[str, Run]) -> tuple[str, list[str]]:
  """Returns a case's line of the table, and the bounds it breaks."""
  cells, bad, many = [], [], runs(case)
  for name, kind in KINDS.items():
    loss, params = apart(ones[name], many[name])
    cells.append(f"{loss:.0e}, {params:.0e}")
    if loss > kind.loss or params > (np.inf if kind.parameters is None else kind.parameters):
      bad.append(f"{case.name}, {name}")
  used = next(iter(many.values())).collectives
  counts = ", ".join(f"{count} {kind}" for kind, count in used.items())
  return f"| {case.name} | {case.student}, {case.teacher} | {' | '.join(cells)} | {counts} |", bad


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
