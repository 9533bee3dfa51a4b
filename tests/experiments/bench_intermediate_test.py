"""The comparison of students by what is compared in training: its table, and what it reuses."""

import types

import pytest

from configs import quickstart_toy
from experiments import bench_intermediate
from hybridlm.config import ModelConfig


def test_a_seed_is_computed_once_and_only_read_for_the_same_values(tmp_path):
  made = []

  def make():
    made.append(1)
    return {"cut": {"kl": 0.5}}

  for _ in range(2):
    assert bench_intermediate.once(tmp_path / "seed0.json", "a", make) == {"cut": {"kl": 0.5}}
  with pytest.raises(ValueError, match="seed0.json holds results of other values"):
    bench_intermediate.once(tmp_path / "seed0.json", "b", make)
  assert made == [1]


def test_the_table_has_means_over_seeds_and_differences_within_them():
  c = quickstart_toy.get_config()
  c.targets.blocks = (0, 1)
  cfg = ModelConfig.from_pattern("----", V=31, D=16, F=24)
  names = ("cut", *bench_intermediate.VARIANTS)
  results = [
    {"teacher": {"ce": 1.0 + seed}}
    | {name: {"kl": kl + seed / 10, "ce": 1.0 + seed + kl}
       for name, kl in zip(names, (0.8, 0.4, 0.2, 0.5), strict=True)}
    for seed in range(3)
  ]
  lines = bench_intermediate.page(types.SimpleNamespace(cfg=cfg, c=c), results)
  assert lines[0].startswith("A teacher `----`") and "cut to `--` of" in lines[0]
  rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
  assert rows["logits, out"] == (
    "| logits, out | 0.3000 ± 0.1000 | 2.2000 ± 1.0000 | 75.0% | -0.2000, -0.2000, -0.2000 |")
  assert "| 50.0% | +0.0000," in rows["logits"] and "| 0.0% | +0.4000," in rows["cut"]
