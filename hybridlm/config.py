"""What a model is: a frozen list of typed blocks, and the names of the leaves each kind holds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hybridlm import axes, layout, presets
from hybridlm.blocks import (
  KINDS,
  Attention,
  Block,
  GatedConv,
  Llama3Scaling,
  Mamba,
  Mlp,
  Rope,
  one_of,
  positive,
)

__all__ = [
  "KINDS", "PRESETS", "Attention", "Block", "GatedConv", "Llama3Scaling", "Mamba", "Mlp",
  "ModelConfig", "Rope", "block_name", "check", "leaf_names", "parameters", "scale_name",
  "shapes",
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
        state.
      V: vocabulary rows.
      D: residual width.
      **sizes: any field of the block kinds in the pattern or of `ModelConfig`, by name. `bias`
        holds for attention and MLP alike.

    Raises:
      ValueError: an unknown block letter, a size nobody uses, a size that a block misses.
    """
    unknown = sorted(set(pattern) - set(KINDS))
    if unknown:
      raise ValueError(f"pattern {pattern!r}: {unknown[0]!r} is not one of {' '.join(KINDS)}")
    own = {field.name for field in dataclasses.fields(cls)} - {"V", "D", "blocks"}
    used = set(sizes) & own
    made = {}
    for symbol in sorted(set(pattern)):
      fields = dataclasses.fields(KINDS[symbol])
      chosen = {field.name: sizes[field.name] for field in fields if field.name in sizes}
      missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in sizes]
      if missing:
        raise ValueError(f"pattern {pattern!r}: block {symbol!r} needs the size {missing[0]}")
      used |= set(chosen)
      made[symbol] = KINDS[symbol](**chosen)
    if set(sizes) - used:
      raise ValueError(f"pattern {pattern!r}: nothing in it uses {min(set(sizes) - used)!r}")
    rest = {name: sizes[name] for name in set(sizes) & own}
    return cls(V=V, D=D, blocks=tuple(made[symbol] for symbol in pattern), **rest)

  @property
  def pattern(self) -> str:
    """One character a block: `M` Mamba-2, `*` attention, `-` MLP, `C` Mamba-2 without a state."""
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
    plain["blocks"] = [{"kind": block.symbol, **dataclasses.asdict(block)} for block in self.blocks]
    for block in plain["blocks"]:
      if "dt_limits" in block:
        block["dt_limits"] = [x if math.isfinite(x) else str(x) for x in block["dt_limits"]]
    return plain

  @classmethod
  def from_dict(cls, plain: Mapping[str, Any]) -> "ModelConfig":
    """Returns the config that `to_dict` wrote.

    Raises:
      ValueError: a field or a block kind that no config has, or a field that is missing.
    """
    try:
      blocks = tuple(_block_from_dict(index, block) for index, block in enumerate(plain["blocks"]))
      return cls(**(dict(plain) | {"blocks": blocks}))
    except (KeyError, TypeError) as error:
      raise ValueError(f"model config: {error}") from error


def _block_from_dict(index: int, plain: Mapping[str, Any]) -> Block:
  fields = dict(plain)
  symbol = fields.pop("kind", None)
  if symbol not in KINDS:
    raise ValueError(f"model config: block {index} has kind {symbol!r}, known: {' '.join(KINDS)}")
  if "dt_limits" in fields:
    fields["dt_limits"] = tuple(float(limit) for limit in fields["dt_limits"])
  if fields.get("rope") is not None:
    rope = dict(fields["rope"])
    if rope.get("scaling") is not None:
      rope["scaling"] = Llama3Scaling(**rope["scaling"])
    if rope.get("frequency") is not None:
      rope["frequency"] = tuple(rope["frequency"])
    fields["rope"] = Rope(**rope)
  return KINDS[symbol](**fields)


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
    "embed": ("w_embed_VD",),
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
  outer = {"V": cfg.V, "D": cfg.D}
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
