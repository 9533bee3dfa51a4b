"""Records reach every sink, and no step is in the log twice."""

import concurrent.futures
import json
import resource
import struct
import time

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from hybridlm.train import metrics


def record(step, split="train", **values):
  return {"step": step, "split": split, "loss": 2.0 / step, "tokens_per_second": 9000.0, **values}


def fill(workdir, records, *, done=0, steps=10, progress="off"):
  with metrics.sinks(workdir, done=done, steps=steps, progress=progress) as opened:
    return metrics.write(opened, records)


def events(folder):
  """Returns (tag, step, value) of every scalar in TensorBoard's files, and the purging starts."""
  scalars, starts = [], []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
      if event.session_log.status == event_pb2.SessionLog.START:
        starts.append(event.step)
      data = data[16 + size :]
  return scalars, starts


def test_records_are_written_as_json_lines_and_read_back(tmp_path):
  records = [record(1), record(2), record(2, "valid", kl=0.25)]
  assert fill(tmp_path, records) == records
  assert metrics.read(tmp_path / "metrics.jsonl") == records


def test_records_are_written_as_scalars_for_tensorboard(tmp_path):
  fill(tmp_path, [record(4, "valid", kl=0.25), record(5, loss=0.5)])
  scalars, _ = events(tmp_path / "tensorboard")
  assert sorted(scalars) == [
    ("train/loss", 5, 0.5), ("train/tokens_per_second", 5, 9000.0), ("valid/kl", 4, 0.25),
    ("valid/loss", 4, 0.5), ("valid/tokens_per_second", 4, 9000.0),
  ]


def test_a_restart_hides_tensorboard_s_events_of_the_steps_done_again(tmp_path):
  fill(tmp_path, [record(4), record(7)])
  fill(tmp_path, [record(5)], done=4)
  assert events(tmp_path / "tensorboard")[1] == [1, 5]


def test_a_disk_that_is_full_is_an_error_of_whoever_writes_to_tensorboard(tmp_path):
  board = metrics.TensorBoard(tmp_path, first_step=1)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      for step in range(1, 400):
        board.write(record(step))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  board.close()


def test_cutting_the_log_back_drops_later_steps_and_a_half_written_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  fill(tmp_path, [record(2), record(4), record(4, "valid"), record(6)])
  with open(path, "a") as file:
    file.write('{"step": 8, "spl')
  kept = metrics.truncate(path, last=4)
  assert kept == [record(2), record(4), record(4, "valid")] == metrics.read(path)
  assert path.read_text() == "".join(json.dumps(line) + "\n" for line in kept)
  assert metrics.truncate(path, last=0) == [] and path.read_text() == ""


def test_a_log_that_is_not_there_is_empty(tmp_path):
  assert metrics.truncate(tmp_path / "metrics.jsonl", last=3) == []
  assert not list(tmp_path.iterdir())


def test_a_line_that_is_no_record_is_refused_by_number(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps(record(1)) + "\nnonsense\n")
  with pytest.raises(ValueError, match="metrics.jsonl, line 2 is not a metrics record"):
    metrics.read(path)


def test_the_bar_shows_steps_loss_and_real_tokens_a_second(capsys):
  fill(None, [record(4, loss=1.23456), record(4, "valid", loss=0.5)], done=2, progress="bar")
  shown = capsys.readouterr().err.rsplit("\r", 1)[-1]
  assert "4/10" in shown and "40%" in shown
  assert "loss=1.2346" in shown and "tokens/s=9,000" in shown and "valid=0.5000" in shown


@pytest.mark.parametrize("progress", ["off", "auto"])
def test_no_bar_is_drawn_where_it_is_off_or_nobody_watches(capsys, progress):
  fill(None, [record(4)], progress=progress)
  assert capsys.readouterr().err == ""


def test_an_unknown_kind_of_progress_is_refused():
  with pytest.raises(ValueError, match="progress 'loud' is not one of bar, auto, off"):
    metrics.check_progress("loud")


def timing(data_seconds, called, returned, ready):
  future = concurrent.futures.Future()
  future.set_result(ready)
  return metrics.Timing(data_seconds, called, returned, future)


def test_device_time_runs_from_the_call_or_the_end_of_the_step_before():
  # The host runs ahead: three steps are called in a row, each computes for 2 seconds; the fourth
  # batch is late, so the device idles from 7 to 10.
  timings = [
    timing(0.5, 1.0, 1.1, 3.0), timing(0.1, 1.2, 1.3, 5.0), timing(0.1, 1.4, 1.5, 7.0),
    timing(8.1, 10.0, 10.1, 12.0),
  ]
  assert metrics.durations(timings, fresh=False) == pytest.approx(
    {"data_seconds": 2.2, "idle_seconds": (0.5 + 3.0) / 4, "device_seconds": 2.0}
  )


def test_compilation_counts_as_neither_waiting_nor_computing():
  timings = [timing(0.5, 1.0, 41.0, 43.0), timing(0.1, 41.2, 41.3, 45.0)]
  assert metrics.durations(timings, fresh=True) == pytest.approx(
    {"data_seconds": 0.3, "idle_seconds": 0.25, "device_seconds": 2.0, "compile_seconds": 40.0}
  )


def test_the_stopwatch_reports_when_a_result_was_ready():
  with metrics.Stopwatch() as stopwatch:
    before = time.perf_counter()
    ready = stopwatch.ready({"x": jnp.arange(3) + 1}).result()
    assert before <= ready <= time.perf_counter()
