"""The search alone: candidates under a budget, the best of them briefly distilled, the front.

python -m experiments.search --config=configs/search_toy.py [--dry_run] [--config.KEY=VALUE]
"""

from experiments import cli, pipeline, searching, settings


def main(job: cli.Job) -> None:
  """Searches and prints the finalists; a dry run counts what there is to be searched.

  Raises:
    ValueError: bad input, such as an empty space or a budget that nothing fits.
  """
  if job.config.plan.path not in ("", settings.SEARCH):
    raise ValueError(f"plan.path={job.config.plan.path!r}: a search makes its own plan; unset it")
  job.config.plan.path = settings.SEARCH
  folders = pipeline.execute(job, searching.NAME)
  if folders:
    folder = folders[searching.NAME]
    print((folder / "search.md").read_text(encoding="utf-8"))
    print(f"plan: {folder / 'plan.json'}")


if __name__ == "__main__":
  cli.start(main)
