"""The command that tries faults out: what it compares, and that it runs."""

import json

import pytest

from experiments import console, faults, faults_runs


def place(folder, losses):
  """Returns a place whose distillation has logged losses, by step."""
  path = folder / "job" / "distil.partial" / "metrics.jsonl"
  path.parent.mkdir(parents=True)
  path.write_text("".join(
    json.dumps({"step": step, "split": split, "loss": loss}) + "\n"
    for step, loss in losses.items() for split in ("train", "valid")) + '{"step": 99, "spl')
  return faults_runs.Place(folder)


def test_losses_are_compared_where_they_are_means_of_the_same_steps(tmp_path):
  one = place(tmp_path / "one", {3: 4.0, 6: 3.0, 9: 2.0})
  two = place(tmp_path / "two", {3: 4.0, 5: 9.0, 6: 9.0, 9: 2.5})
  assert faults.apart(one, two) == [0.0, pytest.approx(0.2)]
  assert one.step() == 9


def test_an_unknown_fault_is_refused_by_name(capsys):
  assert console.call(faults.main, ["faults", "--only=flood"]) == 2
  assert "--only='flood' is not one of kill, sigterm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_tries_a_fault_and_writes_its_row(tmp_path, capsys):
  path = tmp_path / "faults.md"
  assert console.call(faults.main, ["faults", "--only=sigterm", f"--out={path}"]) == 0
  assert "saved, exit code 143 | 0 steps | same bits" in capsys.readouterr().out
  assert path.read_text().rstrip().endswith("exit code 143 | 0 steps | same bits |")
