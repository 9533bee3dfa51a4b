"""Checkpoints that are whole or not there: state by Orbax, position and config as JSON, checksums.

    checkpoints/00000300/state/         Orbax
                         position.json  where the data iterator stood after step 300
                         config.json    what the run was asked for
                         manifest.json  SHA-256 and size of every file above, shapes of the leaves

The manifest is written last and in one rename, so a folder without it is an interrupted save:
`restore` passes it by and the next `save` removes it. Orbax restores a flipped bit without a word;
here every byte is checked before Orbax sees it.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from hybridlm.config import ModelConfig, check
from hybridlm.train import state as states

MODEL = "model_config.json"
_MANIFEST = "manifest.json"


class Restored(NamedTuple):
  """What `restore` found: a state on fresh device arrays and the position of the data iterator."""

  state: states.TrainState
  position: Any


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file as a whole: whoever reads it, a crash between included, sees old or new."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
  _sync(path.parent)


def _text(value: Any) -> str:
  return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _write_json(path: pathlib.Path, value: Any) -> None:
  write_text(path, _text(value))


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text("utf-8"))


def _sync(path: pathlib.Path) -> None:
  """Waits until a file's content, or a folder's list of names, is on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in path.rglob("*") if p.is_file() and p != path / _MANIFEST)


