"""Who an error is blamed on when it leaves our own code: what we raise, or what we ran into."""

import subprocess

import pytest

from cases import commands
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


@pytest.mark.parametrize("name, line", [
  ("generate", "give --model=PATH and at least one --prompt=TEXT"),
  ("convert", "give --source=PATH"),
])
def test_what_a_command_itself_raises_is_one_line_when_it_runs_as_a_module(name, line, tmp_path):
  done = subprocess.run(
    commands.command(name), cwd=tmp_path, env=commands.environment(), capture_output=True,
    text=True, check=False,
  )
  assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
