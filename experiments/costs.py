"""What the device's time went to, from a trace and the text of the compiled program.

Operations are named by where they come from: the file that wrote them and the pass they belong to.
"""

import pathlib
import re
from collections import Counter
from typing import NamedTuple

from jax.profiler import ProfileData

# Their time is that of the operations inside them.
CONTAINERS = ("while", "call", "conditional")
ELSEWHERE = "the compiler's own"
_TABLE = re.compile(r"^(FileNames|FileLocations|StackFrames)\n((?:\d+ .*\n)+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\]})] ([\w\-]+)\(", re.MULTILINE)


class Source(NamedTuple):
  """An operation of a program: its opcode, and file and pass in words."""

  opcode: str
  place: str


def sources(text: str) -> dict[str, Source]:
  """Returns where the operations of a compiled program come from, by name.

  Args:
    text: the program, as `compiled.as_text()` prints it.
  """
  tables = {
    name: dict(line.split(" ", 1) for line in rows.splitlines()) for name, rows in
    _TABLE.findall(text)
  }
  files = {key: value.strip('"') for key, value in tables.get("FileNames", {}).items()}
  places = {key: _number(value, "file_name_id") for key, value in
            tables.get("FileLocations", {}).items()}
  frames = {key: _number(value, "file_location_id") for key, value in
            tables.get("StackFrames", {}).items()}
  found = {}
  for line in text.splitlines():
    made = _INSTRUCTION.match(line)
    if made:
      frame = _number(line, "stack_frame_id")
      file = files.get(places.get(frames.get(frame, ""), ""))
      name = re.search(r'op_name="([^"]*)"', line)
      found[made[1]] = Source(made[2], _place(file, name[1] if name else ""))
  return found


def _number(text: str, key: str) -> str:
  """Returns the digits behind `key=`, or none."""
  made = re.search(rf"\b{key}=(\d+)", text)
  return made[1] if made else ""


def _place(file: str | None, name: str) -> str:
  """Returns a file and a pass in words, from a path and the name JAX gave an operation."""
  if file is None:
    return ELSEWHERE
  parts = pathlib.PurePath(file).parts
  if "hybridlm" in parts:
    last = len(parts) - parts[::-1].index("hybridlm")
    where = "/".join(parts[last:])
  else:
    where = parts[parts.index("site-packages") + 1] if "site-packages" in parts else parts[-1]
  if "transpose(" in name:
    return f"{where}, backward"
  return f"{where}, forward" if "jvp(" in name else where


def seconds(trace: pathlib.Path, text: str) -> Counter:
  """Returns device seconds of a program's operations, by where they come from.

  Args:
    trace: an `.xplane.pb` file.
    text: the program that ran while it was written; other programs in the trace are left out.
  """
  known, module = sources(text), text.split(None, 2)[1].rstrip(",")
  spent: dict[bool, Counter] = {True: Counter(), False: Counter()}
  for plane in ProfileData.from_file(str(trace)).planes:
    found = spent[plane.name.startswith("/device:")]
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        operation = stats.get("hlo_op")
        if operation is None or stats.get("hlo_module", module) != module:
          continue
        source = known.get(operation, Source("", ELSEWHERE))
        if source.opcode not in CONTAINERS:
          found[source.place] += 1e-9 * event.duration_ns
  # Of a CPU the host's threads are the device; else they only say when an operation was started.
  return spent[True] or spent[False]


def largest(trace: pathlib.Path, text: str, count: int) -> list[tuple[str, float]]:
  """Returns the places that took most of the device's time, and their shares of it.

  Raises:
    ValueError: the trace has none of the program's operations.
  """
  spent = seconds(trace, text)
  whole = sum(spent.values())
  if not whole:
    raise ValueError(f"trace {trace} has no operation of the program")
  return [(place, found / whole) for place, found in spent.most_common(count)]
