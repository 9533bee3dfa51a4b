"""Hugging Face folders: config.json and safetensors in and out, one tensor at a time."""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

from hybridlm import axes, config, lazy
from hybridlm.config import Mamba, ModelConfig
from hybridlm.interop import beside, folders, layout, safetensors
from hybridlm.interop.families import FAMILIES, fields, table
from hybridlm.interop.families.table import Family
from hybridlm.interop.layout import Piece

CONFIG = "config.json"
# Dtypes of weights on disk, and the dtype of the leaves read from them.
DTYPES: Mapping[np.dtype, np.dtype] = {
  np.dtype(np.float32): np.dtype(np.float32),
  np.dtype(jnp.bfloat16): np.dtype(jnp.bfloat16),
  np.dtype(np.float16): np.dtype(np.float32),
  np.dtype(np.float64): np.dtype(np.float32),
}
HEAD = "lm_head.weight"
# Rows of a stored head that are compared with the embedding at a time.
ROWS = 4096
METADATA = {"format": "pt"}  # older transformers refuse files without it
# vLLM shards models of these families by these rules; largest number of shards looked at.
SHARDS = 64
MULTIPLE = 8


class Published(NamedTuple):
  """One tensor to write: its name, shape and dtype, and how to make its values."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def open(folder: str | os.PathLike) -> tuple[ModelConfig, dict[str, lazy.Leaf]]:
  """Returns the config and the leaves of a Hugging Face folder; leaves are read when asked for.

  Leaves keep their dtype; float16 and float64 become float32, and so do those that a multiplier of
  the config is folded into, unless it is a power of two. A head that is stored although the config
  ties it is compared with the embedding: where they differ it is the head, as transformers has it.

  Raises:
    FileNotFoundError: config.json, the weights or a shard is missing.
    ValueError: an unknown architecture, a key our blocks cannot follow, a tensor that is missing,
      unknown, or of another shape or dtype.
  """
  plain = fields.load(folder, CONFIG)
  place = f"{os.fspath(folder)}: {CONFIG}"
  chosen = _family(plain, place)
  stored = safetensors.open_folder(folder)
  published = _renamed(chosen, stored, os.fspath(folder))
  stated = fields.Fields(plain, place, frozenset(published))
  cfg = _config(chosen, stated)
  if cfg.tied and HEAD in published and not _ties(chosen, published):
    cfg = cfg.replace(tied=False)
  return cfg, _leaves(chosen, cfg, published, chosen.scales(stated, cfg), os.fspath(folder))


def _ties(chosen: Family, published: Mapping[str, Any]) -> bool:
  """Whether a stored head holds the embedding's values; rows are compared a few at a time."""
  embed = next(name for name, (piece,) in chosen.outer.items() if piece.leaf.startswith("embed/"))
  pair = [published.get(name) for name in (embed, HEAD)]
  if pair[0] is None or tuple(pair[0].shape) != tuple(pair[1].shape) or len(pair[0].shape) != 2:
    return True  # told by name where leaves are made
  edges = [*range(0, pair[0].shape[0], ROWS), pair[0].shape[0]]
  return all(
    np.array_equal(*(tensor.read(rows=rows) for tensor in pair))
    for rows in itertools.pairwise(edges)
  )


def _family(plain: Mapping[str, Any], place: str) -> Family:
  name = plain.get("model_type")
  if name is None and {"d_model", "ssm_cfg"} <= set(plain):
    name = "state_spaces"
  if not isinstance(name, str) or name not in FAMILIES:
    known = ", ".join(each for each in FAMILIES if FAMILIES[each].describe)
    raise ValueError(f"{place}: model_type={folders.clip(name)} is not one of {known}")
  if plain.get("quantization_config") is not None:
    raise ValueError(f"{place}: quantization_config: quantized weights cannot be read")
  return FAMILIES[name]


