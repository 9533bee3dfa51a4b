"""The teacher's store: the stage that writes it, and the one that a distillation learns from."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments import artefacts, precision, stages
from experiments.mistakes import about
from experiments.settings import Setup
from experiments.stages import Inputs, Stage
from hybridlm import bind, layout
from hybridlm.config import ModelConfig
from hybridlm.data import pipeline as data
from hybridlm.data import store
from hybridlm.distill import top
from hybridlm.train import mesh as meshes
from hybridlm.train import together

# Of a stage's values: what it learns from.
FIELD = "store"


def weights(folder: pathlib.Path) -> str:
  """Returns the fingerprint of the weights that a finished stage's folder holds."""
  files = artefacts.read_record(folder / "done.json", {"files": dict})["files"]
  return artefacts.digest({
    name: digest for name, digest in files.items()
    if name.startswith(f"{artefacts.MODEL}/") and name.endswith(".safetensors")
  })


def key(s: Setup, teacher: str) -> store.Key:
  """Returns what a store for a distillation is made from; `teacher` is as `weights` gives it."""
  run = s.c.distil
  real = s.cfg.real_vocabulary
  rows = b"".join(sorted({row for batch in _validation(s) for row in _hashes(batch)}))
  return store.Key(
    teacher=teacher, tokenizer=s.c.data.tokenizer, tokens=s.corpus.tokenizer.fingerprint,
    train=data.rows_fingerprint(
      s.corpus, batch=run.batch, length=s.c.data.length, seed=s.c.seed + 1),
    valid=hashlib.sha256(rows).hexdigest(), length=s.c.data.length, V=real,
    k=run.top_k or real, temperature=float(run.temperature), precision=run.teacher_precision,
  )


def check(s: Setup) -> None:
  """Raises where the values of `store`, or of what is kept, are out of range.

  Raises:
    ValueError: names the key.
  """
  if s.c.store.dtype not in store.DTYPES:
    raise ValueError(f"store.dtype={s.c.store.dtype!r} is not one of {', '.join(store.DTYPES)}")
  if s.c.store.file_mib < 1:
    raise ValueError(f"store.file_mib={s.c.store.file_mib} must be at least 1")
  real = s.cfg.real_vocabulary
  if not 0 <= s.c.distil.top_k <= real:
    raise ValueError(f"distil.top_k={s.c.distil.top_k} must lie in 0..{real}, the vocabulary")


def write(s: Setup, name: str) -> Stage:
  """Returns the stage that writes what the teacher says of the rows a distillation reads."""
  check(s)

  def fill(folder: pathlib.Path, inputs: Inputs) -> None:
    cfg, params = precision.teacher(*artefacts.read_model(inputs["teacher"]), s.c.distil)
    cfg = cfg.replace(layout=s.c.mesh.teacher_layout or s.c.mesh.layout)
    teacher = together.first(lambda: weights(inputs["teacher"]))
    _Writer(s, folder, key(s, teacher), _teacher(s, cfg, params)).run()

  known = dataclasses.asdict(key(s, ""))
  values = {
    **{field: known[field] for field in known if field not in ("teacher", "tokenizer")},
    "rows": s.c.distil.steps * s.c.distil.batch, "dtype": s.c.store.dtype,
  }
  return Stage(name, values, fill, needs=("teacher",), together=True)


