"""What the teacher says of every row that distillation reads, kept for runs without the teacher.

python -m experiments.teacher --config=configs/quickstart.py [--workdir=...] [--config.KEY=VALUE]
"""

from experiments import cli, lessons, pipeline, stages, storing, teaching
from experiments.settings import Setup
from experiments.stages import Stage
from hybridlm.data import store


def build(s: Setup) -> list[Stage]:
  """Returns the stages that make the teacher, and its store for each run of the distillation."""
  made = [stage for stage in (teaching.teacher(s), teaching.correct(s)) if stage is not None]
  runs = lessons.setups(s)
  brought, who = lessons.teachers(runs, s, "", made[-1].name, teaching.teacher)
  names = lessons.names("", "store", len(runs))
  return [*made, *brought, *(
    stages.rewired(storing.write(each, name), {"teacher": source})
    for each, name, source in zip(runs, names, who, strict=True)
  )]


def main(job: cli.Job) -> None:
  """Writes the stores and prints where they lie."""
  folders = pipeline.execute(job, build=build)
  for name, folder in folders.items():
    if name.startswith("store"):
      found = store.Store(folder)
      size = store.record_size(found.key, found.dtype)
      print(f"{name}: {folder}: {found.rows:,} rows of {found.key.length} tokens, the "
            f"{found.key.k} most likely of {found.key.V} and the rest, "
            f"{found.rows * size / 2**20:,.1f} MiB; "
            f"--config.distil.store={folder}")


if __name__ == "__main__":
  cli.start(main)
