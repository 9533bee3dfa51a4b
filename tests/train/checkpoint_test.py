"""A checkpoint is whole or not there, and what is restored is what was saved, bit for bit."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import tiny
from hybridlm.train import checkpoint, optim, sealed, state

OPTIMIZER = optim.make(peak=0.1, steps=9)
CONFIG = {"run": {"peak": 0.1, "sizes": (3, 4)}, "name": "tiny"}
POSITION = {"next": 12, "order": [3, 1, 2], "inner": {"seed": 7}}


def some_state(step, dtype=jnp.float32, **sizes):
  """Returns a state of odd values in parameters, moments and counters alike."""
  fresh = state.create(tiny.init(step, dtype=dtype, **sizes), OPTIMIZER)
  keys = iter(jax.random.split(jax.random.key(step), 99))

  def odd(leaf):
    if leaf.ndim == 0:
      return leaf + step
    return leaf + jax.random.normal(next(keys), leaf.shape, leaf.dtype)

  return jax.tree.map(odd, fresh)


def save(folder, step, **changes):
  settings = {"position": POSITION, "config": CONFIG, "keep": 3} | changes
  return checkpoint.save(folder, some_state(step), **settings)


def restore(folder, config=CONFIG, like=None):
  return checkpoint.restore(folder, some_state(0) if like is None else like, config=config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder of three good checkpoints; tests work on copies."""
  folder = tmp_path_factory.mktemp("saved")
  for step in (3, 5, 8):
    save(folder, step)
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def flip(path, offset, bit=0):
  data = bytearray(path.read_bytes())
  data[offset % len(data)] ^= 1 << bit
  path.write_bytes(bytes(data))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path, dtype):
  original = some_state(5, dtype)
  checkpoint.save(tmp_path / "new", original, position=POSITION, config=CONFIG, keep=1)
  found = restore(tmp_path / "new", like=some_state(0, dtype))
  assert tiny.same(found.state, original)
  assert [leaf.dtype for leaf in jax.tree.leaves(found.state)] == [
    leaf.dtype for leaf in jax.tree.leaves(original)
  ]
  assert found.position == POSITION


def test_restored_arrays_are_fresh_and_can_be_donated(folder):
  like = some_state(0)
  found = restore(folder, like=like).state
  state.check_apart(found, like)
  copy = jax.tree.map(np.array, found)
  after = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(found)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(found))
  assert tiny.same(after, jax.tree.map(lambda x: x + 1, copy))


def test_a_checkpoint_of_before_there_were_notes_is_restored_without(folder):
  path = folder / "00000008"
  leaves = sealed.leaves(path)
  (path / "notes.json").unlink()
  (path / "manifest.json").unlink()
  sealed.seal(path, 8, leaves)
  found = restore(folder)
  assert tiny.same(found.state, some_state(8)) and found.notes == {}


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert restore(tmp_path) is None
  assert restore(tmp_path / "absent") is None


def test_the_last_ones_are_kept(tmp_path):
  for step in range(1, 6):
    path = save(tmp_path, step, keep=2)
    assert path == tmp_path / f"{step:08d}"
  assert [p.name for p in sorted(tmp_path.iterdir())] == ["00000004", "00000005"]
  with pytest.raises(ValueError, match="keep=0 must be at least 1"):
    save(tmp_path, 6, keep=0)


def files(path):
  return sorted(p for p in path.rglob("*") if p.is_file())


def test_one_flipped_bit_of_any_file_is_seen(folder):
  path = folder / "00000008"
  assert sealed.damage(path) is None
  rng = np.random.default_rng(0)
  checked = 0
  for file in files(path):
    good = file.read_bytes()
    for offset in rng.integers(0, max(1, len(good)), 12) if good else ():
      flip(file, int(offset), bit=int(offset) % 8)
      assert sealed.damage(path), f"{file} at {offset}"
      file.write_bytes(good)
      checked += 1
  assert checked > 100 and sealed.damage(path) is None


def test_any_truncated_lost_or_added_file_is_seen_by_name(folder):
  path = folder / "00000008"
  for file in files(path):
    name, good = file.relative_to(path).as_posix(), file.read_bytes()
    if good:
      file.write_bytes(good[:-1])
      assert name in sealed.damage(path)
    if name != "manifest.json":
      file.unlink()
      assert sealed.damage(path) == f"{name} is missing"
    file.write_bytes(good)
  (path / "state" / "more").write_bytes(b"")
  assert sealed.damage(path) == "state/more is not in the manifest"


