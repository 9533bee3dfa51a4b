"""Rounds, corrections and repairs as stages: which there are, what each reads, mistakes."""

import pathlib

import jax
import pytest

from configs import quickstart_toy
from experiments import pipeline, rounds, settings, stages
from experiments.mistakes import is_mistake

PLAIN = ["teacher", "calibrate", "plan", "cut", "ngrams", "evaluate_cut", "distil", "scratch",
         "findings", "evaluate_end", "report"]
ROUND = {"targets": {"D": 14, "F": 20, "H": 3}, "distil": {"steps": 2, "peak": 1e-3}}


def toy():
  """Returns the toy config with one source of text, the one that is read fast."""
  c = quickstart_toy.get_config()
  c.evaluate.outside = "main"
  return c


def setup(tmp_path, **changes):
  """Returns the toy job with sections changed: `repair={"run": ..}`, `schedule=(..)`."""
  c = toy()
  for name, value in changes.items():
    if isinstance(value, dict):
      c[name].update(value)
    else:
      c[name] = value
  grid = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
  return settings.setup(c, grid, cache=tmp_path / "cache")


def built(tmp_path, **changes):
  """Returns the stages of the toy job by name."""
  return {stage.name: stage for stage in pipeline.build(setup(tmp_path, **changes))}


def prints(found, tmp_path):
  """Returns the fingerprint of each stage by name."""
  return {s.stage.name: s.fingerprint for s in stages.survey(list(found.values()), tmp_path / "w")}


def test_a_job_that_asks_for_none_of_it_has_the_plain_stages_and_their_inputs(tmp_path):
  found = built(tmp_path)
  assert list(found) == PLAIN
  assert found["plan"].config == {"targets": {"D": 12, "F": 16, "H": 2, "P": 4, "J": 2}}
  assert found["cut"].needs == ("teacher", "plan") and found["cut"].config == {}
  assert found["distil"].needs == ("teacher", "cut")
  assert set(found["distil"].config) == {"training", "data"}
  assert "run" not in found["teacher"].config["training"]


def test_a_correction_before_stands_in_for_the_teacher_everywhere(tmp_path):
  found = built(tmp_path, correct={"run": "before"})
  assert list(found)[:2] == ["teacher", "correct"] and found["correct"].needs == ("teacher",)
  for name in ("calibrate", "cut", "distil", "findings"):
    assert "correct" in found[name].needs and "teacher" not in found[name].needs, name
  # Both are measured.
  assert {"teacher", "correct"} <= set(found["evaluate_cut"].needs)


def test_a_correction_beside_teaches_and_nothing_else(tmp_path):
  found = built(tmp_path, correct={"run": "beside"})
  for name in ("calibrate", "cut", "findings"):
    assert "teacher" in found[name].needs and "correct" not in found[name].needs, name
  assert found["distil"].needs == ("correct", "cut")
  one, two = (prints(built(tmp_path, correct={"run": run}), tmp_path) for run in
              ("before", "beside"))
  assert one["correct"] == two["correct"]  # who reads it does not change what it is
  assert one["cut"] != two["cut"] and prints(built(tmp_path), tmp_path)["cut"] == two["cut"]


def test_a_repair_lies_between_cut_and_distillation_and_its_values_are_its_inputs(tmp_path):
  found = built(tmp_path, repair={"run": "least_squares"})
  assert list(found)[3:5] == ["cut", "repair"]
  assert found["repair"].needs == ("teacher", "plan", "cut")
  assert found["distil"].needs == ("teacher", "repair")
  before = prints(found, tmp_path)
  after = prints(built(tmp_path, repair={"run": "least_squares", "ridge": 0.5}), tmp_path)
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {"repair", "evaluate_cut", "distil", "evaluate_end", "report"}


def test_every_round_scores_cuts_and_distils_and_the_next_begins_with_its_student(tmp_path):
  second = {"targets": {"F": 18}}
  found = built(
    tmp_path, schedule=(ROUND, second), repair={"run": "least_squares"}, correct={"run": "beside"})
  assert list(found)[:13] == [
    "teacher", "correct",
    "round1_calibrate", "round1_plan", "round1_cut", "round1_repair", "round1_distil",
    "round2_calibrate", "round2_plan", "round2_cut", "round2_repair", "round2_distil", "calibrate",
  ]
  assert found["round1_calibrate"].needs == ("teacher",)
  assert found["round2_calibrate"].needs == ("round1_distil",)
  assert found["round2_plan"].needs == ("round1_distil", "round2_calibrate")
  assert found["round2_cut"].needs == ("round1_distil", "round2_plan")
  assert found["round2_repair"].needs == ("round1_distil", "round2_plan", "round2_cut")
  assert found["round2_distil"].needs == ("correct", "round2_repair")  # the teacher teaches always
  assert found["cut"].needs == ("round2_distil", "plan")
  assert found["distil"].needs == ("correct", "repair")
  assert found["round1_plan"].config == {"targets": ROUND["targets"]}
  assert found["round2_plan"].config == {"targets": {"F": 18}}
  training = [found[name].config["training"] for name in ("round1_distil", "round2_distil")]
  assert [(run["steps"], run["peak"]) for run in training] == [(2, 1e-3), (4, 3e-3)]
  assert training[0]["batch"] == 2


