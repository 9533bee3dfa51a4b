"""The command line: where configs are found, how overrides are read, whose mistake an error is."""

import numpy as np
import pytest

from experiments import cli
from hybridlm.config import ModelConfig

TOY = "--config=configs/quickstart_toy.py"


def parse(*argv):
  return cli.parse(["distill", *argv])


def test_overrides_keep_the_type_of_what_they_replace():
  c = parse(
    TOY, "--config.distil.steps=7", "--config.distil.peak=1", "--config.targets.D=10",
    "--config.data.phases=((0,(('main',0.5),('other',0.5))),)", "--config.data.tokenizer=x",
  ).config
  assert (c.distil.steps, c.distil.peak, c.targets.D) == (7, 1.0, 10)
  assert isinstance(c.distil.peak, float)
  assert c.data.phases == ((0, (("main", 0.5), ("other", 0.5))),)
  assert c.data.tokenizer == "x"


@pytest.mark.parametrize("word", ["", "None"])
def test_what_a_config_sets_can_be_unset_again(word):
  c = parse(TOY, f"--config.targets.H={word}", f"--config.calibrate.depth={word}").config
  assert (c.targets.H, c.calibrate.depth, c.targets.D) == (None, None, 12)
  assert parse(TOY, f"--config.targets.H={word}", "--config.targets.H=3").config.targets.H == 3
  assert parse(TOY, "--config.targets.H=3", f"--config.targets.H={word}").config.targets.H is None
  with pytest.raises(ValueError, match="distil.steps"):
    parse(TOY, f"--config.distil.steps={word}")


def test_a_config_is_the_same_wherever_its_folder_configs_lies(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.origin("configs/evidence/heads.py") == "configs/evidence/heads.py"
  for place in ("configs/mine.py", "elsewhere/configs/mine.py", "mine.py"):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("")
  assert cli.origin("configs/mine.py") == cli.origin("elsewhere/configs/mine.py")
  assert cli.origin("mine.py") == (tmp_path / "mine.py").as_posix()


def test_two_parses_share_nothing():
  assert parse(TOY, "--config.distil.steps=7").config.distil.steps == 7
  assert parse(TOY).config.distil.steps == 4


def test_folders_follow_from_the_name_unless_given():
  job = parse(TOY)
  assert (str(job.workdir), str(job.cache)) == ("workdir/quickstart_toy", "workdir/cache")
  job = parse(TOY, "--workdir=a/b", "--cache_dir=c", "--dry_run")
  assert (str(job.workdir), str(job.cache), job.dry_run) == ("a/b", "c", True)


def test_a_config_in_the_working_directory_comes_before_the_installed_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert parse(TOY).config.name == "quickstart_toy"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart_toy.py").write_text(
    "from configs import base\n\n\ndef get_config():\n  c = base.get_config()\n"
    "  c.name = 'mine'\n  return c\n"
  )
  assert parse(TOY).config.name == "mine"


@pytest.mark.parametrize("argv, words", [
  ((), "give one --config=FILE; installed: .*configs/quickstart.py"),
  (("--config=configs/benchmark_ssd.py",), "benchmark_ssd.py is another command's: it has no part"),
  ((TOY, TOY), "give one --config=FILE"),
  (("--config=configs/gone.py",), "configs/gone.py: no such file"),
  ((TOY, "--config.targets=3"), "'targets' is unknown; nearest: targets.D"),
  ((TOY, "--config.calibrate.batchs=3"), "nearest: calibrate.batch"),
  ((TOY, "distill"), "'distill' is not a flag"),
])
def test_what_cannot_be_read_is_an_error_that_says_what_can(argv, words):
  with pytest.raises((ValueError, FileNotFoundError), match=words.replace("(", r"\(")):
    parse(*argv)


def test_help_lists_flags_and_configs(capsys):
  assert cli.call(lambda job: None, ["distill", "--help"]) == 0
  out = capsys.readouterr().out
  assert "dry_run: " in out and "configs/quickstart.py" in out


def test_a_mistake_is_one_line_and_code_2(capsys):
  def main(job):
    ModelConfig.from_pattern("M?", V=3, D=2)

  assert cli.call(main, ["distill", TOY]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.count("\n") == 1 and "'?'" in captured.err


@pytest.mark.parametrize("bug", [
  lambda: np.zeros(3).reshape(2, 2),  # raised in a library
  lambda: int("three"),  # raised below our own frame, but not by us
  lambda: {}["key"],
])
def test_a_bug_keeps_its_traceback(bug):
  with pytest.raises((ValueError, KeyError)):
    cli.call(lambda job: bug(), ["distill", TOY])
