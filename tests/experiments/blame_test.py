"""Who an error is blamed on when it leaves our own code: what we raise, or what we ran into."""

import pytest

from experiments import cli

ARGV = ["distill", "--config=configs/quickstart_toy.py"]


def ours(line: str):
  """Returns a function of one line that seems to be defined in our packages."""
  scope = {"__name__": "experiments.example"}
  exec(f"def act(job):\n  {line}\n", scope)
  return scope["act"]


@pytest.mark.parametrize("kind", ["ValueError", "FileNotFoundError"])
def test_what_our_code_raises_is_one_line_for_the_user(kind, capsys):
  assert cli.call(ours(f"raise {kind}('the value 3 is odd')"), ARGV) == 2
  assert capsys.readouterr().err == "the value 3 is odd\n"


@pytest.mark.parametrize("line", ["int('three')", "open('/nowhere/at/all')", "assert False",
                                  "raise KeyError('key')"])
def test_what_our_code_runs_into_keeps_its_traceback(line):
  with pytest.raises((ValueError, FileNotFoundError, AssertionError, KeyError)):
    cli.call(ours(line), ARGV)