def test_a_changed_round_redoes_itself_and_what_follows_but_not_the_rounds_before(tmp_path):
  one, two = (
    prints(built(tmp_path, schedule=(ROUND, {"targets": {"F": size}})), tmp_path)
    for size in (18, 17))
  kept = {name for name in one if one[name] == two[name]}
  assert {"teacher", "round1_calibrate", "round1_distil", "round2_calibrate"} <= kept
  assert not {"round2_plan", "round2_distil", "calibrate", "cut", "distil"} & kept


def test_sizes_of_rounds_are_checked_against_the_student_before(tmp_path):
  s = setup(tmp_path, schedule=(ROUND, {"targets": {"F": 18}}))
  assert [(each.small.D, each.small.F) for each in s.rounds] == [(14, 20), (14, 18)]
  assert (s.small.D, s.small.F) == (12, 16) and s.cfg.D == 16
  text = pipeline.dry_run(s, pipeline.build(s), tmp_path / "work")
  assert "| round 1 | " in text and "| round 2 | " in text and "| small model | " in text


def test_after_a_round_that_leaves_blocks_to_the_scores_sizes_are_not_foretold(tmp_path):
  s = setup(tmp_path, schedule=({"targets": {"blocks": 2}},), calibrate={"depth": "kl"})
  assert s.small is None
  found = {stage.name: stage for stage in pipeline.build(s)}
  assert found["scratch"].needs == ("cut",)
  text = pipeline.dry_run(s, list(found.values()), tmp_path / "work")
  assert "its sizes are known after the scores" in text


@pytest.mark.parametrize("given, words", [
  (({"target": {}},), ["schedule: round 1", "target is unknown", "targets"]),
  ((ROUND, {"targets": {"D": 12}, "distil": {"stesp": 3}}),
   ["schedule: round 2", "distil.stesp is unknown", "distil.steps"]),
  (({"targets": {"Q": 3}},), ["schedule: round 1", "targets.Q is unknown"]),
  (({"distil": {"steps": 3}},), ["schedule: round 1", "it has no targets"]),
  ((ROUND, ROUND | {"targets": {"F": 21}}), ["schedule: round 2", "F=21", "20"]),
  (({"targets": {"D": 10}},), ["D=12", "10"]),  # the last one would grow
  (({"targets": {"D": 14}, "distil": {"steps": 0}},), ["schedule: round 1", "distil.steps=0"]),
  (({"targets": {"D": 14}, "distil": {"steps": "few"}},), ["schedule: round 1", "few"]),
  (({"targets": {"D": 14}, "distil": {"warmup": 9}},), ["schedule: round 1", "warmup=9"]),
  ((3,), ["schedule: round 1", "3 is not a table"]),
  ("none", ["schedule='none' is not a tuple of rounds"]),
])
def test_a_mistake_in_a_round_is_one_line_that_names_the_round(given, words, tmp_path):
  c = toy()
  with c.ignore_type():
    c.schedule = given
  grid = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
  with pytest.raises(ValueError) as caught:
    settings.setup(c, grid, cache=tmp_path / "cache")
  assert is_mistake(caught.value) and "\n" not in str(caught.value)
  assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rounds_take_nothing_of_the_last_ones_sizes_or_export():
  c = quickstart_toy.get_config()
  c.schedule, c.export.format = ({"targets": {"F": 20}},), "hf"
  one, = rounds.configs(c)
  assert settings.targets(one) == {"F": 20} and one.export.format == "none"
  assert c.targets.D == 12 and c.export.format == "hf"  # the config itself is as it was


def test_targets_by_block_are_read_and_written_as_data():
  c = quickstart_toy.get_config()
  c.targets.F, c.targets.blocks, c.targets.floors = ((1, 16), (10, 8)), (0, 1), (("*", 2),)
  wanted = settings.targets(c)
  assert wanted["F"] == {1: 16, 10: 8} and wanted["blocks"] == [0, 1]
  assert wanted["floors"] == {"*": 2} and settings.written(wanted)["F"] == {"1": 16, "10": 8}
  for bad in ((3, 4), ((1, 2, 3),), ((1, 16), (1, 8)), ()):
    c.targets.F = bad
    with pytest.raises(ValueError, match=r"targets\.F="):
      settings.targets(c)


def test_a_rewired_stage_reads_other_folders_under_the_plain_names(tmp_path):
  seen = {}
  plain = stages.Stage("cut", {"a": 1}, lambda folder, inputs: seen.update(inputs),
                       needs=("teacher", "plan"), version=3)
  made = stages.rewired(plain, {"cut": "round1_cut", "plan": "round1_plan", "other": "x"})
  assert (made.name, made.needs) == ("round1_cut", ("teacher", "round1_plan"))
  assert (made.version, made.config) == (3, {"a": 1})
  made.run(tmp_path, {"teacher": pathlib.Path("t"), "round1_plan": pathlib.Path("p")})
  assert seen == {"teacher": pathlib.Path("t"), "plan": pathlib.Path("p")}
  assert stages.rewired(plain, {"other": "x", "cut": "cut"}) is plain
  assert stages.rewired(None, {"cut": "x"}) is None
