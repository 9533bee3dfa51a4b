"""What a model is: a frozen list of typed blocks, and the names of the leaves each kind holds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hybridlm import axes, layout, patterns, presets
from hybridlm.blocks import (
  KINDS,
  Attention,
  Block,
  Fusion,
  GatedConv,
  Mamba,
  Mamba1,
  Mlp,
  Parallel,
  attention_of,
  ssm_of,
)
from hybridlm.fields import one_of, positive
from hybridlm.rotary import Llama3Scaling, Rope

__all__ = [
  "KINDS", "PRESETS", "Attention", "Block", "Fusion", "GatedConv", "Llama3Scaling", "Mamba",
  "Mamba1", "Mlp", "ModelConfig", "Parallel", "Rope", "attention_of", "block_name", "check",
  "leaf_names", "parameters", "scale_name", "shapes", "ssm_of",
]  # the block kinds are part of the config: import them from here

NORMS = ("rmsnorm", "layernorm1p")
REMATS = ("none", "block", "unit", "dots", "offload")
STACKS = ("none", "units")
DTYPES = ("float32", "bfloat16", "float64")
# How projections of blocks are multiplied, and what their weights are held in.
QUANTIZED = ("none", "fp8")
HELD = ("float32", "bfloat16", "int8", "fp8")
SCALED = ("int8", "fp8")
# Implementations that `ops` knows by these names, and its scan's default chunk off a CPU.
SCANS = ("reference", "chunked", "pallas_tpu", "pallas_gpu")
ATTENTIONS = ("xla", "cudnn", "splash")
CHUNK = 128


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A hybrid language model: vocabulary V, residual width D and a typed list of blocks.

  Attributes:
    V: rows of the embedding.
    D: residual width.
    blocks: the blocks in order; sizes may differ from block to block.
    meta: M learnable vectors before every document, which all its tokens see (arXiv 2411.13676);
      positions, losses and logits are counted without them.
    norm: "rmsnorm" or "layernorm1p" (gains are stored as the factor applied, 1 + w).
    eps: added to the mean square inside every norm.
    tied: whether the head is the transposed embedding.
    context: positions the model was made for; None: any number.
    vocabulary: real tokens; rows from there to V are padding and never predicted. None: all V.
    dtype: compute dtype; parameters are float32, and so is what must be (norms, scans, losses).
    remat: what the backward pass computes again: "none"; each "block" from its input; each repeated
      "unit" of blocks from its input, then each block; all of a block but products of activations
      and weights ("dots"); as "block", with the inputs in the host's memory meanwhile ("offload").
    stack: "units" runs equal blocks by a scan over one stack of leaves (`nn.stack.stacked`) where
      models are trained; "none" compiles every block by itself.
    init_std: standard deviation of the projections at initialisation.
    ssd: implementation of the scan by name; None lets `ops.ssd.api` choose.
    chunk: tokens a chunk of the scan; None lets `ops.ssd.api` choose.
    attention: implementation of attention by name; None lets `ops.attention` choose.
    layout: where parameters and activations lie on a mesh, a name of `layout.LAYOUTS`.
    quantize: "fp8" multiplies the blocks' projections in FP8, forward and backward (see
      `ops.quantize`); "none" in the compute dtype.
    wide_ends: blocks at either end that "fp8" leaves in the compute dtype.
    held: what weights are held in, as `nn.held.hold` makes them: "int8" and "fp8" have a scale for
      every output channel, in a leaf of its own (`scale_name`).
  """

  V: int
  D: int
  blocks: tuple[Block, ...]
  meta: int = 0
  norm: str = "rmsnorm"
  eps: float = 1e-5
  tied: bool = False
  context: int | None = None
  vocabulary: int | None = None
  dtype: str = "float32"
  remat: str = "none"
  stack: str = "none"
  init_std: float = 0.02
  ssd: str | None = None
  chunk: int | None = None
  attention: str | None = None
  layout: str = layout.DEFAULT
  quantize: str = "none"
  wide_ends: int = 4
  held: str = "float32"

  def __post_init__(self):
    positive("ModelConfig", V=self.V, D=self.D)
    if not self.blocks or not isinstance(self.blocks, tuple):
      raise ValueError(f"ModelConfig: blocks={self.blocks!r} must be a tuple of at least one block")
    for name in ("chunk", "context"):
      if getattr(self, name) is not None:
        positive("ModelConfig", **{name: getattr(self, name)})
    for name, allowed in (("ssd", SCANS), ("attention", ATTENTIONS)):
      if getattr(self, name) is not None:
        one_of("ModelConfig", name, getattr(self, name), allowed)
    one_of("ModelConfig", "norm", self.norm, NORMS)
    one_of("ModelConfig", "dtype", self.dtype, DTYPES)
    one_of("ModelConfig", "remat", self.remat, REMATS)
    one_of("ModelConfig", "stack", self.stack, STACKS)
    one_of("ModelConfig", "layout", self.layout, tuple(layout.LAYOUTS))
    if not self.eps > 0 or not self.init_std > 0:
      raise ValueError(f"ModelConfig: eps={self.eps} and init_std={self.init_std} must be positive")
    if self.vocabulary is not None and not 1 <= self.vocabulary <= self.V:
      raise ValueError(f"ModelConfig: vocabulary={self.vocabulary} must lie in 1..V={self.V}")
    self._check_precision()
    self._check_meta()
    self._check_kernel()
    self._check_shared()

  def _check_meta(self) -> None:
    if type(self.meta) is not int or self.meta < 0:
      raise ValueError(f"ModelConfig: meta={self.meta!r} must be a number of meta tokens")
    if self.context is not None and self.meta >= self.context:
      raise ValueError(f"ModelConfig: meta={self.meta} tokens leave no place for text in a context "
                       f"of {self.context}")

  def _check_kernel(self) -> None:
    if self.attention in (None, "xla"):
      return
    found = [each for each in map(attention_of, self.blocks) if each is not None]
    wide = any(each.U not in (None, each.E) for each in found)
    if found and (self.meta or wide):
      what = f"meta={self.meta} tokens" if self.meta else "values wider or narrower (U) than keys"
      raise ValueError(
        f"ModelConfig: attention={self.attention!r} cannot express {what}: use 'xla'")

  def _check_shared(self) -> None:
    for index, owner in enumerate(self.owners):
      mine = attention_of(self.blocks[index])
      if mine is None or not mine.shared:
        continue
      if owner is None:
        raise ValueError(f"ModelConfig: block {index} shares keys and values, but no attention "
                         "stands before it")
      theirs = attention_of(self.blocks[owner])
      if mine.keys != theirs.keys:
        names = ("K", "E", "U", "window", "rope")
        name, own, other = next(
          each for each in zip(names, mine.keys, theirs.keys, strict=True) if each[1] != each[2])
        raise ValueError(
          f"ModelConfig: block {index} shares keys and values with block {owner}, but has "
          f"{name}={own} where that has {name}={other}; the blocks of a group agree on "
          f"{', '.join(names)}, and lie between global ones"
        )

  @property
  def owners(self) -> tuple[int | None, ...]:
    """For each block, the one whose keys and values its attention reads: itself, or another."""
    found, latest = [], None
    for index, block in enumerate(self.blocks):
      attention = attention_of(block)
      latest = index if attention is not None and not attention.shared else latest
      found.append(latest if attention is not None else None)
    return tuple(found)

  @property
  def kv_groups(self) -> tuple[tuple[int, ...], ...]:
    """Blocks that read the same keys and values, first the one that has them; of two or more."""
    groups: dict[int, list[int]] = {}
    for index, owner in enumerate(self.owners):
      if owner is not None:
        groups.setdefault(owner, []).append(index)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)

  def _check_precision(self) -> None:
    one_of("ModelConfig", "quantize", self.quantize, QUANTIZED)
    one_of("ModelConfig", "held", self.held, HELD)
    if type(self.wide_ends) is not int or self.wide_ends < 0:
      raise ValueError(f"ModelConfig: wide_ends={self.wide_ends!r} must be a number of blocks")
    if self.quantize != "none" and 2 * self.wide_ends >= len(self.blocks):
      raise ValueError(
        f"ModelConfig: quantize={self.quantize!r} with wide_ends={self.wide_ends} leaves none of "
        f"the {len(self.blocks)} blocks to quantize; lower wide_ends"
      )

  @classmethod
  def from_pattern(cls, pattern: str, *, V: int, D: int, **sizes: Any) -> "ModelConfig":
    """Returns the config a pattern string and one size a letter describe.

    Args:
      pattern: one character a block: `M` Mamba-2, `*` attention, `-` MLP, `C` Mamba-2 without its
        state, `S` Mamba-1, `=` attention and an SSM side by side.
      V: vocabulary rows.
      D: residual width.
      **sizes: any field of the block kinds in the pattern or of `ModelConfig`, by name. `bias`
        holds for attention and MLP alike. For `=` also `ssm` ("mamba2" or "mamba1") and `fusion`
        ("mean" or "sum"). Where there is attention, `global_layers` (those without the window) and
        `kv_groups` (tuples of layers that share keys and values), counted over layers with
        attention.

    Raises:
      ValueError: an unknown block letter, a size nobody uses, a size that a block misses, branches
        of other widths than the fusion's, groups that cross a global layer.
    """
    own = {field.name for field in dataclasses.fields(cls)} - {"V", "D", "blocks"}
    blocks, used = patterns.blocks(pattern, sizes)
    if set(sizes) - used - own:
      raise ValueError(f"pattern {pattern!r}: nothing in it uses {min(set(sizes) - used - own)!r}")
    rest = {name: sizes[name] for name in set(sizes) & own}
    return cls(V=V, D=D, blocks=blocks, **rest)

  @property
  def pattern(self) -> str:
    """One character a block, as `from_pattern` takes them."""
    return "".join(block.symbol for block in self.blocks)

  @property
  def real_vocabulary(self) -> int:
    """Tokens that can be predicted: rows of the embedding that are not padding."""
    return self.V if self.vocabulary is None else self.vocabulary

  def at(self, index: int) -> "ModelConfig":
    """Returns the config that block `index` computes by: wide ends are not quantized."""
    inside = self.wide_ends <= index < len(self.blocks) - self.wide_ends
    return self if inside or self.quantize == "none" else self.replace(quantize="none")

  def sizes(self, index: int) -> dict[str, int]:
    """Returns letter -> size for block `index`, D and V included."""
    block = self.blocks[index]
    return {"V": self.V, "D": self.D} | {letter: getattr(block, letter) for letter in block.axes}

  def size(self, letter: str) -> int:
    """Returns the size all blocks that have an axis agree on.

    Raises:
      ValueError: no block has the axis, or blocks differ.
    """
    if letter in ("V", "D"):
      return getattr(self, letter)
    if letter == "M" and self.meta:
      return self.meta
    found = {getattr(block, letter) for block in self.blocks if letter in block.axes}
    if len(found) != 1:
      what = f"blocks disagree: {sorted(found)}" if found else "no block has this axis"
      raise ValueError(f"size of axis {letter!r} in {self.pattern!r}: {what}")
    return found.pop()

  def __getattr__(self, name: str) -> int:
    """`cfg.F` and its like: the size all blocks agree on; raises where they do not."""
    if name in axes.ALPHABET:
      try:
        return self.size(name)
      except ValueError as error:
        raise AttributeError(str(error)) from error
    raise AttributeError(f"ModelConfig has no field {name!r}")

  def replace(self, **changes: Any) -> "ModelConfig":
    """Returns a copy with some fields changed."""
    return dataclasses.replace(self, **changes)

  def to_dict(self) -> dict[str, Any]:
    """Returns the config as plain values that JSON can hold (infinity as a string)."""
    plain = dataclasses.asdict(self)
    return plain | {"blocks": [patterns.to_plain(block) for block in self.blocks]}

  @classmethod
  def from_dict(cls, plain: Mapping[str, Any]) -> "ModelConfig":
    """Returns the config that `to_dict` wrote.

    Raises:
      ValueError: a field or a block kind that no config has, or a field that is missing.
    """
    try:
      blocks = tuple(
        patterns.from_plain(f"block {index}", block) for index, block in enumerate(plain["blocks"]))
      return cls(**(dict(plain) | {"blocks": blocks}))
    except (KeyError, TypeError) as error:
      raise ValueError(f"model config: {error}") from error


