"""The store: a calibration that is killed, extended or shared out ends as one that was not."""

import functools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import hybridlm
from cases import commands, models
from hybridlm.prune import store
from hybridlm.prune.scores import Scores

CFG = models.make(pattern="M-")
SPEC = {"estimator": "activation,F=flap", "axes": "HF", "data": "text"}
KILLED = """
import os, signal, sys
import hybridlm
from cases import models
seen = []
def place(batch):
  seen.append(batch)
  if len(seen) == 4:
    os.kill(os.getpid(), signal.SIGKILL)
  return dict(batch)
cfg = models.make(pattern="M-")
hybridlm.calibrate(cfg, models.params(cfg), models.batches(cfg, 5, (2, 19)), store=sys.argv[1],
                   every=2, place=place, estimator="activation,F=flap", axes="HF", data="text")
"""


def params():
  return models.params(CFG)


@functools.cache
def batches():
  return models.batches(CFG, 5, (2, 19))


@functools.cache
def whole():
  """Returns the scores of a run that nothing interrupted."""
  return hybridlm.calibrate(CFG, params(), batches(), **SPEC)


class Counting:
  """Counts the rows with real tokens that are computed; fails at a given batch."""

  def __init__(self, fail=None):
    self.rows, self.calls, self.fail = 0, 0, fail

  def __call__(self, batch):
    if self.calls == self.fail:
      raise KeyboardInterrupt
    self.calls += 1
    self.rows += int((batch["weight_BL"].sum(1) > 0).sum())
    return dict(batch)


def run(path, given=None, place=dict, **changes):
  given = batches() if given is None else given
  return hybridlm.calibrate(
    CFG, params(), given, store=path, place=place, **{**SPEC, "every": 2, **changes})


def same(got, want):
  assert got.weight == want.weight and got.meta == want.meta and got.rows == want.rows
  for part in ("sums", "means"):
    one, two = getattr(got, part), getattr(want, part)
    assert set(one) == set(two)
    for path in two:
      np.testing.assert_array_equal(one[path], two[path], err_msg=path)


def test_an_interrupted_run_goes_on_where_it_last_saved_bit_for_bit(tmp_path):
  path = tmp_path / "scores.npz"
  with pytest.raises(KeyboardInterrupt):
    run(path, place=Counting(fail=3))
  rest = Counting()
  same(run(path, place=rest), whole())
  assert rest.rows == 6  # 2 of the 5 batches of 2 rows were saved
  same(Scores.load(path), whole())


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
  path = tmp_path / "scores.npz"
  extra = {"PYTHONPATH": f"{commands.ROOT}{os.pathsep}{commands.ROOT / 'tests'}"}
  done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=commands.environment(
    **extra, XLA_FLAGS=os.environ["XLA_FLAGS"]), check=False)
  assert done.returncode == -signal.SIGKILL
  assert len(Scores.load(path).rows) == 4
  path.with_name("scores.npz.part").write_bytes(b"half a file")
  rest = Counting()
  same(run(path, place=rest), whole())
  assert rest.rows == 6


def test_more_batches_of_the_same_text_add_only_what_is_new(tmp_path):
  path = tmp_path / "scores.npz"
  run(path, batches()[:3])
  more = Counting()
  same(run(path, place=more), whole())
  assert more.rows == 4
  again = Counting()
  same(run(path, place=again), whole())
  assert again.rows == 0


def test_rows_scored_already_are_skipped_inside_batches_too(tmp_path):
  path = tmp_path / "scores.npz"
  every_other = [{key: v[:1] for key, v in batch.items()} for batch in batches()]
  run(path, every_other)
  more = Counting()
  got = run(path, place=more)
  assert more.rows == 5 and more.calls == 3  # five rows left, packed by two
  assert sorted(got.rows) == sorted(whole().rows)
  for name in whole().sums:
    np.testing.assert_allclose(got.get(name), whole().get(name), rtol=1e-6, err_msg=name)


def test_batches_of_two_lengths_go_on_in_batches_of_their_own(tmp_path):
  path = tmp_path / "scores.npz"
  given = [*batches()[:3], *models.batches(CFG, 2, (2, 11))]
  with pytest.raises(KeyboardInterrupt):
    run(path, given, place=Counting(fail=3))
  rest = Counting()
  same(run(path, given, place=rest), hybridlm.calibrate(CFG, params(), given, **SPEC))
  assert rest.rows == 6


