"""The loop: what it writes, when it looks, how it goes on, and what stops it."""

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cases import tiny
from hybridlm.train import loop, metrics, optim, sealed, state, step

OPTIMIZER = optim.make(peak=0.02, steps=12, warmup=2)
CONFIG = {"seed": 0}
TIMES = (
  "tokens_per_second", "step_seconds", "data_seconds", "idle_seconds", "device_seconds",
  "compile_seconds", "validate_seconds", "checkpoint_seconds", "process_memory_bytes",
)


@functools.cache
def stepper(optimizer=OPTIMIZER, loss_fn=tiny.distillation):
  return step.make_step(loss_fn, optimizer)


@functools.cache
def evaluator():
  return step.make_eval(tiny.distillation)


def validate(params):
  return evaluator()(params, tiny.init(1), [tiny.batch(100), tiny.batch(101)])


def run(steps=12, workdir=None, data=None, params=None, loss_fn=tiny.distillation,
        optimizer=OPTIMIZER, **changes):
  """Runs the loop on the tiny model with everything at odd intervals."""
  start = state.create(tiny.init() if params is None else params, optimizer)
  settings = {"log_every": 3, "config": CONFIG, "progress": "off"}
  if workdir is not None:
    settings |= {"save_every": 5, "validate_every": 4, "validate": validate}
  return loop.run(
    stepper(optimizer, loss_fn), start, tiny.Data() if data is None else data, steps=steps,
    frozen=tiny.init(1), workdir=workdir, **(settings | changes),
  )


def timeless(records):
  return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def saved_steps(workdir):
  return [int(path.name) for path in sealed.complete(workdir / loop.CHECKPOINTS)]


def by_hand(steps=12):
  """The same training without the loop: states' parameters and metrics, step by step."""
  now, teacher, seen = state.create(tiny.init(), OPTIMIZER), tiny.init(1), []
  for number in range(steps):
    now, values = stepper()(now, teacher, tiny.batch(number))
    seen.append(jax.device_get(values))
  return now, seen


def test_the_loop_makes_the_steps_one_makes_by_hand():
  final, _ = run()
  assert tiny.same(final, by_hand()[0])


def test_a_record_is_the_weighted_mean_of_the_steps_since_the_last(tmp_path):
  _, history = run(workdir=tmp_path)
  _, seen = by_hand()
  trains = [record for record in history if record["split"] == "train"]
  # Every third step, and where validation (4), saving (5) or the end (12) look as well.
  assert [record["step"] for record in trains] == [3, 4, 5, 6, 8, 9, 10, 12]
  start = 0
  for record in trains:
    part, start = seen[start : record["step"]], record["step"]
    weights = np.array([float(value["weight"]) for value in part])
    assert record["weight"] == weights.sum()
    for name in ("loss", "kl", "ce", "agree", "correct", "grad_norm"):
      mean = (weights * [float(value[name]) for value in part]).sum() / weights.sum()
      assert record[name] == pytest.approx(mean, rel=1e-6)
    assert record["learning_rate"] == float(part[-1]["learning_rate"])
    assert record["tokens_per_second"] > 0 and record["device_seconds"] > 0
  assert ["compile_seconds" in record for record in trains] == [True] + [False] * 7


def test_validation_happens_when_due_and_at_the_end_with_the_parameters_of_that_step(tmp_path):
  final, history = run(workdir=tmp_path, steps=10)
  valid = [record for record in history if record["split"] == "valid"]
  assert [record["step"] for record in valid] == [4, 8, 10]
  assert {k: valid[-1][k] for k in ("loss", "weight")} == pytest.approx(
    {k: validate(final.params)[k] for k in ("loss", "weight")}
  )
  assert valid[0]["loss"] == pytest.approx(validate(by_hand(4)[0].params)["loss"])


def test_metrics_on_disk_are_the_history(tmp_path):
  _, history = run(workdir=tmp_path)
  assert metrics.read(tmp_path / loop.METRICS) == history
  assert any((tmp_path / "tensorboard").iterdir())


def test_a_run_in_memory_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  run(steps=4)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [5, 7, 11])
def test_a_resumed_run_ends_as_an_undisturbed_one_bit_for_bit(tmp_path, stop):
  run(workdir=tmp_path, steps=stop)
  resumed, _ = run(workdir=tmp_path)
  assert tiny.same(resumed, by_hand()[0])


