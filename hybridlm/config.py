"""What a model is: a frozen list of typed blocks, and the names of the leaves each kind holds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from hybridlm import axes

ACTIVATIONS = ("relu2", "swiglu")
NORMS = ("rmsnorm", "layernorm1p")
REMATS = ("none", "block")
DTYPES = ("float32", "bfloat16")
# Implementations that `ops` knows by these names, and its scan's default chunk off a CPU.
SCANS = ("reference", "chunked")
ATTENTIONS = ("xla", "cudnn", "splash")
CHUNK = 128


def _positive(owner: str, **sizes: Any) -> None:
  for name, value in sizes.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{owner}: {name}={value!r} must be a whole number of at least 1")


def _one_of(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise ValueError(f"{owner}: {name}={value!r} is not one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions over the first `rotary` channels of a head (None: all of them)."""

  base: float = 10000.0
  rotary: int | None = None

  def __post_init__(self):
    if not self.base > 0:
      raise ValueError(f"Rope: base={self.base!r} must be positive")
    if self.rotary is not None and (self.rotary < 2 or self.rotary % 2):
      raise ValueError(f"Rope: rotary={self.rotary!r} must be an even number of at least 2")


@dataclasses.dataclass(frozen=True)
class Mamba:
  """A Mamba-2 mixer: G groups of H heads of P channels, state N, convolution of W taps.

  `dt_limits` clips the step size after softplus, the same in prefill and decode.
  """

  G: int
  H: int
  P: int
  N: int
  W: int = 4
  conv_bias: bool = True
  dt_limits: tuple[float, float] = (0.0, math.inf)
  symbol: ClassVar[str] = "M"
  axes: ClassVar[str] = "GHPNW"

  def __post_init__(self):
    _positive("Mamba", G=self.G, H=self.H, P=self.P, N=self.N, W=self.W)
    if not isinstance(self.dt_limits, tuple) or len(self.dt_limits) != 2:
      raise ValueError(f"Mamba: dt_limits={self.dt_limits!r} must be a pair, as a tuple")
    low, high = self.dt_limits
    if not 0 <= low < high:
      raise ValueError(f"Mamba: dt_limits={self.dt_limits!r} must satisfy 0 <= low < high")

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    names = (
      "w_z_DGHP w_x_DGHP w_b_DGN w_c_DGN w_dt_DGH conv_x_WGHP conv_b_WGN conv_c_WGN "
      "dt_bias_GH a_log_GH skip_GH gate_gain_GHP w_out_GHPD"
    ).split()
    bias = ["conv_bias_x_GHP", "conv_bias_b_GN", "conv_bias_c_GN"] if self.conv_bias else []
    return (*names, *bias)


@dataclasses.dataclass(frozen=True)
class Attention:
  """Causal grouped-query attention: K key-value heads, J queries for each, width E."""

  K: int
  J: int
  E: int
  window: int | None = None
  rope: Rope | None = None
  bias: bool = False
  symbol: ClassVar[str] = "*"
  axes: ClassVar[str] = "KJE"

  def __post_init__(self):
    _positive("Attention", K=self.K, J=self.J, E=self.E)
    if self.window is not None:
      _positive("Attention", window=self.window)
    rotary = self.rope.rotary or self.E if self.rope else 2
    if rotary > self.E or rotary % 2:
      raise ValueError(f"Attention: {rotary} rotary channels do not fit a head of width E={self.E}")

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    bias = ("b_q_KJE", "b_k_KE", "b_v_KE", "b_o_D") if self.bias else ()
    return ("w_q_DKJE", "w_k_DKE", "w_v_DKE", "w_o_KJED", *bias)


