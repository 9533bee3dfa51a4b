"""What can be wrong with a config's values, found before anything runs."""

import difflib
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from configs import base
from experiments import exchange, losses, observing, precision
from experiments.mistakes import about
from hybridlm import axes, config
from hybridlm import layout as layouts
from hybridlm.config import Mamba, ModelConfig, Parallel
from hybridlm.data import tokenizers
from hybridlm.data.pipeline import Corpus
from hybridlm.eval import ngram
from hybridlm.interop.families import FAMILIES
from hybridlm.prune import depth as depths
from hybridlm.prune import repair
from hybridlm.prune import scores as scoring
from hybridlm.train import guard
from hybridlm.train import mesh as meshes

# The least that whole numbers may be; seeds are 32 bits.
LEAST = {
  "seed": 0, "data.length": 1,
  "calibrate.batch": 1, "calibrate.batches": 1,
  "evaluate.batch": 1, "evaluate.batches": 1, "evaluate.speed_repeats": 1, "evaluate.ngram": 0,
  "findings.batch": 1, "findings.batches": 1, "findings.seeds": 1, "findings.calibration": 1,
  "repair.batch": 1, "repair.batches": 1, "distil.wide_ends": 0,
  "assess.batch": 1, "assess.batches": 1, "assess.context": 1, "assess.seeds": 1,
  "assess.steps": 1, "assess.turns": 1,
} | {
  f"{run}.{key}": least for run in ("teacher", "distil", "correct")
  for key, least in {"steps": 1, "batch": 1, "accumulate": 1, "validate_batches": 1,
                     "validate_every": 0, "save_every": 0, "keep": 1}.items()
}
# No correction; one that everything after it uses; one that only teaches.
CORRECTIONS = ("none", "before", "beside")
REPAIRS = ("none", "least_squares")
# What a search must be bounded by, at least one.
BOUNDS = ("parameters", "memory_gib", "prefill_ms", "decode_ms", "tokens_per_second")


def values(c: ConfigDict, grid: Mesh) -> None:
  """Raises where numbers and names of the config are out of range or cannot go together.

  Raises:
    ValueError: names the key, its value and the rule.
  """
  for path, least in LEAST.items():
    value = _value(c, path)
    if value < least:
      raise ValueError(f"{path}={value} must be at least {least}")
  if c.seed >= 2**31:
    raise ValueError(f"seed={c.seed} must be below 2**31")
  if c.evaluate.ngram > 40:
    raise ValueError(f"evaluate.ngram={c.evaluate.ngram}: more than 40 symbols never fit 64 bits")
  _batches(c, grid)
  _names(c)
  keep = min(c[run].keep for run in ("teacher", "distil", "correct"))
  guard.check(guard.Guard(**c.guard), keep=keep)
  losses.check(c.distil)
  precision.check(c.distil)
  _optional(c)
  observing.check(c)


def _value(c: ConfigDict, path: str) -> Any:
  for name in path.split("."):
    c = c[name]
  return c


def _batches(c: ConfigDict, grid: Mesh) -> None:
  """Raises unless the devices divide the rows of batches, and the positions of rows."""
  names = {"layout": c.mesh.layout, "teacher_layout": c.mesh.teacher_layout or c.mesh.layout}
  for key, name in names.items():
    if name not in layouts.LAYOUTS:
      raise ValueError(f"mesh.{key}={name!r} is not one of {', '.join(layouts.LAYOUTS)}")
  spread = [layouts.names(layouts.LAYOUTS[name].activations["B"]) for name in names.values()]
  for key in ("teacher", "distil", *(("correct",) if c.correct.run != "none" else ())):
    run = c[key]
    for along in spread:
      rows = math.prod(grid.shape.get(name, 1) for name in along)
      if run.batch % (run.accumulate * rows):
        raise ValueError(
          f"{key}.batch={run.batch} is not a multiple of {key}.accumulate={run.accumulate} times "
          f"{' × '.join(f'mesh.{name}' for name in along)}={rows}"
        )
      if c.evaluate.batch % rows:  # runs are watched on rows that lie as theirs do
        raise ValueError(f"evaluate.batch={c.evaluate.batch} is not a multiple of "
                         f"{' × '.join(f'mesh.{name}' for name in along)}={rows}")
  rows, parts = meshes.rows(grid), grid.shape.get("sequence", 1)
  for key in ("calibrate", "evaluate", "findings", "repair"):
    if c[key].batch % rows:
      raise ValueError(f"{key}.batch={c[key].batch} is not a multiple of mesh.data × "
                       f"mesh.fsdp={rows}")
  if c.data.length % parts:
    raise ValueError(f"data.length={c.data.length} is not a multiple of mesh.sequence={parts}")


