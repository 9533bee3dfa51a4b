"""Rotary positions as published configs state them, in transformers 5 and before."""

import math
from typing import Any

from hybridlm.config import Llama3Scaling, ModelConfig, Rope, attention_of
from hybridlm.interop.families.fields import Fields

LLAMA3 = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"}
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
# How far frequencies may be from a geometric series, as a share of each: less than float32 rounds.
CLOSE = 1e-9


def read(fields: Fields, width: int, *, partial: float, fixed: bool = False) -> Rope:
  """Returns the rotary positions of heads of `width` channels.

  `rope_scaling` comes before `rope_parameters`, and a key inside them before one beside them.

  Args:
    fields: a config.json.
    width: channels of a head.
    partial: the share of them that turns where the config does not say.
    fixed: whether a share stated outside `rope_parameters` is not looked at (Bamba).

  Raises:
    ValueError: a kind of scaling other than none and llama3, or a share that is not even.
  """
  table = fields.table("rope_scaling", "rope_parameters")
  kind = table.plain.get("rope_type", table.plain.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise table.error("rope_type", f"rotary positions of kind {kind!r} are not known here")
  base = (table if table.has("rope_theta") else fields).number("rope_theta", 10000.0)
  outside = partial if fixed else fields.number(PARTIAL, partial)
  share = table.number(PARTIAL, outside)
  rotary = int(width * share) if 0 < share <= 1 else 0
  if rotary < 2 or rotary % 2:
    raise fields.error(PARTIAL, f"{share} of {width} channels must be an even number, at least 2")
  scaling = None
  if kind == "llama3":
    numbers = {ours: table.number(theirs) for ours, theirs in LLAMA3.items()}
    where = next((each for each in (fields, table) if each.has(ORIGINAL)), None)
    context = where.integer(ORIGINAL) if where else fields.integer("max_position_embeddings")
    scaling = Llama3Scaling(**numbers, context=context)
  return Rope(base=base, rotary=None if rotary == width else rotary, scaling=scaling)


def theta(rope: Rope) -> float | None:
  """Returns the base whose frequencies these rotary positions have; None where there is none.

  Pairs that were kept of a wider head have one where they are evenly spaced from the first on.
  """
  if rope.frequency is None:
    return float(rope.base)
  count, slowest = len(rope.frequency), rope.frequency[-1]
  base = float(rope.base) if count == 1 else slowest ** (-count / (count - 1))
  series = Rope(base=base, rotary=2 * count).frequencies(2 * count)
  near = (math.isclose(*pair, rel_tol=CLOSE) for pair in zip(rope.frequency, series, strict=True))
  return base if all(near) else None


def reasons(cfg: ModelConfig) -> list[str]:
  """Returns a reason for every attention block whose pairs turn as no single base makes them."""
  ropes = [getattr(attention_of(block), "rope", None) for block in cfg.blocks]
  return [
    f"block {index} keeps {len(rope.frequency)} pairs of rotary positions that are no "
    "geometric series from 1 on, the class knows one rope_theta"
    for index, rope in enumerate(ropes)
    if rope is not None and theta(rope) is None
  ]


def whole_reasons(cfg: ModelConfig, turned: str = "all") -> list[str]:
  """Returns a reason for every attention block in which only a part of a head turns."""
  found = [(index, attention_of(block)) for index, block in enumerate(cfg.blocks)]
  return [
    f"block {index} turns {mixer.rope.rotary} of {mixer.E} channels, the class {turned}"
    for index, mixer in found
    if mixer is not None and mixer.rope and (mixer.rope.rotary or mixer.E) != mixer.E
  ]


def describe(rope: Rope, width: int, *, partial: bool) -> dict[str, Any]:
  """Returns `rope_parameters`; `partial` families state the share of channels that turns."""
  found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta(rope)}
  if rope.scaling is not None:
    numbers = {theirs: getattr(rope.scaling, ours) for ours, theirs in LLAMA3.items()}
    found |= {"rope_type": "llama3", ORIGINAL: rope.scaling.context, **numbers}
  if partial:
    share = (rope.rotary or width) / width
    # The class rounds down.
    up = int(share * width) < (rope.rotary or width)
    found[PARTIAL] = math.nextafter(share, 2.0) if up else share
  return found
