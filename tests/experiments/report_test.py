"""The report says what the numbers say, whichever way they went."""

import math

import numpy as np
import pytest

import hybridlm
from cases import models
from experiments import artefacts, plots, report, training
from hybridlm.prune.scores import Scores


def results(**cross_entropy):
  """Returns results whose bits per byte are twice their cross-entropy."""
  return {
    name: {
      "inside": {"cross_entropy": ce, "bits_per_byte": 2 * ce, "agreement": 0.4321, "kl": 0.1234,
                 "tokens": 100.0, "bytes": 50},
      "outside": {"cross_entropy": ce + 1, "bits_per_byte": 2 * ce + 2},
      "parameters": 1234567, "forward_tokens_per_second": 4321.0,
    }
    for name, ce in cross_entropy.items()
  }


def test_recovery_is_the_share_of_the_gap_that_closed():
  assert report.recovery(results(teacher=1.0, pruned=3.0, distilled=1.5)) == pytest.approx(0.75)
  assert report.recovery(results(teacher=1.0, pruned=3.0, distilled=3.5)) == pytest.approx(-0.25)
  assert math.isnan(report.recovery(results(teacher=1.0, pruned=1.0, distilled=1.0)))


@pytest.mark.parametrize("scratch, fourth, verb, sixth, other", [
  (2.0, 2.1, "beats", 2.05, "beats"), (1.2, 1.9, "does not beat", 1.8, "does not beat"),
  (2.0, 2.1, "beats", 1.9, "does not beat"),
])
def test_verdicts_follow_the_numbers(scratch, fourth, verb, sixth, other):
  found = results(teacher=1.0, pruned=3.0, distilled=1.5, scratch=scratch)
  lines = report.verdicts(found, {"inside": [4.0, 3.0, 2.5, fourth, 2.3, sixth, 2.4]})
  assert f"(2.000 bits a byte) {verb} a byte 4-gram ({fourth:.3f})" in lines[0]
  assert f"{other} the strongest n-gram printed, the 6-gram ({sixth:.3f})" in lines[0]
  assert "sample of 100 tokens of the split, the n-grams on all of it" in lines[0]
  assert "costs 4.000" in lines[1] and "brings back 3.000" in lines[1] and "75.0%" in lines[1]
  verb = "beats" if scratch == 2.0 else "does not beat"
  assert lines[2].startswith(f"Distilled (3.000) {verb} the same size")


def test_rounds_come_after_the_teachers_and_before_the_last_cut():
  names = ["scratch", "round10_pruned", "distilled", "round2_distilled", "repaired", "teacher",
           "round2_pruned", "pruned", "corrected"]
  assert report.ordered(names) == [
    "teacher", "corrected", "round2_pruned", "round2_distilled", "round10_pruned", "pruned",
    "repaired", "distilled", "scratch",
  ]
  assert report.label("round10_repaired") == "round 10: pruned + repaired"


@pytest.mark.parametrize("corrected, repaired, gains, brings", [
  (0.5, 2.5, "gains 1.000", "brings back 1.000"), (1.5, 3.5, "loses 1.000", "loses 1.000")])
def test_verdicts_say_what_correction_and_repair_did(corrected, repaired, gains, brings):
  found = results(teacher=1.0, corrected=corrected, pruned=3.0, repaired=repaired, distilled=2.0)
  lines = report.verdicts(found, {})
  assert f"Correction of the teacher {gains} bits a byte" in lines[0]
  assert f"Pruning costs {2 * (3.0 - corrected):.3f}" in lines[1]
  assert f"{1 / (3.0 - corrected):.1%} of the loss gap" in lines[1]
  assert lines[2] == f"Repair before distillation {brings} bits a byte."
  assert report.reference(found) == "corrected" and report.reference(["teacher"]) == "teacher"


def test_a_row_of_the_table_shows_what_was_measured():
  found = results(pruned=1.25)["pruned"]
  cells = report.row("pruned", found, {"tokens_per_second": 9876.4})
  assert cells == ["pruned", "1,234,567", "2.500", "4.500", "43.2%", "0.1234", "9,876", "4,321"]
  assert report.row("pruned", found, None)[6] == "–"
  assert len(cells) == len(report.HEADER)


