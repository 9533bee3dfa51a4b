"""A search's limits: what a config's rules and budget ask, and what models cost in their terms."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments import budgets
from experiments.settings import Setup
from hybridlm.config import Block, Mamba, ModelConfig, ssm_of
from hybridlm.prune import constraints, cost, latency, select, sizes
from hybridlm.prune.constraints import Budget, Rules, Source

TIMES = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Limits:
  """Rules, a budget, and where seconds come from.

  Attributes:
    rules: what a small model must be.
    budget: what it may cost, and at which context and batch.
    source: of seconds; None: they are not known.
  """

  rules: Rules
  budget: Budget
  source: Source = None

  @property
  def floors(self) -> Mapping[str, int]:
    """Block kind -> at least so many of it."""
    return self.rules.floors

  @property
  def bounds(self) -> dict[str, float]:
    """Upper bounds by the names that `costs` has; throughput is one on the seconds of a step."""
    found = dict(self.budget.bounds)
    if "tokens_per_second" in found:
      slowest = self.budget.batch / found.pop("tokens_per_second")
      found["decode_seconds"] = min(slowest, found.get("decode_seconds", slowest))
    return found

  def reasons(
    self, parent: ModelConfig, small: ModelConfig, *, budget: bool = True,
    kept: Sequence[int] | None = None,
  ) -> list[str]:
    """Returns why a candidate may not be; `budget` False leaves the budget out."""
    bounds = self.budget if budget else Budget()
    return constraints.reasons(parent, small, self.rules, bounds, source=self.source, kept=kept)

  def costs(self, cfg: ModelConfig) -> dict[str, Any]:
    """Returns parameters, bytes of weights and decode state, and seconds of a model.

    Seconds are None where nothing says them.
    """
    whole = self._cost(cfg)
    found = {"parameters": whole.parameters, "memory_bytes": whole.total_bytes}
    for phase in TIMES:
      known = self.source is not None
      found[f"{phase}_seconds"] = (
        latency.estimate(cfg, self.source, phase=phase, **self._place) if known else None)
    return found

  def block(self, cfg: ModelConfig, index: int) -> dict[str, Any]:
    """Returns the share of one block in what its model costs, by the names of `bounds`."""
    block = cfg.blocks[index]
    one, two = (self._cost(cfg.replace(blocks=_after(block, count))) for count in (1, 2))
    return self._named(two.parameters - one.parameters, two.total_bytes - one.total_bytes,
                       cfg, block)

  def outside(self, cfg: ModelConfig) -> dict[str, Any]:
    """Returns what everything but the blocks costs, by the names of `bounds`."""
    alone = cfg.replace(blocks=cfg.blocks[:1])
    share, whole = self.block(cfg, 0), self._cost(alone)
    ints = {"parameters": whole.parameters, "memory_bytes": whole.total_bytes}
    rest = self._named(0, 0, cfg, None)
    return rest | {name: ints[name] - share[name] for name in ints if name in rest}

  def refusal(self, parent: ModelConfig, candidates: Iterable[ModelConfig]) -> str:
    """Returns one line on a budget that no candidate meets: the nearest possible one."""
    found = constraints.nearest(parent, candidates, self.rules, self.budget, source=self.source)
    return constraints.refusal(self.budget, found)

  @property
  def _place(self) -> dict[str, int]:
    return {"context": self.budget.context, "batch": self.budget.batch}

  def _cost(self, cfg: ModelConfig) -> cost.Cost:
    dtypes = {
      name: getattr(self.budget, name)
      for name in ("weight_dtype", "kv_dtype", "conv_dtype", "ssm_dtype")
    }
    return cost.cost(cfg, **self._place, **dtypes)

  def _named(self, parameters: int, memory: int, cfg: ModelConfig, block: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"parameters": parameters, "memory_bytes": memory}
    for phase in TIMES:
      if f"{phase}_seconds" in self.bounds:
        found[f"{phase}_seconds"] = latency.seconds(
          cfg, block, self.source, phase=phase, **self._place)
    return {name: found[name] for name in self.bounds}


def _after(block: Block, count: int) -> tuple[Block, ...]:
  """Returns so many copies of a block, behind one with keys to read if it reads another one's."""
  own = latency.owning(block)
  return (*(() if own == block else (own,)), *[block] * count)


def of(s: Setup, cfg: ModelConfig, *, measured: bool = True) -> Limits:
  """Returns the limits of a job on a parent; blocks are timed here unless a device is named.

  `measured` False leaves seconds unknown rather than time anything, where no bound needs them.
  """
  timed = samples(cfg, s.c.search.space.to_dict())
  source = budgets.source(s.c, timed, cache=s.cache, needed=measured)
  return Limits(budgets.rules(s.c), budgets.budget(s.c), source)


def samples(cfg: ModelConfig, choices: Mapping[str, Sequence[int]]) -> list[ModelConfig]:
  """Returns models whose blocks, timed, tell what lies between: the parent and cuts of it.

  The cuts have the largest, the middle and the smallest choice of every size, and where no-ops, or
  branches off, are among the choices, every SSM, or such branch, gone.
  """
  inner = {name: sorted(each) for name, each in choices.items()
           if each and name not in ("blocks", "layers", "noop", *sizes.OFF)}
  wanted = [{name: each[at(len(each))] for name, each in inner.items()}
            for at in (lambda n: n - 1, lambda n: n // 2, lambda n: 0)]
  if any(choices.get("noop", ())):
    mixers = [i for i, block in enumerate(cfg.blocks) if isinstance(ssm_of(block), Mamba)]
    wanted += [{"noop": mixers}, wanted[-1] | {"noop": mixers}]
  forked = [i for i, block in enumerate(cfg.blocks) if sizes.forked(block)]
  wanted += [{name: forked} for name in sizes.OFF if any(choices.get(name, ()))]
  found = [cfg]
  for targets in wanted:
    try:
      small = select.sized(cfg, targets)
    except ValueError:
      continue  # choices that do not go together
    found += [] if small in found else [small]
  return found


def rule(reason: str) -> str:
  """Returns the rule a reason names; of a budget, which bound: "budget: memory"."""
  name, _, text = reason.partition(": ")
  return f"budget: {text.split(' ', 1)[0]}" if name == "budget" else name
