"""The kinds of blocks a model is made of: frozen sizes, and the names of the leaves each holds."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from hybridlm.fields import one_of, positive
from hybridlm.rotary import Rope

ACTIVATIONS = ("relu2", "swiglu")
# What a Mamba-2 mixer norms: y silu(z), y alone before it is gated, or nothing.
GATES = ("gated", "before", "none")
# How the branches of a parallel block meet: the mean of the normed channels of both through one
# projection (Hymba), or the sum of what each projects by itself (Falcon-H1).
FUSIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Mamba:
  """A Mamba-2 mixer: G groups of H heads of P channels, state N, convolution of W taps.

  `dt_limits` clips the step size after softplus, the same in prefill and decode. `gate` is what
  the norm inside reads: "gated", y silu(z), each group by itself; "before", y, which is gated
  afterwards; "none": there is no norm, and no gain.
  """

  G: int
  H: int
  P: int
  N: int
  W: int = 4
  conv_bias: bool = True
  dt_limits: tuple[float, float] = (0.0, math.inf)
  gate: str = "gated"
  symbol: ClassVar[str] = "M"
  axes: ClassVar[str] = "GHPNW"

  def __post_init__(self):
    positive("Mamba", G=self.G, H=self.H, P=self.P, N=self.N, W=self.W)
    if not isinstance(self.dt_limits, tuple) or len(self.dt_limits) != 2:
      raise ValueError(f"Mamba: dt_limits={self.dt_limits!r} must be a pair, as a tuple")
    low, high = self.dt_limits
    if not 0 <= low < high:
      raise ValueError(f"Mamba: dt_limits={self.dt_limits!r} must satisfy 0 <= low < high")
    one_of("Mamba", "gate", self.gate, GATES)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    names = (
      "w_z_DGHP w_x_DGHP w_b_DGN w_c_DGN w_dt_DGH conv_x_WGHP conv_b_WGN conv_c_WGN "
      "dt_bias_GH a_log_GH skip_GH"
    ).split()
    bias = ["conv_bias_x_GHP", "conv_bias_b_GN", "conv_bias_c_GN"] if self.conv_bias else []
    return (*names, *_gain(self.gate), "w_out_GHPD", *bias)


def _gain(gate: str) -> tuple[str, ...]:
  """Returns the gain of the norm inside a mixer, if there is one."""
  return () if gate == "none" else ("gate_gain_GHP",)


@dataclasses.dataclass(frozen=True)
class Mamba1:
  """A Mamba-1 mixer: H channels, each with a state of N and a step size of its own, dt rank R.

  One group and heads of one channel: letters mean what they mean of `Mamba`. B, C and the step
  size are read from the convolved channels, dt through R numbers. `norms`: RMSNorms on those R
  numbers, on B and on C (arXiv 2403.19887, and Hymba).
  """

  H: int
  N: int
  R: int
  W: int = 4
  conv_bias: bool = True
  norms: bool = True
  G: ClassVar[int] = 1
  P: ClassVar[int] = 1
  symbol: ClassVar[str] = "S"
  axes: ClassVar[str] = "GHPNRW"

  def __post_init__(self):
    positive("Mamba1", H=self.H, N=self.N, R=self.R, W=self.W)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    names = (
      "w_z_DGHP w_x_DGHP conv_x_WGHP in_rank_GHPR in_b_GHPN in_c_GHPN in_dt_RGH dt_bias_GH "
      "a_log_GHN skip_GH w_out_GHPD"
    ).split()
    bias = ("conv_bias_x_GHP",) if self.conv_bias else ()
    norms = ("rank_gain_R", "b_gain_GN", "c_gain_GN") if self.norms else ()
    return (*names, *bias, *norms)


@dataclasses.dataclass(frozen=True)
class GatedConv:
  """A Mamba-2 mixer without its state: skip times the convolved input, gated, normed, projected.

  What is left of a Mamba block whose B, C and dt are taken away: G groups of H heads of P
  channels, a convolution of W taps. `gate` as of `Mamba`.
  """

  G: int
  H: int
  P: int
  W: int = 4
  conv_bias: bool = True
  gate: str = "gated"
  symbol: ClassVar[str] = "C"
  axes: ClassVar[str] = "GHPW"

  def __post_init__(self):
    positive("GatedConv", G=self.G, H=self.H, P=self.P, W=self.W)
    one_of("GatedConv", "gate", self.gate, GATES)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    bias = ("conv_bias_x_GHP",) if self.conv_bias else ()
    names = ("w_z_DGHP", "w_x_DGHP", "conv_x_WGHP", "skip_GH", *_gain(self.gate), "w_out_GHPD")
    return (*names, *bias)


@dataclasses.dataclass(frozen=True)
class Attention:
  """Causal grouped-query attention: K key-value heads, J queries for each, width E.

  Values have the width U where it is given, as Hymba's, else E too. A block that is `shared` has no
  keys and values of its own: it reads those of the nearest attention before it.
  """

  K: int
  J: int
  E: int
  window: int | None = None
  rope: Rope | None = None
  bias: bool = False
  U: int | None = None
  shared: bool = False
  symbol: ClassVar[str] = "*"

  def __post_init__(self):
    positive("Attention", K=self.K, J=self.J, E=self.E)
    for name in ("window", "U"):
      if getattr(self, name) is not None:
        positive("Attention", **{name: getattr(self, name)})
    rotary = self.rope.rotary or self.E if self.rope else 0
    if rotary > self.E or rotary % 2:
      raise ValueError(f"Attention: {rotary} rotary channels do not fit a head of width E={self.E}")

  @property
  def axes(self) -> str:
    """Letters of the axes that this block has sizes for."""
    return "KJE" if self.U is None else "KJEU"

  @property
  def value(self) -> str:
    """The letter of the width of values and of what heads give: U where it is given, else E."""
    return "E" if self.U is None else "U"

  @property
  def keys(self) -> tuple[Any, ...]:
    """What blocks must agree on to share keys and values."""
    return (self.K, self.E, self.U, self.window, self.rope)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    own, wide = not self.shared, self.value
    keys = ("w_k_DKE", f"w_v_DK{wide}") if own else ()
    bias = ("b_q_KJE", *(("b_k_KE", f"b_v_K{wide}") if own else ()), "b_o_D") if self.bias else ()
    return ("w_q_DKJE", *keys, f"w_o_KJ{wide}D", *bias)


@dataclasses.dataclass(frozen=True)
class Mlp:
  """A feed-forward layer of width F: squared ReLU, or SwiGLU (a second, gating projection)."""

  F: int
  activation: str = "relu2"
  bias: bool = False
  symbol: ClassVar[str] = "-"
  axes: ClassVar[str] = "F"

  def __post_init__(self):
    positive("Mlp", F=self.F)
    one_of("Mlp", "activation", self.activation, ACTIVATIONS)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this layer, axes included."""
    gated = self.activation == "swiglu"
    gate = ("w_gate_DF",) if gated else ()
    bias = ("b_up_F", "b_down_D") + (("b_gate_F",) if gated else ()) if self.bias else ()
    return ("w_up_DF", "w_down_FD", *gate, *bias)


