"""What a run shows of itself: shares of the devices' peak, memory, times that add up, a trace."""

import math
import time

import jax
import pytest
from jax.profiler import ProfileData

from cases import tiny
from hybridlm.train import loop, metrics, observe, optim, state, step

OPTIMIZER = optim.make(peak=0.02, steps=8, warmup=2)
STEP = step.make_step(tiny.distillation, OPTIMIZER)
TOKENS = tiny.BATCH * tiny.LENGTH
PEAK = 1e9


def flops(length):
  return {"model": 100.0 * length, "teacher": 7.0 * length}
TRACED = (2, 4)  # after the one, up to the other


def run(workdir, *, watch, data=None, steps=8, **settings):
  """Returns the history of a short run of the tiny model."""
  start = state.create(tiny.init(), OPTIMIZER)
  return loop.run(
    STEP, start, data or tiny.Data(), steps=steps, frozen=tiny.init(1), workdir=workdir,
    config={}, log_every=3, progress="off", watch=watch, **settings,
  )[1]


def traces(folder):
  return sorted(folder.rglob("*.xplane.pb"))


def marked(path):
  """Returns the numbers of the steps that a trace has whole."""
  lines = [line for plane in ProfileData.from_file(str(path)).planes for line in plane.lines]
  events = [event for line in lines for event in line.events if event.name == "step"]
  return sorted(dict(event.stats)["step_num"] for event in events)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
  """The history and the folder of a run that is watched in every way."""
  folder = tmp_path_factory.mktemp("watched")
  history = run(
    folder, watch=observe.Watch(flops, PEAK, TRACED), save_every=4, validate_every=6,
    validate=lambda params: {"loss": 1.0},
  )
  return history, folder


def test_utilisation_is_the_flops_of_all_positions_in_the_steps_time_over_the_peak(watched):
  for record in watched[0]:
    if record["split"] == "train":
      seconds = record["step_seconds"] * record["steps"]
      for name, key, each in (("model", "mfu", 100.0), ("teacher", "teacher_mfu", 7.0)):
        spent = record[f"{name}_flops_per_second"] * seconds
        assert spent == pytest.approx(each * tiny.LENGTH * TOKENS * record["steps"], rel=1e-9)
        assert record[key] == pytest.approx(record[f"{name}_flops_per_second"] / PEAK, rel=1e-12)


def test_every_step_is_timed_once_and_parts_of_a_step_do_not_exceed_it(watched):
  trains = [record for record in watched[0] if record["split"] == "train"]
  assert [record["steps"] for record in trains] == [3, 1, 2, 2]
  for record in trains:
    assert 0 <= record["idle_seconds"] <= record["data_seconds"]
    # What the tracer takes is left out of a step's time, though a step may end in the middle of it.
    if record["step"] > TRACED[1]:
      assert record["device_seconds"] + record["idle_seconds"] <= record["step_seconds"] + 1e-9


def test_memory_is_a_high_water_mark(watched):
  seen = [record["process_memory_bytes"] for record in watched[0] if record["split"] == "train"]
  assert seen == sorted(seen) and seen[0] > 2**24


def test_saves_and_validations_say_what_they_took(watched):
  history, folder = watched
  saves = [record for record in history if record["split"] == "save"]
  assert [record["step"] for record in saves] == [4, 8]
  assert all(record["checkpoint_seconds"] > 0 for record in saves)
  assert all("validate_seconds" in record for record in history if record["split"] == "valid")
  assert metrics.read(folder / loop.METRICS) == history


def test_a_trace_holds_the_steps_that_were_asked_for(watched):
  (path,) = traces(watched[1] / observe.TRACE)
  assert path.parts[-4:-2] == ("plugins", "profile")  # where XProf and TensorBoard look
  assert marked(path) == [3, 4]


def test_starting_and_ending_a_trace_counts_as_no_step(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: time.sleep(0.2))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: time.sleep(0.1))
  with observe.Trace((1, 2), tmp_path) as trace:
    spent = []
    for number in (1, 2, 3):
      with trace.step(number):
        pass
      spent.append(trace.done(number, ()))
  assert spent[0] == spent[2] == 0.0 and spent[1] >= 0.3


def test_a_run_that_fails_in_a_traced_step_closes_its_trace(tmp_path):
  with pytest.raises(ValueError, match="the data ended before step 3"):
    run(tmp_path / "one", data=tiny.Data(end=2), watch=observe.Watch(profile=(1, 6)))
  assert marked(traces(tmp_path / "one")[0])[0] == 2
  run(tmp_path / "two", steps=2, watch=observe.Watch(profile=(1, 6)))  # ends before the trace does
  assert marked(traces(tmp_path / "two")[0]) == [2]


def test_without_a_workdir_there_is_no_trace(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run(None, steps=2, watch=observe.Watch(profile=(0, 1)))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("profile", [(3, 3), (5, 2), (-1, 2)])
def test_a_trace_of_no_step_is_refused_before_the_first(tmp_path, profile):
  message = f"profile {profile[0]}:{profile[1]}: START is at least 0 and STOP comes after it"
  with pytest.raises(ValueError, match=message):
    run(tmp_path, watch=observe.Watch(profile=profile))
  assert not list(tmp_path.iterdir())


def test_an_unknown_peak_leaves_the_share_out_and_unknown_flops_leave_out_both():
  assert observe.utilisation(observe.Watch(flops), [(2, 5), (2, 5)], 4.0) == {
    "model_flops_per_second": 2 * 10 * 500.0 / 4, "teacher_flops_per_second": 2 * 10 * 35.0 / 4}
  assert observe.utilisation(observe.NOTHING, [(2, 5)], 4.0) == {}
  assert observe.utilisation(observe.Watch(flops, PEAK), [(0, 0)], 4.0) == {}


def test_memory_is_that_of_the_fullest_device_where_devices_count_it(monkeypatch):
  class Chip:
    """A device that counts its memory."""

    def __init__(self, peak):
      self._peak = peak

    def memory_stats(self):
      return {"peak_bytes_in_use": self._peak, "bytes_in_use": 1}

  monkeypatch.setattr(jax, "local_devices", lambda: [Chip(5), Chip(9), Chip(7)])
  assert observe.memory() == {"device_memory_bytes": 9}


def test_what_a_block_takes_is_noted_when_it_is_over():
  with observe.taken("x_seconds") as record:
    assert record == {}
  assert list(record) == ["x_seconds"] and math.isfinite(record["x_seconds"])
