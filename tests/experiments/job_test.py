"""The main job at toy size, as a user runs it: stages, reruns, mistakes."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from cases import commands
from configs import quickstart_toy
from experiments import artefacts, report, settings
from hybridlm import config

CONFIG = commands.TOY
STAGES = ["teacher", "calibrate", "plan", "cut", "ngrams", "evaluate_cut", "distil", "scratch",
          "findings", "evaluate_end", "report"]


def parameters() -> tuple[str, str]:
  """Returns the parameters of the toy teacher and of its small model, as tables print them."""
  grid = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
  s = settings.setup(quickstart_toy.get_config(), grid, cache=pathlib.Path("unused"))
  return tuple(f"{config.parameters(cfg):,}" for cfg in (s.cfg, s.small))


def call(place, name, *argv):
  """Returns exit code, output and error output of one command on the copied job."""
  return commands.drive([(name, [CONFIG, "--workdir=job", *argv])], cwd=place)[0]


def states(out: str) -> dict[str, str]:
  """Returns the state of each stage that a dry run printed."""
  lines = out[: out.index("teacher: `")].splitlines()[1:]
  return {line.split()[0]: line.split()[1] for line in lines}


def ran(out: str) -> list[str]:
  """Returns the stages that a run computed, in order."""
  lines = [line.split() for line in out.splitlines() if line.startswith("[hybridlm]")]
  return [words[1].rstrip(":") for words in lines if words[2] in ("new", "redo", "resume")]


def test_one_command_goes_from_text_to_a_report(finished):
  (code, out, err), = json.loads((finished / "out.json").read_text())
  assert (code, err) == (0, "")
  assert ran(out) == STAGES
  text = (finished / "job" / "report" / "report.md").read_text()
  for name in ("teacher", "pruned", "pruned + distilled", "same size from scratch"):
    assert f"| {name} | " in text
  teacher, small = parameters()
  assert f"| teacher | {teacher} |" in text and f"| pruned | {small} |" in text
  speed = artefacts.read_json(finished / "job" / "evaluate_end" / "speed.json")
  assert speed.keys() == {"teacher", "pruned", "distilled", "scratch"}
  for name, tokens in speed.items():  # one stage timed them all, taking turns
    table = text.partition("## Where the time went")[0].splitlines()
    row, = (line for line in table if line.startswith(f"| {report.NAMES[name]} | "))
    assert row.endswith(f" {tokens:,.0f} |")
  pictures = {path.name for path in (finished / "job" / "report").glob("*.png")}
  maps = {f"importance_{name}.png" for name in ("HP", "F", "KJ", "D", "X")}
  assert pictures == maps | {"loss.png"}
  assert all(f"]({name})" in text for name in pictures)
  assert "loss gap" in out and str(pathlib.Path("job", "report", "report.md")) in out


def test_a_rerun_computes_nothing_and_changes_no_file(place):
  before = commands.files(place)
  code, out, err = call(place, "distill")
  assert (code, err, ran(out)) == (0, "", [])
  assert commands.files(place) == before


def test_a_changed_value_redoes_its_stage_and_what_depends_on_it(place):
  code, out, _ = call(place, "distill", "--config.distil.temperature=2.0")
  assert code == 0
  assert ran(out) == ["distil", "evaluate_end", "report"]
  assert "distil: redo (training.temperature: 1.0 -> 2.0)" in out


def test_a_dry_run_says_what_would_be_redone_and_computes_nothing(place):
  before = commands.files(place)
  code, out, err = call(place, "distill", "--config.targets.F=10", "--dry_run")
  assert (code, err) == (0, "")
  kept = {"teacher", "calibrate", "ngrams", "findings"}
  assert states(out) == {name: "done" if name in kept else "redo" for name in STAGES}
  assert "targets.F: 16 -> 10" in out and f"| teacher | {parameters()[0]} |" in out
  assert commands.files(place) == before


def test_a_dry_run_of_a_new_job_writes_nothing_at_all(tmp_path):
  (code, out, _), = commands.drive([("distill", [CONFIG, "--dry_run"])], cwd=tmp_path)
  assert code == 0 and set(states(out).values()) == {"new"}
  assert list(tmp_path.iterdir()) == []


def test_workdirs_share_the_teacher_and_single_stages_stop_where_they_should(place):
  argv = [CONFIG, "--workdir=other"]
  names = ("pretrain", "calibrate", "prune", "evaluate")
  results = commands.drive([(name, argv) for name in names], cwd=place)
  assert [code for code, _, _ in results] == [0] * 4
  assert [ran(out) for _, out, _ in results] == [[], ["calibrate"], ["plan", "cut"],
                                                 ["evaluate_cut"]]
  assert f"| pruned | {parameters()[1]} |" in results[3][1] and "| byte 2-gram |" in results[3][1]


def test_a_plan_and_a_teacher_given_as_files_are_used_as_they_are(place):
  shutil.copy(place / "job" / "plan" / "plan.json", place / "mine.json")
  teacher, = (place / "cache").glob("teacher-*")
  argv = [CONFIG, "--workdir=other", "--config.plan.path=mine.json",
          f"--config.teacher.path={teacher / 'model'}"]
  (code, out, _), = commands.drive([("prune", argv)], cwd=place)
  assert code == 0 and ran(out) == ["teacher", "plan", "cut"]
  for name in ("model.json", "model.safetensors"):
    assert (place / "other" / "cut" / "model" / name).read_bytes() == (
      place / "job" / "cut" / "model" / name).read_bytes()


def text(path: str, source: str = "main") -> list[str]:
  """Returns the arguments that make a folder of text a source."""
  return [f"--config.data.sources.{source}.{key}" for key in ("kind=text", f"path={path}")]


# Mistakes: what it is -> (arguments, words that the one line must hold).
MISTAKES = {
  "an unknown config key": (["--config.distil.stesp=3"], ["distil.stesp", "distil.steps"]),
  "a value of another type": (["--config.distil.steps=few"], ["distil.steps", "few"]),
  "an unknown flag": (["--workdri=x"], ["workdri"]),
  "an unknown preset": (["--config.model.preset=nemotron_h_9b"], ["nemotron_h_9b",
                                                                  "nemotron_h_8b"]),
  "a preset with a pattern": (["--config.model.preset=nemotron_h_8b"], ["nemotron_h_8b",
                                                                        "pattern"]),
  "a letter no block has": (["--config.model.pattern=M?"], ["M?"]),
  "a target above the parent": (["--config.targets.D=17"], ["D=17", "16"]),
  "a target of zero": (["--config.targets.F=0"], ["F=0"]),
  "heads in two units that disagree": (
    ["--config.targets.heads=3", "--config.targets.H=4"], ["heads"]),
  "heads that groups cannot share": (
    ["--config.targets.H=None", "--config.targets.heads=5"],
    ["heads=5", "not a multiple of its 2 groups"]),
  "a layout that devices cannot share": (["--config.mesh.tensor=2"], ["tensor=2", "needs 2"]),
  "a vocabulary too small for the tokenizer": (["--config.model.V=200"], ["257", "V=200"]),
  "an unknown tokenizer": (["--config.data.tokenizer=sotu_1025"], ["sotu_1025", "sotu_1024"]),
  "an unknown estimator": (["--config.calibrate.estimator=best"], ["best", "activation"]),
  "scores that miss an axis": (["--config.calibrate.axes=HP"], ["score_D"]),
  "a source that is not there": (["--config.evaluate.outside=latin"], ["latin", "main"]),
  "a missing corpus": (text("gone"), ["gone"]),
  "a corpus of a user who is not there": (text("~nobody-here/x"), ["~nobody-here/x"]),
  "an empty corpus": (text("empty"), ["main"]),
  "a corpus that is not UTF-8": (text("latin"), ["latin", "UTF-8"]),
  "a corpus shorter than a sequence": (text("short"), ["main", "fewer", "data.length=32"]),
  "an out-of-domain corpus shorter than a sequence": (
    text("short", "other"), ["data.sources.other", "'test'", "20 tokens", "data.length=32"]),
  "a sequence longer than the corpus": (["--config.data.length=20000000"], ["20000000"]),
  "a sequence of nothing": (["--config.data.length=0"], ["data.length=0"]),
  "micro-batches that do not divide": (["--config.distil.accumulate=3"], ["batch=2",
                                                                          "accumulate=3"]),
  "a mesh of more devices than there are": (["--config.mesh.data=3"], ["3", "1"]),
  "an unknown schedule": (["--config.teacher.schedule=linear"], ["linear", "cosine"]),
  "a plan that is not there": (["--config.plan.path=gone.json"], ["gone.json"]),
  "a plan of other parameters": (["--config.plan.path=foreign.json"], ["foreign.json",
                                                                       "parameters"]),
  "a plan of another number of heads in each group": (
    ["--config.plan.path=uneven.json"], ["uneven.json", "every group keeps as many"]),
  "a teacher that is not there": (["--config.teacher.path=gone"], ["gone"]),
  "a teacher without parameters": (["--config.teacher.path=half"], ["half"]),
  "a teacher that is a list": (["--config.teacher.path=list"], ["list/model.json"]),
  "a truncated teacher": (["--config.teacher.path=truncated"], ["truncated/model.safetensors"]),
  "a teacher whose weights are not finite": (
    ["--config.teacher.path=nan/model"], ["nan/model", "embed/w_embed_VD", "must be finite"]),
  "a teacher in a package that is not there": (
    ["--config.teacher.path=package:gone/x.gguf"], ["package:gone/x.gguf", "not installed"]),
  "a teacher that is no model": (["--config.teacher.path=empty"], ["empty", "config.json"]),
  "a teacher that is no GGUF file": (
    ["--config.teacher.path=bad.gguf"], ["bad.gguf is not a whole GGUF file"]),
  "the tokenizer of a teacher that is pretrained": (
    ["--config.data.tokenizer=teacher"], ["data.tokenizer='teacher'", "teacher.path is empty"]),
  "a token that ends no document": (
    ["--config.data.tokenizer=sotu_1024", "--config.data.end=<end>"], ["<end>"]),
  "an unknown format of export": (["--config.export.format=onnx"], ["export.format='onnx'", "hf"]),
  "an unknown family of models": (
    ["--config.export.format=hf", "--config.export.family=gpt9"], ["gpt9", "llama"]),
  "a family that cannot hold the small model": (
    ["--config.export.format=hf", "--config.export.family=llama"], ["export", "llama cannot"]),
  "an axis the model has not": (
    ["--config.model.pattern=M-", "--config.model.K=None", "--config.model.J=None",
     "--config.model.E=None", "--config.targets.J=None", "--config.targets.K=1"],
    ["target K=1", "no block of 'M-' has this axis"]),
  "a misspelt target": (["--config.targets.NN=4"], ["targets.NN", "targets.N"]),
  "a misspelt value of the repair": (["--config.repair.rigde=1.0"], ["repair.rigde",
                                                                      "repair.ridge"]),
  "an unknown correction": (["--config.correct.run=after"], ["correct.run='after'", "beside"]),
  "a search of nothing": (["--config.plan.path=search"], ["plan.path='search'", "search.space"]),
  "layers of a model that is not made of them": (
    ["--config.targets.layers=1"], ["layers=1", "not made of layers"]),
}


def write_bad_input(place: pathlib.Path) -> None:
  """Writes corpora, plans and teachers that no run can use."""
  for name, data in {"empty": b"", "latin": b"caf\xe9 " * 99, "short": b"too short"}.items():
    (place / name).mkdir()
    for number in range(20):
      (place / name / f"{number:02d}.txt").write_bytes(data)
  plan = json.loads((place / "job" / "plan" / "plan.json").read_text())
  (place / "foreign.json").write_text(json.dumps(plan | {"source": "0" * 64}))
  plan["keep"]["00"]["keep_GH"][1].pop()
  (place / "uneven.json").write_text(json.dumps(plan))
  teacher, = (place / "cache").glob("teacher-*")
  cfg, params = artefacts.load_model(teacher)
  artefacts.save_model(place / "nan", cfg, params | {"embed": {
    "w_embed_VD": np.full_like(params["embed"]["w_embed_VD"], np.nan)}})
  for name in ("half", "list", "truncated"):
    (place / name).mkdir()
    shutil.copy(teacher / "model" / "model.json", place / name)
  (place / "list" / "model.json").write_text("[]")
  (place / "bad.gguf").write_text("GGUF")
  weights = (teacher / "model" / "model.safetensors").read_bytes()
  (place / "truncated" / "model.safetensors").write_bytes(weights[:-50])


def test_a_users_mistake_gets_one_line_and_code_2_and_changes_nothing(place, subtests):
  write_bad_input(place)
  before = commands.files(place / "job")
  calls = [("distill", [CONFIG, "--workdir=job", *argv]) for argv, _ in MISTAKES.values()]
  fresh = [("distill", [CONFIG, "--workdir=fresh/a/job", "--cache_dir=cache", *argv])
           for argv, _ in MISTAKES.values()]
  results = commands.drive(calls + fresh, cwd=place)
  for (name, (_, words)), *both in zip(
    MISTAKES.items(), results[: len(calls)], results[len(calls) :], strict=True
  ):
    with subtests.test(name):
      for code, _, err in both:
        assert code == 2, err
        assert err.count("\n") == 1 and err.endswith("\n")
        assert all(word in err for word in words), err
  assert commands.files(place / "job") == before
  assert not (place / "fresh").exists()


def test_a_workdir_of_another_config_is_refused(place):
  config = place / "mine.py"
  config.write_text(
    "from configs import quickstart_toy\n\n\ndef get_config():\n"
    "  c = quickstart_toy.get_config()\n  c.name = 'mine'\n  return c\n"
  )
  before = commands.files(place / "job")
  (code, _, err), = commands.drive([("distill", ["--config=mine.py", "--workdir=job"])], cwd=place)
  assert code == 2 and err.count("\n") == 1
  assert "belongs to config 'quickstart_toy' of configs/quickstart_toy.py, not" in err
  assert commands.files(place / "job") == before


def test_rows_that_devices_cannot_share_are_refused(place):
  before = commands.files(place / "job")
  (code, _, err), (other, _, words) = commands.drive(
    [("distill", [CONFIG, "--workdir=job", *argv]) for argv in (
      ["--config.mesh.data=8"], ["--config.mesh.data=1", "--config.mesh.tensor=8"])],
    cwd=place, XLA_FLAGS="--xla_force_host_platform_device_count=8")
  assert (code, err) == (
    2, "teacher.batch=2 is not a multiple of teacher.accumulate=1 times mesh.data × mesh.fsdp=8\n")
  assert other == 2 and "mesh.tensor=8" in words and ": the teacher: leaf " in words, words
  assert commands.files(place / "job") == before


def test_a_diverged_run_keeps_its_folder_and_damaged_checkpoints_are_told_and_left(place):
  wild = ["--config.distil.peak=1e30", "--config.distil.clip=1e30", "--config.distil.warmup=0",
          "--config.distil.save_every=1"]
  code, _, err = call(place, "distill", *wild)
  assert code == 2 and "is not finite" in err and err.count("\n") == 1, err
  partial = place / "job" / "distil.partial"
  saved = list(partial.glob("checkpoints/*/position.json"))
  assert saved and (partial / "metrics.jsonl").is_file()
  for path in saved:
    path.write_bytes(path.read_bytes()[:-3])
  before = commands.files(place / "job")
  code, _, err = call(place, "distill", *wild)
  assert code == 2 and "damaged" in err and err.count("\n") == 1, err
  assert commands.files(place / "job") == before


def test_a_truncated_artefact_is_told_and_left_alone(place):
  path = place / "job" / "cut" / "model" / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-50])
  before = commands.files(place / "job")
  code, _, err = call(place, "distill", "--config.distil.temperature=2.0")
  assert code == 2 and err.count("\n") == 1
  assert "cut: model/model.safetensors is not what was written" in err
  assert commands.files(place / "job") == before


def test_the_study_of_heads_names_the_command_that_made_it(place):
  code, out, err = call(place, "evidence")
  assert (code, err) == (0, "")
  text = (place / "docs" / "results" / "quickstart_toy.md").read_text()
  assert f"python -m experiments.evidence {CONFIG}\n" in text


@pytest.mark.parametrize("where", [
  "cache/teacher-*/model/model.safetensors", "job/cut/model/model.safetensors"])
def test_one_flipped_bit_in_a_model_is_found_before_it_is_used(place, where):
  path, = place.glob(where)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  before = commands.files(place)
  code, _, err = call(place, "distill", "--config.distil.temperature=2.0")
  assert code == 2 and "model.safetensors" in err and "SHA-256" in err and err.count("\n") == 1
  assert commands.files(place) == before
