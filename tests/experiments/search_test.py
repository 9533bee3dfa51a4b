"""A search leaves the best plan, its front and everything it looked at, and repeats itself."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import hybridlm
from configs import search_toy
from experiments import artefacts, census, searching, settings, stages
from experiments.mistakes import is_mistake
from hybridlm.prune import select
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores
from hybridlm.prune.search import masked

KEPT = ("plan.json", "candidates.jsonl", "replacements.jsonl", "front.json")
BLOCKWISE = {"method": "milp", "solutions": 2, "evolve": 1}


def config(**changes):
  """Returns the toy search without distillation; `changes` are of its section `search`."""
  c = search_toy.get_config()
  c.search.update({"rungs": (), "evolve": 1, **changes})
  c.plan.path = "search"
  return c


def devices(*shape):
  """Returns a grid of the first devices: data x model."""
  some = jax.devices()[: np.prod(shape)]
  return jax.make_mesh(shape, ("data", "tensor"), (AxisType.Auto,) * 2, devices=some)


@pytest.fixture(name="stage", scope="module")
def _stage(finished):
  """Runs the search of a config in a folder, on the finished job's teacher and scores."""
  grid = devices(1, 1)
  inputs = {"teacher": next((finished / "cache").glob("teacher-*")),
            "calibrate": finished / "job" / "calibrate"}

  def run(c, folder, grid=grid, **others):
    s = settings.setup(c, grid, cache=finished / "cache")
    (stage,) = searching.stages(s)
    folder.mkdir(exist_ok=True)
    stage.run(folder, inputs | others)
    return json.loads((folder / "front.json").read_text())

  run.grid, run.inputs, run.cache = grid, inputs, finished / "cache"
  return run


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def kept(folder):
  return {name: (folder / name).read_bytes() for name in KEPT}


@pytest.mark.parametrize("changes", [{}, BLOCKWISE], ids=["uniform", "by block"])
def test_the_best_of_what_was_scored_is_the_plan_and_it_keeps_the_budget(stage, tmp_path, changes):
  front = stage(config(**changes), tmp_path)
  found = lines(tmp_path / "candidates.jsonl")
  scored = [record for record in found if "reasons" not in record]
  rejected = [record for record in found if "reasons" in record]
  best = min(scored, key=lambda record: (record["kl"], record["parameters"]))
  assert front["winner"] == best["id"] and front["counts"]["scored"] == len(scored)
  assert front["counts"]["rejected"] == len(rejected)
  cfg, params = artefacts.load_model(stage.inputs["teacher"])
  scores = Scores.load(stage.inputs["calibrate"] / "scores.npz")
  for record in scored:
    plan = Plan.load(tmp_path / record["plan"])
    assert plan == select.plan(cfg, scores, record["targets"])
    cost = hybridlm.cost(plan.small_config(), context=32, batch=1)
    assert (record["parameters"], record["memory_bytes"]) == (cost.parameters, cost.total_bytes)
    assert cost.parameters <= 9_000
  assert Plan.load(tmp_path / "plan.json") == Plan.load(tmp_path / best["plan"])
  _, small = hybridlm.cut(cfg, params, Plan.load(tmp_path / "plan.json"))
  assert sum(leaf.size for leaf in jax.tree.leaves(small)) == best["parameters"]
  assert {record["origin"] for record in scored} <= {"random", "milp", "evolve"}
  assert best["id"] in front["front"]["masked"] and front["rungs"] == []