def _config(chosen: Family, stated: fields.Fields) -> ModelConfig:
  """Returns the model of a config.json; what our blocks refuse is told with the file's name."""
  try:
    return chosen.read(stated)
  except ValueError as error:
    if str(error).startswith(stated.place):
      raise
    raise ValueError(f"{stated.place}: {error}") from error


def _renamed(chosen: Family, stored: Mapping[str, Any], place: str) -> dict[str, Any]:
  """Returns tensors under the names that the family's table has."""
  found = {}
  for name, tensor in stored.items():
    for theirs, ours in chosen.renamed:
      if name.startswith(theirs):
        name = ours + name.removeprefix(theirs)
    if name in found:
      raise ValueError(f"{place}: tensor {folders.clip(name)} is there under two names")
    found[name] = tensor
  return found


def _leaves(
  chosen: Family,
  cfg: ModelConfig,
  published: Mapping[str, Any],
  scales: table.Scales,
  place: str,
) -> dict[str, lazy.Leaf]:
  found = {}
  wanted = table.entries(chosen, cfg)
  for name, (ours, pieces) in wanted.items():
    sizes = table.sizes(cfg, ours)
    shape = layout.shape(pieces, sizes)
    if name not in published:
      raise ValueError(f"{place}: lacks the tensor {name!r} of shape {shape}")
    tensor = published[name]
    if tuple(tensor.shape) != shape:
      raise ValueError(
        f"{place}: tensor {name!r} has shape {tuple(tensor.shape)}, {CONFIG} says {shape}"
      )
    if tensor.dtype not in DTYPES:
      raise ValueError(f"{place}: tensor {name!r} has dtype {tensor.dtype}, weights have a float")
    for piece, rows in zip(pieces, layout.rows(pieces, sizes), strict=True):
      leaf = _leaf(piece, tensor, rows, sizes)
      found[ours + piece.leaf] = _scaled(leaf, scales.get(piece.leaf, 1.0))
  extra = sorted(name for name in published.keys() - wanted.keys() if not _known(chosen, cfg, name))
  if extra:
    raise ValueError(f"{place}: tensor {folders.clip(extra[0])} is none that {CONFIG} asks for")
  return {path: found[path] for path, _ in axes.leaves(config.leaf_names(cfg))}


def _known(chosen: Family, cfg: ModelConfig, name: str) -> bool:
  """Whether a tensor may be there without being read: a tied head, or no parameter at all."""
  return (cfg.tied and name == HEAD) or bool(re.fullmatch(chosen.ignored, name))


def _leaf(piece: Piece, tensor: Any, rows: tuple[int, int], sizes: layout.Sizes) -> lazy.Leaf:
  dtype = piece.dtype(DTYPES[tensor.dtype])

  def read() -> np.ndarray:
    return layout.to_leaf(piece, tensor.read(rows=rows), sizes).astype(dtype, copy=False)

  return lazy.Leaf(axes.shape(piece.name, sizes), dtype, read)


def _scaled(leaf: lazy.Leaf, factor: float) -> lazy.Leaf:
  """Returns a leaf times a number, in float32 where the product may need more digits."""
  if factor == 1:
    return leaf
  exact = abs(math.frexp(factor)[0]) == 0.5
  dtype = leaf.dtype if exact else np.dtype(np.float32)

  def read() -> np.ndarray:
    return (leaf.read().astype(np.float32) * np.float32(factor)).astype(dtype, copy=False)

  return lazy.Leaf(leaf.shape, dtype, read)


