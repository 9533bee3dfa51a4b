"""Reads a compiled program's text: what it sends between devices, loops counted as often as run."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
MEMORY = re.compile(r"Memory Space: .*\(color=(?P<color>\d+)\)\nTotal bytes: (?P<bytes>\d+)")
COLORS = {"0": "default", "5": "host"}  # whatever the report calls them
NAMED = re.compile(r"replica_groups=mesh\[(?P<mesh>[^\]]*)\] ?\{(?P<used>[^}]*)\}")
AXIS = re.compile(r"'(?P<name>\w+)'=(?P<size>\d+)")
USED = re.compile(r"'(?P<name>\w+)'(?::\(\d+\)(?P<part>\d+))?")
CHANNEL = re.compile(r"channel_id=(?P<id>\d+)")
CONDITION = re.compile(r"condition=%?(?P<name>[\w.\-]+)")
FUSED = re.compile(r"calls=%?(?P<name>[\w.\-]+)")
CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((?P<n>\d+)\)")
SCATTERED = "all-reduce-scatter"  # how a TPU names a fusion that leaves each device its part


class Sent(NamedTuple):
  """One collective: its kind, its channel (which its pieces share), its bytes."""

  kind: str
  channel: str
  size: float


class Computation(NamedTuple):
  """One function of a program: what it sends, whom it calls how often, whole numbers it holds.

  A call's number of turns is the name of the loop's condition where nothing else says it.
  """

  sent: list[Sent]
  calls: list[tuple[str, int | str]]
  constants: list[int]


def collectives(hlo: str, devices: int) -> dict[str, float]:
  """Returns kind -> bytes that one device sends in a run of the program.

  A loop turns as often as the compiler says, or else up to the number its condition compares with.

  Args:
    hlo: the text of the compiled program.
    devices: of the program; a collective without groups is among all of them.
  """
  found, entry = _computations(hlo, devices)
  times: collections.Counter[str] = collections.Counter({entry: 1})
  for name in _ordered(entry, {key: each.calls for key, each in found.items()}):
    for other, turns in found[name].calls if name in found else ():
      times[other] += times[name] * (_limit(found, turns) if isinstance(turns, str) else turns)
  once: dict[tuple[str, str], float] = {}
  fused = {match["name"] for match in FUSED.finditer(hlo)}
  for name, each in found.items():
    for number, sent in enumerate(each.sent):
      # Pieces of one operation lie in fusions. What lies in loops themselves is sent as often as it
      # stands there: copies of a loop, and other operations too, may share a channel.
      pieces = sent.channel if name in fused and SCATTERED not in name else ""
      key = (sent.kind, pieces or f"{name} {number}")
      # Later pieces may lie in loops that an operation goes on beside, its first does not.
      if times[name]:
        once[key] = min(once.get(key, math.inf), times[name] * sent.size)
  total: collections.Counter[str] = collections.Counter()
  for (kind, _), size in once.items():
    total[kind] += size
  return {kind: size for kind, size in sorted(total.items()) if size}


def _limit(found: Mapping[str, Computation], condition: str) -> int:
  """Returns the largest whole number in a loop's condition: the turns of a loop from 0."""
  own = found.get(condition, Computation([], [], []))
  inner = [_limit(found, other) for other, _ in own.calls]
  return max([1, *own.constants, *inner])


def _computations(hlo: str, devices: int) -> tuple[dict[str, Computation], str]:
  """Returns the functions of a program by name, and the name of the one that is run."""
  found: dict[str, Computation] = {}
  own, entry = Computation([], [], []), ""
  for line in hlo.splitlines():
    if not line.startswith(" "):
      match = HEAD.match(line)
      if match:
        name, own = match["name"], Computation([], [], [])
        found[name] = own
        entry = name if line.startswith("ENTRY") else entry
      continue
    if match := CONSTANT.search(line):
      own.constants.append(int(match["n"]))
    if match := OP.match(line):
      own.sent.append(_sent(match, line, name, devices))
    if "=" in line and CALLS.search(line):
      own.calls.extend(_calls(line))
  if not entry:
    raise ValueError("the compiler printed no entry of the program")
  return found, entry


def _calls(line: str) -> Iterator[tuple[str, int | str]]:
  trips, condition = TRIPS.search(line), CONDITION.search(line)
  turns: int | str = 1
  if " while(" in line:
    turns = int(trips["n"]) if trips else condition["name"] if condition else 1
  for match in CALLS.finditer(line):
    for target in match["to"].strip("{}").split(","):
      yield target.strip(" %"), turns


def _sent(match: re.Match, line: str, name: str, devices: int) -> Sent:
  """Returns a collective with the bytes that a device sends for it."""
  kind = match["op"]
  if kind == "all-reduce" and SCATTERED in name:
    kind = "reduce-scatter"
  results = [_bytes(m) for m in SHAPE.finditer(match["result"])]
  among, channel = _among(line, devices), CHANNEL.search(line)
  # The result of a start has the operand beside it; a tuple of several results is all of them.
  size = max(results, default=0) if match["start"] else sum(results)
  if kind == "reduce-scatter" and match["op"] == kind:
    size *= 1 if match["start"] else among
  return Sent(kind, channel["id"] if channel else "", size * SENT[kind](among))


def _among(line: str, devices: int) -> int:
  """Returns how many devices a collective is among."""
  if match := IOTA.search(line):
    return int(match["each"])
  if match := NAMED.search(line):
    sizes = {m["name"]: int(m["size"]) for m in AXIS.finditer(match["mesh"])}
    used = USED.finditer(match["used"])
    return math.prod(int(m["part"]) if m["part"] else sizes[m["name"]] for m in used)
  match = LISTED.search(line)
  return len(match["first"].split(",")) if match and match["first"] else devices


def _bytes(match: re.Match) -> int:
  if match["kind"] not in BYTES:
    return 0
  return BYTES[match["kind"]] * math.prod(int(size) for size in match["sizes"].split(",") if size)


def _ordered(entry: str, calls: Mapping[str, Sequence[tuple[str, Any]]]) -> list[str]:
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
  found = {
    COLORS[match["color"]]: int(match["bytes"]) for match in MEMORY.finditer(report)
    if match["color"] in COLORS
  }
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
