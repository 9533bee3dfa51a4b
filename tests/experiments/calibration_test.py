"""The calibration stage: killed, extended, refused, and the same under another mesh."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest

from cases import commands
from experiments import calibration
from hybridlm.prune.scores import Scores

SPEC = ["--config.calibrate.estimator=activation,F=flap,N=ghost",
        "--config.calibrate.axes=HFDJN", "--config.calibrate.depth=window",
        "--config.calibrate.window=1", "--config.calibrate.noop=kl",
        "--config.calibrate.save_every=1"]
ARGS = [commands.TOY, "--workdir=job", *SPEC]


@pytest.mark.slow
def test_more_batches_add_to_the_scores_an_earlier_run_left_on_any_mesh(place):
  more = ["--config.calibrate.batches=4"]
  wide = ["--config.mesh.data=2", "--workdir=wide"]
  calls = [("calibrate", ARGS), ("calibrate", [*ARGS, *more])]
  done = commands.drive(calls, cwd=place)
  assert [code for code, _, _ in done] == [0, 0], done
  extended = Scores.load(place / "job" / "calibrate" / calibration.SCORES)
  assert len(extended.rows) == 8  # those of two batches of two, and as many again
  done = commands.drive(
    [("calibrate", [*ARGS, *more, *wide])], cwd=place,
    XLA_FLAGS="--xla_force_host_platform_device_count=2")
  assert done[0][0] == 0, done
  fresh = Scores.load(place / "wide" / "calibrate" / calibration.SCORES)
  assert sorted(fresh.rows) == sorted(extended.rows) and fresh.meta == extended.meta
  assert fresh.meta["window"] == 1 and "score_ssm_X" in fresh.sums
  for path in fresh.sums:
    one, two = fresh.get(path), extended.get(path)
    # What a block loses without its SSM is next to nothing after six steps of training.
    close = {"rtol": 1e-4 if path == "score_ssm_X" else 1e-5}
    near = 1e-6 * two[np.isfinite(two)].max()
    np.testing.assert_allclose(one, two, **close, atol=near, err_msg=path)


@pytest.mark.slow
def test_a_killed_calibration_goes_on_from_the_rows_it_had_saved(place):
  many = ["--config.calibrate.batches=40"]
  process = subprocess.Popen(
    commands.command("calibrate", *ARGS, *many), cwd=place, env=commands.environment(),
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  saved = place / "job" / "calibrate.partial" / calibration.SCORES
  while not saved.is_file():
    assert process.poll() is None
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  before = len(Scores.load(saved).rows)
  assert 0 < before < 80
  done = commands.drive([
    ("calibrate", [*ARGS, *many]), ("calibrate", [*ARGS, *many, "--workdir=calm"])], cwd=place)
  assert [code for code, _, _ in done] == [0, 0] and "calibrate: resume" in done[0][1], done
  one, two = (Scores.load(place / job / "calibrate" / calibration.SCORES)
              for job in ("job", "calm"))
  assert one.rows == two.rows and one.meta == two.meta
  for path in two.sums:
    np.testing.assert_array_equal(one.sums[path], two.sums[path], err_msg=path)