def test_a_manifest_of_another_step_is_seen(folder):
  shutil.move(folder / "00000008", folder / "00000009")
  assert sealed.damage(folder / "00000009") == "manifest.json is of step 8"


def largest(path):
  return max(files(path / "state"), key=lambda file: file.stat().st_size)


def test_a_damaged_newest_falls_back_to_the_one_before_in_one_warning(folder, caplog):
  flip(largest(folder / "00000008"), 1000)
  with caplog.at_level(logging.WARNING, logger="absl"):
    found = restore(folder)
  assert tiny.same(found.state, some_state(5))
  (warning,) = [record.getMessage() for record in caplog.records]
  assert "00000008 is damaged (state/" in warning and "falling back to the one before" in warning
  assert "\n" not in warning


def test_all_damaged_is_an_error_not_a_fresh_start(folder):
  for path in folder.iterdir():
    largest(path).write_bytes(b"short")
  before = files(folder)
  with pytest.raises(ValueError, match="all 3 checkpoints in .* are damaged, the newest 00000008: s"
                     ) as error:
    restore(folder)
  assert "\n" not in str(error.value)
  assert files(folder) == before


def test_a_save_that_was_cut_off_is_ignored_and_removed_by_the_next(folder, caplog):
  (folder / "00000008" / "manifest.json").unlink()
  with caplog.at_level(logging.WARNING, logger="absl"):
    found = restore(folder)
  assert int(found.state.step) == 5
  assert ["no manifest" in record.getMessage() for record in caplog.records] == [True]
  assert (folder / "00000008").is_dir()
  save(folder, 6)
  assert [p.name for p in sorted(folder.iterdir())] == ["00000003", "00000005", "00000006"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(folder):
  flip(largest(folder / "00000008"), 1000)
  save(folder, 8)
  assert sealed.damage(folder / "00000008") is None
  assert tiny.same(restore(folder).state, some_state(8))


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_good_one(folder):
  flip(largest(folder / "00000008"), 1000)
  save(folder, 6, keep=2)
  assert [p.name for p in sorted(folder.iterdir())] == ["00000005", "00000006"]


def test_what_is_not_a_checkpoint_is_left_alone(folder):
  (folder / "notes.txt").write_text("mine")
  (folder / "best").mkdir()
  save(folder, 9, keep=1)
  assert sorted(p.name for p in folder.iterdir()) == ["00000009", "best", "notes.txt"]


@pytest.mark.parametrize(
  "change,message",
  [
    ({"run": {"peak": 0.2, "sizes": [3, 4]}}, "run.peak = 0.1, this run has 0.2"),
    ({"run": {"peak": 0.1, "sizes": [3, 5]}}, r"run.sizes = \[3, 4\], this run has \[3, 5\]"),
    ({"run": {"peak": 0.1}}, r"run.sizes = \[3, 4\], this run has nothing"),
    ({"extra": None}, "extra = nothing, this run has null"),
    ({"run": 1}, 'run = {"peak": 0.1, "sizes": .3, 4.}, this run has 1'),
  ],
)
def test_another_config_is_refused_by_its_first_differing_key(folder, change, message):
  with pytest.raises(ValueError, match=f"00000008 was made with {message}"):
    restore(folder, config=CONFIG | change)


def test_other_leaves_are_refused_by_name(folder):
  with pytest.raises(ValueError, match=r"leaf opt_state/1/mu/blocks/00/b_down_D is \[\[16\], 'flo"):
    restore(folder, like=some_state(0, width=18))
  with pytest.raises(ValueError, match="leaf params/blocks/00/b_down_D is .* 'float32'.*bfloat16"):
    restore(folder, like=some_state(0, dtype=jnp.bfloat16))


def test_parameters_and_config_can_be_read_alone(folder):
  params, config = checkpoint.load_params(folder)
  assert tiny.same(params, some_state(8).params)
  assert config == json.loads(json.dumps(CONFIG))
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    checkpoint.load_params(folder / "absent")


def test_a_config_that_json_cannot_hold_leaves_no_checkpoint(tmp_path):
  with pytest.raises(ValueError):
    save(tmp_path, 1, config={"peak": float("nan")})
  assert sealed.complete(tmp_path) == []
