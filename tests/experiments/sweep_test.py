"""Sweeps: what a line of text asks for, members as processes, and the table of what came out."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cases import commands
from experiments import artefacts, console, members, sweep, sweep_table, sweeping
from experiments.members import Outcome, Task

# A command that does as its arguments say: it counts its starts in a file, then ends with a code.
SCRIPT = """
import os, pathlib, subprocess, sys, time
job, *codes = sys.argv[1:]
place = pathlib.Path(job)
place.mkdir(parents=True, exist_ok=True)
count = len(list(place.glob("start*")))
(place / f"start{count}").write_text(f"{os.getpid()}")
code = codes[min(count, len(codes) - 1)]
print("first words")
print(f"code {code}", "is in use by another run" if code == "2used" else "", flush=True)
if code == "sleep":
  child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
  (place / "child").write_text(f"{child.pid}")
  time.sleep(600)
sys.exit(int(code[0]))
"""
TOY = commands.TOY


def pairs(*sweeps):
  """Returns the settings of members, as text."""
  return [" ".join(f"{k}={v}" for k, v in member.settings) for member in sweeping.members(sweeps)]


def test_a_sweep_is_a_product_a_zip_or_a_list_and_several_multiply():
  assert pairs("a=1,2;b=x,y") == ["a=1 b=x", "a=1 b=y", "a=2 b=x", "a=2 b=y"]
  assert pairs("zip:a=1,2;b=x,y") == ["a=1 b=x", "a=2 b=y"]
  assert pairs("list:p:a=1,b=2;q:;r:b=3") == ["a=1 b=2", "", "b=3"]
  assert pairs("zip:a=1,2;b=x,y", "seed=0,1") == [
    "a=1 b=x seed=0", "a=1 b=x seed=1", "a=2 b=y seed=0", "a=2 b=y seed=1"]


def test_what_stands_in_brackets_or_quotes_is_one_value_and_an_empty_one_unsets():
  assert pairs("p=((0,(('a',0.5),('b',0.5))),),();q='x;y,z'") == [
    "p=((0,(('a',0.5),('b',0.5))),) q='x;y,z'", "p=() q='x;y,z'"]
  assert pairs("targets.D=,12") == ["targets.D=", "targets.D=12"]
  assert pairs("teacher.path=package:one/two.gguf") == ["teacher.path=package:one/two.gguf"]


def test_folders_have_the_names_of_a_list_or_say_what_is_set_and_stay_plain():
  def names(*sweeps):
    return [member.name for member in sweeping.members(sweeps)]

  assert names("a.b=1,2;c=3") == ["a.b=1,c=3", "a.b=2,c=3"]
  assert names("list:small:a=1;wide:a=2", "seed=0,1") == [
    "small,seed=0", "small,seed=1", "wide,seed=0", "wide,seed=1"]
  odd = names("path=/x/y z,/x/y_z;q=" + "9" * 200)
  assert len(set(odd)) == 2 and all(len(name) <= 100 and not set(name) & set("/ ") for name in odd)


@pytest.mark.parametrize("text, words", [
  ("", "has no member"),
  ("a", "'a' is not KEY=VALUE"),
  ("a=1;a=2", "'a' is set twice"),
  ("a=1,1", "'a=1' is the same member as 'a=1'"),
  ("zip:a=1,2;b=3", "every key needs as many values: a has 2, b has 1"),
  ("tip:a=1", "'tip' is not a form"),
  ("list:a=1", "'a=1' is not NAME:KEY=VALUE"),
  ("list:p:a=1;p:a=2", "the name 'p' is given twice"),
  ("a=(1,2", r"lacks a closing '\)'"),
  ("a=1)", r"closes '\)', which is not open"),
])
def test_a_sweep_that_is_not_one_says_what_is_wrong(text, words):
  with pytest.raises(ValueError, match=words):
    sweeping.members([text])


@pytest.fixture(name="tasks")
def _tasks(tmp_path, monkeypatch):
  """Returns a function from names and exit codes of their attempts to tasks."""
  (tmp_path / "acting.py").write_text(SCRIPT)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))

  def make(**codes):
    return [
      Task(name, tmp_path / name, ("acting", str(tmp_path / name / "job"), *each.split()),
           {"config": {"a": name}})
      for name, each in codes.items()
    ]

  return make


def run(tasks, **options):
  """Runs tasks; returns their outcomes in the order in which they ended, and what was said."""
  outcomes, said = {}, []
  members.run(tasks, **{"jobs": 3, "retries": 1} | options, say=said.append,
              ended=outcomes.__setitem__)
  return outcomes, said


def test_crashes_are_tried_again_and_mistakes_are_not(tasks, monkeypatch):
  monkeypatch.setattr(members, "_PATIENCE", 0.01)
  made = tasks(fine="0", once="1 0", always="1", mistake="2", waits="2used 2used 2used 0")
  outcomes, said = run(made)
  assert {name: (one.state, one.attempts) for name, one in outcomes.items()} == {
    "fine": ("done", 1), "once": ("done", 2), "always": ("failed", 2), "mistake": ("failed", 1),
    "waits": ("done", 1)}
  assert outcomes["always"].said == ("first words", "code 1")
  assert any("once: crashed with code 1" in line for line in said)
  assert (made[1].folder / members.LOG).read_text().count("first words") == 2
  assert run(tasks(more="1 1 1 0"), retries=3)[0]["more"].attempts == 4


def test_a_finished_member_stands_until_what_it_was_asked_for_changes(tasks):
  task, = tasks(one="0")
  assert members.standing(task) == (None, "nothing there yet")
  run([task])
  outcome, why = members.standing(task)
  assert (outcome.state, outcome.attempts, why) == ("done", 1, "finished as asked")
  changed = task._replace(asked={"config": {"a": "two"}})
  assert members.standing(changed) == (None, "config.a: one -> two")
  failed = changed._replace(argv=(*task.argv[:2], "2"))
  run([failed])  # what was there is no longer finished
  assert members.standing(task) == (None, "an earlier run left it unfinished")


def test_at_most_so_many_run_at_a_time(tasks):
  made, most, now = tasks(a="0", b="0", c="0", d="0"), 0, 0
  def say(line):
    nonlocal most, now
    now += line.endswith("started")
    most = max(most, now)

  def ended(name, outcome):
    nonlocal now
    now -= 1

  members.run(made, jobs=2, retries=0, say=say, ended=ended)
  assert most == 2


def alive(pid: int) -> bool:
  """Whether a process is there and not merely unburied."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_members_and_their_children_die_with_the_sweep_however_it_dies(tasks, tmp_path, number):
  task, = tasks(one="sleep")
  (tmp_path / "drive.py").write_text(
    "from experiments import members, sweep; import sys, pathlib\n"
    f"task = members.Task('one', pathlib.Path({str(task.folder)!r}), {task.argv!r}, {{}})\n"
    "sweep.main = lambda argv: members.run([task], jobs=1, retries=9, say=print, ended=print)\n"
    "sys.exit(sweep.start([]))\n")
  process = subprocess.Popen(
    [sys.executable, str(tmp_path / "drive.py")], stderr=subprocess.PIPE, text=True,
    env=os.environ | {"PYTHONPATH": f"{commands.ROOT}:{tmp_path}"},
  )
  child = task.folder / "job" / "child"
  while not child.is_file() or not child.read_text():
    assert process.poll() is None
    time.sleep(0.02)
  pids = [int(path.read_text()) for path in (child, task.folder / "job" / "start0")]
  assert all(map(alive, pids))
  process.send_signal(number)
  err = process.communicate()[1]
  deadline = time.monotonic() + 20
  while any(map(alive, pids)) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not any(map(alive, pids))
  if number != signal.SIGKILL:
    assert process.returncode == 130 and "goes on from here" in err


