"""What runs are watched for follows from configs, and the split of their time from records."""

import jax
import pytest

import hybridlm
from cases import models
from configs import base, quickstart_toy
from experiments import cli, observing, report
from hybridlm.prune import devices


class Chip:
  """A device of some kind."""

  def __init__(self, kind):
    self.device_kind = kind


def history(**extra):
  """Returns records of three timed steps, a validation and two saves; seconds are easy to add."""
  common = {"split": "train", "data_seconds": 2.0, "device_seconds": 5.0, **extra}
  return [
    common | {"step": 1, "steps": 1, "step_seconds": 8.0, "idle_seconds": 2.0,
              "compile_seconds": 30.0, "mfu": 0.5, "process_memory_bytes": 7},
    {"step": 1, "split": "save", "checkpoint_seconds": 4.0},
    common | {"step": 3, "steps": 2, "step_seconds": 6.0, "idle_seconds": 0.5, "mfu": 0.2,
              "process_memory_bytes": 9},
    {"step": 3, "split": "valid", "ce": 1.0, "validate_seconds": 3.0},
    {"step": 3, "split": "save", "checkpoint_seconds": 1.0},
  ]


def test_the_parts_of_a_run_s_time_are_those_of_its_records_and_sum_to_it():
  found = observing.split(history())
  assert found == {
    "device": 15.0, "idle": 3.0, "other": 2.0, "compile": 30.0, "validate": 3.0, "checkpoint": 5.0,
    "seconds": 58.0, "steps": 3, "data": 6.0, "stepping": 20.0, "process_memory_bytes": 9,
    "mfu": pytest.approx((0.5 * 8 + 0.2 * 12) / 20),
  }
  assert sum(found[part] for part in observing.PARTS) == found["seconds"]


def test_the_report_s_row_shows_shares_of_wall_time_and_the_teacher_apart():
  found = observing.split(history(teacher_mfu=0.1))
  assert observing.row("distilled", found) == [
    "distilled", "6,666.7", "32.0%", "42.0%", "0.00", "58.0",
    "25.9%", "5.2%", "3.4%", "51.7%", "5.2%", "8.6%",
  ]
  del found["mfu"]
  assert observing.row("x", found)[2:4] == ["–", "–"]
  text = report.times({"distilled": observing.split(history()), "teacher": found})
  assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
    "teacher", "pruned + distilled"]
  assert text.splitlines()[0].count("|") == len(observing.HEADER) + 1


def test_flops_are_three_forwards_of_the_model_and_one_of_the_teacher(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [Chip("NVIDIA H200")] * 3)
  big, small = models.make(), models.make(pattern="-").replace(dtype="bfloat16")
  watch = observing.watch(small, big, (3, 5))
  assert watch.flops(64) == {
    "model": 3 * hybridlm.cost(small, context=64).prefill_flops,
    "teacher": hybridlm.cost(big, context=64).prefill_flops,
  }
  assert watch.peak == 3 * 989.4e12 and watch.profile == (3, 5)
  alone = observing.watch(big, None, ())
  assert set(alone.flops(8)) == {"model"} and alone.profile is None and alone.peak == 3 * 67e12


@pytest.mark.parametrize("kinds, dtype", [
  (["NVIDIA H200", "abacus"], "bfloat16"), (["NVIDIA H200"], "float64"), (["cpu"], "float32")])
def test_a_device_or_dtype_without_a_published_peak_has_none(monkeypatch, kinds, dtype):
  monkeypatch.setattr(jax, "devices", lambda: [Chip(kind) for kind in kinds])
  assert observing.peak(dtype) is None


def test_every_kind_of_device_is_in_the_table_of_peaks():
  assert set(devices.KINDS.values()) == set(devices.DEVICES)
  assert devices.of_kind("TPU v5 lite") is devices.DEVICES["v5e"]
  assert devices.of_kind("NVIDIA H100 PCIe") is None


def test_the_flag_traces_the_distillation_or_the_teacher_where_that_is_all():
  job = cli.parse(["distill", "--config=configs/quickstart_toy.py", "--profile=1:3"])
  assert job.profile == (1, 3)
  asked = observing.traced(job.config, job.profile, ())
  assert (tuple(asked.distil.profile), tuple(asked.teacher.profile)) == ((1, 3), ())
  asked = observing.traced(job.config, job.profile, ("teacher",))
  assert (tuple(asked.distil.profile), tuple(asked.teacher.profile)) == ((), (1, 3))
  assert tuple(job.config.distil.profile) == ()
  assert cli.parse(["distill", "--config=configs/quickstart_toy.py"]).profile is None


@pytest.mark.parametrize("text, message", [
  ("3", "profile '3': give START:STOP"), ("3-5", "give START:STOP"), ("3:x", "give START:STOP"),
  ("5:3", "profile 5:3: START is at least 0 and STOP comes after it"),
])
def test_another_text_than_two_numbers_of_steps_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    cli.parse(["distill", "--config=configs/quickstart_toy.py", f"--profile={text}"])


def test_a_run_that_leaves_no_trace_though_asked_is_told(tmp_path):
  folders = {name: tmp_path / name for name in ("teacher", "distil")}
  (line,) = observing.missed((1, 3), folders)
  assert line.startswith("profile 1:3: no trace; the run was done before")
  assert observing.missed(None, folders) == []
  (tmp_path / "distil" / "trace").mkdir(parents=True)
  assert observing.missed((1, 3), folders) == []


def test_steps_beyond_the_run_and_values_that_are_no_steps_are_refused():
  c = quickstart_toy.get_config()
  with pytest.raises(ValueError, match="profile 3:5 goes beyond distil.steps=4"):
    observing.traced(c, (3, 5), ())
  for value, message in (((3,), "two numbers"), ((1, 2.0), "two numbers"), ((4, 2), "4:2: START")):
    c = base.get_config()
    c.teacher.profile = value
    with pytest.raises(ValueError, match=f"teacher.profile=.*{message}"):
      observing.check(c)
  observing.check(quickstart_toy.get_config())