def test_steps_that_are_done_again_are_logged_once(tmp_path):
  whole, history = run(workdir=tmp_path / "whole")
  workdir = tmp_path / "killed"

  class Killed(Exception):
    """Stands for what ends a process between two saves."""

  def killing(value):
    raise Killed

  with pytest.raises(Killed):
    run(workdir=workdir, data=tiny.Data({9: killing}))
  assert saved_steps(workdir) == [5]
  assert metrics.read(workdir / loop.METRICS)[-1]["step"] == 9
  resumed, again = run(workdir=workdir)
  assert tiny.same(resumed, whole)
  assert timeless(again) == timeless(history)
  assert metrics.read(workdir / loop.METRICS) == again


def test_a_finished_run_is_left_as_it_is(tmp_path):
  final, history = run(workdir=tmp_path)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  again, told = run(workdir=tmp_path)
  assert tiny.same(again, final) and told == history
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
  with pytest.raises(ValueError, match="is at step 12, beyond the 7 asked for"):
    run(workdir=tmp_path, steps=7)


def test_a_damaged_newest_checkpoint_costs_steps_not_the_result(tmp_path, caplog):
  whole, history = run(workdir=tmp_path / "whole")
  workdir = tmp_path / "damaged"
  run(workdir=workdir, steps=10)
  newest = workdir / loop.CHECKPOINTS / "00000010" / "state" / "manifest.ocdbt"
  newest.write_bytes(bytes([newest.read_bytes()[0] ^ 1]) + newest.read_bytes()[1:])
  with caplog.at_level(logging.WARNING, logger="absl"):
    resumed, again = run(workdir=workdir)
  assert ["00000010 is damaged" in record.getMessage() for record in caplog.records] == [True]
  assert tiny.same(resumed, whole) and timeless(again) == timeless(history)


def test_the_teacher_survives_and_is_in_no_checkpoint(tmp_path):
  teacher = tiny.init(1, width=20)
  start = state.create(tiny.init(), OPTIMIZER)
  loop.run(stepper(), start, tiny.Data(), steps=2, frozen=teacher, workdir=tmp_path, config={},
           progress="off")
  assert tiny.same(teacher, tiny.init(1, width=20))
  manifest = json.loads((tmp_path / loop.CHECKPOINTS / "00000002" / "manifest.json").read_text())
  sizes = [np.prod(shape) for shape, _ in manifest["body"]["leaves"].values()]
  student = sum(leaf.size for leaf in jax.tree.leaves(tiny.init()))
  assert sum(sizes) == 3 * student + len([size for size in sizes if size == 1])


def test_a_state_that_shares_memory_with_the_teacher_is_refused():
  teacher = tiny.init(1)
  start = state.create(teacher, OPTIMIZER)
  shared = start._replace(params=start.params | {"embed": teacher["embed"]})
  with pytest.raises(ValueError, match="embed/w_embed_VD and frozen embed/w_embed_VD share"):
    loop.run(stepper(), shared, tiny.Data(), steps=2, frozen=teacher)


def spiked(params, frozen, batch):
  sums = tiny.distillation(params, frozen, batch)
  spike_BL = batch["spike_BL"] * params["head"]["w_head_DV"][3, 5]
  return sums | {"loss": sums["loss"] + spike_BL.sum()}


class Spiking(tiny.Data):
  """The usual batches, and an infinite factor on one entry of the head in batch 6."""

  def __next__(self):
    value = 0.0 if self.get_state()["next"] != 6 else np.inf
    batch = super().__next__()
    return batch | {"spike_BL": np.full_like(batch["weight_BL"], value)}


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_a_gradient_that_is_not_finite_stops_with_step_batch_and_leaf(tmp_path, log_every):
  with pytest.raises(FloatingPointError) as error:
    run(workdir=tmp_path, data=Spiking(), loss_fn=spiked, log_every=log_every, validate=None)
  message = str(error.value)
  assert "step 7: gradient of head/w_head_DV is not finite (loss " in message
  assert message.endswith('batch at position {"next": 6}') and "\n" not in message
  assert isinstance(error.value, ValueError)
  # The state of step 7 and all that followed is poisoned; the one of step 5 is not.
  assert saved_steps(tmp_path) == [5]
  assert all(record["step"] < 7 for record in metrics.read(tmp_path / loop.METRICS))


