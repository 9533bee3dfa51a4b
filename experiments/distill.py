"""The whole job: teacher, scores, plan, cut, distillation, baselines, evaluation, report.

python -m experiments.distill --config=configs/quickstart.py [--workdir=...] [--config.KEY=VALUE]
    [--aot=v5p:4x4x4]
"""

from experiments import aot, cli, pipeline


def main(job: cli.Job) -> None:
  """Runs every stage that is not done and prints the report's table; or compiles a step ahead."""
  if job.aot is not None:
    print(aot.tell(job.config, job.aot))
    return
  folders = pipeline.execute(job)
  if folders:
    path = folders["report"] / "report.md"
    lines = path.read_text(encoding="utf-8").splitlines()
    print("\n".join(line for line in lines[: lines.index("## What was kept")] if line))
    print(f"report: {path}")


if __name__ == "__main__":
  cli.start(main)
