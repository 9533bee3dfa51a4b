"""Continues prompts with a model on disk, and prints the text as it comes.

python -m experiments.generate --model=PATH --prompt="Once upon a time" [--prompt=...]
    [--steps=64] [--temperature=0.8] [--top_k=40] [--top_p=0.95] [--seed=0] [--tokenizer=NAME]

Several prompts are one batch, printed when it is done. A row ends with the model's end of text.
"""

import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

import hybridlm
from experiments import console, measures
from hybridlm import api
from hybridlm.decode import loop
from hybridlm.nn import serve

# Tokens between two looks at a text that is being watched.
WATCHED = 4


def main(argv: Sequence[str]) -> None:
  """Generates as the flags say and prints every prompt with its continuation.

  Raises:
    FileNotFoundError: a model or tokenizer that is not there.
    ValueError: a flag is wrong, or the model cannot take the prompt.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("model", None, "A published folder, ours, or GGUF.", flag_values=values)
  flags.DEFINE_string("tokenizer", None, "Default: the model's own.", flag_values=values)
  flags.DEFINE_multi_string("prompt", [], "A text to go on with.", flag_values=values)
  flags.DEFINE_integer("steps", 64, "New tokens at most.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the draws.", 0, 2**31 - 1, flag_values=values)
  flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", flag_values=values)
  flags.DEFINE_integer("top_k", None, "Draw from so many likeliest tokens.", flag_values=values)
  flags.DEFINE_float("top_p", None, "Draw from this much probability.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  if not values.model or not values.prompt:
    raise ValueError("give --model=PATH and at least one --prompt=TEXT")
  cfg, params = hybridlm.load(values.model)
  reader = measures.reader(values.model, values.tokenizer, cfg)
  rows = [list(reader.encode(text)) or [reader.prefix] for text in values.prompt]
  ends = tuple(i for i in reader.ends if i < cfg.V)
  names = ("steps", "seed", "temperature", "top_k", "top_p")
  prompt_BL = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for prompt_L, row in zip(prompt_BL, rows, strict=True):
    prompt_L[: len(row)] = row
  parts = loop.stream(
    serve.prefill, serve.step, cfg, api.fuse(cfg, params), prompt_BL,
    length_B=np.array([*map(len, rows)]), stop=ends,
    every=WATCHED if len(rows) == 1 else loop.CALL, **{name: values[name].value for name in names},
  )
  new_BL, shown = np.zeros((len(rows), 0), np.int32), [0] * len(rows)
  for part in parts:
    new_BL = np.concatenate([new_BL, part], axis=1)
    if len(rows) == 1:
      shown = _show(reader, values.prompt, rows, new_BL, ends, shown, whole=False)
  _show(reader, values.prompt, rows, new_BL, ends, shown, whole=True)


def _show(reader, prompts, rows, new_BL, ends, shown, *, whole):
  """Prints what is new of every text, and returns how many characters each has shown."""
  for row, prompt in enumerate(prompts):
    ids = [int(i) for i in new_BL[row] if i not in ends]
    # Read with what they follow: some tokenizers drop the space a text begins with.
    text = prompt + reader.decode(rows[row] + ids, False)[len(reader.decode(rows[row], False)) :]
    # A character that lacks bytes yet is shown when it is whole.
    text = text if whole else text.rstrip("\ufffd")
    print(text[shown[row] :], end="\n" if whole else "", flush=True)
    shown[row] = max(shown[row], len(text))
  return shown


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