def _names(c: ConfigDict) -> None:
  choices = {
    "calibrate.depth": (None, *depths.ESTIMATORS),
    "evaluate.inside": sorted(c.data.sources), "evaluate.outside": sorted(c.data.sources),
    "correct.run": CORRECTIONS, "repair.run": REPAIRS, "repair.order": repair.ORDERS,
    "repair.target": repair.TARGETS, "repair.gain": repair.GAINS,
    "scratch.run": ("same", "none"), "export.format": exchange.FORMATS,
    "export.family": (None, *(name for name, each in FAMILIES.items() if each.describe)),
  }
  for path, known in choices.items():
    value = _value(c, path)
    if value not in known:
      raise ValueError(f"{path}={value!r} is not one of {', '.join(map(str, known))}")
  letters, spec = c.calibrate.axes, c.calibrate.estimator
  for name in c.assess.recall:
    if name not in c.data.sources or c.data.sources[name].kind != "recall":
      raise ValueError(f"assess.recall={tuple(c.assess.recall)}: {name!r} is no source of kind "
                       "'recall'")
  if not letters or not set(letters) <= set(scoring.SCORE_OF):
    raise ValueError(f"calibrate.axes={letters!r}: choose from {''.join(scoring.SCORE_OF)}")
  with about(f"calibrate.estimator={spec!r}"):
    scoring.parse(spec, letters)


def _optional(c: ConfigDict) -> None:
  """Raises where parts that can be left out say what they cannot, or exclude each other."""
  if not 0 < c.repair.ridge < math.inf:
    raise ValueError(f"repair.ridge={c.repair.ridge} must be positive")
  if (c.repair.order, c.repair.target) == ("together", "out"):
    raise ValueError("repair.order='together' with repair.target='out': every block would make up "
                     "for the same lack; take 'one_by_one', or 'mix'")
  defaults = base.get_config()
  for part in ("plan", "targets", "repair", "correct", "distil"):
    for key in c[part]:
      if key not in defaults[part]:
        near = difflib.get_close_matches(key, list(defaults[part]), n=3, cutoff=0.0)
        raise ValueError(
          f"{part}.{key} is unknown; nearest: {', '.join(f'{part}.{name}' for name in near)}")
  if c.plan.path == "search":
    if not any(c.search.space.values()):
      raise ValueError("plan.path='search': search.space is empty: name choices of a size, such as "
                       "search.space.D=(128, 160)")
    if all(c.budget[name] is None for name in BOUNDS):
      raise ValueError("plan.path='search': nothing bounds it: set one of "
                       + ", ".join(f"budget.{name}" for name in BOUNDS))
  if c.schedule and c.plan.path:
    raise ValueError(f"schedule and plan.path={c.plan.path!r} are both given: every round plans "
                     "from its own scores")


def heads(kept: Iterable[Any], cfg: ModelConfig) -> None:
  """Raises unless `findings.heads` can be studied on a teacher.

  Raises:
    ValueError: not whole numbers, or heads that its groups have not.
  """
  kept = tuple(kept)
  if kept and not any(isinstance(block, Mamba) for block in cfg.blocks):
    raise ValueError(f"findings.heads={kept}: the teacher {cfg.pattern!r} has no Mamba block")
  if kept and any(isinstance(block, Parallel) for block in cfg.blocks):
    raise ValueError(f"findings.heads={kept}: the teacher {cfg.pattern!r} has parallel blocks; "
                     "heads are studied where a block is one mixer")
  for count in kept:
    if type(count) is not int or not 1 <= count <= cfg.size("H"):
      raise ValueError(
        f"findings.heads={kept}: {count!r} is not a whole number of heads in 1..{cfg.size('H')}, "
        "those of a group of the teacher"
      )


