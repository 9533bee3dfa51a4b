"""Rotary positions as published configs state them, in transformers 5 and before."""

import math
from typing import Any

from hybridlm.config import Llama3Scaling, Rope
from hybridlm.interop.families.fields import Fields

LLAMA3 = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"}
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


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


def describe(rope: Rope, width: int, *, partial: bool) -> dict[str, Any]:
  """Returns `rope_parameters`; `partial` families state the share of channels that turns."""
  found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(rope.base)}
  if rope.scaling is not None:
    numbers = {theirs: getattr(rope.scaling, ours) for ours, theirs in LLAMA3.items()}
    found |= {"rope_type": "llama3", ORIGINAL: rope.scaling.context, **numbers}
  if partial:
    share = (rope.rotary or width) / width
    # The class rounds down.
    up = int(share * width) < (rope.rotary or width)
    found[PARTIAL] = math.nextafter(share, 2.0) if up else share
  return found