def describe(cfg: ModelConfig, family: str | None = None) -> tuple[str, dict[str, Any]]:
  """Returns `(family, config)`: a family that can express a model, and its config.json.

  Padded rows of the vocabulary are left out: the published model predicts the same tokens.

  Args:
    cfg: the model.
    family: a key of `families.FAMILIES`; None: the first that can express it.

  Raises:
    ValueError: that family, or every one, cannot express the model; says all reasons, or the
      first of each family.
  """
  cfg = _trimmed(cfg)
  if family is not None and family not in FAMILIES:
    raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
  names = [name for name, each in FAMILIES.items() if each.describe is not None]
  names = names if family is None else [family]
  found = {name: table.reasons(FAMILIES[name], cfg) for name in names}
  name = next((each for each in names if not found[each]), None)
  if name is None and family is not None:
    raise ValueError(f"family {family} cannot express this model: {_listed(found[names[0]])}")
  if name is None and len({tuple(each) for each in found.values()}) == 1:
    raise ValueError(f"no family can express this model: {_listed(found[names[0]])}")
  if name is None:
    firsts = "; ".join(f"{each}: {_listed(found[each][:2])}" for each in names)
    raise ValueError(f"no family can express this model: {firsts}")
  chosen = FAMILIES[name]
  common = {"architectures": [chosen.architecture], "model_type": name} | dict.fromkeys(beside.IDS)
  return name, common | chosen.describe(cfg)


def _listed(reasons: list[str]) -> str:
  return "; ".join(reasons[:12]) + (f"; and {len(reasons) - 12} more" if len(reasons) > 12 else "")


def _trimmed(cfg: ModelConfig) -> ModelConfig:
  return cfg.replace(V=cfg.real_vocabulary, vocabulary=None)


def tensors(
  cfg: ModelConfig,
  leaves: lazy.Leaves,
  family: str,
  *,
  dtype: str | None = None,
) -> Iterator[Published]:
  """Yields the published tensors of a model, each made when it is read.

  A tied model of a family that does not tie gets its head written out.

  Args:
    cfg: the model, which the family can express (`describe`).
    leaves: its canonical tree.
    family: a key of `families.FAMILIES`.
    dtype: "float32" or "bfloat16"; None keeps that of the leaves.

  Raises:
    ValueError: the leaves are not the config's canonical tree, or neither float32 nor bfloat16.
  """
  config.check(cfg, lazy.tree(leaves))
  for path, leaf in leaves.items():
    if leaf.dtype not in set(DTYPES.values()):
      raise ValueError(f"leaf {path!r} has dtype {leaf.dtype}, weights are float32 or bfloat16")
  chosen, small = FAMILIES[family], _trimmed(cfg)
  if small.V < cfg.V:
    leaves = {path: _without_padding(path, leaf, small.V) for path, leaf in leaves.items()}
  if small.tied and not chosen.ties:
    small = small.replace(tied=False)
    leaves = {**leaves, "head/w_head_DV": _transposed(leaves["embed/w_embed_VD"])}
  for name, (ours, pieces) in table.entries(chosen, small).items():
    parts = [leaves[ours + piece.leaf] for piece in pieces]
    changed = any(piece.change for piece in pieces)
    # What is published as another number, and so held in float32, lies there as the matrices do.
    kept = _matrices(leaves) if changed and dtype is None else dtype
    yield _published(name, pieces, parts, table.sizes(small, ours), kept)


def _matrices(leaves: lazy.Leaves) -> str:
  """Returns the widest dtype of the projections: what config.json states."""
  found = {leaf.dtype for path, leaf in leaves.items() if path.rpartition("/")[2].startswith("w_")}
  return "float32" if np.dtype(np.float32) in found else "bfloat16"


def _without_padding(path: str, leaf: lazy.Leaf, V: int) -> lazy.Leaf:
  name = path.rpartition("/")[2]
  if "V" not in axes.of(name):
    return leaf
  at = axes.dimension(name, "V")
  shape = (*leaf.shape[:at], V, *leaf.shape[at + 1 :])
  rows = (slice(None),) * at + (slice(V),)
  return lazy.Leaf(shape, leaf.dtype, lambda: leaf.read()[rows])


def _transposed(leaf: lazy.Leaf) -> lazy.Leaf:
  return lazy.Leaf(leaf.shape[::-1], leaf.dtype, lambda: leaf.read().T)