def block_name(index: int) -> str:
  """Returns the folder of a block in the canonical tree: 7 -> `07`."""
  return f"{index:02d}"


def scale_name(name: str) -> str:
  """Returns the leaf with the scales of a held weight's outputs: `w_x_DGHP` -> `scale_x_GHP`.

  A projection reads the residual stream, D on the left, or writes to it, D on the right.

  Raises:
    ValueError: the leaf is no projection.
  """
  letters = axes.of(name)
  if not name.startswith("w_") or "D" not in (letters[0], letters[-1]):
    raise ValueError(f"leaf {name!r} is not a projection from or to D")
  outputs = letters[1:] if letters[0] == "D" else letters[-1]
  return f"scale_{axes.stem(name).removeprefix('w_')}_{outputs}"


def _scale_names(cfg: ModelConfig, block: Block) -> tuple[str, ...]:
  names = [name for name in block.leaves if name.startswith("w_")]
  return tuple(map(scale_name, names)) if cfg.held in SCALED else ()


def leaf_names(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the canonical tree of a model with each leaf its own name, axes included."""
  norm = ("norm_gain_D",) if cfg.norm == "rmsnorm" else ("norm_gain_D", "norm_bias_D")
  folders = {
    "embed": ("w_embed_VD", *(("meta_MD",) if cfg.meta else ())),
    "final": norm,
    **({} if cfg.tied else {"head": ("w_head_DV",)}),
  }
  tree: dict[str, Any] = {key: {name: name for name in names} for key, names in folders.items()}
  tree["blocks"] = {
    block_name(index): {
      name: name for name in (*norm, *block.leaves, *_scale_names(cfg, block))
    }
    for index, block in enumerate(cfg.blocks)
  }
  return tree


def shapes(cfg: ModelConfig) -> dict[str, Any]:
  """Returns the canonical tree of a model with each leaf its shape, from names and sizes alone."""
  names = leaf_names(cfg)
  outer = {"V": cfg.V, "D": cfg.D, "M": cfg.meta}
  tree = {
    key: {name: axes.shape(name, outer) for name in folder}
    for key, folder in names.items()
    if key != "blocks"
  }
  tree["blocks"] = {
    block_name(index): {
      name: axes.shape(name, cfg.sizes(index)) for name in names["blocks"][block_name(index)]
    }
    for index in range(len(cfg.blocks))
  }
  return tree


def parameters(cfg: ModelConfig) -> int:
  """Returns the number of parameters, from names and sizes alone (a tied head counts once)."""
  return sum(math.prod(shape) for _, shape in axes.leaves(shapes(cfg)))


def check(cfg: ModelConfig, params: Mapping[str, Any]) -> None:
  """Raises unless `params` is exactly this config's canonical tree.

  Raises:
    ValueError: names the first leaf that is missing, unknown, or of another shape.
  """
  expected = dict(axes.leaves(shapes(cfg)))
  found = dict(axes.leaves(params))
  for path in sorted(expected.keys() | found.keys()):
    if path not in found:
      raise ValueError(f"parameters lack the leaf {path!r} of shape {expected[path]}")
    if path not in expected:
      raise ValueError(f"parameters hold {path!r}, which pattern {cfg.pattern!r} has not")
    if tuple(found[path].shape) != expected[path]:
      raise ValueError(
        f"leaf {path!r} has shape {tuple(found[path].shape)}, its letters say {expected[path]}"
      )


PRESETS: Mapping[str, ModelConfig] = {
  name: ModelConfig.from_pattern(**sizes) for name, sizes in presets.SIZES.items()
}