def layout(
  cfg: ModelConfig, grid: Mesh | AbstractMesh, owner: str, names: Iterable[str] = ()
) -> None:
  """Raises unless a model can be laid out on a mesh, as it is and by layouts of other names.

  Raises:
    ValueError: a leaf with a size that the devices along an axis do not divide, or an attention
      that cannot be divided over positions.
  """
  tree: dict[str, Any] = {}
  for path, shape in axes.leaves(config.shapes(cfg)):
    *folders, name = path.split("/")
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = jax.ShapeDtypeStruct(shape, np.float32)
  sizes = ", ".join(f"mesh.{name}={size}" for name, size in grid.shape.items())
  with about(f"{sizes}: {owner}"):
    for name in dict.fromkeys((cfg.layout, *names)):
      meshes.shardings(grid, tree, layouts.LAYOUTS[name].parameters)
    if grid.shape.get("sequence", 1) > 1 and cfg.attention not in (None, "xla"):
      raise ValueError(f"model.attention={cfg.attention!r} cannot be divided over positions: 'xla' "
                       "can")


def texts(c: ConfigDict, corpus: Corpus) -> None:
  """Raises unless every split that a job reads holds a sequence, and n-grams can be counted.

  Raises:
    ValueError: names source, split and rule.
  """
  mixed = sorted({name for _, weights in corpus.phases for name, _ in weights})
  inside, test = c.evaluate.inside, c.evaluate.split
  used = [*((name, "train") for name in mixed), (inside, "valid"), (inside, c.calibrate.split),
          (inside, test), (c.evaluate.outside, test)]
  for source, split in dict.fromkeys(used):
    sequence(corpus, source, split, c.data.length)
  if c.evaluate.ngram:
    found = [d.text for name in mixed for d in corpus.documents(name, "train")]
    with about(f"evaluate.ngram={c.evaluate.ngram}"):
      # What is counted depends on the symbols alone.
      ngram.fit(["".join(sorted(set().union(*found)))], order=c.evaluate.ngram)


def tokenizer(name: str, source: pathlib.Path | None, corpus: Corpus) -> None:
  """Raises unless a teacher from elsewhere reads the ids that the text is turned into.

  Args:
    name: of the tokenizer in the config.
    source: of the teacher; one that brings no tokenizer along, or none that can be read, is not
      compared.
    corpus: the text.

  Raises:
    ValueError: another tokenizer; names both.
  """
  if source is None or name == "teacher":
    return
  try:
    own = tokenizers.load(str(source), end=corpus.spec.end)
  except (ValueError, FileNotFoundError):
    return
  if own.fingerprint != corpus.tokenizer.fingerprint:
    raise ValueError(f"data.tokenizer={name!r} is not that of the teacher in {source}, whose ids "
                     "stand for other text: take data.tokenizer='teacher'")


def sequence(corpus: Corpus, source: str, split: str, length: int) -> None:
  """Raises unless a split holds a sequence's tokens; reads no further than it must.

  Raises:
    ValueError: too few, or a template's token that the tokenizer has not.
  """
  longest = max(1, int(corpus.tokenizer.byte_lengths_V.max()))
  documents = corpus.documents(source, split)
  for part in documents[0].parts:  # all are written by the same template
    if part.special:
      tokenizers.special(corpus.tokenizer, part.text, place=f"data.sources.{source}")
  # An id stands for at most `longest` bytes, and each document ends with one more.
  if sum(1 + -(-len(d.text) // longest) for d in documents) >= length:
    return
  count = 0
  for document in documents:
    count += 1 + len(corpus.tokenizer.encode(document.text))
    if count >= length:
      return
  raise ValueError(
    f"data.sources.{source}: its split {split!r} has {count} tokens, fewer than one sequence of "
    f"data.length={length}"
  )
