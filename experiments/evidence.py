"""The study of a teacher's heads as a table of results, the teacher pretrained or cached.

python -m experiments.evidence --config=configs/evidence/heads.py
"""

import pathlib

from experiments import artefacts, cli, evaluation, pipeline

RESULTS = pathlib.Path("docs", "results")


def main(job: cli.Job) -> None:
  """Runs the study and writes `docs/results/NAME.md` below the working directory."""
  if not job.config.findings.heads:
    raise ValueError("findings.heads is empty: name the heads a group to keep, e.g. (5, 3)")
  folders = pipeline.execute(job, "findings")
  if folders:
    text = (folders["findings"] / "findings.md").read_text(encoding="utf-8")
    name = job.config.name
    command = f"python -m experiments.evidence --config={job.file}"
    head = [
      f"# {name}", "", f"    {command}", "",
      f"Made on {evaluation.machine()}.", "", text, "",
    ]
    path = RESULTS / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    artefacts.write_bytes(path, "\n".join(head).encode())
    print(text)
    print(f"table: {path}")


if __name__ == "__main__":
  cli.start(main)
