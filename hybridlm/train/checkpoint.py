"""Checkpoints that are whole or not there: state by Orbax, position and config as JSON, checksums.

    checkpoints/00000300/state/         Orbax; every process writes its own shards
                         position.json  where the data iterator stood after step 300
                         notes.json     what else the loop goes on from
                         config.json    what the run was asked for
                         manifest.json  SHA-256 and size of every file above, shapes of the leaves

Training goes on while a checkpoint is written: `Saver.start` returns once the state is in host
memory. The manifest is written when all else is on the disk, so whatever interrupts a save leaves a
folder without one: `restore` passes it by and the next save removes it. The data's position names
the seed of its order, and nothing else in a run is random.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from hybridlm.config import ModelConfig, check
from hybridlm.train import sealed, together
from hybridlm.train import state as states

MODEL = "model_config.json"
# Seconds after which processes give up waiting for one that writes no more.
PATIENCE = 600


class Restored(NamedTuple):
  """What `restore` found: a state on fresh device arrays, the position of the data iterator, and
  what else the loop noted."""

  state: states.TrainState
  position: Any
  notes: dict[str, Any] = {}


class NotSaved(ValueError, OSError):
  """A checkpoint could not be written; those before it are whole."""


def _leaves(tree: Any) -> dict[str, Any]:
  return {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in states.named_leaves(tree)
  }


class Saver:
  """Writes the checkpoints of one run, one at a time, while training goes on.

  As a context it waits, at its end, for the save under way.
  """

  def __init__(self, folder: str | os.PathLike, *, config: Mapping[str, Any], keep: int):
    if keep < 1:
      raise ValueError(f"checkpoint: keep={keep} must be at least 1")
    self._folder = pathlib.Path(folder).absolute()
    self._config, self._keep = config, keep
    self._writer = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(use_compression=False),
      async_options=ocp.options.AsyncOptions(timeout_secs=PATIENCE),
    )
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: tuple[pathlib.Path, concurrent.futures.Future] | None = None

  def __enter__(self) -> "Saver":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    try:
      if error is None:
        self.wait()
      elif self._pending is not None:
        self._join()
    finally:
      self._pool.shutdown()
      self._writer.close()

  def start(
    self, state: states.TrainState, *, position: Any, notes: Mapping[str, Any]
  ) -> pathlib.Path:
    """Returns the path of a checkpoint that is being written; the state may be donated at once.

    Waits for the save before it. Interrupted ones are removed.

    Raises:
      NotSaved: that one, or the beginning of this one, could not be written.
      ValueError: position, notes or config that JSON cannot hold.
    """
    self.wait()
    step = int(state.step)
    path = self._folder / f"{step:08d}"
    values = {"position": position, "config": self._config, "notes": notes}
    texts = {name: json.dumps(value, allow_nan=False) for name, value in values.items()}
    together.first(lambda: self._begin(path, {k: json.loads(v) for k, v in texts.items()}))
    error = None
    try:
      self._writer.save(path / "state", args=ocp.args.PyTreeSave(state))
      self._pending = path, self._pool.submit(self._end, path, step, _leaves(state))
    except Exception as caught:  # of many kinds, by what lies beneath: files, buckets, processes
      error = self._failed(path, caught)
    _agreed(error)
    return path

  def wait(self) -> None:
    """Returns when the save under way, if there is one, is whole on every process.

    Raises:
      NotSaved: it could not be written.
    """
    if self._pending is not None:
      _agreed(self._join())

  def _join(self) -> NotSaved | None:
    """Waits for this process's part of the save under way and returns what went wrong."""
    (path, future), self._pending = self._pending, None
    error = future.exception()
    return None if error is None else self._failed(path, error)

  def _begin(self, path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Makes the folder with all that is not the state."""
    try:
      sealed.prepare(path)
      for name, value in values.items():
        sealed.write_json(path / f"{name}.json", value)
    except OSError as error:
      raise self._failed(path, error) from error

  def _end(self, path: pathlib.Path, step: int, leaves: dict[str, Any]) -> None:
    """Seals the checkpoint once Orbax has it whole: that waits for every process."""
    self._writer.wait_until_finished()
    if together.writes():
      sealed.seal(path, step, leaves)
      try:
        sealed.retain(path, self._keep)
      except OSError as error:  # this one is whole; the next save tries again
        logging.warning("checkpoint %s is whole, but others could not be removed: %s", path, error)

  def _failed(self, path: pathlib.Path, error: BaseException) -> NotSaved:
    """Returns the error to raise for another one; what was written of the checkpoint goes."""
    if together.writes():
      with contextlib.suppress(OSError):
        (path / sealed.MANIFEST).unlink(missing_ok=True)
      shutil.rmtree(path, ignore_errors=True)
    whole = [p.name for p in sealed.complete(self._folder)]
    text = reason(error)
    logging.error("checkpoint %s: %s", path, error)
    made = NotSaved(
      f"checkpoint {path} could not be written: {text}; {_space(self._folder)}; "
      + (f"the last whole one is {whole[-1]}" if whole else "there is no whole one before it")
    )
    made.__cause__ = error
    return made


def _agreed(error: NotSaved | None) -> None:
  """Raises `NotSaved` on every process if one of them has it."""
  try:
    together.check(error)
  except NotSaved:
    raise
  except ValueError as other:
    raise NotSaved(str(other)) from other


def reason(error: BaseException) -> str:
  """Returns why something could not be written, in a few words."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split()) or type(error).__name__
  known = [code for code in ("No space left on device", "File too large", "Disk quota exceeded")
           if code in text]
  return known[0] if known else text[:300]


def _space(folder: pathlib.Path) -> str:
  try:
    usage = shutil.disk_usage(folder)
  except OSError as error:
    return f"{folder}: {error.strerror}"
  return f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free there"


def save(
  folder: str | os.PathLike,
  state: states.TrainState,
  *,
  position: Any,
  config: Mapping[str, Any],
  keep: int,
  notes: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Returns the path of the checkpoint written for the state's step; when it returns, it is whole.

  Interrupted saves are removed first. Afterwards the last `keep` checkpoints stay; later steps
  than this one, left by a run whose newest checkpoint was damaged, go.

  Args:
    folder: where the checkpoints of one run lie; the same for every process.
    state: what to save.
    position: what the data iterator's `get_state` returned; JSON-able.
    config: what `restore` compares; JSON-able.
    keep: checkpoints to hold on to.
    notes: what else the loop goes on from; JSON-able.

  Raises:
    NotSaved: it could not be written, for want of space perhaps.
    ValueError: `keep` below 1, or values that JSON cannot hold.
  """
  with Saver(folder, config=config, keep=keep) as saver:
    return saver.start(state, position=position, notes=notes or {})


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
  """Returns the first key at which two JSON values differ, and both sides as text."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    same = type(old) is type(new) and old == new
    return None if same else (key, json.dumps(old), json.dumps(new))
  for name in sorted(old.keys() | new.keys()):
    inner = f"{key}.{name}" if key else name
    if name not in new:
      return inner, json.dumps(old[name]), "nothing"
    if name not in old:
      return inner, "nothing", json.dumps(new[name])
    if found := _first_difference(old[name], new[name], inner):
      return found
  return None


def _check_same(path: pathlib.Path, config: Mapping[str, Any], leaves: dict[str, Any]) -> None:
  plain = json.loads(json.dumps(config))
  if found := _first_difference(sealed.read_json(path / "config.json"), plain):
    key, old, new = found
    raise ValueError(f"checkpoint {path} was made with {key} = {old}, this run has {new}")
  saved = sealed.leaves(path)
  for name in sorted(saved.keys() | leaves.keys()):
    if saved.get(name) != leaves.get(name):
      raise ValueError(f"checkpoint {path}: leaf {name} is {saved.get(name)}, this run has "
                       f"{leaves.get(name)}")


def restore(
  folder: str | os.PathLike, like: Any, *, config: Mapping[str, Any], skip: int = 0
) -> Restored | None:
  """Returns the newest good checkpoint, on arrays of its own, or None where none was ever saved.

  It may have been saved on another mesh, or by another number of processes.

  Args:
    folder: where the checkpoints of one run lie.
    like: a state, or one of `jax.ShapeDtypeStruct`, of the same leaves, shapes and dtypes; its
      shardings say where to restore to.
    config: must equal the saved one.
    skip: good checkpoints to pass by first, as `sealed.newest_good` does.

  Raises:
    ValueError: all checkpoints are damaged; or the newest good one is of another config (the first
      differing key is named) or of other leaves.
  """
  name = together.first(lambda: _name(sealed.newest_good(folder, skip=skip)))
  if name is None:
    return None
  path = pathlib.Path(folder).absolute() / name
  _check_same(path, config, _leaves(like))
  args = ocp.args.PyTreeRestore(
    like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    leaves, tree = jax.tree.flatten(reader.restore(path / "state", args=args))
  # Orbax may hand out views of host memory; a step donates its state. One leaf at a time.
  for index, leaf in enumerate(leaves):
    leaves[index] = jnp.copy(leaf)
  notes = path / "notes.json"
  return Restored(
    jax.tree.unflatten(tree, leaves), sealed.read_json(path / "position.json"),
    sealed.read_json(notes) if notes.is_file() else {},
  )


def _name(path: pathlib.Path | None) -> str | None:
  return None if path is None else path.name


def load_params(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the parameters (nested dict of arrays) and config of the newest good checkpoint.

  Raises:
    FileNotFoundError: no checkpoint was ever saved there.
    ValueError: all are damaged.
  """
  path = sealed.newest_good(folder)
  if path is None:
    raise FileNotFoundError(f"no checkpoint in {folder}")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    wanted = {"params": reader.metadata(path / "state").item_metadata.tree["params"]}
    host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=host, partial_restore=True)
    tree = reader.restore(path / "state", args=args)
  return jax.tree.map(jnp.array, tree["params"]), sealed.read_json(path / "config.json")


def name_model(folder: str | os.PathLike, cfg: ModelConfig) -> None:
  """Writes which model a run's checkpoints are of, so that `load_model` needs nothing else."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  sealed.write_json(folder / MODEL, cfg.to_dict())


def load_model(
  folder: str | os.PathLike,
  canonical: Callable[[ModelConfig, Any], dict[str, Any]] = lambda cfg, params: params,
) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the config and the parameters of a run's newest good checkpoint.

  `canonical` makes the model's own tree of the one that trained.

  Raises:
    FileNotFoundError: no checkpoint was ever saved there, or nobody said of which model.
    ValueError: all are damaged, or they are of another model.
  """
  path = pathlib.Path(folder) / MODEL
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  params, _ = load_params(folder)
  try:
    cfg = ModelConfig.from_dict(sealed.read_json(path))
    params = canonical(cfg, params)
    check(cfg, params)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return cfg, params