def _published(
  name: str,
  pieces: tuple[Piece, ...],
  leaves: list[lazy.Leaf],
  sizes: layout.Sizes,
  dtype: str | None,
) -> Published:
  kept = [piece.dtype(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)]
  stored = np.dtype(jnp.dtype(dtype) if dtype else jnp.result_type(*kept))

  def read() -> np.ndarray:
    parts = [
      layout.to_published(piece, leaf.read(), sizes).astype(stored, copy=False)
      for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  return Published(name, layout.shape(pieces, sizes), stored, read)


def write(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  leaves: lazy.Leaves,
  *,
  family: str | None = None,
  like: str | os.PathLike | None = None,
  dtype: str | None = None,
) -> str:
  """Writes a folder that transformers loads, whole or not at all; returns the family's name.

  Args:
    folder: where; must not be there, be empty, or have been written by us.
    cfg: the model.
    leaves: its canonical tree.
    family: as in `describe`; None: that of `like` where it can express the model.
    like: a model on disk whose token ids and tokenizer files are carried on.
    dtype: "float32" or "bfloat16"; None keeps the leaves' and states that of the projections.

  Raises:
    ValueError: no family, or not that one, can express the model; the tokenizer or a token id of
      `like` is outside the vocabulary; something else lies at `folder`.
  """
  found = beside.gather(like)
  beside.check(found, cfg.real_vocabulary)
  name, plain = describe(cfg, _same_family(cfg, found) if family is None else family)
  # Stated is what is stored: transformers casts to it.
  plain |= {**found.ids, "dtype": _matrices(leaves) if dtype is None else dtype}
  published = tensors(cfg, leaves, name, dtype=dtype)
  with folders.replacing(folder) as part:
    safetensors.write_folder(part, published, metadata=METADATA)
    (part / CONFIG).write_text(fields.dump(plain), encoding="utf-8")
    beside.write(part, found)
  return name


def _same_family(cfg: ModelConfig, found: beside.Beside) -> str | None:
  """Returns the family of another model if it can express this one."""
  chosen = FAMILIES.get(found.family)
  return None if chosen is None or table.reasons(chosen, _trimmed(cfg)) else chosen.name


def serving_notes(cfg: ModelConfig) -> list[str]:
  """Returns what a serving engine will ask of the model's shape, one line a note.

  Tensor parallelism of vLLM: the shards must divide the SSM groups unless there is one group,
  and the heads of every kind; key-value heads are copied where there are fewer than shards. CUDA
  kernels of Mamba-2 need convolution channels in multiples of 8.
  """
  counts = {tuple(_shard_counts(block)) for block in cfg.blocks}
  legal = sorted(set.intersection(*(set(each) for each in counts)))
  notes = [f"tensor parallel sizes this shape allows: {', '.join(map(str, legal))}"]
  for index, block in enumerate(cfg.blocks):
    ssm = config.ssm_of(block)
    if ssm is not None:
      states = ssm.N if isinstance(ssm, Mamba) else 0
      channels = ssm.G * (ssm.H * ssm.P + 2 * states)
      if channels % MULTIPLE:
        notes.append(
          f"block {index} has {channels} convolution channels, CUDA kernels of Mamba-2 need a "
          f"multiple of {MULTIPLE}"
        )
  return notes


def _shard_counts(block: config.Block) -> Iterator[int]:
  attention, ssm = config.attention_of(block), config.ssm_of(block)
  for count in range(1, SHARDS + 1):
    fits = block.F % count == 0 if isinstance(block, config.Mlp) else True
    if ssm is not None:
      fits = ssm.G * ssm.H % count == 0 and (ssm.G == 1 or ssm.G % count == 0)
    if attention is not None:
      shares = attention.K % count == 0 or count % attention.K == 0
      fits = fits and attention.K * attention.J % count == 0 and shares
    if fits:
      yield count