def finished(folder, bits, seed=0):
  """Fills a member's job as a finished command would."""
  stage = folder / "job" / "evaluate_end"
  result = {"distilled": {"parameters": 7000, "inside": {"bits_per_byte": bits, "kl": seed}}}
  artefacts.write_json(stage / "results.json", result)
  artefacts.write_json(stage / "inputs.json", {"config": {}, "needs": {"teacher": "f" * 64}})
  artefacts.write_json(stage / "done.json", {"files": {}})


@pytest.fixture(name="swept")
def _swept(tmp_path, monkeypatch):
  """Returns a function that calls the command in a folder, members standing in for themselves.

  A member whose targets.D is 11 fails. It returns the exit code and the names that ran.
  """
  monkeypatch.chdir(tmp_path)
  ran = []

  def act(tasks, *, jobs, retries, say, ended):
    for task in tasks:
      ran.append(task)
      values = task.asked["config"]
      if values["targets"]["D"] == 11:
        ended(task.name, Outcome("failed", 2, 1.0, ("words", "last | words")))
        continue
      finished(task.folder, values["targets"]["D"] + values["seed"])
      (task.folder / members.LOG).write_text("")
      artefacts.write_json(task.folder / members.FINISHED,
                           {"asked": task.asked, "attempts": 1, "seconds": 2.0})
      ended(task.name, Outcome("done", 1, 2.0))

  monkeypatch.setattr(members, "run", act)

  def call(*argv):
    ran.clear()
    return console.call(sweep.main, ["sweep", TOY, *argv]), [task.name for task in ran]

  call.tasks = ran
  return call


