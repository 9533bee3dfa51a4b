"""The benchmark of conversions measures the models that it says."""

import dataclasses

import pytest

from cases import models
from experiments import bench_convert, console, random_checkpoint
from hybridlm import config

CFG = models.make("untied", "M-*", dt_limits=(0.001, float("inf")), context=64)
SMALL = CFG.replace(D=11, blocks=(CFG.blocks[0], dataclasses.replace(CFG.blocks[1], F=13),
                                  CFG.blocks[2]))


@pytest.mark.parametrize("preset, targets, message", [
  ("other", "little", "its source is not of other"), ("big", "less", "its plan is not of less"),
])
def test_a_source_of_another_preset_is_refused(
  capsys, tmp_path, monkeypatch, preset, targets, message
):
  others = {"other": CFG.replace(D=14), "less": SMALL.replace(D=10)}
  monkeypatch.setattr(config, "PRESETS", {**config.PRESETS, "big": CFG, "little": SMALL, **others})
  monkeypatch.setattr(bench_convert, "copy", None)
  random_checkpoint.main([
    "x", "--preset=big", "--targets=little", f"--target={tmp_path / 'source'}",
    f"--plan={tmp_path / 'plan.json'}",
  ])
  bench_convert.check_source(tmp_path, "big", "little")
  flags = [f"--folder={tmp_path}", f"--preset={preset}", f"--targets={targets}"]
  assert console.call(bench_convert.main, ["x", *flags]) == 2
  assert capsys.readouterr().err == f"--folder={tmp_path}: {message}; give another folder\n"
