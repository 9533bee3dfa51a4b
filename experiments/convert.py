"""Converts a model from one format to another, or prunes it by a plan, one tensor at a time.

python -m experiments.convert --source=FOLDER_OR_FILE --target=FOLDER [--format=hf|hybridlm]
    [--family=NAME] [--plan=plan.json] [--dtype=float32|bfloat16]

Sources: a Hugging Face folder, a folder of ours (the folder `model` of a stage is one), a GGUF
file. The target takes its name when it is whole and verified; before, it is `NAME.unverified`,
which does not load while it is verified. Tokenizer files are carried on.
"""

import sys
from collections.abc import Sequence

from absl import flags

from experiments import console, conversion
from hybridlm.interop import dispatch


def main(argv: Sequence[str]) -> None:
  """Converts as the flags say and prints what was read, written and verified.

  Raises:
    ValueError: a flag, the source or the plan is wrong, or the format cannot hold the model.
    FileNotFoundError: a source or plan that is not there.
  """
  values = flags.FlagValues()
  text = {
    "source": "What to read: a Hugging Face folder, one of ours, or a GGUF file.",
    "target": "The folder to write; one that was written so before is replaced.",
    "family": "Published architecture to write, with --format=hf; default: the first that fits.",
    "plan": "Manifest of a pruning plan made for the source.",
  }
  for name, about in text.items():
    flags.DEFINE_string(name, None, about, flag_values=values)
  flags.DEFINE_enum("format", "hf", dispatch.FORMATS, "Of the target.", flag_values=values)
  flags.DEFINE_enum(
    "dtype", None, conversion.DTYPES, "Of the weights; default: as they are.", flag_values=values
  )
  if not console.parse(values, argv, __doc__):
    return
  for name in ("source", "target"):
    if not getattr(values, name):
      raise ValueError(f"give --{name}=PATH")
  job = conversion.Job(**{name: getattr(values, name) for name in conversion.Job._fields})
  conversion.convert(job, say=print)


if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
