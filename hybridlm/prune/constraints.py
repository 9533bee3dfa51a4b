"""Which candidates may be: rules and budgets, each refusal with its value and its limit."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hybridlm.config import Block, Mlp, ModelConfig, attention_of, block_name, ssm_of
from hybridlm.prune import cost as costs
from hybridlm.prune import latency
from hybridlm.prune.devices import Device

# Bound of a budget -> its unit, and whether the measured value must not be below it.
BOUNDS: Mapping[str, tuple[str, bool]] = {
  "parameters": ("", False), "memory_bytes": (" GiB", False), "prefill_seconds": (" s", False),
  "decode_seconds": (" s", False), "tokens_per_second": (" tokens/s", True),
}
# Names that `Rules.divisors` may have.
SIZED = ("D", "heads", "blocks", "F", "K", "J", "E", "G", "H", "P", "N", "V", "U", "R", "M")
TIMED = ("prefill_seconds", "decode_seconds", "tokens_per_second")
Source = Device | latency.Table | None
Number = int | float


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a small model may cost at most; None: no bound.

  Attributes:
    parameters: elements of its tree.
    memory_bytes: weights and the decode state of `batch` sequences of `context` tokens.
    prefill_seconds: of reading `batch` sequences of `context` tokens.
    decode_seconds: of one step behind them.
    tokens_per_second: at least so many, of all sequences together, in decoding.
    context: tokens a sequence.
    batch: sequences.
    weight_dtype: of weights in memory; None: the compute dtype, as for the next two.
    kv_dtype: of keys and values.
    conv_dtype: of the convolutions' last inputs.
    ssm_dtype: of the SSM states.
  """

  parameters: int | None = None
  memory_bytes: int | None = None
  prefill_seconds: float | None = None
  decode_seconds: float | None = None
  tokens_per_second: float | None = None
  context: int = 8192
  batch: int = 1
  weight_dtype: str | None = None
  kv_dtype: str | None = None
  conv_dtype: str | None = None
  ssm_dtype: str = "float32"

  def __post_init__(self):
    for name, bound in self.bounds.items():
      if isinstance(bound, bool) or not 0 < bound < math.inf:
        raise ValueError(f"budget: {name}={bound!r} must be a positive number")
    for name in ("context", "batch"):
      if getattr(self, name) < 1:
        raise ValueError(f"budget: {name}={getattr(self, name)} must be at least 1")
    for name in ("weight_dtype", "kv_dtype", "conv_dtype", "ssm_dtype"):
      if getattr(self, name) is not None:
        costs.nbytes(1, getattr(self, name))

  @property
  def bounds(self) -> dict[str, Number]:
    """The bounds that are set, by name."""
    found = {name: getattr(self, name) for name in BOUNDS}
    return {name: bound for name, bound in found.items() if bound is not None}

  def __str__(self) -> str:
    said = [say(name, bound) for name, bound in self.bounds.items()]
    return f"{', '.join(said) or 'no bound'} at context={self.context}, batch={self.batch}"


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a small model must be.

  Attributes:
    divisors: letter (or "heads": of a block, or "blocks": how many) -> a size that was changed must
      be a multiple of it. A size that the parent has too is always right.
    floors: block kind -> at least so many of it.
    conv_multiple: channels of every convolution must be a multiple (CUDA kernels take 8).
    shards: numbers of devices that a server must be able to split the model over. As vLLM does it:
      they divide the SSM groups (or there is one), SSM heads, query heads and F, and they divide
      the KV heads or are a multiple of them.
    inner_share: heads x channels of a mixer must be at least this share of the parent's.
    check: raises ValueError where the model cannot be, such as one that no export can say.
  """

  divisors: Mapping[str, int] = dataclasses.field(default_factory=dict)
  floors: Mapping[str, int] = dataclasses.field(default_factory=dict)
  conv_multiple: int = 1
  shards: Sequence[int] = ()
  inner_share: float = 0.0
  check: Callable[[ModelConfig], Any] | None = None

  def __post_init__(self):
    for letter, divisor in self.divisors.items():
      if letter not in SIZED:
        raise ValueError(f"rules: divisors names {letter!r}, which is no size")
      _whole(f"divisors.{letter}", divisor)
    for symbol, floor in self.floors.items():
      _whole(f"floors[{symbol!r}]", floor, least=0)
    _whole("conv_multiple", self.conv_multiple)
    for shards in self.shards:
      _whole("shards", shards)
    if not 0 <= self.inner_share <= 1:
      raise ValueError(f"rules: inner_share={self.inner_share} must lie in 0..1")


def _whole(name: str, value: Any, *, least: int = 1) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"rules: {name}={value!r} must be a whole number of at least {least}")


def say(name: str, value: Number, *, digits: int = 4, met: bool = False) -> str:
  """Returns a bound or a measured value as a reader takes it: `parameters 4,489,000,000`.

  Args:
    name: of `BOUNDS`.
    value: of a bound, or measured.
    digits: how many count, of what is no whole number.
    met: rounds to the side on which the value meets what is said as a bound.
  """
  unit, least = BOUNDS[name]
  if name == "parameters":
    return f"parameters {value:,.0f}"
  memory = name == "memory_bytes"
  value = value / 2**30 if memory else value
  places = max(3 if memory else 0, digits - 1 - math.floor(math.log10(value)))
  if met:
    value = (math.floor if least else math.ceil)(value * 10**places) / 10**places
  name = "memory" if memory else name.removesuffix("_seconds").replace("_", " ")
  return f"{name} {value:,.{places}f}{unit}"


def measures(cfg: ModelConfig, budget: Budget, source: Source = None) -> dict[str, Number]:
  """Returns what a model costs in each unit that a budget bounds.

  Args:
    cfg: the model.
    budget: says where it is measured: context, batch, dtypes.
    source: of seconds, see `latency.estimate`.

  Raises:
    ValueError: a bound on time without a source.
  """
  asked = budget.bounds
  place = {"context": budget.context, "batch": budget.batch}
  found: dict[str, Number] = {}
  if asked.keys() & set(TIMED) and source is None:
    name = next(name for name in TIMED if name in asked)
    raise ValueError(f"budget: {name} needs timings or a device")
  if asked.keys() - set(TIMED):
    dtypes = {key: getattr(budget, key) for key in ("weight_dtype", "kv_dtype", "conv_dtype")}
    cost = costs.cost(cfg, **place, **dtypes, ssm_dtype=budget.ssm_dtype)
    found |= {"parameters": cost.parameters, "memory_bytes": cost.total_bytes}
  for phase in ("prefill", "decode"):
    if f"{phase}_seconds" in asked:
      found[f"{phase}_seconds"] = latency.estimate(cfg, source, phase=phase, **place)
  if "tokens_per_second" in asked:
    found["tokens_per_second"] = latency.tokens_per_second(cfg, source, **place)
  return {name: found[name] for name in asked}


def excess(name: str, value: Number, bound: Number) -> float:
  """Returns how far a value is beyond its bound, as a factor: above 1 it breaks it."""
  return bound / value if BOUNDS[name][1] else value / bound


def over(cfg: ModelConfig, budget: Budget, source: Source = None) -> list[str]:
  """Returns a line for each bound of a budget that a model breaks."""
  lines = []
  for name, value in measures(cfg, budget, source).items():
    bound = getattr(budget, name)
    if excess(name, value, bound) > 1:
      word = "fewer" if BOUNDS[name][1] else "more"
      said = [(say(name, value, digits=n), say(name, bound, digits=n)) for n in (4, 12)]
      have, may = said[said[0][0] == said[0][1]]
      lines.append(f"budget: {have}, {word} than {may}")
  return lines


def _each(cfg: ModelConfig, of: Callable[[Block], Any]) -> dict[int, Any]:
  """Returns what `of` says of each block, where it says anything; of equal objects once."""
  said: dict[int, Any] = {}
  for block in cfg.blocks:
    if id(block) not in said:
      said[id(block)] = of(block)
  if all(value is None for value in said.values()):
    return {}
  found = ((index, said[id(block)]) for index, block in enumerate(cfg.blocks))
  return {index: value for index, value in found if value is not None}


def _size(block: Block, letter: str) -> int | None:
  """Returns the size a block has under a name of `Rules.divisors`."""
  ssm = ssm_of(block)
  if letter == "heads":
    return None if ssm is None else ssm.G * ssm.H
  return getattr(block, letter) if letter in block.axes else None


def _whole_size(cfg: ModelConfig, letter: str) -> int:
  """Returns a size of the whole model under a name of `Rules.divisors`."""
  return {"D": cfg.D, "V": cfg.V, "M": cfg.meta, "blocks": len(cfg.blocks)}[letter]


def _undivided(block: Block, letter: str, divisor: int) -> int | None:
  size = _size(block, letter)
  return size if size is not None and size % divisor else None


def _divisors(parent: ModelConfig, small: ModelConfig, rules: Rules) -> list[str]:
  lines = []
  for letter, divisor in rules.divisors.items():
    if letter in ("D", "V", "M", "blocks"):
      have, had = (_whole_size(each, letter) for each in (small, parent))
      wrong = {None: have} if have % divisor and have != had else {}
    else:
      wrong = _each(small, functools.partial(_undivided, letter=letter, divisor=divisor))
      free = set(_each(parent, functools.partial(_size, letter=letter)).values()) if wrong else ()
      wrong = {index: size for index, size in wrong.items() if size not in free}
    lines += _grouped(wrong, lambda size, name=letter, per=divisor:
                      f"divisor: {name}={size} is not a multiple of {per}")
  return lines


def _grouped(wrong: Mapping[int | None, Any], text: Callable[[Any], str]) -> list[str]:
  """Returns one line for each value that breaks a rule, with the blocks that have it."""
  by: dict[Any, list] = {}
  for index, value in wrong.items():
    by.setdefault(value, []).append(index)
  lines = []
  for value, indices in by.items():
    names = [block_name(index) for index in indices if index is not None]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    lines.append(text(value) + (f" (block {shown})" if names else ""))
  return lines


def _floors(small: ModelConfig, rules: Rules) -> list[str]:
  kinds = small.pattern
  return [
    f"floor: {kinds.count(symbol)} blocks of kind {symbol}, fewer than {floor}"
    for symbol, floor in rules.floors.items() if kinds.count(symbol) < floor
  ]


def _convolutions(small: ModelConfig, rules: Rules) -> list[str]:
  def odd(block: Block) -> int | None:
    channels = costs.channels(block)
    return channels if channels % rules.conv_multiple else None

  wrong = _each(small, odd)
  return _grouped(wrong, lambda channels: f"conv_multiple: {channels} channels of the convolution "
                  f"are not a multiple of {rules.conv_multiple}")


def unsplit(block: Block, shards: int) -> str | None:
  """Returns why a server cannot split a block over `shards` devices; None: it can."""
  ssm, attention = ssm_of(block), attention_of(block)
  if ssm is not None:
    heads = ssm.G * ssm.H
    if ssm.G > 1 and ssm.G % shards:
      return f"G={ssm.G} SSM groups"
    if heads % shards:
      return f"{heads} SSM heads"
  if attention is not None:
    if attention.K * attention.J % shards:
      return f"{attention.K * attention.J} query heads"
    if attention.K % shards and shards % attention.K:
      return f"K={attention.K} KV heads"
  return f"F={block.F}" if isinstance(block, Mlp) and block.F % shards else None


def _shards(small: ModelConfig, rules: Rules) -> list[str]:
  lines = []
  for shards in rules.shards:
    wrong = _each(small, functools.partial(unsplit, shards=shards))
    lines += _grouped(wrong, lambda why, n=shards: f"shards: {why} do not split over {n} devices")
  return lines


def _inner(
  parent: ModelConfig, small: ModelConfig, rules: Rules, kept: Sequence[int] | None
) -> list[str]:
  if not rules.inner_share:
    return []
  had = {i: b.G * b.H * b.P for i, b in enumerate(map(ssm_of, parent.blocks)) if b is not None}
  if kept is None and len(small.blocks) == len(parent.blocks):
    kept = range(len(parent.blocks))
  wrong = {}
  for index, block in enumerate(map(ssm_of, small.blocks)):
    if block is not None:
      inner = block.G * block.H * block.P
      own = min(had.values()) if kept is None else had[kept[index]]
      if inner < rules.inner_share * own:
        wrong[index] = (inner, own)
  return _grouped(wrong, lambda pair: f"inner_share: heads x channels {pair[0]}, fewer than "
                  f"{rules.inner_share:g} of the parent's {pair[1]}")


def reasons(
  parent: ModelConfig, small: ModelConfig, rules: Rules, budget: Budget, *, source: Source = None,
  kept: Sequence[int] | None = None,
) -> list[str]:
  """Returns why a candidate may not be, a line for each rule it breaks: `rule: value and limit`.

  Args:
    parent: the model it is cut from.
    small: the candidate.
    rules: what it must be.
    budget: what it may cost.
    source: of seconds, for a budget of time: timings, or a device.
    kept: the parent's blocks that stay, where some go and the parent's mixers are not all as wide:
      without it `inner_share` compares with the narrowest of them.

  Raises:
    ValueError: a budget of time without a source.
  """
  lines = [
    *_divisors(parent, small, rules), *_floors(small, rules), *_convolutions(small, rules),
    *_shards(small, rules), *_inner(parent, small, rules, kept),
  ]
  if rules.check is not None:
    try:
      rules.check(small)
    except ValueError as error:
      lines.append(f"export: {error}")
  return [*lines, *over(small, budget, source)]


class Nearest(NamedTuple):
  """The candidate that is least beyond a budget, and the budget that it would meet."""

  cfg: ModelConfig
  budget: Budget


def nearest(
  parent: ModelConfig, candidates: Iterable[ModelConfig], rules: Rules, budget: Budget, *,
  source: Source = None,
) -> Nearest | None:
  """Returns the nearest budget that some candidate meets; the budget itself if one does.

  Nearest is the candidate, of those that break no rule, whose worst bound is exceeded by the least
  factor; bounds it exceeds become what it costs. None: every candidate breaks a rule.
  """
  best, least = None, math.inf
  for cfg in candidates:
    found = measures(cfg, budget, source)
    worst = max((excess(name, found[name], bound) for name, bound in budget.bounds.items()),
                default=0.0)
    if worst < least and not reasons(parent, cfg, rules, Budget()):
      best, least = (cfg, found), worst
  if best is None:
    return None
  cfg, found = best
  wider = {name: found[name] for name, bound in budget.bounds.items()
           if excess(name, found[name], bound) > 1}
  return Nearest(cfg, dataclasses.replace(budget, **wider))


def refusal(budget: Budget, found: Nearest | None) -> str:
  """Returns one line on a budget that no candidate meets: the budget, and the nearest possible."""
  if found is None:
    return f"budget {budget}: every candidate breaks a rule, so no budget is possible"
  wider = found.budget.bounds.items() - budget.bounds.items()
  said = ", ".join(say(name, bound, met=True) for name, bound in sorted(wider))
  return f"budget {budget}: no candidate fits; the nearest possible is {said}"