def test_a_table_has_one_line_a_row_and_numbers_to_the_right():
  assert report.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_the_report_holds_every_part_and_every_picture_it_names(tmp_path):
  cfg = models.make()
  params = models.params(cfg)
  scores = hybridlm.calibrate(cfg, params, models.batches(cfg), depth="influence")
  plan = hybridlm.plan(cfg, scores, {"D": 12, "F": 16, "H": 2, "P": 4, "J": 2, "blocks": 4})
  log = {
    "train": [{"tokens": 10, "ce": 3.0}, {"tokens": 20, "ce": 2.0}],
    "valid": [{"tokens": 20, "ce": 2.5}],
    "summary": {"tokens_per_second": 50.0, "time": {
      "stepping": 3.0, "steps": 2, "seconds": 4.0, "device": 2.5, "idle": 0.25, "other": 0.25,
      "compile": 0.5, "validate": 0.25, "checkpoint": 0.25}},
  }
  main = report.write(
    tmp_path, title="a title", results=results(teacher=1.0, pruned=3.0, distilled=1.5, scratch=2.0),
    ngrams={"inside": [4.0, 3.0], "outside": [5.0, 4.5]},
    logs={"teacher": log, "distilled": log, "scratch": log}, scores=scores, plan=plan,
    facts={"Teacher": "small"},
  )
  text = (tmp_path / "report.md").read_text()
  assert text.startswith("# a title\n") and main in text and "* Teacher: small" in text
  assert "| byte 2-gram | 3.000 | 4.500 |" in text
  times = text.partition("## Where the time went")[2].splitlines()
  assert [line.split("|")[1].strip() for line in times if line.startswith("|")][2:] == [
    "teacher", "pruned + distilled", "same size from scratch"]
  pictures = {path.name for path in tmp_path.glob("*.png")}
  wanted = {f"importance_{name}.png" for name in ("HP", "F", "KJ", "D", "X")} | {"loss.png"}
  assert pictures == wanted and all(f"]({name})" in text for name in pictures)


def test_bars_are_coloured_by_what_the_plan_keeps(tmp_path, monkeypatch):
  cfg = models.make(pattern="-")
  sums = {"00/score_F": np.arange(24, dtype=np.float32) ** 2}
  scores = Scores(sums, 1.0, {"parameters": "x"})
  plan = hybridlm.plan(cfg, scores, {"F": 10})
  drawn = []
  monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
  plots.importance(scores, plan, tmp_path)
  ax = drawn[0].axes[0]
  colours = {}
  for bars in ax.containers:
    for bar in bars:
      colours[round(bar.get_x() + bar.get_width() / 2)] = (bars.get_label(), bar.get_height())
  assert [colours[f] for f in range(24)] == [
    ("kept 10" if f >= 14 else "dropped 14", pytest.approx(f)) for f in range(24)
  ]


def test_the_log_counts_tokens_and_averages_speed_over_them():
  times = {"steps": 1, "step_seconds": 2.0, "data_seconds": 0.5, "idle_seconds": 0.25,
           "device_seconds": 1.5}
  history = [
    {"step": 2, "split": "train", "ce": 3.0, "weight": 100.0, "tokens_per_second": 50.0} | times,
    {"step": 2, "split": "valid", "ce": 3.5, "validate_seconds": 1.0},
    {"step": 2, "split": "save", "checkpoint_seconds": 1.0},
    {"step": 3, "split": "train", "ce": 2.0, "weight": 50.0, "tokens_per_second": 100.0} | times,
  ]
  log = training.log(history)
  assert log["train"] == [{"tokens": 100, "ce": 3.0}, {"tokens": 150, "ce": 2.0}]
  assert log["valid"] == [{"tokens": 100, "ce": 3.5}]
  assert log["summary"]["tokens_per_second"] == pytest.approx(150 / 2.5)
  assert (log["summary"]["steps"], log["summary"]["tokens"]) == (3, 150)
  assert log["summary"]["time"]["seconds"] == 6.0


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
  cfg = models.make("layernorm")
  params = models.params(cfg)
  artefacts.save_model(tmp_path, cfg, params)
  again_cfg, again = artefacts.load_model(tmp_path)
  assert again_cfg == cfg
  assert models.axes.rename(again, str).keys() == params.keys()
  for (path, one), (other, two) in zip(
    models.axes.leaves(params), models.axes.leaves(again), strict=True
  ):
    assert path == other and np.array_equal(one, two) and one.dtype == two.dtype


def test_tokenizer_files_lie_beside_the_weights(tmp_path):
  cfg, like = models.make(), tmp_path / "like"
  like.mkdir()
  (like / "tokenizer.json").write_text('{"model": {"vocab": {"a": 30}}}')
  (like / "thesis.tex").write_text("not one of them")
  for name, source in (("with", like), ("without", tmp_path / "gone"), ("plain", None)):
    artefacts.save_model(tmp_path / name, cfg, models.params(cfg), like=source)
    found = {path.name for path in (tmp_path / name / "model").iterdir()}
    assert ("tokenizer.json" in found) == (name == "with") and "thesis.tex" not in found


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_model_is_an_error(tmp_path, size):
  cfg = models.make()
  artefacts.save_model(tmp_path, cfg, models.params(cfg))
  path = tmp_path / "model" / "model.safetensors"
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(ValueError, match="model.safetensors"):
    artefacts.load_model(tmp_path)