def test_after_the_guard_stopped_a_run_it_can_go_on_from_its_last_good_step(tmp_path):
  whole, _ = run(workdir=tmp_path / "whole")
  with pytest.raises(loop.NotFinite):
    run(workdir=tmp_path / "stopped", data=Spiking(), loss_fn=spiked)
  resumed, _ = run(workdir=tmp_path / "stopped")
  assert tiny.same(resumed, whole)


def test_a_poisoned_step_that_is_due_for_saving_is_not_saved(tmp_path):
  with pytest.raises(FloatingPointError, match="step 7: gradient"):
    run(workdir=tmp_path, data=Spiking(), loss_fn=spiked, save_every=7)
  assert saved_steps(tmp_path) == []


def test_a_parameter_that_is_not_finite_is_named_though_it_poisons_every_gradient():
  params = tiny.init()
  params["blocks"]["00"]["b_down_D"] = params["blocks"]["00"]["b_down_D"].at[2].set(jnp.nan)
  with pytest.raises(FloatingPointError, match="step 1: parameter blocks/00/b_down_D is not"):
    run(params=params)


def test_a_target_outside_the_vocabulary_stops_the_run():
  def bad(batch):
    return batch | {"target_BL": batch["target_BL"] + tiny.V}

  with pytest.raises(FloatingPointError, match=r'step 5: .* position {"next": 4}'):
    run(data=tiny.Data({4: bad}))


def test_a_batch_without_any_weight_stops_the_run():
  def empty(batch):
    return batch | {"weight_BL": batch["weight_BL"] * 0}

  with pytest.raises(FloatingPointError, match="step 5: the mean over a batch of weight 0.0"):
    run(data=tiny.Data({4: empty}))


def test_an_update_that_is_not_finite_is_never_saved_or_returned(tmp_path):
  def rate(count):
    return jnp.where(count == 4, jnp.nan, 0.1)

  broken = optim.Optimizer(*optax.sgd(rate), lambda step: 0.1)
  message = r"step 5: params/blocks/00/b_down_D is not finite after the update; .*{\"next\": 4}"
  with pytest.raises(FloatingPointError, match=message):
    run(workdir=tmp_path, optimizer=broken, validate=None)
  assert saved_steps(tmp_path) == []
  with pytest.raises(FloatingPointError, match=message):
    run(steps=5, optimizer=broken)


def test_a_validation_that_is_not_finite_stops_the_run():
  with pytest.raises(FloatingPointError, match="step 4: validation kl is inf"):
    run(validate=lambda params: {"kl": float("inf")}, validate_every=4)


def test_data_that_ends_early_is_refused_with_its_position():
  with pytest.raises(ValueError, match='the data ended before step 6, at position {"next": 5}'):
    run(data=tiny.Data(end=5))


def test_another_config_leaves_the_workdir_as_it_was(tmp_path):
  run(workdir=tmp_path, steps=5)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  with pytest.raises(ValueError, match="made with seed = 0, this run has 1"):
    run(workdir=tmp_path, config={"seed": 1})
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_config_that_json_cannot_hold_fails_before_the_first_step():
  class Untouched(tiny.Data):
    """Data that nobody may ask for anything."""

    def __next__(self):
      raise AssertionError

  with pytest.raises(TypeError, match="not JSON serializable"):
    run(config={"sizes": {1, 2}}, data=Untouched())


@pytest.mark.parametrize(
  "change,message",
  [
    ({"steps": 0}, "steps=0"),
    ({"log_every": 0}, "log_every=0"),
    ({"keep": 0}, "keep=0"),
    ({"validate_every": -1}, "validate_every=-1"),
    ({"save_every": -2}, "save_every=-2"),
    ({"save_every": 2}, "save_every=2 needs a workdir"),
    ({"progress": "loud"}, "progress 'loud'"),
  ],
)
def test_impossible_intervals_are_refused_by_value(change, message):
  with pytest.raises(ValueError, match=message):
    run(**change)
