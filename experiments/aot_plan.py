"""What is compiled ahead of time: the slice that a name stands for, and the step a config takes."""

import math
import re
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from experiments import checks, exchange, losses, precision, settings
from experiments.ahead import TARGETS
from hybridlm import layout
from hybridlm.config import PRESETS, ModelConfig
from hybridlm.interop import dispatch
from hybridlm.prune import select
from hybridlm.prune.plan import Plan

NAME = re.compile(r"(?P<chip>\w+):(?P<shape>\d+(?:x\d+)*)")
# Dimensions of the chips' own grids: what a slice's name has.
DIMENSIONS = {"v5e": (2,), "v6e": (2,), "v5p": (3,), "h200": (1, 2)}


UNTIL = ("", "memory")


class Slice(NamedTuple):
  """Devices of one kind: `v5p:4x4x4` are 64 chips in a cube, `h200:2x8` two hosts of eight."""

  chip: str
  shape: tuple[int, ...]

  @property
  def devices(self) -> int:
    """How many there are."""
    return math.prod(self.shape)


def slice_of(name: str) -> Slice:
  """Returns the slice that a name stands for.

  Raises:
    ValueError: another chip, or a shape that its slices have not.
  """
  match = NAME.fullmatch(name)
  if match is None or match["chip"] not in TARGETS:
    raise ValueError(f"slice {name!r}: give CHIP:SHAPE, such as v5p:4x4x4 or h200:8, with a chip "
                     f"of {', '.join(TARGETS)}")
  shape = tuple(int(size) for size in match["shape"].split("x"))
  wanted = DIMENSIONS[match["chip"]]
  if len(shape) not in wanted or not all(shape):
    raise ValueError(f"slice {name!r}: a slice of {match['chip']} has "
                     f"{' or '.join(map(str, wanted))} dimensions of 1 or more")
  return Slice(match["chip"], shape)


def mesh(c: ConfigDict, devices: int) -> dict[str, int]:
  """Returns how many of so many devices the config puts along each axis of the mesh.

  Raises:
    ValueError: sizes that do not multiply to the number of devices.
  """
  sizes = {name: c.mesh[name] for name in layout.AXES}
  others = math.prod(size for name, size in sizes.items() if name != "data")
  if sizes["data"] is None:
    sizes["data"] = max(1, devices // max(1, others))
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    raise ValueError(f"{text}: not {devices} devices, which the slice has")
  return sizes


def models(c: ConfigDict) -> tuple[ModelConfig, ModelConfig]:
  """Returns the student and the teacher, from sizes alone; a search stands for `search.winner`.

  Raises:
    FileNotFoundError: a teacher or a plan that is not there.
    ValueError: a model or targets that cannot be, or a search without a winner.
  """
  if c.teacher.path:
    source, _ = dispatch.open(exchange.located("teacher.path", c.teacher.path))
    runtime = {name: c.model[name] for name in settings.RUNTIME if c.model[name] is not None}
    teacher = source.replace(**runtime)
  elif c.model.preset in PRESETS:
    teacher = settings.model(c, PRESETS[c.model.preset].real_vocabulary)
  else:
    teacher = settings.model(c, settings.corpus(c).tokenizer.V)
  wanted = settings.targets(c)
  if c.plan.path == settings.SEARCH:
    wanted = {name: size for name, size in c.search.winner.items() if size is not None}
    if not wanted:
      raise ValueError("plan.path='search': what it will find is not known; say what to compile by "
                       "search.winner, such as --config.search.winner.D=3072")
  elif c.plan.path:
    return Plan.load(c.plan.path).small_config(), teacher
  elif not wanted:
    raise ValueError(settings.UNSET)
  return select.sized(teacher, wanted), teacher


def _divides(c: ConfigDict, along: dict[str, int], models: dict[str, ModelConfig]) -> None:
  """Raises unless the mesh divides rows, positions and every leaf, as the models are laid out."""
  run, parts = c.distil, along["sequence"]
  if c.data.length % parts:
    raise ValueError(f"data.length={c.data.length} is not a multiple of mesh.sequence={parts}")
  grid = AbstractMesh(tuple(along.values()), tuple(along))
  for owner, cfg in models.items():
    names = layout.names(layout.LAYOUTS[cfg.layout].activations["B"])
    rows = math.prod(along[name] for name in names)
    if run.batch % (rows * run.accumulate):
      raise ValueError(
        f"distil.batch={run.batch} is not a multiple of distil.accumulate={run.accumulate} times "
        f"{' × '.join(f'mesh.{name}' for name in names)}={rows}")
    checks.layout(cfg, grid, owner)


def order(c: ConfigDict, asked: str) -> dict[str, Any]:
  """Returns what the compiling process is told, as plain values.

  `asked`: a slice; `@memory` after it leaves out machine code, most of what a TPU's compiler does.
  Of several runs of a distillation it is what they share. Intermediate activations are not compared
  yet: what is kept of them is for a plan to say.

  Raises:
    ValueError: a slice, a mesh or models that cannot be, or what the mesh does not divide.
  """
  name, _, until = asked.partition("@")
  if until not in UNTIL:
    raise ValueError(f"--aot={asked}: after @ comes {' or '.join(filter(None, UNTIL))}")
  chips, run = slice_of(name), c.distil
  if until and TARGETS[chips.chip].platform != "tpu":
    raise ValueError(f"--aot={asked}: only compilers of TPUs say what is in memory before the end")
  if run.store:
    raise ValueError(f"distil.store={run.store!r}: a step is compiled with its teacher at hand; "
                     "leave it empty")
  student, teacher = models(c)
  student = precision.student(student, run).replace(layout=c.mesh.layout)
  teacher = precision.teacher_config(teacher, run).replace(
    layout=c.mesh.teacher_layout or c.mesh.layout)
  along = mesh(c, chips.devices)
  losses.check(run)
  precision.check(run)
  _divides(c, along, {"the student": student, "the teacher": teacher})
  published = c.teacher.path or c.model.preset  # their weights come in the compute dtype
  return {
    "slice": name, "until": until or "program", "mesh": along,
    "student": student.to_dict(), "teacher": teacher.to_dict(),
    "teacher_dtype": teacher.dtype if published else "float32", "run": settings.plain(run),
    "length": c.data.length,
  }
