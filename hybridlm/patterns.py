"""Blocks from a pattern string and one size a letter, and blocks as plain values for JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.blocks import (
  KINDS,
  Attention,
  Block,
  Fusion,
  Mamba,
  Mamba1,
  Parallel,
  attention_of,
)
from hybridlm.fields import one_of
from hybridlm.rotary import Llama3Scaling, Rope

# What the SSM branch of a parallel block is, by name.
SSMS: Mapping[str, type] = {"mamba2": Mamba, "mamba1": Mamba1}
# Options of a pattern that are no fields of a block.
OPTIONS = ("ssm", "fusion", "global_layers", "kv_groups")


def blocks(pattern: str, sizes: Mapping[str, Any]) -> tuple[tuple[Block, ...], set[str]]:
  """Returns the blocks of a pattern, and the names of `sizes` that they use.

  Raises:
    ValueError: an unknown block letter, a size that a block misses, groups of layers that cannot
      share keys.
  """
  unknown = sorted(set(pattern) - set(KINDS))
  if unknown:
    raise ValueError(f"pattern {pattern!r}: {unknown[0]!r} is not one of {' '.join(KINDS)}")
  used: set[str] = set()
  made = {}
  for symbol in sorted(set(pattern)):
    make = _parallel if KINDS[symbol] is Parallel else _plain(KINDS[symbol])
    made[symbol], names = make(f"pattern {pattern!r}: block {symbol!r}", sizes)
    used |= names
  found = [made[symbol] for symbol in pattern]
  layers = [index for index, block in enumerate(found) if attention_of(block) is not None]
  if layers:
    used |= {"global_layers", "kv_groups"} & set(sizes)
    _globals(pattern, found, layers, _listed(pattern, sizes, "global_layers"))
    _share(pattern, found, layers, _listed(pattern, sizes, "kv_groups", inside=True))
  return tuple(found), used


def _plain(kind: type):
  def make(place: str, sizes: Mapping[str, Any]) -> tuple[Any, set[str]]:
    fields = dataclasses.fields(kind)
    chosen = {field.name: sizes[field.name] for field in fields if field.name in sizes}
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in sizes]
    if missing:
      raise ValueError(f"{place} needs the size {missing[0]}")
    return kind(**chosen), set(chosen)

  return make


def _parallel(place: str, sizes: Mapping[str, Any]) -> tuple[Parallel, set[str]]:
  """Returns a parallel block; a mean has its own norms, so the mixer inside has none by default."""
  ssm, kind = sizes.get("ssm", "mamba2"), sizes.get("fusion", "mean")
  one_of(place, "ssm", ssm, tuple(SSMS))
  if ssm == "mamba2" and kind == "mean":
    sizes = {"gate": "none", **sizes}
  attention, names = _plain(Attention)(place, sizes)
  mixer, others = _plain(SSMS[ssm])(place, sizes)
  width = attention.K * attention.J * (attention.U or attention.E)
  fusion = Fusion(kind, width if kind == "mean" else None)
  # One group and heads of one channel are what Mamba-1 has: saying so is no mistake.
  fixed = {letter for letter in "GP" if ssm == "mamba1" and sizes.get(letter) == 1}
  return Parallel(attention, mixer, fusion), names | others | fixed | {"ssm", "fusion"}


def _listed(
  pattern: str, sizes: Mapping[str, Any], name: str, *, inside: bool = False
) -> Sequence[Any]:
  """Returns an option that lists layers, or with `inside` lists of them."""
  given = sizes.get(name) or ()
  parts = (given, *(given if inside and isinstance(given, (tuple, list)) else ()))
  if not all(isinstance(part, (tuple, list)) for part in parts):
    what = "tuples of layers, such as ((1, 2),)" if inside else "layers, such as (0, 3)"
    raise ValueError(f"pattern {pattern!r}: {name}={given!r} must be a tuple of {what}")
  return given


def _layer(pattern: str, layers: Sequence[int], name: str, number: Any) -> int:
  if type(number) is not int or not 0 <= number < len(layers):
    raise ValueError(f"pattern {pattern!r}: {name} names layer {number!r}; with attention there "
                     f"are {len(layers)}, counted from 0")
  return layers[number]


def _globals(pattern, found, layers, wanted) -> None:
  for number in wanted:
    index = _layer(pattern, layers, "global_layers", number)
    attention = dataclasses.replace(attention_of(found[index]), window=None)
    found[index] = with_attention(found[index], attention)


def _share(pattern, found, layers, groups) -> None:
  """Takes keys and values from all but the first layer of each group."""
  seen: set[int] = set()
  for group in groups:
    place = f"pattern {pattern!r}: kv_groups holds {tuple(group)!r}"
    indices = [_layer(pattern, layers, "kv_groups", number) for number in group]
    if len(group) < 2 or list(group) != list(range(group[0], group[0] + len(group))):
      raise ValueError(f"{place}: a group is two or more layers in a row, with attention each")
    if seen & set(group):
      raise ValueError(f"{place}: layer {min(seen & set(group))} is in two groups")
    seen |= set(group)
    for number, index in zip(group, indices, strict=True):
      window, first = (attention_of(found[i]).window for i in (index, indices[0]))
      if window != first:
        said = [n for n, i in zip(group, indices, strict=True)
                if attention_of(found[i]).window is None]
        raise ValueError(f"{place}: layer {said[0]} is global, others of the group have a window; "
                         "groups lie between global layers")
      if number != group[0]:
        attention = dataclasses.replace(attention_of(found[index]), shared=True)
        found[index] = with_attention(found[index], attention)


def with_attention(block: Block, attention: Attention) -> Block:
  """Returns a block with its attention replaced, alone or as a branch."""
  if isinstance(block, Parallel):
    return dataclasses.replace(block, attention=attention)
  return attention


def to_plain(block: Block) -> dict[str, Any]:
  """Returns a block as plain values, its kind among them (infinity as a string)."""
  if isinstance(block, Parallel):
    parts = {"attention": block.attention, "ssm": block.ssm}
    return {"kind": block.symbol, "fusion": dataclasses.asdict(block.fusion)} | {
      name: part if part is None else to_plain(part) for name, part in parts.items()}
  plain = {"kind": block.symbol, **dataclasses.asdict(block)}
  if "dt_limits" in plain:
    plain["dt_limits"] = [x if math.isfinite(x) else str(x) for x in plain["dt_limits"]]
  return plain


def from_plain(place: str, plain: Mapping[str, Any]) -> Block:
  """Returns the block that `to_plain` gave.

  Raises:
    ValueError: a kind that there is none of, named with its place.
    TypeError: a field that the kind has not.
  """
  fields = dict(plain)
  symbol = fields.pop("kind", None)
  if symbol not in KINDS:
    raise ValueError(f"model config: {place} has kind {symbol!r}, known: {' '.join(KINDS)}")
  if KINDS[symbol] is Parallel:
    runs = {name: tuple(tuple(run) for run in value) if isinstance(value, (list, tuple)) else value
            for name, value in dict(fields.pop("fusion")).items()}
    parts = {name: part if part is None else from_plain(f"{name} of {place}", part)
             for name, part in fields.items()}
    return Parallel(fusion=Fusion(**runs), **parts)
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
