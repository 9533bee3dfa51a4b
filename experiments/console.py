"""What commands without a config share: plain flags, and one line for a user's mistake."""

import sys
from collections.abc import Callable, Sequence

from absl import flags

from experiments import mistakes


def call(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
  """Returns the exit code of a command: 0, or 2 after one line about a user's mistake.

  Anything but a user's mistake keeps its traceback (see `mistakes.is_mistake`).
  """
  try:
    main(argv)
  except mistakes.TYPES as error:
    if not mistakes.is_mistake(error):
      raise
    print(" ".join(str(error).split()), file=sys.stderr)
    return 2
  return 0


def parse(values: flags.FlagValues, argv: Sequence[str], about: str) -> bool:
  """Reads an argument list into flags; returns False after printing the help it asks for.

  Raises:
    ValueError: an unknown flag, a value of another type, or an argument that is no flag.
  """
  if {"--help", "-h"} & set(argv):
    print(about)
    print(values.get_help())
    return False
  try:
    rest = values(list(argv))[1:]
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest:
    raise ValueError(f"argument {rest[0]!r} is not a flag; values are given as --name=value")
  return True
