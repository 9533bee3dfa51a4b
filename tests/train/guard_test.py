"""Bad steps are left out or gone past, told of, counted, and the same after a restart."""

import functools
import gc
import json

import jax
import numpy as np
import pytest

from cases import tiny
from hybridlm.train import checkpoint, guard, loop, metrics, optim, sealed, state, step

OPTIMIZER = optim.make(peak=0.02, steps=30, warmup=2)
STEPS = 24
INFINITE, HUGE = np.inf, 1e4


def loss_fn(params, frozen, batch):
  """The usual loss, and one entry of the head times what batches say: its gradient spikes too."""
  sums = tiny.distillation(params, frozen, batch)
  spike_BL = batch["spike_BL"] * (3 + params["head"]["w_head_DV"][3, 5])
  return sums | {"loss": sums["loss"] + spike_BL.sum()}


@functools.cache
def stepper(bad="make"):
  return step.make_step(loss_fn, OPTIMIZER, bad=bad)


class Data(tiny.Data):
  """The usual batches; those at some positions have a factor that makes their loss bad."""

  def __init__(self, bad, before=None):
    super().__init__()
    self._bad, self._before = bad, before

  def __next__(self):
    if self._before:
      self._before(self)
    value = self._bad.get(self.get_state()["next"], 0.0)
    batch = super().__next__()
    return batch | {"spike_BL": np.full_like(batch["weight_BL"], value)}


def run(workdir, bad, guarded, *, steps=STEPS, before=None, **changes):
  settings = {"log_every": 3, "save_every": 4, "progress": "off", "config": {}} | changes
  made = stepper("skip" if guarded.action == "skip" else "make")
  return loop.run(
    made, state.create(tiny.init(), OPTIMIZER), Data(bad, before), steps=steps,
    frozen=tiny.init(1), workdir=workdir, guard=guarded, **settings,
  )


@functools.cache
def by_hand(*numbers, skipping=False):
  """Returns the state after the batches of these numbers, one after the other."""
  now, teacher = state.create(tiny.init(), OPTIMIZER), tiny.init(1)
  more = (np.float32(np.inf),) if skipping else ()
  for number in numbers:
    batch = tiny.batch(number)
    batch |= {"spike_BL": np.zeros_like(batch["weight_BL"])}
    now, _ = stepper("skip" if skipping else "make")(now, teacher, batch, *more)
  return now


def told(workdir):
  return [r for r in metrics.read(workdir / loop.METRICS) if r["split"] == "guard"]


def trained(workdir):
  return [r["step"] for r in metrics.read(workdir / loop.METRICS) if r["split"] == "train"]


def saved(workdir):
  return [int(path.name) for path in sealed.complete(workdir / loop.CHECKPOINTS)]


SKIP = guard.Guard(action="skip", spike=3.0)
BACK = guard.Guard(action="rollback", spike=3.0)
BAD = {6: INFINITE, 13: HUGE}


class Killed(Exception):
  """Stands for what ends a process between two saves."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Runs that nothing kills: action -> state and records."""
  folder = tmp_path_factory.mktemp("whole")
  return {guarded.action: run(folder / guarded.action, BAD, guarded) for guarded in (SKIP, BACK)}


def test_skipped_steps_leave_the_state_of_a_run_that_never_saw_their_batches(whole):
  final, history = whole["skip"]
  expected = by_hand(*(n for n in range(STEPS) if n not in BAD), skipping=True)
  assert tiny.same(final._replace(step=0), expected._replace(step=0))
  assert int(final.step) == STEPS and int(expected.step) == STEPS - 2
  first, second = (r for r in history if r["split"] == "guard")
  assert (first["step"], first["action"]) == (7, "skip")
  assert "step 7: gradient of head/w_head_DV is not finite (loss inf" in first["reason"]
  assert second["step"] == 14 and "the loss is above" in second["reason"]
  assert '3 times the running median' in second["reason"]
  assert second["reason"].endswith('batch at position {"next": 13}')
  losses = [r["loss"] for r in history if r["split"] == "train"]
  assert max(losses) < 10 * min(losses)


def test_going_back_goes_past_the_bad_batch_and_those_before_it(tmp_path):
  final, history = run(tmp_path, BAD, BACK)
  # From the checkpoint of step 4 on with batch 7; then step 11 is of batch 13: from step 8 on, 14.
  used = [0, 1, 2, 3, *range(7, 11), *range(14, 30)]
  assert tiny.same(final, by_hand(*used[:STEPS]))
  first, second = told(tmp_path)
  assert (first["step"], first["from_step"], first["action"]) == (4, 7, "rollback")
  assert "step 7: gradient of head/w_head_DV is not finite" in first["reason"]
  assert (second["step"], second["from_step"]) == (8, 11)
  steps = trained(tmp_path)
  assert steps == sorted(set(steps)) and steps[-1] == STEPS
  assert metrics.read(tmp_path / loop.METRICS) == history


def test_going_back_further_leaves_out_more_and_removes_what_was_made_of_it(tmp_path):
  final, _ = run(tmp_path, {13: HUGE}, BACK._replace(back=2), steps=16)
  used = [*range(8), *range(14, 30)]
  assert tiny.same(final, by_hand(*used[:16]))
  assert [(r["step"], r["from_step"]) for r in told(tmp_path)] == [(8, 14)]


