"""The kinds of blocks a model is made of: frozen sizes, and the names of the leaves each holds."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

ACTIVATIONS = ("relu2", "swiglu")


def positive(owner: str, **sizes: Any) -> None:
  """Raises unless every size is a whole number of at least 1."""
  for name, value in sizes.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{owner}: {name}={value!r} must be a whole number of at least 1")


def one_of(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises unless a name is one of those allowed."""
  if value not in allowed:
    raise ValueError(f"{owner}: {name}={value!r} is not one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Stretched rotary positions (Llama 3.1): slow pairs are slowed down by `factor`.

  Pairs that turn less than `low` times in `context` positions are slowed down, those that turn
  more than `high` times are not, and those between are interpolated.
  """

  factor: float
  low: float
  high: float
  context: int

  def __post_init__(self):
    positive("Llama3Scaling", context=self.context)
    if not self.factor > 0 or not 0 < self.low < self.high:
      raise ValueError(f"Llama3Scaling: needs factor > 0 and 0 < low < high, not {self}")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions over the first `rotary` channels of a head (None: all of them).

  `frequency` is the angle a position adds to each pair, where pairs of another model were kept:
  `base` and `scaling` have no say then.
  """

  base: float = 10000.0
  rotary: int | None = None
  scaling: Llama3Scaling | None = None
  frequency: tuple[float, ...] | None = None

  def __post_init__(self):
    if not self.base > 0:
      raise ValueError(f"Rope: base={self.base!r} must be positive")
    if self.rotary is not None and (self.rotary < 2 or self.rotary % 2):
      raise ValueError(f"Rope: rotary={self.rotary!r} must be an even number of at least 2")
    if self.frequency is not None:
      self._check_frequency()

  def _check_frequency(self) -> None:
    given = self.frequency
    numbers = isinstance(given, tuple) and all(type(x) is float and x > 0 for x in given)
    if not numbers or not all(math.isfinite(x) for x in given):
      raise ValueError(f"Rope: frequency={given!r} must be a tuple of positive numbers")
    if self.rotary != 2 * len(given):
      raise ValueError(
        f"Rope: frequency has {len(given)} pairs, rotary={self.rotary!r} is not twice as many"
      )
    if self.scaling is not None:
      raise ValueError("Rope: frequency and scaling both given; frequencies are final angles")

  def frequencies(self, width: int) -> tuple[float, ...]:
    """Returns the angle a position adds to each pair of a head of this width, in radians."""
    if self.frequency is not None:
      return self.frequency
    rotary = self.rotary or width
    plain = [self.base ** (-2 * i / rotary) for i in range(rotary // 2)]
    return tuple(plain) if self.scaling is None else tuple(_stretched(self.scaling, plain))


def _stretched(scaling: Llama3Scaling, plain: list[float]) -> Iterator[float]:
  for frequency in plain:
    turns = scaling.context * frequency / (2 * math.pi)
    share = min(max((turns - scaling.low) / (scaling.high - scaling.low), 0.0), 1.0)
    yield (1 - share) * frequency / scaling.factor + share * frequency


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
    positive("Mamba", G=self.G, H=self.H, P=self.P, N=self.N, W=self.W)
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
class GatedConv:
  """A Mamba-2 mixer without its state: skip times the convolved input, gated, normed, projected.

  What is left of a Mamba block whose B, C and dt are taken away: G groups of H heads of P
  channels, a convolution of W taps.
  """

  G: int
  H: int
  P: int
  W: int = 4
  conv_bias: bool = True
  symbol: ClassVar[str] = "C"
  axes: ClassVar[str] = "GHPW"

  def __post_init__(self):
    positive("GatedConv", G=self.G, H=self.H, P=self.P, W=self.W)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this mixer, axes included."""
    bias = ("conv_bias_x_GHP",) if self.conv_bias else ()
    return ("w_z_DGHP", "w_x_DGHP", "conv_x_WGHP", "skip_GH", "gate_gain_GHP", "w_out_GHPD", *bias)


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
    positive("Attention", K=self.K, J=self.J, E=self.E)
    if self.window is not None:
      positive("Attention", window=self.window)
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
    positive("Mlp", F=self.F)
    one_of("Mlp", "activation", self.activation, ACTIVATIONS)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Names of the leaves of this layer, axes included."""
    gated = self.activation == "swiglu"
    gate = ("w_gate_DF",) if gated else ()
    bias = ("b_up_F", "b_down_D") + (("b_gate_F",) if gated else ()) if self.bias else ()
    return ("w_up_DF", "w_down_FD", *gate, *bias)


Block = Mamba | GatedConv | Attention | Mlp
KINDS: Mapping[str, type] = {kind.symbol: kind for kind in (Mamba, GatedConv, Attention, Mlp)}