class _Writer:
  """Fills a folder file by file, from where an earlier run ended. Process 0 alone writes."""

  def __init__(
    self, s: Setup, folder: pathlib.Path, key: store.Key, said: Callable[[data.Batch], top.Top]
  ):
    self._s, self._folder, self._key, self._said = s, folder, key, said
    self._dtype = s.c.store.dtype

  def run(self) -> None:
    """Writes what is not there yet, and the manifest at last."""
    run = self._s.c.distil
    total = run.steps * run.batch
    size = store.record_size(self._key, self._dtype)
    steps = max(1, (self._s.c.store.file_mib << 20) // (size * run.batch))  # in one file
    done = together.first(self._rows_there) // run.batch
    stream = data.train_batches(
      self._s.corpus, batch=run.batch, length=self._s.c.data.length, seed=self._s.c.seed + 1)
    stream.skip(done)
    for first in range(done, run.steps, steps):
      few = (next(stream) for _ in range(first, min(first + steps, run.steps)))
      self._seal(store.TRAIN, first * run.batch, self._records(few, first * run.batch))
    valid: dict[bytes, bytes] = {}
    for row, record in self._rows(_validation(self._s)):
      valid.setdefault(row, record(len(valid)))
    self._seal(store.VALID, 0, list(valid.values()))
    if together.writes():
      made = store.manifest(
        self._folder, self._key, dtype=self._dtype, rows=total, valid=list(valid))
      artefacts.write_json(self._folder / store.MANIFEST, made)

  def _rows_there(self) -> int:
    """Returns how many rows an earlier run left; its batches and files may have been others.

    What it left half written is removed.
    """
    for path in self._folder.glob("*.partial"):
      path.unlink()
    files = store.sealed(self._folder, store.TRAIN)
    return store.first_row(files[-1]) + store.count(files[-1]) if files else 0

  def _seal(self, part: str, first: int, records: Sequence[bytes]) -> None:
    together.first(lambda: store.seal(self._folder, part, first, records).name)

  def _records(self, batches, first: int) -> list[bytes]:
    return [record(first + n) for n, (_, record) in enumerate(self._rows(batches))]

  def _rows(self, batches) -> Iterator[tuple[bytes, Callable[[int], bytes]]]:
    """Returns each row's hash, and what makes its record once it has a number."""
    for batch in batches:
      arrays = [np.asarray(each) for each in self._said(batch)]
      for row, *parts in zip(_hashes(batch), *arrays, strict=True):
        yield row, lambda number, row=row, parts=parts: store.pack(
          tuple(parts), row=row, number=number, V=self._key.V, dtype=self._dtype)


def _teacher(s: Setup, cfg: ModelConfig, params: Any) -> Callable[[data.Batch], top.Top]:
  """Returns what the teacher says of a batch, computed on the job's devices."""
  run, count = s.c.distil, s.c.distil.top_k or cfg.real_vocabulary
  rules = layout.LAYOUTS[cfg.layout].parameters
  held = meshes.put(params, meshes.shardings(s.grid, params, rules))

  @jax.jit
  def say(params, token_BL, segment_BL):
    hidden_BLD, head_DV = bind.apply_hidden(
      cfg, params, {"token_BL": token_BL, "segment_BL": segment_BL})
    return top.of(hidden_BLD, head_DV, count=count, temperature=run.temperature,
                  vocabulary=cfg.real_vocabulary)

  def said(batch: data.Batch) -> top.Top:
    read = {name: batch[name] for name in ("token_BL", "segment_BL")}
    read = meshes.put(read, meshes.batch_shardings(s.grid, read))
    with jax.set_mesh(s.grid):
      return top.Top(*meshes.fetch(tuple(say(held, **read))))

  return said


def _validation(s: Setup) -> list[data.Batch]:
  """Returns the whole batches that a distillation is watched on."""
  return data.eval_batches(
    s.corpus, source=s.inside, split="valid", batch=s.c.evaluate.batch, length=s.c.data.length,
    limit=s.c.distil.validate_batches,
  )


def _hashes(batch: data.Batch) -> list[bytes]:
  return [store.row_hash(*pair)
          for pair in zip(batch["token_BL"], batch["segment_BL"], strict=True)]


def opened(s: Setup) -> store.Store | None:
  """Returns the store that a distillation learns from; None: from the teacher itself.

  All but the teacher is compared here, the teacher by `check_teacher` once it is there.

  Raises:
    FileNotFoundError: there is no store.
    ValueError: it is damaged, made from something else, or too short; or a value out of range.
  """
  run = s.c.distil
  check(s)
  if not run.store:
    return None
  with about("distil.store"):
    found = store.Store(run.store)
    store.check_key(run.store, found.key, key(s, found.key.teacher))
    if found.rows < run.steps * run.batch:
      raise ValueError(f"store {run.store}: it has {found.rows} rows of training data, too few for "
                       f"{run.steps} steps of {run.batch}")
  return found


def values(found: store.Store | None) -> dict[str, Any]:
  """Returns what a stage that learns from a store says of it."""
  if found is None:
    return {}
  return {FIELD: {"manifest": found.fingerprint, "teacher": found.key.teacher}}


def verify(found: store.Store, folder: pathlib.Path) -> None:
  """Raises unless the teacher in a stage's folder made the store, and every record is whole.

  Processes share the reading, and fail together.

  Raises:
    ValueError: another teacher, or a damaged record.
  """
  check_teacher(found.key.teacher, folder)
  error = None
  try:
    found.verify(jax.process_index(), jax.process_count())
  except ValueError as caught:
    error = caught
  together.check(error)


def check_teacher(teacher: str, folder: pathlib.Path) -> None:
  """Raises unless the teacher in a stage's folder is the one a store was made with.

  Raises:
    ValueError: it is another.
  """
  found = weights(folder)
  if found != teacher:
    raise ValueError(f"distil.store: another teacher: the store was made with {teacher[:12]}, "
                     f"this run has {found[:12]} in {folder}")


def check_teachers(made: Sequence[Stage], workdir: pathlib.Path) -> None:
  """Raises where a stage learns from the store of another teacher than lies there already.

  Raises:
    ValueError: it is another.
  """
  wanted = {stage.needs[0]: stage.config[FIELD]["teacher"] for stage in made
            if FIELD in stage.config}
  if wanted:
    for status in stages.survey(made, workdir):
      if status.stage.name in wanted and status.state == "done":
        check_teacher(wanted[status.stage.name], status.folder)
