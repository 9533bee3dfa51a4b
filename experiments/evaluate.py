"""What teacher and pruned model are worth before distillation, and the n-gram baselines.

python -m experiments.evaluate --config=configs/quickstart.py [--config.evaluate.batches=8]
"""

from experiments import artefacts, cli, pipeline, report


def main(job: cli.Job) -> None:
  """Measures teacher, pruned model and n-grams, and prints their tables."""
  baseline = ("ngrams",) if job.config.evaluate.ngram else ()
  folders = pipeline.execute(job, "evaluate_cut", *baseline)
  if folders:
    results = artefacts.read_json(folders["evaluate_cut"] / "results.json")
    print(report.table(report.HEADER, [report.row(key, results[key], None) for key in results]))
    for name in baseline:
      print(report.ngram_table(artefacts.read_json(folders[name] / "ngrams.json")))


if __name__ == "__main__":
  cli.start(main)
