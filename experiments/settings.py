"""From a config's numbers and strings to the library's objects, checked before anything runs."""

import dataclasses
import difflib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import checks, exchange, precision, rounds
from experiments.leftover import UNSET, replayed, small
from experiments.mistakes import about
from hybridlm import layout
from hybridlm.config import PRESETS, ModelConfig, Rope
from hybridlm.data import pipeline as data
from hybridlm.data.sources import Source
from hybridlm.interop import dispatch
from hybridlm.train import mesh as meshes
from hybridlm.train import optim

SIZES = "VDFKJEUGHPNRW"
# `plan.path` that stands for the best of the search.
SEARCH = "search"
# Targets that name blocks, or how many of them scores choose.
LISTED = ("blocks", "noop", "attention_off", "ssm_off")
# What else a model is made of, and how it computes; only the latter may change a preset.
STYLE = (
  "activation", "norm", "tied", "meta", "window", "rope", "global_layers", "kv_groups", "ssm",
  "fusion", "gate",
)
RUNTIME = ("dtype", "remat", "stack", "ssd", "chunk", "attention")


def plain(config: ConfigDict) -> dict[str, Any]:
  """Returns a subtree as values JSON can hold, tuples as lists."""
  def change(value):
    if isinstance(value, Mapping):
      return {key: change(item) for key, item in value.items()}
    return [change(item) for item in value] if isinstance(value, (tuple, list)) else value

  return change(config.to_dict())


def corpus(c: ConfigDict, *, folder: pathlib.Path | None = None) -> data.Corpus:
  """Returns the config's text; `folder` keeps token ids between runs."""
  sources = tuple(Source(name=name, **c.data.sources[name]) for name in sorted(c.data.sources))
  spec = data.DataSpec(sources, _tokenizer(c), c.data.phases, c.data.end)
  return data.Corpus(spec, folder=folder)


def _tokenizer(c: ConfigDict) -> str:
  """Returns the name or the path of the tokenizer."""
  name = c.data.tokenizer
  if name == "teacher":
    if not c.teacher.path:
      raise ValueError("data.tokenizer='teacher': teacher.path is empty, so it brings none along")
    return str(exchange.located("teacher.path", c.teacher.path))
  packaged = name.startswith(exchange.PACKAGE)
  return str(exchange.located("data.tokenizer", name)) if packaged else name


def imported(c: ConfigDict, source: pathlib.Path, vocabulary: int) -> ModelConfig:
  """Returns the config of a teacher from elsewhere, computing as the config says.

  Raises:
    FileNotFoundError: a file of it is missing.
    ValueError: a damaged or unknown model, or more ids than it has rows.
  """
  with about("teacher.path"):
    cfg, _ = dispatch.open(source)
  check_vocabulary(c, cfg, vocabulary)
  return cfg.replace(**{name: c.model[name] for name in RUNTIME if c.model[name] is not None})


def model(c: ConfigDict, vocabulary: int) -> ModelConfig:
  """Returns the config of the teacher that would be pretrained.

  Args:
    c: the whole config.
    vocabulary: ids of the tokenizer; V is as large unless the config says otherwise.

  Raises:
    ValueError: an unknown preset, a preset with sizes of its own, a pattern without, or V too small
      for the tokenizer.
  """
  given = {name: c.model[name] for name in (*SIZES, *STYLE) if c.model[name] not in (None, ())}
  runtime = {name: c.model[name] for name in RUNTIME if c.model[name] is not None}
  if c.model.preset:
    if c.model.preset not in PRESETS:
      near = difflib.get_close_matches(c.model.preset, PRESETS, n=3, cutoff=0.0)
      raise ValueError(f"preset {c.model.preset!r} is unknown; nearest: {', '.join(near)}")
    if given or c.model.pattern:
      extra = "pattern" if c.model.pattern else min(given)
      raise ValueError(f"preset {c.model.preset!r} has its own model.{extra}: leave that unset")
    cfg = PRESETS[c.model.preset].replace(**runtime)
  else:
    if not c.model.pattern:
      raise ValueError("model.pattern is empty: give a pattern, such as 'M-M*-', or a preset")
    if "D" not in given:
      raise ValueError("model.D is unset: a model needs its residual width")
    with about("model"):
      given |= {"rope": Rope(base=given["rope"])} if "rope" in given else {}
      cfg = ModelConfig.from_pattern(c.model.pattern, **({"V": vocabulary} | given), **runtime)
  check_vocabulary(c, cfg, vocabulary)
  return cfg.replace(vocabulary=vocabulary) if vocabulary < cfg.V else cfg