def test_members_are_run_once_and_again_when_something_changed(swept, capsys):
  line = "--sweep=targets.D=12,10;seed=0,1"
  names = ["targets.D=12,seed=0", "targets.D=12,seed=1", "targets.D=10,seed=0",
           "targets.D=10,seed=1"]
  assert swept(line) == (0, names)
  home = pathlib.Path("workdir", "quickstart_toy_sweep")
  assert swept.tasks[0].argv == (
    "experiments.distill", TOY, "--config.targets.D=12", "--config.seed=0",
    f"--workdir={home / names[0] / 'job'}", "--cache_dir=workdir/cache")
  assert swept(line) == (0, [])
  assert swept("--sweep=targets.D=12,10,9;seed=0") == (0, ["targets.D=9,seed=0"])
  capsys.readouterr()
  assert swept(line, "--config.distil.steps=5")[1] == names
  assert f"{names[0]}: to run (config.distil.steps: 4 -> 5)" in capsys.readouterr().out
  (home / names[1] / "job" / "evaluate_end" / "results.json").unlink()
  (home / names[1] / "job" / "evaluate_end").rename(home / "elsewhere")
  assert swept(line, "--config.distil.steps=5", "--dry_run") == (0, [])


def test_the_table_has_a_row_a_member_and_mean_and_spread_over_seeds(swept):
  assert swept("--sweep=targets.D=12,10,11;seed=0,2")[0] == 2  # those of width 11 fail
  home = pathlib.Path("workdir", "quickstart_toy_sweep")
  bits = "evaluate_end.distilled.inside.bits_per_byte"
  table = json.loads((home / "table.json").read_text())
  assert [row["values"][bits] for row in table["members"]] == [12, 14, 10, 12, None, None]
  assert [row["state"] for row in table["members"]] == ["done"] * 4 + ["failed"] * 2
  groups = {group["settings"]["targets.D"]: group["values"][bits] for group in table["groups"]}
  assert groups["12"] == {"n": 2, "mean": 13, "spread": pytest.approx(2**0.5)}
  assert groups["11"] == {"n": 0, "mean": None, "spread": None}
  page = (home / "table.md").read_text()
  assert "| targets.D=12,seed=0 | 12 | 0 | 7,000 |" in page and " 13 ± 1.4 " in page
  assert page.count("| failed, 2 attempts |") == 2 and page.count("| done |") == 4
  assert "* targets.D=11,seed=0, after 2 attempts:" in page and "      last | words" in page