def test_stores_of_two_hosts_merge_into_one_run(tmp_path):
  one, two = tmp_path / "one.npz", tmp_path / "two.npz"
  run(one, batches()[::2])
  run(two, batches()[1::2])
  both = store.merge([one, two])
  assert both.meta == whole().meta and sorted(both.rows) == sorted(whole().rows)
  for name in whole().sums:
    np.testing.assert_allclose(both.get(name), whole().get(name), rtol=1e-12, err_msg=name)
  both.save(tmp_path / "both.npz")
  more = Counting()
  run(tmp_path / "both.npz", place=more)
  assert more.rows == 0
  with pytest.raises(ValueError, match="share 6 rows of data"):
    store.merge([one, tmp_path / "both.npz"])
  run(two.with_name("three.npz"), batches()[1::2], data="other text")
  with pytest.raises(ValueError, match="its data is 'other text', that of .* is 'text'"):
    store.merge([one, two.with_name("three.npz")])


@pytest.mark.parametrize("changes, message", [
  ({"data": "other"}, "its data is 'text', not 'other'"),
  ({"estimator": "activation"}, "its estimator is 'activation,F=flap', not 'activation'"),
  ({"axes": "F"}, "its axes is 'HF', not 'F'"),
  ({"depth": "kl"}, "its depth is 'None', not 'kl'"),
  ({"noop": "kl"}, "its noop is 'None', not 'kl'"),
])
def test_a_store_of_another_calibration_is_refused_by_what_differs(tmp_path, changes, message):
  path = tmp_path / "scores.npz"
  whole().save(path)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=f"score store .*: of another calibration, {message}"):
    run(path, **changes)
  assert path.read_bytes() == before


def test_a_store_of_other_parameters_dtype_or_version_is_refused(tmp_path, monkeypatch):
  path = tmp_path / "scores.npz"
  whole().save(path)
  with pytest.raises(ValueError, match="its parameters is"):
    hybridlm.calibrate(CFG, models.params(CFG, seed=1), batches(), store=path, **SPEC)
  with pytest.raises(ValueError, match="its dtype is 'float32', not 'bfloat16'"):
    hybridlm.calibrate(CFG.replace(dtype="bfloat16"), params(), batches(), store=path, **SPEC)
  with pytest.raises(ValueError, match="its config is"):  # no parameter says what eps is
    hybridlm.calibrate(CFG.replace(eps=1e-3), params(), batches(), store=path, **SPEC)
  same(hybridlm.calibrate(
    CFG.replace(chunk=4, remat="block"), params(), batches(), store=path, **SPEC), whole())
  monkeypatch.setattr(store.table, "VERSION", 99)
  with pytest.raises(ValueError, match="its version is '2', not '99'"):
    run(path)


def test_a_store_with_more_data_than_asked_for_is_refused(tmp_path):
  path = tmp_path / "scores.npz"
  whole().save(path)
  with pytest.raises(ValueError, match="4 rows it counts are not among the data given"):
    run(path, batches()[:3])


def test_a_damaged_store_is_refused_and_left_as_it_is(tmp_path):
  path = tmp_path / "scores.npz"
  whole().save(path)
  half = path.read_bytes()[:-40]
  path.write_bytes(half)
  with pytest.raises(ValueError, match="not a score file"):
    run(path)
  assert path.read_bytes() == half


def test_greedy_goes_on_with_the_blocks_that_are_gone(tmp_path):
  path = tmp_path / "scores.npz"
  want = run(path, depth="greedy")
  scores = Scores.load(path)
  assert scores.meta["gone"] == list(np.argsort(want.get("score_X")))
  # As after a kill within the last turn, had the other block gone first.
  other = scores.meta["gone"][1]
  sums = {name: v for name, v in scores.sums.items() if name != "score_X"}
  meta = {**scores.meta, "gone": [other]}
  Scores(sums, scores.weight, meta, scores.means, scores.rows).save(path)
  assert run(path, depth="greedy").get("score_X")[other] == 0.0
  with pytest.raises(ValueError, match="'greedy' do not merge"):
    want.merge(want)


def test_saves_are_at_least_a_batch_apart(tmp_path):
  with pytest.raises(ValueError, match="every=0 batches between saves must be at least 1"):
    run(tmp_path / "scores.npz", every=0)


def test_the_order_of_letters_is_no_difference(tmp_path):
  path = tmp_path / "scores.npz"
  whole().save(path)
  same(run(path, axes="FH"), whole())