def check_vocabulary(c: ConfigDict, cfg: ModelConfig, vocabulary: int) -> None:
  """Raises unless the model can read every id of the config's tokenizer.

  Raises:
    ValueError: ids beyond V.
  """
  if vocabulary > cfg.V:
    raise ValueError(f"tokenizer {c.data.tokenizer!r} has {vocabulary} ids, more than V={cfg.V}")


def targets(c: ConfigDict) -> dict[str, Any]:
  """Returns the targets that the config sets, as `prune.select.plan` takes them.

  Pairs become mappings: `F = ((1, 16), (3, 8))` is F by block, `floors` blocks by symbol. A tuple
  of blocks, as `LISTED` targets take it, becomes a list.

  Raises:
    ValueError: a tuple of anything else.
  """
  return {name: _target(name, value) for name, value in c.targets.items() if value is not None}


def _target(name: str, value: Any) -> Any:
  if not isinstance(value, (tuple, list)):
    return value
  if name in LISTED:
    return list(value)
  key = str if name == "floors" else int
  if not value or not all(
    isinstance(pair, (tuple, list)) and len(pair) == 2 and type(pair[0]) is key for pair in value
  ):
    what = "a symbol and how many stay" if key is str else "a block and its size"
    raise ValueError(f"targets.{name}={value!r}: pairs of {what}, such as "
                     + ("(('*', 2),)" if key is str else "((1, 16), (3, 8))"))
  if len(dict(value)) < len(value):
    raise ValueError(f"targets.{name}={value!r} names one twice")
  return dict(value)


