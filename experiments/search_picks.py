"""The search's pick beside those of other rules, as a table of results.

python -m experiments.search_picks --config=configs/evidence/search.py
"""

import pathlib

from experiments import artefacts, cli, evaluation, pipeline, searching, settings

RESULT = pathlib.Path("docs", "results", "search_picks.md")


def main(job: cli.Job) -> None:
  """Searches and writes what came out below the working directory.

  Raises:
    ValueError: the config names no rival.
  """
  if not job.config.search.rivals:
    raise ValueError(f"search.rivals is empty: name some of {', '.join(searching.RIVALS)}")
  job.config.plan.path = settings.SEARCH
  folders = pipeline.execute(job, searching.NAME)
  if folders:
    folder = folders[searching.NAME]
    found = (folder / "search.md").read_text(encoding="utf-8").splitlines()
    command = f"python -m experiments.search_picks --config={job.file}"
    made = f"Made on {evaluation.machine()}: one teacher, one seed."
    head = ["# search_picks", "", f"    {command}", "", made, ""]
    artefacts.write_bytes(RESULT, ("\n".join([*head, *found[2:]]) + "\n").encode())
    picture = RESULT.with_name(f"{RESULT.stem}.png")
    artefacts.write_bytes(picture, (folder / "pareto.png").read_bytes())
    text = RESULT.read_text(encoding="utf-8").replace("(pareto.png)", f"({picture.name})")
    artefacts.write_bytes(RESULT, text.encode())
    print(text)
    print(f"table: {RESULT}")


if __name__ == "__main__":
  cli.start(main)