def test_a_column_may_leave_out_what_is_plain_and_an_unknown_one_is_named(swept, tmp_path):
  finished(tmp_path / "one", 3.0, seed=5)
  found = sweep_table.numbers(tmp_path / "one" / "job", tmp_path)
  full = "evaluate_end.results.distilled.inside.kl"
  for column in (full, "evaluate_end.distilled.inside.kl", "evaluate_end.kl"):
    assert sweep_table.pick(found, column) == 5
  assert sweep_table.pick(found, "evaluate_end.inside.bits") is None
  swept("--sweep=seed=0", "--columns=evaluate_end.distilled.inside.bits")
  page = pathlib.Path("workdir", "quickstart_toy_sweep", "table.md").read_text()
  assert "No member has the column 'evaluate_end.distilled.inside.bits'; nearest: " in page
  assert "evaluate_end.results.distilled.inside.bits_per_byte" in page


def test_a_search_tells_of_its_winner_and_its_last_rung(tmp_path):
  stage = tmp_path / "job" / "search"
  rungs = [{"id": name, "valid_kl": kl} for name, kl in (("a@2", 3.0), ("b@2", 9.0), ("a@4", 2.0))]
  front = {"winner": "a", "rungs": rungs, "counts": {"scored": 7}}
  artefacts.write_json(stage / "front.json", front)
  records = [{"id": "b", "kl": 8.0}, {"id": "a", "kl": 5.0, "parameters": 70}]
  artefacts.write_bytes(stage / "candidates.jsonl", "\n".join(map(json.dumps, records)).encode())
  artefacts.write_json(stage / "inputs.json", {"config": {}, "needs": {}})
  artefacts.write_json(stage / "done.json", {"files": {}})
  found = sweep_table.numbers(tmp_path / "job", tmp_path)
  picked = [sweep_table.pick(found, column) for column in sweep_table.COLUMNS["search"]]
  assert picked == [7, 70, None, 5.0, 2.0, None]


@pytest.mark.parametrize("argv, words", [
  (["--sweep=distil.stesp=3,4"], "config key 'distil.stesp' is unknown; nearest: distil.steps"),
  (["--sweep=distil.steps=3,four"], "distil.steps"),
  (["--sweep=seed=0,1", "--config.seed=1"], "'seed' is swept and set by --config.seed=1"),
  (["--sweep=seed=0", "--command=dance"], "dance"),
  (["--sweep=seed=0", "--jobs=0"], "jobs"),
  (["--sweeps=seed=0"], "sweeps"),
  ([], "give --sweep"),
])
def test_what_is_wrong_is_said_before_anything_starts(swept, capsys, argv, words):
  assert swept(*argv) == (2, [])
  captured = capsys.readouterr()
  assert words in captured.err and captured.err.count("\n") == 1
  assert not pathlib.Path("workdir").exists()


def test_a_workdir_of_others_is_left_alone(swept, capsys):
  assert swept("--sweep=seed=0", "--workdir=here")[0] == 0
  assert swept("--sweep=seed=0", "--workdir=here", "--command=prune") == (2, [])
  words = "belongs to another sweep: its command is 'distill', not 'prune'"
  assert words in capsys.readouterr().err
  pathlib.Path("mine").mkdir()
  pathlib.Path("mine", "file").write_text("")
  assert swept("--sweep=seed=0", "--workdir=mine") == (2, [])


@pytest.mark.slow
def test_real_commands_share_their_cache_and_fill_the_table(tmp_path):
  line = [sys.executable, "-m", "experiments.sweep", TOY, "--command=prune", "--jobs=2",
          "--sweep=targets.D=12,10", "--workdir=all"]
  for expected in ("done after", "done (finished as asked)"):
    made = subprocess.run(line, cwd=tmp_path, env=commands.environment(), capture_output=True,
                          text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count(expected) == 2
  table = json.loads((tmp_path / "all" / "table.json").read_text())
  small, smaller = (row["values"]["cut.parameters"] for row in table["members"])
  assert small > smaller > 0
  assert len(list((tmp_path / "cache").glob("teacher-*[0-9a-f]"))) == 1