Runs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Fusion:
  """How the outputs of the branches of a parallel block become one.

  "mean": each branch's channels are normed by an RMSNorm with a gain of its own, and the mean of
  both (a branch that is off counts as zeros) goes through one projection `w_out_YD`.
  "sum": each branch has its own output projection, and their outputs are added.

  Attributes:
    kind: "mean" or "sum".
    Y: channels that meet in a mean; None for a sum.
    attention: where the channels of attention stand among those Y, as runs `(first, stop)`, in
      order; None: all of them. Branches cut apart keep different ones.
    ssm: the same of the SSM branch.
  """

  kind: str = "mean"
  Y: int | None = None
  attention: Runs | None = None
  ssm: Runs | None = None

  def __post_init__(self):
    one_of("Fusion", "kind", self.kind, FUSIONS)
    if self.kind == "sum":
      if (self.Y, self.attention, self.ssm) != (None, None, None):
        raise ValueError("Fusion: a sum has no channels in common, so neither Y nor runs")
      return
    positive("Fusion", Y=self.Y)
    for name in ("attention", "ssm"):
      runs = getattr(self, name)
      if runs is not None:
        _check_runs(name, runs, self.Y)

  def places(self, branch: str) -> tuple[int, ...]:
    """Returns which of the Y channels a branch ("attention" or "ssm") writes, in its own order."""
    runs = getattr(self, branch)
    runs = ((0, self.Y),) if runs is None else runs
    return tuple(itertools.chain.from_iterable(itertools.starmap(range, runs)))