@dataclasses.dataclass(frozen=True)
class Mlp:
  """A feed-forward layer of width F: squared ReLU, or SwiGLU (a second, gating projection)."""

  F: int
  activation: str = "relu2"
  bias: bool = False
  symbol: ClassVar[str] = "-"
  axes: ClassVar[str] = "F"

  def __post_init__(self):
    _positive("Mlp", F=self.F)
    _one_of("Mlp", "activation", self.activation, ACTIVATIONS)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this layer, axes included."""
    gated = self.activation == "swiglu"
    gate = ("w_gate_DF",) if gated else ()
    bias = ("b_up_F", "b_down_D") + (("b_gate_F",) if gated else ()) if self.bias else ()
    return ("w_up_DF", "w_down_FD", *gate, *bias)


Block = Mamba | Attention | Mlp
KINDS: Mapping[str, type] = {kind.symbol: kind for kind in (Mamba, Attention, Mlp)}


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
    vocabulary: real tokens; rows from there to V are padding and never predicted. None: all V.
    dtype: compute dtype; parameters are float32, and so is what must be (norms, scans, losses).
    remat: "block" recomputes each block in the backward pass; "none" keeps its activations.
    init_std: standard deviation of the projections at initialisation.
    ssd: implementation of the scan by name; None lets `ops.ssd.api` choose.
    chunk: tokens a chunk of the scan; None lets `ops.ssd.api` choose.
    attention: implementation of attention by name; None lets `ops.attention` choose.
  """

  V: int
  D: int
  blocks: tuple[Block, ...]
  norm: str = "rmsnorm"
  eps: float = 1e-5
  tied: bool = False
  vocabulary: int | None = None
  dtype: str = "float32"
  remat: str = "none"
  init_std: float = 0.02
  ssd: str | None = None
  chunk: int | None = None
  attention: str | None = None

  def __post_init__(self):
    _positive("ModelConfig", V=self.V, D=self.D)
    if not self.blocks or not isinstance(self.blocks, tuple):
      raise ValueError(f"ModelConfig: blocks={self.blocks!r} must be a tuple of at least one block")
    if self.chunk is not None:
      _positive("ModelConfig", chunk=self.chunk)
    for name, allowed in (("ssd", SCANS), ("attention", ATTENTIONS)):
      if getattr(self, name) is not None:
        _one_of("ModelConfig", name, getattr(self, name), allowed)
    _one_of("ModelConfig", "norm", self.norm, NORMS)
    _one_of("ModelConfig", "dtype", self.dtype, DTYPES)
    _one_of("ModelConfig", "remat", self.remat, REMATS)
    if not self.eps > 0 or not self.init_std > 0:
      raise ValueError(f"ModelConfig: eps={self.eps} and init_std={self.init_std} must be positive")
    if self.vocabulary is not None and not 1 <= self.vocabulary <= self.V:
      raise ValueError(f"ModelConfig: vocabulary={self.vocabulary} must lie in 1..V={self.V}")

  @classmethod
  def from_pattern(cls, pattern: str, *, V: int, D: int, **sizes: Any) -> "ModelConfig":
    """Returns the config a pattern string and one size a letter describe.

    Args:
      pattern: one character a block: `M` Mamba-2, `*` attention, `-` MLP.
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
    """One character a block: `M` Mamba-2, `*` attention, `-` MLP."""
    return "".join(block.symbol for block in self.blocks)

  @property
  def real_vocabulary(self) -> int:
    """Tokens that can be predicted: rows of the embedding that are not padding."""
    return self.V if self.vocabulary is None else self.vocabulary

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
    fields["rope"] = Rope(**fields["rope"])
  return KINDS[symbol](**fields)


def block_name(index: int) -> str:
  """Returns the folder of a block in the canonical tree: 7 -> `07`."""
  return f"{index:02d}"


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
    block_name(index): {name: name for name in (*norm, *block.leaves)}
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


def _nemotron(pattern: str, *, D: int, F: int, J: int, H: int, P: int = 64, N: int = 128):
  """Nemotron-H and its successors: 8 SSM groups, 8 key-value heads of width 128, no RoPE."""
  return ModelConfig.from_pattern(
    pattern,
    V=131072,
    D=D,
    F=F,
    K=8,
    J=J,
    E=128,
    G=8,
    H=H,
    P=P,
    N=N,
    dtype="bfloat16",
    dt_limits=(0.001, math.inf),
    remat="block",
  )


_LAYERS_52 = "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-"
_LAYERS_118 = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
_LAYERS_98 = (
  "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-"
  "M-M-M-M-M-"
)
_LAYERS_62 = "M-M-M-M*-" * 6 + "M-M-M-M-"
_LAYERS_56 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_LAYERS_42 = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"

# Patterns and sizes: arXiv 2504.03624, 2504.11409, 2508.14444 and the published configurations.
PRESETS: Mapping[str, ModelConfig] = {
  "nemotron_h_8b": _nemotron(_LAYERS_52, D=4096, F=21504, J=4, H=16),
  "nemotron_h_4b": _nemotron(_LAYERS_52, D=3072, F=12288, J=4, H=14),
  "nemotron_h_47b": _nemotron(_LAYERS_98, D=8192, F=30720, J=8, H=32, N=256),
  "nemotron_h_56b": _nemotron(_LAYERS_118, D=8192, F=32768, J=8, H=32, N=256),
  "nemotron_nano_2_12b": _nemotron(_LAYERS_62, D=5120, F=20480, J=5, H=16, P=80),
  "nemotron_nano_2_9b": _nemotron(_LAYERS_56, D=4480, F=15680, J=5, H=16, P=80),
  "nemotron_3_nano_4b": _nemotron(_LAYERS_42, D=3136, F=12544, J=5, H=12, P=80),
}
