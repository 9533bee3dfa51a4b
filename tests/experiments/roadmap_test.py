"""Models side by side: equal sizes or a refusal, values to rows, and what is said of two rows."""

import pytest

from cases import models
from experiments import cli, console, roadmap, sweeping
from hybridlm.config import parameters

CONFIG = "--config=configs/evidence/hymba.py"
COLUMNS = roadmap._columns("recall")


def table(**values):
  """Returns a sweep's table: name -> (bits, recall) of every seed."""
  rows = [
    {"name": f"{name},seed={seed}", "values": dict(zip(COLUMNS.values(), (*pair, 60.0 + seed),
                                                       strict=True))}
    for name, pairs in values.items() for seed, pair in enumerate(pairs)
  ]
  return {"members": rows}


def row(name, *pairs, pattern="M-"):
  found = table(**{name: pairs, "other": pairs[::-1]})
  return roadmap.row(name, models.make(pattern=pattern), found, COLUMNS, 64, 12.0)


def test_the_models_of_the_study_have_equal_parameters_and_ever_smaller_states():
  job = cli.parse(["roadmap", CONFIG])
  found = sweeping.members([job.config.assess.members])
  made = {each.name: roadmap._model([CONFIG], each) for each in found}
  assert [*made] == ["llama", "mamba2", "sequential", "parallel", "windows", "sharing", "meta"]
  counts = [parameters(cfg) for cfg in made.values()]
  assert max(counts) <= (1 + job.config.assess.tolerance) * min(counts)
  text = roadmap.sizes(made, job.config.assess.tolerance, 8192)
  state = {line.split("|")[1].strip(): int(line.split("|")[-2].replace(",", ""))
           for line in text.splitlines()[2:]}
  assert state["llama"] > 3 * state["sequential"] and state["parallel"] > 2 * state["windows"]
  assert state["windows"] > state["sharing"] and state["mamba2"] < state["sharing"] < state["meta"]
  roadmap.check_pairs(job.config.assess.pairs, made)
  made["wide"] = models.make(F=999)
  with pytest.raises(ValueError, match=r"assess.members: wide has [0-9,]+ parameters, .* has|"
                                       r".* has .*, wide .* assess.tolerance=0.02"):
    roadmap.sizes(made, job.config.assess.tolerance, 8192)


def test_values_of_a_model_are_those_of_its_own_members_seed_by_seed():
  found = row("one", (2.0, 0.5), (3.0, 0.25))
  assert (found.bits, found.recall, found.seconds) == ((2.0, 3.0), (0.5, 0.25), (60.0, 61.0))
  assert roadmap.over(found.bits, ".2f") == "2.50 ± 0.71" and roadmap.over((1.5,), ".2f") == "1.50"


def test_two_models_are_compared_within_seeds_and_recall_by_chance_is_no_claim():
  one, other = row("one", (2.0, 0.5), (3.0, 0.25)), row("two", (2.5, 0.4), (3.0, 0.5), pattern="*-")
  said = roadmap.verdict(one, other, 0.1)
  assert "one against two: -0.500, +0.000 bits a byte; +10.0%, -25.0% recall;" in said
  assert f"{other.state / one.state:.2f} times fewer bytes" in said
  low = [row(name, (2.0, 0.19)) for name in ("one", "two")]
  assert "near chance" in roadmap.verdict(*low, 0.1) and "%" not in roadmap.verdict(*low, 0.1)


def test_the_page_has_a_row_a_model_and_its_command(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  job = cli.parse(["roadmap", CONFIG])
  job.config.assess.pairs = (("one", "two"),)
  page = roadmap.write(job, [row("one", (2.0, 0.5)), row("two", (2.5, 0.4))], "the command")
  written = (tmp_path / roadmap.RESULTS / "hymba_study.md").read_text()
  assert page.startswith(written) and "    the command\n" in written
  assert "| one | " in written and "| 2.000 | 50.0% | 0.0" in written and "main 0.5" in written
  assert (tmp_path / roadmap.RESULTS / "hymba_study.png").is_file()


@pytest.mark.parametrize("change, words", [
  ("assess.members=", "assess.members is empty"),
  ("assess.recall=()", "assess.recall is empty"),
  ("assess.pairs=(('meta','all'),)", "no pair of models; there are llama"),
  ("assess.tolerance=0.0001", "parameters"),
])
def test_a_study_that_cannot_be_made_is_told_in_one_line_before_anything_runs(
  change, words, tmp_path, capfd
):
  line = ["roadmap", CONFIG, f"--config.{change}", f"--workdir={tmp_path / 'new'}"]
  code = console.call(roadmap.main, line)
  err = capfd.readouterr().err
  assert code == 2 and words in err and err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


TINY = (
  "data.tokenizer=bytes", "data.length=32", "data.sources.recall.pairs=3",
  "data.sources.recall.documents=40", "data.sources.short.documents=40", "model.D=16",
  "model.pattern=*-", "model.K=2",
  "teacher.steps=3", "teacher.batch=2", "teacher.warmup=1", "evaluate.batches=1",
  "evaluate.batch=2", "assess.batch=2", "assess.batches=2", "assess.context=48", "assess.steps=2",
  "assess.turns=1", "assess.members=list:llama:model.F=24", "assess.pairs=(('llama','llama'),)",
)


@pytest.mark.slow
def test_one_command_trains_measures_and_writes_the_page(tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XLA_FLAGS", "")  # members see one device
  line = ["roadmap", CONFIG, *(f"--config.{each}" for each in TINY)]
  assert console.call(roadmap.main, line) == 0, capfd.readouterr().err
  page = (tmp_path / roadmap.RESULTS / "hymba_study.md").read_text()
  rows = [each for each in page.splitlines() if each.startswith("| llama | ")]
  assert len(rows) == 1 and "–" not in rows[0]
  assert "* llama against llama: +0.000 bits" in page
  assert "192 tokens each (from step 0 main 0.5, short 0.5; from step 250 " in page
  capfd.readouterr()
  assert console.call(roadmap.main, line) == 0
  assert "llama,seed=0: done (finished as asked)" in capfd.readouterr().out