def _check_runs(name: str, runs: Any, size: int) -> None:
  pairs = isinstance(runs, tuple) and all(isinstance(run, tuple) and len(run) == 2 for run in runs)
  flat = list(itertools.chain.from_iterable(runs)) if pairs else []
  whole = all(type(edge) is int for edge in flat)
  if not whole or flat != sorted(set(flat)) or not flat or flat[0] < 0 or flat[-1] > size:
    raise ValueError(
      f"Fusion: {name}={runs!r} must be ascending runs (first, stop) apart within 0..Y={size}"
    )


Ssm = Mamba | Mamba1 | GatedConv


@dataclasses.dataclass(frozen=True)
class Parallel:
  """Attention and SSM heads side by side, reading the same normed input (arXiv 2411.13676).

  Either branch may be off (None), not both. Letters of both branches are this block's own.
  """

  attention: Attention | None
  ssm: Ssm | None
  fusion: Fusion
  symbol: ClassVar[str] = "="

  def __post_init__(self):
    kinds = (("attention", Attention), ("ssm", (Mamba, Mamba1, GatedConv)), ("fusion", Fusion))
    for name, kind in kinds:
      value = getattr(self, name)
      if not isinstance(value, kind) and (value is not None or name == "fusion"):
        raise ValueError(f"Parallel: {name}={value!r} is no such part of a block")
    if self.attention is None and self.ssm is None:
      raise ValueError("Parallel: both branches are off; at least one must stay")
    if self.fusion.kind == "mean":
      self._check_width()

  def _check_width(self) -> None:
    widths = {
      "attention": ("K·J·U" if self.attention and self.attention.U else "K·J·E", self.width),
      "ssm": ("G·H·P", self.inner),
    }
    for branch, (said, width) in widths.items():
      meets = len(self.fusion.places(branch))
      if getattr(self, branch) is not None and width != meets:
        raise ValueError(
          f"Parallel: {branch} has {said}={width} channels, its part of the fusion's "
          f"Y={self.fusion.Y} is {meets}"
        )

  @property
  def width(self) -> int:
    """Channels of all attention heads together; 0: the branch is off."""
    return 0 if self.attention is None else (
      self.attention.K * self.attention.J * (self.attention.U or self.attention.E))

  @property
  def inner(self) -> int:
    """Channels of all SSM heads together; 0: the branch is off."""
    return 0 if self.ssm is None else self.ssm.G * self.ssm.H * self.ssm.P

  @property
  def axes(self) -> str:
    """Letters of the axes that this block has sizes for."""
    parts = [part.axes for part in (self.attention, self.ssm) if part is not None]
    return "".join(parts) + ("Y" if self.fusion.kind == "mean" else "")

  def __getattr__(self, name: str) -> int:
    """The size of a letter, of whichever branch has it."""
    if len(name) == 1:  # copies ask for other names before there are branches to look into
      parts = {letter: part for part in (self.attention, self.ssm) if part for letter in part.axes}
      if name in parts:
        return getattr(parts[name], name)
      if name == "Y" and self.fusion.kind == "mean":
        return self.fusion.Y
    raise AttributeError(f"Parallel has no {name!r}")

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this block, axes included."""
    names = [name for part in (self.attention, self.ssm) if part for name in part.leaves]
    if self.fusion.kind == "sum":
      return tuple(names)
    own = [name for name in names if not name.startswith(("w_o_", "b_o_", "w_out_"))]
    heads = f"attention_gain_KJ{self.attention.value}" if self.attention else None
    gains = (heads, "ssm_gain_GHP" if self.ssm else None)
    return (*own, *(gain for gain in gains if gain), "w_out_YD")


Block = Mamba | Mamba1 | GatedConv | Attention | Mlp | Parallel
KINDS: Mapping[str, type] = {
  kind.symbol: kind for kind in (Mamba, GatedConv, Attention, Mlp, Mamba1, Parallel)
}


def attention_of(block: Block) -> Attention | None:
  """Returns the attention of a block, alone or as a branch; None where there is none."""
  if isinstance(block, Parallel):
    return block.attention
  return block if isinstance(block, Attention) else None


def ssm_of(block: Block) -> Ssm | None:
  """Returns the SSM mixer of a block, alone or as a branch; None where there is none."""
  if isinstance(block, Parallel):
    return block.ssm
  return block if isinstance(block, (Mamba, Mamba1, GatedConv)) else None