@pytest.mark.parametrize("guarded,dies", [(SKIP, 11), (BACK, 7), (BACK, 17)])
def test_a_run_killed_after_a_bad_step_decides_as_one_that_was_not(tmp_path, whole, guarded, dies):
  def killed(data):
    """Ends the run before a batch."""
    if data.get_state()["next"] == dies:
      raise Killed

  with pytest.raises(Killed):
    run(tmp_path, BAD, guarded, before=killed)
  again, after = run(tmp_path, BAD, guarded)
  final, history = whole[guarded.action]
  assert tiny.same(again, final)
  kept = ("step", "split", "loss", "reason")
  assert [{k: r[k] for k in kept if k in r} for r in after if r["split"] != "save"] == [
    {k: r[k] for k in kept if k in r} for r in history if r["split"] != "save"]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_bad_steps_are_bounded_also_after_a_restart(tmp_path, action):
  guarded = guard.Guard(action=action, limit=2)
  many = {number: INFINITE for number in (6, 11, 16)}
  with pytest.raises(loop.NotFinite, match="; the 2 bad steps of guard.limit were met before it"):
    run(tmp_path, many, guarded)
  before = saved(tmp_path)
  with pytest.raises(loop.NotFinite, match="of guard.limit were met before it$"):
    run(tmp_path, many, guarded)
  assert saved(tmp_path) == before and len(told(tmp_path)) == 2


def test_a_spike_stops_a_run_that_is_told_to_stop(tmp_path):
  with pytest.raises(loop.Spike, match="step 14: the loss is above .*, 3 times the running median"):
    run(tmp_path, {13: HUGE}, guard.Guard(spike=3.0))
  assert saved(tmp_path) == [4, 8, 12]
  # Without a factor only NaN and infinity are bad.
  run(tmp_path, {13: HUGE}, guard.STOP)


def test_going_back_leaves_no_room_to_the_state_that_was_left(tmp_path, monkeypatch):
  restore, alive = checkpoint.restore, []

  def counting(*arguments, **settings):
    gc.collect()
    alive.append(sum(leaf.shape == (16, 24) for leaf in jax.live_arrays()))
    return restore(*arguments, **settings)

  monkeypatch.setattr(checkpoint, "restore", counting)
  run(tmp_path, {5: INFINITE}, BACK, steps=6)
  start, back = alive
  assert back == start - 3  # parameters and two moments


def test_the_first_step_can_be_gone_back_from(tmp_path):
  final, _ = run(tmp_path, {0: INFINITE}, BACK, steps=5)
  assert tiny.same(final, by_hand(1, 2, 3, 4, 5))


def test_the_median_is_of_the_good_steps_up_to_the_second_before():
  memory = guard.Memory()
  for number in range(1, guard.LEAST + 1):
    assert guard.bound(SKIP, memory, number + guard.LAG - 1) == np.inf
    memory = guard.heard(memory, number, float(number))
  memory = guard.heard(memory, guard.LEAST + 1, np.nan, skipped=True)
  assert guard.bound(SKIP, memory, guard.LEAST + 1) == np.inf
  assert guard.bound(SKIP, memory, guard.LEAST + 2) == 3.0 * (guard.LEAST + 1) / 2
  for number in range(guard.LEAST + 2, 200):
    memory = guard.heard(memory, number, float(number))
  assert guard.bound(SKIP, memory, 200) == 3.0 * (198 - (guard.WINDOW - 1) / 2)
  back = guard.recalled(json.loads(json.dumps(guard.notes(memory))))
  assert back == memory and memory.skipped == 1


@pytest.mark.parametrize(
  "change,message",
  [
    ({"action": "hope"}, "guard.action='hope' is not one of stop, skip, rollback"),
    ({"spike": 0.5}, "guard.spike=0.5 must be a factor above 1"),
    ({"limit": 0}, "guard.limit=0 must be at least 1"),
    ({"back": 0}, "guard.back=0 must be at least 1"),
    ({"action": "rollback"}, "guard.action='rollback' needs a workdir"),
  ],
)
def test_impossible_guards_are_refused_by_value(change, message):
  with pytest.raises(ValueError, match=message):
    run(None, {}, guard.Guard(**change), save_every=0)


def test_going_back_beyond_what_is_kept_is_refused(tmp_path):
  with pytest.raises(ValueError, match="guard.back=3 goes back beyond the keep=2 checkpoints"):
    run(tmp_path, {}, BACK._replace(back=3), keep=2)


def test_what_is_skipped_has_no_effect_on_any_leaf_but_the_step():
  now = state.create(tiny.init(), OPTIMIZER)
  before = jax.tree.map(np.array, now)
  batch = next(Data({0: HUGE}))
  after, values = stepper("skip")(now, tiny.init(1), batch, np.float32(100.0))
  assert bool(values["skipped"]) and bool(values["finite"]) and int(after.step) == 1
  assert tiny.same(after._replace(step=before.step), before)
  _, values = stepper("skip")(after, tiny.init(1), next(Data({})), np.float32(100.0))
  assert float(values["learning_rate"]) == pytest.approx(float(OPTIMIZER.schedule(0)), rel=1e-5)
