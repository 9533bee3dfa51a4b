"""Our own folder: `model.json` and safetensors whose names are the leaves' paths."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybridlm import axes, config, lazy
from hybridlm.config import ModelConfig
from hybridlm.interop import beside, folders, safetensors
from hybridlm.interop.folders import clip

FORMAT = "hybridlm-model-1"
FILE = "model.json"
DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))


def read_config(folder: str | os.PathLike) -> ModelConfig:
  """Returns the config a folder holds.

  Raises:
    FileNotFoundError: there is no `model.json`.
    ValueError: it is damaged, or of another format.
  """
  plain = folders.read_json(folder, FILE)
  place = pathlib.Path(folder) / FILE
  found = plain.pop("format", None)
  if found != FORMAT:
    raise ValueError(f"{place}: its format is {clip(found)}, not {FORMAT!r}")
  try:
    return ModelConfig.from_dict(plain)
  except (ValueError, TypeError, AttributeError, OverflowError) as error:
    raise ValueError(f"{place}: {' '.join(str(error).split())[:300]}") from error


def open(folder: str | os.PathLike) -> tuple[ModelConfig, dict[str, lazy.Leaf]]:
  """Returns the config and the leaves by path; no weights are read.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or the tensors are not the config's tree; names the first.
  """
  cfg = read_config(folder)
  tensors = safetensors.open_folder(folder)
  expected = dict(axes.leaves(config.shapes(cfg)))
  for path in sorted(expected.keys() | tensors.keys()):
    place = f"{folder}: tensor {clip(path)}"
    if path not in tensors:
      raise ValueError(f"{place}: missing; {FILE} needs it with shape {clip(expected[path])}")
    if path not in expected:
      raise ValueError(f"{place}: {FILE} has no such leaf")
    if tensors[path].shape != expected[path]:
      found, said = tensors[path].shape, clip(expected[path])
      raise ValueError(f"{place}: shape {found}, {FILE} says {said}")
    if tensors[path].dtype not in DTYPES:
      raise ValueError(f"{place}: dtype {tensors[path].dtype}, leaves are float32 or bfloat16")
  return cfg, {path: lazy.Leaf(*tensors[path]) for path in expected}


def _items(leaves: lazy.Leaves) -> Iterator[safetensors.Item]:
  for path, leaf in leaves.items():
    yield path, leaf.shape, leaf.dtype, leaf.read


def write(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  leaves: lazy.Leaves,
  *,
  like: str | os.PathLike | None = None,
) -> None:
  """Writes a folder, whole or not at all, reading one leaf after the other.

  Args:
    folder: the target; one that we wrote before is replaced.
    cfg: the model.
    leaves: exactly its leaves, float32 or bfloat16.
    like: a model on disk whose tokenizer files are carried on.

  Raises:
    ValueError: the leaves are not the config's, or the target holds files of somebody else's.
  """
  config.check(cfg, lazy.tree(leaves))
  for path, leaf in leaves.items():
    if leaf.dtype not in DTYPES:
      raise ValueError(f"leaf {path!r} has dtype {leaf.dtype}, leaves are float32 or bfloat16")
  found = beside.gather(like)
  beside.check(found, cfg.real_vocabulary)
  with folders.replacing(folder) as part:
    beside.write(part, found)
    safetensors.write_folder(part, _items(leaves), metadata={"format": FORMAT})
    plain: dict[str, Any] = {"format": FORMAT, **cfg.to_dict()}
    (part / FILE).write_text(json.dumps(plain, indent=1) + "\n", "utf-8")
