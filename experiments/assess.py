"""What a pretrained model is worth: bits a byte of text, recall, bytes of its decode state.

python -m experiments.assess --config=configs/evidence/hymba.py [--config.KEY=VALUE]

Several models of one size, one under the other: `experiments.roadmap`.
"""

import functools
import pathlib
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

import hybridlm
from experiments import artefacts, cli, pipeline, teaching
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm import api
from hybridlm.config import ModelConfig
from hybridlm.data import recall as made
from hybridlm.eval import lm, recall, targets

NAME, RESULTS = "assess", "results.json"
# What decode states are counted in, and what is compared with published figures.
DTYPE = "bfloat16"


def state(cfg: ModelConfig, context: int) -> dict[str, int]:
  """Returns the bytes of one sequence's decode state by kind, 16 bits a number, and of all."""
  dtypes = {f"{name}_dtype": DTYPE for name in ("kv", "conv", "ssm")}
  cost = hybridlm.cost(cfg, context=context, batch=1, **dtypes)
  kinds = ("kv_bytes", "conv_bytes", "ssm_bytes", "meta_bytes")
  return {name: getattr(cost, name) for name in (*kinds, "state_bytes")}


def chance(c: ConfigDict, source: str) -> float:
  """Returns how often a guess among the values that a document of recall shows is right."""
  return 1 / c.data.sources[source].pairs


def stage(s: Setup) -> Stage:
  """Returns the stage that measures the teacher on held-out text and recall."""
  run, text = s.c.assess, s.c.evaluate

  def measure(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = artefacts.load_model(inputs["teacher"])
    hidden = functools.partial(api.apply_hidden, cfg)
    lengths_V = jnp.asarray(s.corpus.tokenizer.byte_lengths_V)
    evaluate = lm.make(hidden, bytes_V=lengths_V, vocabulary=cfg.real_vocabulary)
    batches = s.held_out(s.inside, text.split, text, text.batches)
    score = targets.make(hidden, vocabulary=cfg.real_vocabulary)
    found: dict[str, Any] = {
      "text": evaluate(params, None, batches), "state": state(cfg, run.context), "recall": {},
    }
    for name in run.recall:
      tokens = s.corpus.tokens(name, text.split)
      rows = made.rows(tokens, batch=run.batch, limit=run.batches)
      found["recall"][name] = recall.measure(score, params, rows, by="answer")
    artefacts.write_json(folder / RESULTS, found)

  values = {
    "text": s.held_out_data(s.inside, text.split, text, text.batches),
    "recall": {name: s.corpus.fingerprint(name, text.split) for name in run.recall},
    "rows": [run.batch, run.batches], "context": run.context,
  }
  return Stage(NAME, values, measure, needs=("teacher",))


def build(s: Setup) -> list[Stage]:
  """Returns the two stages: a teacher, and what it is worth."""
  return [teaching.teacher(s), stage(s)]


def main(job: cli.Job) -> None:
  """Trains the teacher if the cache does not hold it, measures it and prints what came out."""
  folders = pipeline.execute(job, build=build)
  if folders:
    found = artefacts.read_json(folders[NAME] / RESULTS)
    print(f"{found['text']['bits_per_byte']:.4f} bits a byte, {found['state']['state_bytes']:,} "
          f"bytes behind {job.config.assess.context:,} tokens")
    for name, each in found["recall"].items():
      print(f"{name}: {each['accuracy']:.1%} ({each['low']:.1%} to {each['high']:.1%}) of "
            f"{each['count']:,} answers, {chance(job.config, name):.1%} by chance")


if __name__ == "__main__":
  cli.start(main)
