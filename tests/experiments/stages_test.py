"""The stage engine on stages that write one line each: what runs, what is left alone, and why."""

import json
import pathlib
import shutil

import pytest

from experiments import artefacts, journal, mistakes, stages
from hybridlm.train import checkpoint, loop, together

OWNER = {"config": "line", "file": "configs/line.py"}


class Interrupted(Exception):
  """Stands for whatever kills a run."""


def interrupt(folder):
  """Leaves half of its work behind."""
  (folder / "half").write_text("done before the kill")
  raise Interrupted


class Line:
  """Three stages, a <- b <- c and a <- d, that write their config and their inputs' text."""

  def __init__(self, workdir: pathlib.Path, *, home: pathlib.Path | None = None):
    self.workdir, self.home, self.ran = workdir, home, []

  def stages(self, *, version=1, actions=None, **values):
    actions = actions or {}
    needs = {"a": (), "b": ("a",), "c": ("b",), "d": ("a",)}

    def make(name):
      def run(folder, inputs):
        self.ran.append(name)
        texts = [(inputs[need] / "text").read_text() for need in needs[name]]
        if name in actions:
          actions[name](folder)
        (folder / "text").write_text(f"{name}{values.get(name, 0)}({','.join(texts)})")

      return stages.Stage(
        name=name, config={"value": values.get(name, 0)}, run=run, needs=needs[name],
        version=version if name == "b" else 1, home=self.home if name == "a" else None,
      )

    return [make(name) for name in "abcd"]

  def run(self, **values):
    self.ran.clear()
    folders = stages.run(
      self.stages(**values), self.workdir, owner=OWNER, say=lambda line: None)
    return {name: (folder / "text").read_text() for name, folder in folders.items()}

  def states(self, **values):
    return {s.stage.name: (s.state, s.why) for s in stages.survey(self.stages(**values),
                                                                  self.workdir)}


@pytest.fixture(name="line")
def _line(tmp_path):
  return Line(tmp_path / "work")


