"""The optional stages of the main job, run: correction, rounds and repair, killed and resumed."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from cases import commands
from configs import base
from experiments import artefacts, pipeline, settings, stages, teaching
from experiments.artefacts import load_model
from hybridlm import axes
from hybridlm.prune.plan import Plan
from hybridlm.prune.trees import tree_hash

OWNER = {"config": "tiny", "file": "configs/tiny.py"}
RUN = {"batch": 2, "warmup": 1, "validate_every": 2, "validate_batches": 1, "save_every": 1}
WEIGHTS = "model/model.safetensors"


class Interrupted(Exception):
  """Stands for whatever kills a run."""


def built(place: pathlib.Path, **changes) -> list[stages.Stage]:
  """Returns the stages of a job of two MLPs: a correction beside, one round and a repair."""
  c = base.get_config()
  c.name, c.data.length = "tiny", 16
  c.model.update(pattern="--", D=8, F=12)
  c.teacher.update(steps=3, peak=1e-2, **RUN)
  c.correct.update(run="beside", steps=3, peak=1e-2, **RUN)
  c.calibrate.update(batches=1, batch=2)
  c.schedule = ({"targets": {"F": 10}, "distil": {"steps": 2}},)
  c.targets.F = 7
  c.repair.update(run="least_squares", batches=1, batch=2)
  c.distil.update(steps=3, **RUN)
  c.scratch.run = "none"
  c.evaluate.update(batch=2, batches=1, speed_repeats=1, ngram=0, outside="main")
  for section, values in changes.items():
    c[section].update(values)
  grid = jax.make_mesh(
    (1, 1), ("data", "tensor"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
  return pipeline.build(settings.setup(c, grid, cache=place / "cache"))


def run(place: pathlib.Path, *names: str) -> tuple[dict[str, pathlib.Path], list[str]]:
  """Runs the job, up to the named stages; returns its folders and what was said."""
  made, said = built(place), []
  made = pipeline.until(made, *names) if names else made
  return stages.run(made, place / "work", owner=OWNER, say=said.append), said


@pytest.fixture(name="done", scope="module")
def _done(tmp_path_factory):
  place = tmp_path_factory.mktemp("recipe")
  return run(place)[0]


def test_the_teacher_is_cut_and_the_corrected_one_teaches(done):
  hashes = {name: tree_hash(load_model(done[name])[1]) for name in ("teacher", "correct")}
  assert hashes["teacher"] != hashes["correct"]
  assert Plan.load(done["round1_plan"] / "plan.json").source == hashes["teacher"]
  needs = artefacts.read_json(done["round1_distil"] / "inputs.json")["needs"]
  assert set(needs) == {"correct", "round1_repair"}
  log = artefacts.read_json(done["correct"] / "log.json")
  assert log["summary"]["steps"] == 3 and len(log["valid"]) >= 1


def test_the_last_round_cuts_the_student_of_the_one_before(done):
  student_cfg, student = load_model(done["round1_distil"])
  plan = Plan.load(done["plan"] / "plan.json")
  assert student_cfg.F == 10 and plan.source == tree_hash(student)
  assert load_model(done["distil"])[0].F == 7


def test_distillation_begins_with_the_repaired_model(done):
  cut, repaired = (load_model(done[name])[1] for name in ("cut", "repair"))
  changed = {path for (path, one), (_, two) in zip(
    axes.leaves(cut), axes.leaves(repaired), strict=True) if not np.array_equal(one, two)}
  assert changed == {"blocks/00/w_down_FD", "blocks/01/w_down_FD"}
  fits = artefacts.read_json(done["repair"] / "repaired.json")
  assert all(fit["after"] <= fit["before"] for fit in fits.values()) and len(fits) == 2


def test_the_report_has_a_row_and_a_fact_of_each_model(done):
  text = (done["report"] / "report.md").read_text()
  table, _, times = text.partition("## Where the time went")
  rows = [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")]
  assert rows[2:] == [
    "teacher", "teacher, corrected", "round 1: pruned", "round 1: pruned + repaired",
    "round 1: pruned + distilled", "pruned", "pruned + repaired", "pruned + distilled",
  ]
  assert all(f"| {name} | " in times for name in ("teacher, corrected", "pruned + distilled"))
  for words in ("* round 1: Small model: ", "* Corrected teacher: distilled from, the teacher",
                "* Repaired: least squares of 2 output projections", "* Correction of the teacher ",
                "* Training, round 1: pruned + distilled: 2 steps", "* Repair before distillation"):
    assert words in text, words


def test_a_rerun_computes_nothing(done):
  place = done["report"].parents[1]
  before = commands.files(place / "work")
  _, lines = run(place)
  assert lines and all("done already" in line for line in lines)
  assert commands.files(place / "work") == before


@pytest.mark.parametrize("stage", ["correct", "round1_distil", "repair"])
def test_a_stage_that_is_killed_goes_on_to_the_same_model(stage, done, tmp_path, monkeypatch):
  """It dies as it saves its model: what it trained before that is kept."""
  save, where = artefacts.save_model, done[stage].relative_to(done["report"].parents[1])
  for name in ("work", "cache"):
    shutil.copytree(done["report"].parents[1] / name, tmp_path / name)
  want = (tmp_path / where / WEIGHTS).read_bytes()
  shutil.rmtree(tmp_path / where)

  def die(folder, *args, **kwargs):
    if folder.name.startswith(stage):
      raise Interrupted
    save(folder, *args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    patch.setattr(artefacts, "save_model", die)
    run(tmp_path, stage)
  monkeypatch.setattr(teaching.hybridlm, "init", lambda *_, **__: pytest.fail("it starts again"))
  again, said = run(tmp_path, stage)
  assert f"{stage}: resume (an earlier run left it unfinished)" in said
  assert "teacher: done already (made from the same inputs)" in said
  assert (again[stage] / WEIGHTS).read_bytes() == want


def test_a_changed_ridge_redoes_the_repair_and_what_follows(done):
  place = done["report"].parents[1]
  made = built(place, repair={"ridge": 0.1})
  states = {s.stage.name: s.state for s in stages.survey(made, place / "work")}
  redone = {name for name, state in states.items() if state != "done"}
  assert {"round1_repair", "round1_distil", "repair", "distil", "report"} <= redone
  assert not {"teacher", "correct", "round1_calibrate", "round1_plan", "round1_cut"} & redone
