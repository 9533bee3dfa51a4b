"""One door to every format: what a path holds decides how it is read, a name how it is written."""

import os
import pathlib

from hybridlm import lazy
from hybridlm.config import ModelConfig
from hybridlm.interop import gguf, huggingface, native

FORMATS = ("hybridlm", "hf")


def open(path: str | os.PathLike) -> tuple[ModelConfig, lazy.Leaves]:
  """Returns the config of the model a path holds, and its leaves, which are read when asked for.

  A file is GGUF; a folder is ours where it holds `model.json`, and a published one where it holds
  `config.json`.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is none of these, or damaged.
  """
  path = pathlib.Path(path)
  if path.is_file():
    if path.suffix != ".gguf":
      raise ValueError(f"{path}: a model is a folder or a .gguf file")
    return gguf.open(path)
  if not path.is_dir():
    raise FileNotFoundError(f"model {path}: no such file or folder")
  if (path / native.FILE).is_file():
    return native.open(path)
  if (path / huggingface.CONFIG).is_file():
    return huggingface.open(path)
  raise ValueError(f"model {path}: holds neither {native.FILE} nor {huggingface.CONFIG}")


def write(
  path: str | os.PathLike,
  cfg: ModelConfig,
  leaves: lazy.Leaves,
  *,
  format: str,
  family: str | None = None,
  like: str | os.PathLike | None = None,
) -> None:
  """Writes a model, one tensor at a time, as a folder that is whole or not there.

  Args:
    path: the folder.
    cfg: the model.
    leaves: its parameters.
    format: "hybridlm", our own, or "hf": `config.json` and safetensors that transformers loads.
    family: "hf" only: the published class; None takes the first that can say this model.
    like: a model on disk whose tokenizer files and token ids are carried on.

  Raises:
    ValueError: an unknown format, or a model that the published class cannot say.
  """
  if format not in FORMATS:
    raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
  if format == "hf":
    huggingface.write(path, cfg, leaves, family=family, like=like)
    return
  if family is not None:
    raise ValueError(f"family {family!r} is of format 'hf'; our own format has none")
  native.write(path, cfg, leaves, like=like)