@pytest.mark.parametrize("changes", [{}, BLOCKWISE], ids=["uniform", "by block"])
def test_a_search_that_stopped_after_any_line_goes_on_to_the_same_result(stage, tmp_path, changes):
  calm, cut = tmp_path / "calm", tmp_path / "cut"
  stage(config(**changes), calm)
  whole = {name: (calm / name).read_bytes() for name in ("candidates.jsonl", "replacements.jsonl")}
  for name, data in whole.items():
    count = data.count(b"\n")
    for number in {0, count // 2, count - 1}:
      shutil.rmtree(cut, ignore_errors=True)
      shutil.copytree(calm / "plans", cut / "plans")  # a plan is there before its line
      if name == "candidates.jsonl":  # replacements come before candidates
        (cut / "replacements.jsonl").write_bytes(whole["replacements.jsonl"])
      done = b"".join(data.splitlines(keepends=True)[:number])
      (cut / name).write_bytes(done + b'{"id": "cut sho')
      stage(config(**changes), cut)
      assert kept(cut) == kept(calm)


def test_what_a_search_looks_at_follows_from_its_seed(stage, tmp_path):
  stage(config(), tmp_path / "one")
  c = config()
  c.seed = 5
  stage(c, tmp_path / "other")
  one, other = (lines(tmp_path / name / "candidates.jsonl") for name in ("one", "other"))
  assert [line["id"] for line in one] != [line["id"] for line in other]


def test_losses_on_a_mesh_are_those_of_one_device(stage, tmp_path):
  wide = devices(2, 1)
  fronts = [stage(config(), tmp_path / str(grid.size), grid) for grid in (stage.grid, wide)]
  one, two = (lines(tmp_path / name / "candidates.jsonl") for name in ("1", "2"))
  assert fronts[0]["winner"] == fronts[1]["winner"] and len(one) == len(two)
  for record, other in zip(one, two, strict=True):
    assert record.get("kl", 0.0) == pytest.approx(other.get("kl", 0.0), rel=1e-4, abs=1e-7)


def test_a_loss_that_is_not_finite_loses_nothing_that_was_scored(stage, tmp_path, monkeypatch):
  score, left = masked.Scorer.__call__, iter(range(3))

  def broken(self, plan):
    if next(left, None) is None:
      raise masked.NotFinite("search: kl of a candidate is nan")
    return score(self, plan)

  s = settings.setup(config(), stage.grid, cache=stage.cache)
  (made,) = searching.stages(s)
  alone = stages.Stage(
    "search", made.config, lambda folder, inputs: made.run(folder, stage.inputs))
  with monkeypatch.context() as patch, pytest.raises(masked.NotFinite):
    patch.setattr(masked.Scorer, "__call__", broken)
    stages.run([alone], tmp_path, owner={"config": "x", "file": "y"}, say=lambda line: None)
  scored = [r for r in lines(tmp_path / "search.partial" / "candidates.jsonl") if "kl" in r]
  assert len(scored) == 2  # the parent is in the other file


def test_what_only_trains_finalists_is_no_input_of_a_search_without_rungs(stage):
  def inputs(**changes):
    c = config(**changes.pop("search", {}))
    for section, values in changes.items():
      c[section].update(values)
    return searching.stages(settings.setup(c, stage.grid, cache=stage.cache))[0].config

  other = {"distil": {"peak": 1e-5}, "evaluate": {"batches": 1}}
  assert inputs() == inputs(**other)
  rungs = {"search": {"rungs": (2,)}}
  assert inputs(**rungs) != inputs(**rungs, **other)
  assert inputs(**rungs) == inputs(**rungs, distil={"save_every": 1})  # how often it is saved


def test_scores_of_another_model_are_refused(stage, tmp_path):
  scores = Scores.load(stage.inputs["calibrate"] / "scores.npz")
  folder = tmp_path / "calibrate"
  folder.mkdir()
  Scores(scores.sums, scores.weight, {**scores.meta, "parameters": "f" * 64}).save(
    folder / "scores.npz")
  with pytest.raises(ValueError, match="the scores are of parameters ffffffffffff") as error:
    stage(config(), tmp_path / "search", calibrate=folder)
  assert is_mistake(error.value)


@pytest.mark.parametrize("changes, budget, message", [
  ({}, 100, "none of 24 candidates fits; .*the nearest possible is parameters 6,268"),
  (BLOCKWISE, 100, "no choice of blocks fits the budget; the nearest possible needs parameters"),
  ({"space": {"F": (), "D": (), "H": (), "J": ()}}, 9000, "search.space is empty"),
  ({"space": {"F": (23, 25)}}, 9000, "search space F=.*: target F=25 .*larger than the parent's"),
  ({"space": {"K": (3,)}}, 9000, "search space K=.*: target K=3 of block 2: larger"),
], ids=["budget", "budget by block", "empty", "large", "axis"])
def test_what_cannot_be_searched_is_one_line_and_nothing_is_written(
  stage, tmp_path, changes, budget, message
):
  c = config()
  c.search.update(changes)
  c.budget.parameters = budget
  with pytest.raises(ValueError, match=message) as error:
    stage(c, tmp_path / "search")
  assert is_mistake(error.value)
  assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("changes, message", [
  ({"score": "mmlu"}, "search.score='mmlu' is not one of kl, ce"),
  ({"method": "best"}, "search.method='best' is not one of grid, random, milp"),
  ({"finalists": 0}, "search.finalists=0 must be at least 1"),
  ({"rungs": (20, 20)}, r"search.rungs=\(20, 20\): steps must rise"),
  ({"rivals": ("largest",)}, "without search.rungs they do not train"),
  ({"rivals": ("best",), "rungs": (2,)}, "search.rivals: 'best' is not one of largest, targets"),
])
def test_values_that_no_search_can_use_are_refused_before_anything_runs(stage, changes, message):
  c = config(**changes)
  with pytest.raises(ValueError, match=message):
    searching.stages(settings.setup(c, stage.grid, cache=stage.cache))


def test_a_census_counts_what_fits_and_finds_the_named_candidate(stage):
  c = config()
  c.search.winner.update(D=16, F=12, H=2, J=3)
  c.rules.divisors.F = 8
  s = settings.setup(c, stage.grid, cache=stage.cache)
  text = census.text(s)
  assert "24 uniform candidates: D 12..16 (2), F 12..24 (3), H 2..4 (2), J 2..3 (2)" in text
  every = [dict(D=d, F=f, H=h, J=j) for d in (12, 16) for f in (12, 16, 24) for h in (2, 4)
           for j in (2, 3)]
  counts = [hybridlm.cost(select.sized(s.cfg, each)).parameters for each in every]
  good = [n <= 9_000 and each["F"] != 12 for n, each in zip(counts, every, strict=True)]
  big, odd = sum(n > 9_000 for n in counts), sum(each["F"] == 12 for each in every)
  assert f"feasible: {sum(good)}; rejected by rule: " in text
  assert f"budget: parameters {big}" in text and f"divisor {odd}" in text
  top = max(n for n, fits in zip(counts, good, strict=True) if fits)
  assert f"{top:,}" in text.split("largest that fits")[1].splitlines()[0]
  row = text.split("| search.winner |")[1]
  assert "divisor: F=12 is not a multiple of 8" in row
  c.search.method = "milp"  # two options of M, three of the MLP, two of attention, two of D
  assert "block by block: about 10^1 candidates, 7 options to score" in census.text(s)
  c.search.winner.F = 13
  with pytest.raises(ValueError, match="search.winner: .*F=13.* is not in the search space"):
    census.text(s)


def test_a_front_is_of_losses_and_the_costs_that_are_known():
  records = {
    name: {"parameters": parameters, "memory_bytes": memory, "prefill_seconds": None,
           "decode_seconds": None}
    for name, parameters, memory in (("a", 3, 1), ("b", 2, 2), ("c", 3, 2))
  }
  losses = [("a", 1.0), ("b", 1.0), ("c", 1.0)]
  assert searching.front(losses, records) == ["a", "b"] and searching.front([], records) == []
  assert np.isfinite(losses[0][1])