def everything_in(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns every file below a folder and its bytes."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_stage_runs_once_and_reads_what_it_needs(line):
  assert line.run(a=1, d=2) == {
    "a": "a1()", "b": "b0(a1())", "c": "c0(b0(a1()))", "d": "d2(a1())",
  }
  assert line.ran == ["a", "b", "c", "d"]


def test_a_rerun_runs_nothing_and_changes_no_file(line):
  line.run()
  before = everything_in(line.workdir)
  line.run()
  assert line.ran == []
  assert everything_in(line.workdir) == before


def test_a_changed_value_redoes_its_stage_and_everything_downstream_only(line):
  line.run()
  assert line.run(b=5)["c"] == "c0(b5(a0()))"
  assert line.ran == ["b", "c"]


def test_a_raised_code_version_redoes_the_stage_and_everything_downstream(line):
  line.run()
  line.run(version=2)
  assert line.ran == ["b", "c"]


def test_the_survey_says_what_would_run_and_why_and_writes_nothing(line):
  line.run()
  before = everything_in(line.workdir)
  assert line.states(b=5) == {
    "a": ("done", "made from the same inputs"),
    "b": ("redo", "value: 0 -> 5"),
    "c": ("redo", "b changed"),
    "d": ("done", "made from the same inputs"),
  }
  assert line.states(version=2)["b"] == ("redo", "code version: 1 -> 2")
  assert everything_in(line.workdir) == before


def test_the_survey_of_a_missing_workdir_makes_none(line):
  assert {state for state, _ in line.states().values()} == {"new"}
  assert not line.workdir.exists()


def test_a_killed_stage_goes_on_in_the_folder_it_left(line):
  def first(folder):
    (folder / "half").write_text("done before the kill")
    raise Interrupted

  def second(folder):
    assert (folder / "half").read_text() == "done before the kill"

  with pytest.raises(Interrupted):
    line.run(actions={"b": first})
  assert line.states()["b"] == ("resume", "an earlier run left it unfinished")
  line.run(actions={"b": second})
  assert line.ran == ["b", "c", "d"]


def test_what_a_killed_stage_left_is_dropped_when_its_inputs_change(line):
  def leave(folder):
    (folder / "half").write_text("of value 0")
    raise Interrupted

  with pytest.raises(Interrupted):
    line.run(actions={"b": leave})
  line.run(b=1)
  assert not (line.workdir / "b" / "half").exists()


def test_the_old_artefact_stands_until_the_new_one_is_whole(line):
  def kill(folder):
    raise Interrupted

  line.run()
  with pytest.raises(Interrupted):
    line.run(b=1, actions={"b": kill})
  assert (line.workdir / "b" / "text").read_text() == "b0(a0())"
  assert line.states()["b"][0] == "done"


def test_a_finished_partial_folder_only_needs_its_place(line):
  line.run()
  shutil.move(line.workdir / "b", line.workdir / "b.partial")
  line.run()
  assert line.ran == []
  assert (line.workdir / "b" / "text").read_text() == "b0(a0())"


def test_a_damaged_artefact_is_an_error_that_names_the_file(line):
  line.run()
  path = line.workdir / "b" / "text"
  path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
  before = everything_in(line.workdir)
  with pytest.raises(ValueError, match="text is not what was written.*delete the folder"):
    line.run(c=1)
  assert line.ran == []
  assert everything_in(line.workdir) == before


def mistake(folder):
  """Does some work and then finds what only the user can mend."""
  (folder / "half").write_text("")
  artefacts.read_json(folder / "gone.json")


@pytest.mark.parametrize("culprit", "abcd")
def test_a_mistake_found_by_any_stage_of_a_fresh_job_leaves_nothing(line, tmp_path, culprit):
  line.workdir = tmp_path / "some" / "where" / "work"
  with pytest.raises(FileNotFoundError, match="gone.json"):
    line.run(actions={culprit: mistake})
  assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_fresh_job_leaves_the_empty_folder_it_was_given(line):
  line.workdir.mkdir()
  with pytest.raises(FileNotFoundError):
    line.run(actions={"c": mistake})
  assert line.workdir.is_dir() and list(line.workdir.iterdir()) == []


@pytest.mark.parametrize("culprit", "bcd")
def test_a_mistake_found_after_stages_were_redone_brings_their_old_artefacts_back(line, culprit):
  line.run()
  before = everything_in(line.workdir)
  with pytest.raises(FileNotFoundError, match="gone.json"):
    line.run(a=1, d=1, actions={culprit: mistake})
  assert line.ran == list("abcd"[: "abcd".index(culprit) + 1])
  assert everything_in(line.workdir) == before


def test_a_mistake_keeps_what_an_earlier_kill_left_of_other_values(line):
  def kill(folder):
    (folder / "half").write_text("hours of work")
    raise Interrupted

  line.run()
  with pytest.raises(Interrupted):
    line.run(b=1, actions={"b": kill})
  before = everything_in(line.workdir)
  with pytest.raises(FileNotFoundError):
    line.run(b=2, actions={"c": mistake})
  assert everything_in(line.workdir) == before


def test_what_was_resumed_before_a_mistake_can_be_resumed_again(line):
  def kill(folder):
    raise Interrupted

  with pytest.raises(Interrupted):
    line.run(actions={"b": kill})
  with pytest.raises(FileNotFoundError):
    line.run(actions={"c": mistake})
  assert line.ran == ["b", "c"]
  assert line.states()["b"][0] == "resume" and not (line.workdir / "c.partial").exists()
  line.run()
  assert line.ran == ["c", "d"]


@pytest.mark.parametrize("kind", [loop.NotFinite, loop.Spike, checkpoint.NotSaved])
def test_bad_steps_and_a_full_disk_leave_the_folder_and_the_stages_before_it(line, kind):
  def diverge(folder):
    (folder / "metrics").write_text("nan")
    together.check(kind("as the loop raises it"))

  line.run()
  with pytest.raises(kind):
    line.run(b=1, actions={"c": diverge})
  assert (line.workdir / "b" / "text").read_text() == "b1(a0())"
  assert (line.workdir / "c.partial" / "metrics").read_text() == "nan"
  assert (line.workdir / "c" / "text").read_text() == "c0(b0(a0()))"
  assert not list(line.workdir.glob("*.old"))


def test_a_bug_undoes_no_work(line):
  with pytest.raises(ValueError, match="invalid literal"):
    line.run(actions={"c": lambda folder: int("three")})
  assert {path.name for path in line.workdir.iterdir()} == {
    "workdir.json", "a", "b", "c.partial"}


def test_what_a_kill_left_aside_is_put_back_or_dropped(line):
  line.run()
  before = everything_in(line.workdir)
  # Killed between the two renames of b, and while the old c was being removed.
  shutil.move(line.workdir / "b", line.workdir / "b.old")
  shutil.copytree(line.workdir / "c", line.workdir / "c.old")
  line.run()
  assert line.ran == []
  assert everything_in(line.workdir) == before


def test_a_mistake_brings_back_what_a_killed_run_had_put_in_place(line, monkeypatch):
  def kill(folder):
    raise Interrupted

  line.run()
  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    patch.setattr(journal.Journal, "settle", lambda self, mark=0: None)  # as SIGKILL would
    line.run(b=1, actions={"c": kill})
  assert (line.workdir / "b.old").is_dir()
  with pytest.raises(FileNotFoundError):
    line.run(b=2, actions={"c": mistake})
  assert (line.workdir / "b" / "text").read_text() == "b1(a0())"
  line.run(b=1)
  assert line.ran == ["c"] and not list(line.workdir.glob("*.old"))


def test_a_stage_is_redone_when_what_it_needs_was_made_anew(line):
  def other(folder):
    (folder / "chance").write_text("another draw")

  line.run()
  shutil.rmtree(line.workdir / "b")
  assert line.states()["c"] == ("redo", "b is made anew")
  with pytest.raises(Interrupted):
    line.run(actions={"b": other, "c": interrupt})
  shutil.rmtree(line.workdir / "c.partial")
  assert line.states()["c"] == ("redo", "b was made anew")
  line.run()
  assert line.ran == ["c"]


def test_a_stage_is_not_redone_when_what_it_needs_came_out_the_same(line):
  line.run()
  shutil.rmtree(line.workdir / "b")
  line.run()
  assert line.ran == ["b"]


def test_nothing_goes_on_from_another_version_of_what_it_needs(line):
  with pytest.raises(Interrupted):
    line.run(actions={"c": interrupt})
  shutil.rmtree(line.workdir / "b")
  line.run(actions={"b": lambda folder: (folder / "chance").write_text("another draw")})
  assert not (line.workdir / "c" / "half").exists()


@pytest.mark.parametrize("name, text", [
  ("workdir.json", "[]"), ("b/inputs.json", "[]"), ("b/done.json", "[]"), ("b/done.json", "{}"),
  ("b/inputs.json", '{"config": [], "needs": {}}'), ("b/inputs.json", "{"),
])
def test_a_damaged_record_is_an_error_that_names_it(line, name, text):
  line.run()
  (line.workdir / name).write_text(text)
  before = everything_in(line.workdir)
  with pytest.raises(ValueError, match=name) as caught:
    line.run(c=1)
  assert mistakes.is_mistake(caught.value)
  assert everything_in(line.workdir) == before


@pytest.mark.parametrize("owner", [
  {"config": "other", "file": "configs/line.py"}, {"config": "line", "file": "/elsewhere/line.py"}])
def test_a_workdir_of_another_config_is_refused(line, owner):
  line.run()
  with pytest.raises(ValueError, match="belongs to config 'line' of configs/line.py, not"):
    stages.run(line.stages(), line.workdir, owner=owner, say=lambda text: None)


def test_a_folder_with_other_things_in_it_is_refused(line):
  line.workdir.mkdir()
  (line.workdir / "thesis.tex").write_text("precious")
  with pytest.raises(ValueError, match="neither empty nor one of ours"):
    line.run()
  assert everything_in(line.workdir) == {"thesis.tex": b"precious"}


def test_two_runs_never_share_a_workdir_at_a_time(line):
  line.run()
  with artefacts.locked(line.workdir), pytest.raises(ValueError, match="in use by another run"):
    line.run(b=1)
  line.run(b=1)
  assert line.ran == ["b", "c"]


def test_a_shared_artefact_is_made_once_for_all_workdirs(tmp_path):
  home = tmp_path / "cache"
  one, two = (Line(tmp_path / name, home=home) for name in ("one", "two"))
  one.run()
  two.run()
  assert one.ran == ["a", "b", "c", "d"] and two.ran == ["b", "c", "d"]
  two.run(a=1)
  assert two.ran == ["a", "b", "c", "d"]
  one.run()
  assert one.ran == []


def test_a_stage_must_come_after_what_it_needs(line):
  a, b, *_ = line.stages()
  with pytest.raises(ValueError, match="'b'.*before what it needs"):
    stages.survey([b, a], line.workdir)


def test_a_written_file_is_never_half_there(tmp_path, monkeypatch):
  path = tmp_path / "value.json"
  artefacts.write_json(path, {"x": 1})

  def fail(*_):
    raise Interrupted

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(Interrupted):
    artefacts.write_json(path, {"x": 2})
  assert json.loads(path.read_text()) == {"x": 1}
