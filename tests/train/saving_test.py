"""Training goes on while a checkpoint is written, and what cannot be written harms none before."""

import contextlib
import functools
import gc
import os
import resource
import signal
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cases import tiny
from hybridlm.train import checkpoint, loop, mesh, optim, sealed, state, step, stop

OPTIMIZER = optim.make(peak=0.02, steps=12, warmup=2)
STEP = step.make_step(tiny.distillation, OPTIMIZER)


def run(workdir, *, steps=12, data=None, **changes):
  settings = {"log_every": 3, "save_every": 4, "progress": "off", "config": {}} | changes
  return loop.run(
    STEP, state.create(tiny.init(), OPTIMIZER), data or tiny.Data(), steps=steps,
    frozen=tiny.init(1), workdir=workdir, **settings,
  )


def saved(workdir):
  return [int(path.name) for path in sealed.complete(workdir / loop.CHECKPOINTS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The undisturbed run: its state and its losses."""
  final, history = run(tmp_path_factory.mktemp("whole"))
  return final, losses(history)


def losses(history):
  return {record["step"]: record["loss"] for record in history if record["split"] == "train"}


def test_steps_are_made_while_a_checkpoint_is_written(tmp_path, monkeypatch, whole):
  moved_on, seen, seal = threading.Event(), [], sealed.seal

  def slow(path, *rest):
    seen.append((int(path.name), int(path.name) == 12 or moved_on.wait(60)))
    seal(path, *rest)

  def note(batch):
    moved_on.set()
    return batch

  monkeypatch.setattr(sealed, "seal", slow)
  # Step 4 is sealed only once the batch of step 6 was asked for.
  final, _ = run(tmp_path, data=tiny.Data({5: note}))
  assert seen == [(4, True), (8, True), (12, True)] and saved(tmp_path) == [4, 8, 12]
  assert tiny.same(final, whole[0])


def test_what_is_written_is_the_state_at_the_start_of_the_save_though_a_step_takes_it(tmp_path):
  now, teacher = state.create(tiny.init(), OPTIMIZER), tiny.init(1)
  before = jax.tree.map(np.array, now)
  with checkpoint.Saver(tmp_path, config={}, keep=1) as saver:
    path = saver.start(now, position={}, notes={"more": [1.5]})
    for number in range(3):
      now, _ = STEP(now, teacher, tiny.batch(number))
  assert sealed.damage(path) is None
  found = checkpoint.restore(tmp_path, now, config={})
  assert tiny.same(found.state, before) and found.notes == {"more": [1.5]}


@contextlib.contextmanager
def small_disk(limit):
  """No file may grow beyond so many bytes: the nearest to a full disk that every machine has."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Orbax leaves coroutines behind where it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_before_stays(tmp_path, whole):
  class Filling(tiny.Data):
    """With the seventh batch, and the first checkpoint whole, there is no room for another."""

    def __next__(self):
      if self.get_state()["next"] == 6:
        while not saved(tmp_path):
          time.sleep(0.001)
        disk.enter_context(small_disk(8000))
      return super().__next__()

  with contextlib.ExitStack() as disk, pytest.raises(checkpoint.NotSaved) as error:
    run(tmp_path, data=Filling())
  text = str(error.value)
  assert "00000008 could not be written: File too large;" in text and "\n" not in text
  assert "MiB are free there; the last whole one is 00000004" in text
  del error
  gc.collect()
  assert saved(tmp_path) == [4] and not (tmp_path / loop.CHECKPOINTS / "00000008").exists()
  assert tiny.same(run(tmp_path)[0], whole[0])


def test_an_error_behind_the_back_of_training_ends_it_at_the_next_save(tmp_path, monkeypatch):
  def broken(path, *rest):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(sealed, "seal", broken)
  with pytest.raises(checkpoint.NotSaved, match="00000004 could not be written: Input/output"):
    run(tmp_path, data=tiny.Data(end=8))
  assert saved(tmp_path) == []


def test_a_checkpoint_is_whole_where_an_older_one_cannot_be_removed(tmp_path, monkeypatch):
  remove = sealed.remove

  def stuck(path):
    if int(path.name) == 4 and not (tmp_path / "free").exists():
      raise OSError(16, "Device or resource busy")
    remove(path)

  monkeypatch.setattr(sealed, "remove", stuck)
  run(tmp_path, steps=8, keep=1)
  assert saved(tmp_path) == [4, 8]
  (tmp_path / "free").touch()
  run(tmp_path, keep=1)
  assert saved(tmp_path) == [12]


def test_a_run_that_goes_on_leaves_no_room_to_the_state_it_was_given(tmp_path, whole):
  run(tmp_path, steps=8)
  given = state.create(tiny.init(), OPTIMIZER)
  final, _ = loop.run(STEP, given, tiny.Data(), steps=12, frozen=tiny.init(1), workdir=tmp_path,
                      config={}, progress="off")
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  assert tiny.same(final, whole[0])


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(tmp_path):
  run(tmp_path, steps=4)
  size = (tmp_path / loop.METRICS).stat().st_size
  with small_disk(size + 10), pytest.raises(checkpoint.NotSaved, match="File too large; checkpoin"):
    run(tmp_path, log_every=1)
  assert saved(tmp_path) == [4]


class Terminated(tiny.Data):
  """The process is asked to end while it fetches the batch of one step."""

  def __init__(self, number):
    super().__init__({number - 1: self._ask})

  def _ask(self, batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


@pytest.mark.parametrize("number", [5, 8, 12])
def test_sigterm_saves_the_step_it_met_and_ends_with_143(tmp_path, whole, number):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(stop.Stopped, match=f"step {number} is saved in ") as ended:
    run(tmp_path, data=Terminated(number))
  assert ended.value.code == 143 and saved(tmp_path)[-1] == number
  assert signal.getsignal(signal.SIGTERM) is before
  assert tiny.same(run(tmp_path)[0], whole[0])


def test_sigterm_while_the_last_step_is_saved_is_not_forgotten(tmp_path, monkeypatch, whole):
  seal = sealed.seal

  def asking(path, *rest):
    if int(path.name) == 12:
      os.kill(os.getpid(), signal.SIGTERM)
    seal(path, *rest)

  monkeypatch.setattr(sealed, "seal", asking)
  with pytest.raises(stop.Stopped, match="step 12 is saved in "):
    run(tmp_path)
  assert tiny.same(run(tmp_path)[0], whole[0])


def grid(devices):
  """Returns a mesh of the first so many devices."""
  shape = {8: (4, 2), 4: (2, 2), 1: (1, 1)}[devices]
  return Mesh(np.array(jax.devices()[:devices]).reshape(shape), ("fsdp", "tensor"))


@functools.cache
def spread(devices):
  """Returns a step, and where its state lies, on so many devices."""
  like = jax.eval_shape(lambda: state.create(tiny.init(rows=32), OPTIMIZER))
  where = mesh.shardings(grid(devices), like, mesh.RULES)
  return step.make_step(tiny.distillation, OPTIMIZER, shardings=where), where


def test_a_run_of_8_devices_goes_on_on_4_and_on_1_with_the_same_losses(tmp_path):
  curves = {}
  for name, plan in {"moved": ((8, 4), (4, 8), (1, 12)), "stayed": ((8, 12),)}.items():
    for devices, steps in plan:
      advance, where = spread(devices)
      start = mesh.place(state.create(tiny.init(rows=32), OPTIMIZER), where)
      final, history = loop.run(
        advance, start, tiny.Data(), steps=steps, workdir=tmp_path / name, log_every=1,
        save_every=4, progress="off", frozen=tiny.init(1, rows=32),
      )
      assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(final)} == {devices}
    curves[name] = losses(history)
  assert len(curves["moved"]) == 12
  assert curves["moved"] == pytest.approx(curves["stayed"], rel=1e-4)
