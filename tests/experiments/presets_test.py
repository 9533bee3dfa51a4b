"""Published compressions as configs: their spaces hold what was published, and their twins run."""

import importlib
import json

import jax
import pytest

from cases import commands
from experiments import census, cli, limits, settings
from experiments.candidates import Judge
from hybridlm import config
from hybridlm.config import PRESETS
from hybridlm.prune import select

TWINS = {"nemotron_h_8b_to_4b": "nemotron_h_8b", "nemotron_h_56b_to_47b": "nemotron_h_56b",
         "mamba2_1p3b_to_780m": "mamba2_1p3b", "minitron_dense": "nemotron_4_15b"}
# arXiv 2504.11409, Table 1, models without removed layers: D, F, heads, channels, 1e9 parameters.
TABLE = [
  (3072, 12288, 112, 64, 4.489), (3072, 10752, 128, 64, 4.491), (3328, 9984, 112, 64, 4.495),
  (3072, 12288, 112, 60, 4.390), (3072, 12288, 120, 56, 4.391), (3072, 13056, 112, 56, 4.404),
  (3072, 11520, 112, 64, 4.376), (3072, 13056, 96, 64, 4.375), (3072, 13824, 128, 48, 4.490),
  (3072, 14592, 96, 56, 4.431), (3072, 11520, 128, 56, 4.377), (3072, 16128, 64, 64, 4.372),
]


def setup(name, tmp_path):
  """Returns a config's job on one device, nothing of it computed."""
  c = importlib.import_module(f"configs.{name}").get_config()
  grid = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
  return settings.setup(c, grid, cache=tmp_path)


def judge(s):
  """Returns what says of targets whether a job's search may choose them."""
  return Judge(s.cfg, limits.of(s, s.cfg, measured=False))


@pytest.mark.parametrize("name, small", [
  ("nemotron_h_8b_to_4b", "nemotron_h_4b"), ("mamba2_1p3b_to_780m", "mamba2_780m"),
  ("minitron_dense", "minitron_8b"),
])
def test_the_published_model_is_among_the_feasible(tmp_path, name, small):
  s = setup(name, tmp_path)
  assert s.cfg.blocks == PRESETS[TWINS[name]].blocks
  winner, look = census.named(s), judge(s)
  assert look.look(winner) == []
  left, published = look.small(winner), PRESETS[small]
  assert (left.D, left.blocks) == (published.D, published.blocks)
  assert config.parameters(left) == config.parameters(published)
  for target, size in winner.items():
    assert size in s.c.search.space[target]


def test_every_published_candidate_of_full_depth_is_in_the_space_and_fits(tmp_path):
  s = setup("nemotron_h_8b_to_4b", tmp_path)
  look, space = judge(s), s.c.search.space
  for D, F, heads, P, billions in TABLE:
    targets = {"D": D, "F": F, "heads": heads, "P": P}
    found = config.parameters(select.sized(s.cfg, targets))
    assert found / 1e9 == pytest.approx(billions, abs=6e-4)
    assert look.look(targets) == []
    assert all(size in space[target] for target, size in targets.items())
  assert any("parameters" in reason for reason in look.look({"D": 3328, "F": 12288}))


def test_the_published_47b_fits_the_memory_and_its_parent_does_not(tmp_path):
  s = setup("nemotron_h_56b_to_47b", tmp_path)
  limit = limits.of(s, s.cfg, measured=False)
  small, parent = (limit.costs(PRESETS[name])["memory_bytes"] / 2**30
                   for name in ("nemotron_h_47b", "nemotron_h_56b"))
  assert small == pytest.approx(31.68, abs=0.01) and parent == pytest.approx(45.73, abs=0.01)
  assert limit.reasons(s.cfg, PRESETS["nemotron_h_47b"]) == []
  reason, = limit.reasons(s.cfg, s.cfg)
  assert reason.startswith("budget: memory")
  space = s.c.search.space
  assert 98 in space.blocks and 30720 in space.F and (min(space.F), max(space.F)) == (24576, 32768)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_searches_the_same_names_by_the_same_method_and_finds_something(tmp_path, name):
  big = importlib.import_module(f"configs.{name}").get_config()
  s = setup(f"{name}_twin", tmp_path)
  assert not s.c.model.preset and config.parameters(s.cfg) < 1_000_000
  assert set(s.cfg.pattern) == set(PRESETS[TWINS[name]].pattern)
  for key in ("method", "score"):
    assert s.c.search[key] == big.search[key]
  searched, wanted = ({n for n, c in each.search.space.items() if c} for each in (s.c, big))
  assert searched == wanted
  text = census.text(s)
  feasible = int(text.partition("feasible: ")[2].partition(";")[0].replace(",", ""))
  assert feasible >= 5
  if census.named(s):
    row, = (line for line in text.splitlines() if line.startswith(f"| {census.WINNER} |"))
    assert row.endswith("| yes |")


@pytest.mark.parametrize("name", ["search", "distill"])
def test_a_dry_run_of_a_published_compression_allocates_nothing(
  tmp_path, capsys, monkeypatch, name
):
  monkeypatch.chdir(tmp_path)
  command = importlib.import_module(f"experiments.{name}")
  line = [name, "--config=configs/nemotron_h_8b_to_4b.py", "--dry_run",
          "--config.search.space.F=(12288,21504)", "--config.search.space.P=(64,)",
          "--config.search.space.blocks=(48,52)"]
  monkeypatch.setattr("hybridlm.init", None)
  assert cli.call(command.main, line) == 0
  out = capsys.readouterr().out
  assert "search space: 180 uniform candidates" in out
  assert "| 4,489,223,040 |" in out and "feasible: " in out


@pytest.mark.slow
@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs_from_text_to_report(tmp_path, name):
  few = ["teacher.steps=6", "teacher.warmup=1", "distil.steps=6", "distil.warmup=1",
         "search.rungs=(2,)", "search.candidates=200", "evaluate.batches=2", "data.length=64"]
  argv = [f"--config=configs/{name}_twin.py", "--workdir=job",
          *(f"--config.{each}" for each in few)]
  (code, out, err), = commands.drive([("distill", argv)], cwd=tmp_path)
  assert (code, err) == (0, "")
  assert "| pruned + distilled | " in out
  held = json.loads((tmp_path / "job" / "search" / "front.json").read_text())
  assert held
