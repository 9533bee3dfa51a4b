"""One job by one, two and four processes on loopback: the same numbers.

python -m experiments.bench_processes [--out=docs/results/processes.md] [--keep=FOLDER]

Eight devices of one CPU. Ten steps of distillation in float64 (the models and rows of
`bench_meshes`, fewer blocks) by AdamW, on meshes that divide rows, parameters, heads and positions
between processes; then the whole toy job, from text to report, in float32.
"""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import flags

from experiments import artefacts, bench_meshes, console, evaluation, processes
from hybridlm.train import mesh as meshes

DEVICES, JOB_DEVICES, BOUND = 8, 4, 1e-9
COUNTS, JOB_COUNTS = (1, 2, 4), (1, 2)
CASES = (
  bench_meshes.Case({"data": 2, "fsdp": 2, "tensor": 2}),
  bench_meshes.Case({"fsdp": 2, "tensor": 2, "sequence": 2}),
)
PATTERNS = ("M*-", "*-")  # of student and teacher
KIND = "float64 AdamW"
TOY = ["--config=configs/quickstart_toy.py", *(
  f"--config.{part}.batch={JOB_DEVICES}"
  for part in ("teacher", "calibrate", "distil", "evaluate", "findings")
)]
HEADER = """# One process and several

`{command}` on {machine}.

The devices of one machine's CPU, divided among {count} processes that talk by gloo on
loopback, against one process that has them all; – was not run.
Ten steps of distillation by AdamW in float64, {devices} devices: the largest difference to one
process of a loss as a share of it, and of a parameter. Then the whole toy job in float32,
{job} devices: the largest difference of a parameter of the teacher and of the distilled model, and
of a measure in `evaluate_end/results.json` (bits a byte, KL, agreement) that is not a speed.

"""


def main(argv: Sequence[str]) -> None:
  """Runs every case by every number of processes, prints the table, writes it to `--out`.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  flags.DEFINE_string("keep", None, "Folder in which stays what is done.", flag_values=values)
  flags.DEFINE_string("folder", None, "Where a worker leaves what it got.", flag_values=values)
  processes.define(values)
  if not console.parse(values, argv, __doc__):
    return
  if values.folder is not None:
    with processes.join(processes.place(values)):
      work(pathlib.Path(values.folder))
    return
  with tempfile.TemporaryDirectory() as held:
    folders = {count: pathlib.Path(values.keep or held, str(count)) for count in COUNTS}
    for count, folder in folders.items():
      folder.mkdir(parents=True, exist_ok=True)
      if not (folder / f"case{len(CASES) - 1}.npz").is_file():
        together("bench_processes", [f"--folder={folder}"], count, DEVICES, folder)
    for count in JOB_COUNTS:
      together("distill", [*TOY, f"--workdir={folders[count] / 'job'}"], count, JOB_DEVICES,
               folders[count])
    lines, good = table(folders)
  if values.out:
    head = HEADER.format(
      command=" ".join(["python -m experiments.bench_processes", *argv[1:]]),
      machine=evaluation.machine(), count=" and ".join(map(str, COUNTS[1:])), devices=DEVICES,
      job=JOB_DEVICES,
    )
    artefacts.write_bytes(pathlib.Path(values.out), (head + "\n".join(lines) + "\n").encode())
  print("\n".join(lines))
  if not good:
    sys.exit(1)


def together(
  name: str, argv: Sequence[str], count: int, devices: int, folder: pathlib.Path
) -> None:
  """Runs a command by `count` processes that share so many devices of this machine's CPU.

  Raises:
    ChildProcessError: one of them failed; what it said is in `folder`.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  variables = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
    "JAX_ENABLE_X64": str(name == "bench_processes"),
  }
  running = []
  for process in range(count):
    place = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={process}"]
    command = [sys.executable, "-m", f"experiments.{name}", *argv, *(place if count > 1 else ())]
    with open(folder / f"{name}_{process}.log", "w", encoding="utf-8") as log:
      running.append(subprocess.Popen(command, stdout=log, stderr=log, env=variables))
  codes = [each.wait() for each in running]
  if any(codes):
    said = [(folder / f"{name}_{n}.log").read_text("utf-8")[-2000:] for n in range(count)]
    raise ChildProcessError(f"{name} by {count} processes ended with {codes}:\n" + "\n".join(said))


def work(folder: pathlib.Path) -> None:
  """Trains every case on the devices of all processes and has process 0 write what came out."""
  kinds = {KIND: bench_meshes.KINDS[KIND]}
  for number, case in enumerate(CASES):
    run = bench_meshes.train(case, kinds, patterns=PATTERNS)[KIND]
    leaves = {f"leaf{at}": leaf for at, leaf in enumerate(jax.tree.leaves(run.params))}
    index, count = meshes.row_share(meshes.make(case.sizes))
    print(f"{case.name}: process {jax.process_index()} reads share {index} of {count}", flush=True)
    if jax.process_index() == 0:
      np.savez(folder / f"case{number}.npz", losses=run.losses, **leaves)


def table(folders: Mapping[int, pathlib.Path]) -> tuple[list[str], bool]:
  """Returns the lines of the table, and whether every bound holds."""
  counts = [count for count in folders if count > 1]
  lines = ["| what | " + " | ".join(f"{count} processes" for count in counts) + " |",
           "|---|" + "---|" * len(counts)]
  good = True
  for number, case in enumerate(CASES):
    cells = []
    for count in counts:
      one, many = (dict(np.load(folders[n] / f"case{number}.npz")) for n in (1, count))
      loss = float(np.max(np.abs(many["losses"] - one["losses"]) / np.abs(one["losses"])))
      params = max(float(np.max(np.abs(many[key] - one[key]))) for key in one if key != "losses")
      good = good and max(loss, params) <= BOUND
      cells.append(f"{loss:.0e}, {params:.0e}")
    lines.append(f"| {case.name}, float64: loss, parameters | {' | '.join(cells)} |")
  for what, find in (("parameters", _parameters), ("measures", _measures)):
    ones = find(folders[1])
    cells = []
    for count in counts:
      found = find(folders[count]) if count in JOB_COUNTS else None
      cells.append("–" if found is None else
                   f"{max(abs(found[key] - ones[key]).max() for key in ones):.0e}")
    lines.append(f"| the whole toy job: {what} | {' | '.join(cells)} |")
  return [*lines, "", f"Bound in float64: {BOUND:g}. " + ("It holds." if good else "Broken.")], good


def _parameters(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the parameters of the toy job's teacher and of its distilled model."""
  (teacher,) = (folder / "cache").glob("teacher-*")
  found = {}
  for name, place in (("teacher", teacher), ("distil", folder / "job" / "distil")):
    _, params = artefacts.load_model(place)
    found |= {f"{name}{at}": np.asarray(leaf) for at, leaf in enumerate(jax.tree.leaves(params))}
  return found


def _measures(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns what the toy job measured of its trained models, speeds left out."""
  results = artefacts.read_json(folder / "job" / "evaluate_end" / "results.json")
  return {
    f"{name} {test} {key}": np.float64(value)
    for name, tests in results.items() for test in ("inside", "outside")
    for key, value in tests[test].items() if isinstance(value, (int, float))
  }


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
