"""Models from elsewhere as teachers, and the small model as a folder that others load."""

import importlib.util
import pathlib
from typing import Any

from experiments import artefacts, comparison
from hybridlm import config, lazy
from hybridlm.config import ModelConfig
from hybridlm.interop import beside, dispatch, huggingface, native

PACKAGE = "package:"
# In a teacher's folder: what a published model has beside its weights.
LIKE = "like"
# In the folder of an export: what others load.
PUBLISHED = "hf"
FORMATS = ("none", "hf")


def located(key: str, path: str) -> pathlib.Path:
  """Returns where a config's path leads; `package:NAME/FILE` lies in an installed package.

  Args:
    key: of the config, for messages.
    path: its value.

  Raises:
    FileNotFoundError: nothing is there, or the package is not installed.
  """
  found = pathlib.Path(path)
  if path.startswith(PACKAGE):
    name, _, inner = path.removeprefix(PACKAGE).partition("/")
    # Of a top-level name: nothing is imported.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
      raise FileNotFoundError(f"{key}={path}: the package {name!r} is not installed")
    found = pathlib.Path(spec.submodule_search_locations[0], inner)
  if not found.exists():
    raise FileNotFoundError(f"{key}={path}: no such file or folder")
  return found


def fingerprints(path: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of a model's file, or of every file in its folder, by name."""
  files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
  return {each.name: artefacts.file_hash(each) for each in files}


def bring(folder: pathlib.Path, source: pathlib.Path, cfg: ModelConfig) -> None:
  """Fills a stage's folder with a model from elsewhere, one tensor at a time.

  Args:
    folder: of the stage; gets the folders `model` and `like` (tokenizer and special ids).
    source: what `hybridlm.load` takes.
    cfg: its config, as it shall compute.

  Raises:
    FileNotFoundError: a file of it is missing.
    ValueError: a damaged or unknown model, or a leaf that is not finite.
  """
  _, leaves = dispatch.open(source)
  _write_like(folder / LIKE, source)
  checked = {path: comparison.finite(path, leaf, str(source)) for path, leaf in leaves.items()}
  native.write(folder / artefacts.MODEL, cfg, checked, like=folder / LIKE)


def _write_like(folder: pathlib.Path, source: pathlib.Path) -> None:
  """Writes tokenizer files, and a config.json with nothing but the family and the special ids."""
  found = beside.gather(source)
  folder.mkdir(exist_ok=True)
  beside.write(folder, found)
  family = {} if found.family is None else {"model_type": found.family}
  artefacts.write_json(folder / beside.CONFIG, family | dict(found.ids))


def check(cfg: ModelConfig, kind: str, family: str | None) -> None:
  """Raises unless a model can be exported.

  Args:
    cfg: the model.
    kind: one of `FORMATS`.
    family: of published models; None: any that can express it.

  Raises:
    ValueError: no such family can express the model; says why.
  """
  if kind != "none":
    huggingface.describe(cfg, family)


def export(
  folder: pathlib.Path, cfg: ModelConfig, params: Any, *, family: str | None, like: pathlib.Path
) -> None:
  """Writes a Hugging Face folder and `export.json`, which says what came back from it.

  Args:
    folder: of the stage; gets the folder `hf`.
    cfg: the model.
    params: its parameters.
    family: as in `check`; None: the teacher's where it can express the model.
    like: a folder whose special ids and tokenizer files are carried on, if it is there.

  Raises:
    ValueError: no such family can express the model.
    RuntimeError: what was written is not the model.
  """
  place = folder / PUBLISHED
  source = like if like.is_dir() else None
  name = huggingface.write(place, cfg, lazy.of(params), family=family, like=source)
  again_cfg, leaves = huggingface.open(place)
  error = comparison.compare(
    comparison.Side(cfg, lazy.of(params)), comparison.Side(again_cfg, leaves), None, published=True
  )
  artefacts.write_json(folder / "export.json", {
    "family": name, "parameters": config.parameters(again_cfg), "difference": error,
    "files": sorted(path.name for path in place.iterdir() if not path.name.startswith(".")),
  })
