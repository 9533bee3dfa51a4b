"""Reads a compiled program's text: what it sends between devices, loops counted as often as run."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}
# Bytes that a device sends, as a multiple of the larger of operand and result, of n in a group: by
# rings, the least that moves what must be moved.
SENT = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
}
HEAD = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
OP = re.compile(
  r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<result>.*?) (?P<op>" + "|".join(SENT) + r")(?P<start>-start)?\("
)
SHAPE = re.compile(r"\b(?P<kind>[a-z]+\d*(?:e\dm\d(?:fn)?)?)\[(?P<sizes>[\d,]*)\]")
CALLS = re.compile(r"(?P<how>body|calls|to_apply|branch_computations)=(?P<to>\{[^}]*\}|%?[\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(?P<n>\d+)"\}')
LISTED = re.compile(r"replica_groups=\{\{(?P<first>[\d,]*)\}")
IOTA = re.compile(r"replica_groups=\[(?P<groups>\d+),(?P<each>\d+)\]")
MEMORY = re.compile(r"Memory Space: (?P<name>\w+).*\nTotal bytes: (?P<bytes>\d+)")
SCATTERED = "all-reduce-scatter"  # how a TPU names a fusion that leaves each device its part


def collectives(hlo: str, devices: int) -> dict[str, float]:
  """Returns kind -> bytes that one device sends in a run of the program.

  A loop whose number of turns the compiler does not know counts once.

  Args:
    hlo: the text of the compiled program.
    devices: of the program; a collective without groups is among all of them.
  """
  own, calls, entry = _computations(hlo, devices)
  times: collections.Counter[str] = collections.Counter({entry: 1})
  for name in _ordered(entry, calls):
    for other, turns in calls.get(name, ()):
      times[other] += times[name] * turns
  total: collections.Counter[str] = collections.Counter()
  for name, sent in own.items():
    for kind, size in sent:
      total[kind] += times[name] * size
  return {kind: size for kind, size in sorted(total.items()) if size}


def _computations(hlo: str, devices: int):
  """Returns what each computation sends, whom it calls how often, and the entry's name."""
  own: dict[str, list[tuple[str, float]]] = {}
  calls: dict[str, list[tuple[str, int]]] = {}
  name, entry = "", ""
  for line in hlo.splitlines():
    if not line.startswith(" "):
      match = HEAD.match(line)
      if match:
        name = match["name"]
        own[name], calls[name] = [], []
        entry = name if line.startswith("ENTRY") else entry
      continue
    if match := OP.match(line):
      own[name].append(_sent(match, line, name, devices))
    if "=" in line and CALLS.search(line):
      trips = TRIPS.search(line)
      turns = int(trips["n"]) if trips and " while(" in line else 1
      for match in CALLS.finditer(line):
        targets = match["to"].strip("{}").split(",")
        calls[name] += [(target.strip(" %"), turns) for target in targets]
  if not entry:
    raise ValueError("the compiler printed no entry of the program")
  return own, calls, entry


def _sent(match: re.Match, line: str, name: str, devices: int) -> tuple[str, float]:
  """Returns the kind of a collective and the bytes that a device sends for it."""
  kind = match["op"]
  if kind == "all-reduce" and SCATTERED in name:
    kind = "reduce-scatter"
  results = [_bytes(m) for m in SHAPE.finditer(match["result"])]
  among = _among(line, devices)
  # The result of a start has the operand beside it; a tuple of several results is all of them.
  size = max(results, default=0) if match["start"] else sum(results)
  if kind == "reduce-scatter" and match["op"] == kind:
    size *= 1 if match["start"] else among
  return kind, size * SENT[kind](among)


def _among(line: str, devices: int) -> int:
  if match := IOTA.search(line):
    return int(match["each"])
  match = LISTED.search(line)
  return len(match["first"].split(",")) if match and match["first"] else devices


def _bytes(match: re.Match) -> int:
  if match["kind"] not in BYTES:
    return 0
  return BYTES[match["kind"]] * math.prod(int(size) for size in match["sizes"].split(",") if size)


def _ordered(entry: str, calls: Mapping[str, Sequence[tuple[str, int]]]) -> list[str]:
  """Returns computations, each before those it calls."""
  seen: set[str] = set()
  order: list[str] = []
  stack: list[tuple[str, bool]] = [(entry, False)]
  while stack:
    name, done = stack.pop()
    if done:
      order.append(name)
    elif name not in seen:
      seen.add(name)
      stack.append((name, True))
      stack += [(other, False) for other, _ in calls.get(name, ())]
  return order[::-1]


def memories(report: str) -> dict[str, int]:
  """Returns memory -> bytes that a program uses of it, of a TPU compiler's own report.

  Raises:
    ValueError: it has none of the default memory.
  """
  found = {match["name"]: int(match["bytes"]) for match in MEMORY.finditer(report)}
  if "default" not in found:
    raise ValueError("the compiler reported no bytes of the default memory")
  return found


def flops(jaxpr: Any) -> float:
  """Returns the FLOPs of all products in a traced program, on all devices together.

  A scan counts as often as it turns, a kernel as often as its grid has places, and what each device
  of a mesh does by itself as often as there are devices.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (inside, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      shared = math.prod(left[axis] for axis in inside)
      total += 2.0 * shared * math.prod(equation.outvars[0].aval.shape)
    else:
      total += _times(equation) * sum(flops(inner) for inner in _inner(equation.params.values()))
  return total


def _times(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "scan":
    return params["length"]
  if name == "pallas_call":
    return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
  if name == "shard_map":
    sizes = dict(params["mesh"].shape)
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  return 1


def _inner(values: Any):
  """Yields the programs among parameters of an equation."""
  for value in values:
    if isinstance(value, tuple | list):
      yield from _inner(value)
    else:
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        yield value
