"""Decode speed against transformers' cached generate, and against the context of a pure SSM.

python -m experiments.bench_decode [--turns=5] [--steps=64] [--out=docs/results/decode.md]

Needs torch and transformers. Both sides have the same weights and take turns on this machine; a
step's time is that of `steps + 1` tokens less that of one, medians of the turns.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

import hybridlm
from experiments import artefacts, console, evaluation
from hybridlm import api
from hybridlm.decode import loop
from hybridlm.nn import serve

PROMPT, BATCHES, CONTEXTS = 128, (1, 8), (128, 512, 2048, 8192)
HYBRID = {
  "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8,
  "num_key_value_heads": 2, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 64,
  "n_groups": 1, "ssm_state_size": 128, "hybrid_override_pattern": "M-M-M*-M-M*-",
}
SSM = hybridlm.ModelConfig.from_pattern(
  "M-" * 5, V=4096, D=256, F=1024, G=1, H=8, P=64, N=128
)
TOKENS_HEADER = "| batch | transformers, ms a step | hybridlm, ms a step | times | equal tokens |"
CONTEXT_HEADER = "| context | tokens a second |"


def main(argv: Sequence[str]) -> None:
  """Measures, prints the tables, and writes them to `--out`.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_integer("turns", 5, "Times that each is measured.", flag_values=values)
  flags.DEFINE_integer("steps", 64, "Tokens that are timed.", flag_values=values)
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  lines = [TOKENS_HEADER, "|---|---|---|---|---|"]
  lines += against_transformers(values.steps, values.turns)
  lines += ["", CONTEXT_HEADER, "|---|---|", *against_context(values.steps, values.turns)]
  command = " ".join(["python -m experiments.bench_decode", *argv[1:]])
  title = ["# Decode speed", "", f"`{command}` on {evaluation.machine()}.", ""]
  text = "\n".join([*title, *lines, ""])
  print(text)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())


def ours(cfg, params):
  """Returns a function `(prompt_BL, steps) -> new tokens` of one of our models."""
  weights = api.fuse(cfg, params)
  return lambda prompt_BL, steps: loop.generate(
    serve.prefill, serve.step, cfg, weights, prompt_BL, steps=steps
  )


def against_transformers(steps: int, turns: int) -> list[str]:
  """Returns a row a batch size: both medians, their ratio, and how many tokens are equal."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  torch.manual_seed(0)
  model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**HYBRID)).eval()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    mine = ours(*hybridlm.load(folder))

  def theirs(prompt_BL, steps):
    out_BL = model.generate(
      torch.from_numpy(prompt_BL).long(), do_sample=False, max_new_tokens=steps,
      min_new_tokens=steps, eos_token_id=None, pad_token_id=0,
    )
    return out_BL[:, prompt_BL.shape[1] :].numpy()

  rows = []
  for batch in BATCHES:
    shape = (batch, PROMPT)
    prompt_BL = np.random.default_rng(batch).integers(0, SSM.V, shape).astype(np.int32)
    equal = (mine(prompt_BL, steps + 1) == theirs(prompt_BL, steps + 1)).mean()
    theirs_ms, ours_ms = step_times((theirs, mine), prompt_BL, steps, turns)
    times = theirs_ms / ours_ms
    rows.append(f"| {batch} | {theirs_ms:.2f} | {ours_ms:.2f} | {times:.1f} | {equal:.1%} |")
  return rows


def step_times(generates, prompt_BL, steps: int, turns: int) -> list[float]:
  """Returns milliseconds a step of each `(prompt_BL, steps) -> tokens`, which take turns."""
  jobs = [(run, count) for run in generates for count in (steps + 1, 1)]
  seconds = [[] for _ in jobs]
  for turn in range(turns + 1):
    for (run, count), found in zip(jobs, seconds, strict=True):
      start = time.perf_counter()
      run(prompt_BL, count)
      if turn:  # the first turn compiles
        found.append(time.perf_counter() - start)
  whole = [statistics.median(found) for found in seconds]
  return [1e3 * (long - one) / steps for long, one in zip(whole[::2], whole[1::2], strict=True)]


def against_context(steps: int, turns: int) -> list[str]:
  """Returns a row a context: tokens a second of one row of a pure SSM behind such a prompt."""
  weights = api.fuse(SSM, hybridlm.init(SSM))
  streams, seconds = {}, {context: [] for context in CONTEXTS}
  for context in CONTEXTS:
    prompt_BL = np.random.default_rng(context).integers(0, SSM.V, (1, context)).astype(np.int32)
    streams[context] = loop.stream(
      serve.prefill, serve.step, SSM, weights, prompt_BL, steps=steps * (turns + 2), every=steps
    )
    next(streams[context])
  for turn in range(turns + 1):
    for context, stream in streams.items():
      start = time.perf_counter()
      next(stream)
      if turn:
        seconds[context].append(time.perf_counter() - start)
  return [f"| {c} | {steps / statistics.median(found):.0f} |" for c, found in seconds.items()]


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