def written(wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Returns targets as JSON holds them: blocks as text."""
  return {
    name: {str(key): size for key, size in value.items()} if isinstance(value, Mapping) else value
    for name, value in wanted.items()
  }


def chosen(wanted: Mapping[str, Any]) -> bool:
  """Whether scores decide which blocks stay, or what becomes of them."""
  return any(not isinstance(wanted.get(name, []), list) for name in (*LISTED, "layers"))


def open_pattern(cfg: ModelConfig, wanted: Mapping[str, Any]) -> bool:
  """Whether scores decide what kinds of blocks stay, so that targets do not say it."""
  layers = set(zip(cfg.blocks[::2], cfg.blocks[1::2], strict=False))
  counts = not all(isinstance(wanted.get(name, []), list) for name in LISTED)
  return counts or ("layers" in wanted and len(layers) > 1)


def optimizer(run: ConfigDict, *, peak: float | None = None) -> optim.Optimizer:
  """Returns AdamW for one training run of the config; `peak` replaces its own."""
  peak = run.peak if peak is None else peak
  return optim.make(
    peak=peak, steps=run.steps, warmup=run.warmup, floor=run.floor * peak, decay=run.decay,
    name=run.schedule, beta1=run.beta1, beta2=run.beta2, weight_decay=run.weight_decay,
    clip=run.clip,
  )


def mesh(c: ConfigDict) -> Mesh:
  """Returns the devices as a grid: data × fsdp × tensor × sequence.

  Raises:
    ValueError: sizes that do not multiply to the number of devices.
  """
  sizes = {name: c.mesh[name] for name in layout.AXES}
  if sizes["data"] is None:
    others = math.prod(size for name, size in sizes.items() if name != "data")
    sizes["data"] = max(1, jax.device_count() // max(1, others))
  return meshes.make(sizes)


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything a config describes, built and checked; nothing of it has computed yet.

  Attributes:
    c: the config.
    cache: folder that workdirs share.
    corpus: the text.
    source: where a teacher from elsewhere lies; None: it is pretrained.
    cfg: the teacher.
    small: the config that the targets leave (which blocks stay is decided by scores); None: only
      the search, or the scores of an earlier round, will say.
    grid: the devices.
    rounds: the same for every round of the schedule, with its own values in `c` and `small`.
  """

  c: ConfigDict
  cache: pathlib.Path
  corpus: data.Corpus
  source: pathlib.Path | None
  cfg: ModelConfig
  small: ModelConfig | None
  grid: Mesh
  rounds: tuple["Setup", ...] = ()

  @property
  def inside(self) -> str:
    """The source models are trained and compared on."""
    return self.c.evaluate.inside

  @property
  def tests(self) -> dict[str, str]:
    """What is evaluated: "inside" and "outside" -> source."""
    return {"inside": self.c.evaluate.inside, "outside": self.c.evaluate.outside}

  def train_batches(self, run: ConfigDict, seed: int) -> data.Batches:
    """Returns the endless batches of a training run, this process's share of their rows."""
    return data.train_batches(
      self.corpus, batch=run.batch, length=self.c.data.length, seed=seed, **self._share()
    )

  def train_data(self, run: ConfigDict, seed: int) -> str:
    """Returns the fingerprint of `train_batches`."""
    return data.train_fingerprint(
      self.corpus, batch=run.batch, length=self.c.data.length, seed=seed
    )

  def validation(self, run: ConfigDict) -> list[data.Batch]:
    """Returns the batches a training run is watched on; they do not depend on its batch size."""
    wanted = self._held_out(self.inside, "valid", self.c.evaluate, run.validate_batches)
    return data.eval_batches(self.corpus, **wanted, **self._share())

  def held_out(self, source: str, split: str, run: ConfigDict, limit: int) -> list[data.Batch]:
    """Returns batches of a split in order, at most `limit`."""
    return data.eval_batches(self.corpus, **self._held_out(source, split, run, limit))

  def held_out_data(self, source: str, split: str, run: ConfigDict, limit: int) -> str:
    """Returns the fingerprint of `held_out`."""
    return data.eval_fingerprint(self.corpus, **self._held_out(source, split, run, limit))

  def _share(self) -> dict[str, int]:
    index, count = meshes.row_share(self.grid)
    return {"process_index": index, "process_count": count}

  def _held_out(self, source: str, split: str, run: ConfigDict, limit: int) -> dict[str, Any]:
    return {
      "source": source, "split": split, "batch": run.batch, "length": self.c.data.length,
      "limit": limit,
    }


def setup(c: ConfigDict, grid: Mesh, *, cache: pathlib.Path) -> Setup:
  """Returns what a config describes, to be computed on a grid of devices.

  Raises:
    FileNotFoundError: text, tokenizer, teacher or plan that is not there.
    ValueError: values that cannot go together, text that is empty or not UTF-8.
  """
  checks.values(c, grid)
  stops = rounds.configs(c)
  for number, each in enumerate(stops, 1):
    with about(rounds.place(number)):
      checks.values(each, grid)
      optimizer(each.distil)
  for key in ("teacher", "distil", *(("correct",) if c.correct.run != "none" else ())):
    with about(key):
      optimizer(c[key])
  if c.scratch.run == "same":
    with about("scratch"):
      optimizer(c.distil, peak=c.scratch.peak)
  source = exchange.located("teacher.path", c.teacher.path) if c.teacher.path else None
  text = corpus(c, folder=cache / "tokens")
  ids = text.tokenizer.V
  cfg = model(c, ids) if source is None else imported(c, source, ids)
  checks.heads(c.findings.heads, cfg)
  checks.tokenizer(c.data.tokenizer, source, text)
  checks.texts(c, text)
  checks.layout(cfg, grid, "the teacher", (c.mesh.layout, c.mesh.teacher_layout or c.mesh.layout))
  s = Setup(c, cache, text, source, cfg, None, grid)
  parent, made = cfg, []
  for number, each in enumerate(stops, 1):
    with about(rounds.place(number)):
      left, known = _left(each, parent, grid)
    made.append(dataclasses.replace(s, c=each, small=left))
    parent = left if known else None
  return dataclasses.replace(s, small=_left(c, parent, grid)[0], rounds=tuple(made))


def _left(
  c: ConfigDict, parent: ModelConfig | None, grid: Mesh
) -> tuple[ModelConfig | None, bool]:
  """Returns the config that a cut leaves, and whether its kinds of blocks are known by now.

  Args:
    c: a config, or that of a round.
    parent: what is cut; None: scores will say what it is, and then what can be cut from it.
    grid: the devices.

  Raises:
    FileNotFoundError: a plan that is not there.
    ValueError: targets or a plan that the parent cannot meet, or a model that cannot be exported
      or laid out.
  """
  wanted, path = targets(c), c.plan.path
  if path == SEARCH:
    return None, False
  if parent is None:
    if not wanted:
      raise ValueError(UNSET)
    return None, False
  open_ = open_pattern(parent, wanted)
  left = None
  if wanted or not path:
    run = c.calibrate
    left = small(parent, wanted, letters=run.axes, depth=run.depth, noop=run.noop)
  if path:
    left, open_ = replayed(parent, path, None if open_ else left), False
  # No published class has blocks without a branch or state, whichever of them scores choose.
  stay = {name: wanted[name] for name in ("blocks", "layers") if name in wanted}
  if path or not open_pattern(parent, stay):
    with about("export"):
      exchange.check(left, c.export.format, c.export.family)
  checks.layout(left, grid, "the small model", (c.mesh.layout,))
  precision.student(left, c.distil)
  return left, not open_