def _digest(path: pathlib.Path) -> dict[str, Any]:
  with open(path, "rb") as file:
    return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _digest_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _numbered(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders of checkpoints, whole or not, oldest first."""
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if p.is_dir() and len(p.name) == 8 and p.name.isdigit())


def complete(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the checkpoints whose save came to its end, oldest first; nothing is verified."""
  return [p for p in _numbered(pathlib.Path(folder)) if (p / _MANIFEST).is_file()]


def _remove(path: pathlib.Path) -> None:
  """Removes a checkpoint, manifest first, so that one half removed is not taken for a whole."""
  (path / _MANIFEST).unlink(missing_ok=True)
  shutil.rmtree(path)


def _leaves(tree: Any) -> dict[str, Any]:
  return {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in states.named_leaves(tree)
  }


def save(
  folder: str | os.PathLike,
  state: states.TrainState,
  *,
  position: Any,
  config: Mapping[str, Any],
  keep: int,
) -> pathlib.Path:
  """Returns the path of the checkpoint written for the state's step; when it returns, it is whole.

  Interrupted saves are removed first. Afterwards the last `keep` checkpoints stay; later steps
  than this one, left by a run whose newest checkpoint was damaged, go.

  Args:
    folder: where the checkpoints of one run lie.
    state: what to save.
    position: what the data iterator's `get_state` returned; JSON-able.
    config: what `restore` compares; JSON-able.
    keep: checkpoints to hold on to.

  Raises:
    ValueError: `keep` below 1, or a run of several processes.
  """
  if keep < 1:
    raise ValueError(f"checkpoint: keep={keep} must be at least 1")
  if jax.process_count() > 1:
    raise ValueError(f"checkpoint: {jax.process_count()} processes, but only one can save so far")
  folder = pathlib.Path(folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  step = int(state.step)
  path = folder / f"{step:08d}"
  for old in set(_numbered(folder)) - set(complete(folder)) | ({path} if path.exists() else set()):
    _remove(old)
  path.mkdir()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as writer:
    writer.save(path / "state", args=ocp.args.PyTreeSave(state))
  _write_json(path / "position.json", position)
  _write_json(path / "config.json", config)
  _seal(path, step, _leaves(state))
  found = complete(folder)
  for old in set(found) - set([p for p in found if p.name <= path.name][-keep:]):
    _remove(old)
  return path


def _seal(path: pathlib.Path, step: int, leaves: dict[str, Any]) -> None:
  """Makes every file and folder name durable, then writes the manifest."""
  files = _files(path)
  for item in (*files, *(p for p in path.rglob("*") if p.is_dir())):
    _sync(item)
  digests = {file.relative_to(path).as_posix(): _digest(file) for file in files}
  body = {"step": step, "leaves": leaves, "files": digests}
  _write_json(path / _MANIFEST, {"body": body, "sha256": _digest_json(body)})
  _sync(path.parent)


def damage(path: pathlib.Path) -> str | None:
  """Returns in a few words what is wrong with a complete checkpoint, or None."""
  try:
    manifest = _read_json(path / _MANIFEST)
    body, sealed = manifest["body"], manifest["sha256"]
  except (ValueError, KeyError, TypeError) as error:
    return f"{_MANIFEST} cannot be read: {type(error).__name__}"
  if sealed != _digest_json(body) or (path / _MANIFEST).read_text("utf-8") != _text(manifest):
    return f"{_MANIFEST} has other bytes"
  if body["step"] != int(path.name):
    return f"{_MANIFEST} is of step {body['step']}"
  expected = body["files"]
  found = {file.relative_to(path).as_posix(): file for file in _files(path)}
  for name in sorted(expected.keys() | found.keys()):
    if name not in found:
      return f"{name} is missing"
    if name not in expected:
      return f"{name} is not in the manifest"
    was, now = expected[name], _digest(found[name])
    if now["bytes"] != was["bytes"]:
      return f"{name} has {now['bytes']} bytes, not {was['bytes']}"
    if now != was:
      return f"{name} has other bytes"
  return None


def newest_good(folder: str | os.PathLike) -> pathlib.Path | None:
  """Returns the newest checkpoint whose every byte is as it was written; None if none was saved.

  Each damaged one on the way is warned about in one line.

  Raises:
    ValueError: there are checkpoints and all are damaged.
  """
  folder = pathlib.Path(folder).absolute()
  found = complete(folder)[::-1]
  for path in set(_numbered(folder)) - set(found):
    logging.warning("checkpoint %s has no manifest: an interrupted save, ignored", path)
  first = None
  for path in found:
    problem = damage(path)
    if problem is None:
      return path
    first = first or f"{path.name}: {problem}"
    if path != found[-1]:
      text = "checkpoint %s is damaged (%s): falling back to the one before"
      logging.warning(text, path, problem)
  if first:
    raise ValueError(f"all {len(found)} checkpoints in {folder} are damaged, the newest {first}")
  return None


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
  if found := _first_difference(_read_json(path / "config.json"), plain):
    key, old, new = found
    raise ValueError(f"checkpoint {path} was made with {key} = {old}, this run has {new}")
  saved = _read_json(path / _MANIFEST)["body"]["leaves"]
  for name in sorted(saved.keys() | leaves.keys()):
    if saved.get(name) != leaves.get(name):
      raise ValueError(f"checkpoint {path}: leaf {name} is {saved.get(name)}, this run has "
                       f"{leaves.get(name)}")


def restore(
  folder: str | os.PathLike, like: states.TrainState, *, config: Mapping[str, Any]
) -> Restored | None:
  """Returns the newest good checkpoint, on arrays of its own, or None where none was ever saved.

  Args:
    folder: where the checkpoints of one run lie.
    like: a state of the same leaves, shapes and dtypes; its shardings say where to restore to.
    config: must equal the saved one.

  Raises:
    ValueError: all checkpoints are damaged; or the newest good one is of another config (the first
      differing key is named) or of other leaves.
  """
  path = newest_good(folder)
  if path is None:
    return None
  _check_same(path, config, _leaves(like))
  args = ocp.args.PyTreeRestore(
    like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    state = reader.restore(path / "state", args=args)
  # Orbax may hand out views of host memory; a step donates its state.
  return Restored(jax.tree.map(jnp.copy, state), _read_json(path / "position.json"))


def load_params(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the parameters (nested dict of arrays) and config of the newest good checkpoint.

  Raises:
    FileNotFoundError: no checkpoint was ever saved there.
    ValueError: all are damaged.
  """
  path = newest_good(folder)
  if path is None:
    raise FileNotFoundError(f"no checkpoint in {folder}")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    wanted = {"params": reader.metadata(path / "state").item_metadata.tree["params"]}
    host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=host, partial_restore=True)
    tree = reader.restore(path / "state", args=args)
  return jax.tree.map(jnp.array, tree["params"]), _read_json(path / "config.json")


def name_model(folder: str | os.PathLike, cfg: ModelConfig) -> None:
  """Writes which model a run's checkpoints are of, so that `load_model` needs nothing else."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _write_json(folder / MODEL, cfg.to_dict())


def load_model(folder: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the config and the parameters of a run's newest good checkpoint.

  Raises:
    FileNotFoundError: no checkpoint was ever saved there, or nobody said of which model.
    ValueError: all are damaged, or they are of another model.
  """
  path = pathlib.Path(folder) / MODEL
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  params, _ = load_params(folder)
  try:
    cfg = ModelConfig.from_dict(_read_json(path))
    check(cfg, params)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return cfg, params
