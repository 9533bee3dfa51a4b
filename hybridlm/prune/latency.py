"""How long a model takes: the sum of its blocks, each measured alone or bounded by a roofline.

A source of seconds is a `Device` (published peaks: a bound that nothing of their precision runs
below) or a `Table` of timings of the real block kinds on the device at hand. A block that was
measured at that very size, context and batch takes what was measured; any other takes a + b FLOPs +
c bytes, with the a, b, c of at least zero that fit the table's timings of its kind best, relative
to what was measured.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from hybridlm.config import (
  Attention,
  Block,
  Mamba,
  Mamba1,
  ModelConfig,
  Parallel,
  attention_of,
  ssm_of,
)
from hybridlm.prune import cost as costs
from hybridlm.prune.devices import Device

FORMAT = "hybridlm-timings-1"
PHASES = ("prefill", "decode")
HEAD = "head"  # the kind of everything outside the blocks: embedding, final norm, head


class Work(NamedTuple):
  """What a block, or the head, does in one phase: FLOPs, and bytes that must move."""

  flops: float
  bytes: float


class Entry(NamedTuple):
  """One measurement.

  Attributes:
    kind: a block's symbol, or `HEAD`.
    sizes: what else decides the time, as JSON text: the block's fields and the residual width.
    phase: "prefill" (all of the context at once) or "decode" (one step behind it).
    context: tokens a sequence.
    batch: sequences.
    seconds: measured.
    flops: the work's, as `work` counts it.
    bytes: likewise.
  """

  kind: str
  sizes: str
  phase: str
  context: int
  batch: int
  seconds: float
  flops: float
  bytes: float


def check_phase(phase: str, context: int, batch: int) -> None:
  """Raises unless a phase is known and there are tokens.

  Raises:
    ValueError: names the value and the rule.
  """
  if phase not in PHASES:
    raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
  if context < 1 or batch < 1:
    raise ValueError(f"latency: context={context} and batch={batch} must be at least 1")


def work(cfg: ModelConfig, block: Block | None, phase: str, context: int, batch: int) -> Work:
  """Returns what one block does in a phase; None: embedding, final norm and head.

  Bytes are the least that move: weights once, the residual stream in and out, and of the state
  what is read and written: all keys and values, those of meta tokens and of another block too, and
  both ways of an SSM state in a step, once each in a prefill. In a prefill the head computes one
  position a sequence.
  """
  width = costs.nbytes(1, cfg.dtype)
  tokens = context * batch if phase == "prefill" else batch
  stream = 2 * tokens * cfg.D * width
  if block is None:
    flops = 2.0 * cfg.D * cfg.V * batch
    return Work(flops, cfg.V * cfg.D * width + stream + 4 * batch * cfg.V)
  each = costs.part(cfg, block, context=context)
  flops = each.prefill_flops if phase == "prefill" else each.decode_flops
  read = costs.part(cfg, owning(block), context=context)
  turns = 1 if phase == "prefill" else 2
  kept = read.kv * width + turns * (each.conv * width + 4 * each.ssm)
  return Work(flops * tokens, (each.parameters + read.meta) * width + stream + batch * kept)


def owning(block: Block) -> Block:
  """Returns the block with keys and values of its own, if it reads another one's."""
  attention = attention_of(block)
  if attention is None or not attention.shared:
    return block
  own = dataclasses.replace(attention, shared=False)
  return dataclasses.replace(block, attention=own) if isinstance(block, Parallel) else own


def sizes(cfg: ModelConfig, block: Block | None) -> str:
  """Returns what decides a block's time, or the head's, beside phase, context and batch."""
  if block is None:
    return json.dumps({"D": cfg.D, "V": cfg.V, "norm": cfg.norm, "tied": cfg.tied})
  run: tuple[tuple[str, Any], ...] = ()
  if attention_of(block) is not None:
    run += (("attention", cfg.attention),)
  if isinstance(ssm_of(block), (Mamba, Mamba1)):
    run += (("ssd", cfg.ssd), ("chunk", cfg.chunk))
  if cfg.meta and attention_of(block) is not None:
    run += (("meta", cfg.meta),)
  return _sizes(block, cfg.D, cfg.norm, run)


@functools.lru_cache(maxsize=1 << 14)
def _sizes(block: Block, D: int, norm: str, run: tuple) -> str:
  return json.dumps({"D": D, "norm": norm, **_fields(block), **dict(run)}, sort_keys=True)


def _fields(block: Block) -> dict[str, Any]:
  """Returns what decides the time of a block alone; of a parallel one, of each branch."""
  if isinstance(block, Parallel):
    parts = (block.attention, block.ssm)
    own = {part.symbol: _fields(part) for part in parts if part is not None}
    return {"fusion": block.fusion.kind, **own}
  own = {letter: getattr(block, letter) for letter in block.axes}
  for key in ("activation", "bias", "conv_bias", "window"):
    own |= {key: getattr(block, key)} if hasattr(block, key) else {}
  if isinstance(block, Attention):
    own["rope"] = block.rope is not None
    own |= {"shared": True} if block.shared else {}
  own |= {"norms": block.norms} if isinstance(block, Mamba1) else {}
  return own | ({"gate": block.gate} if getattr(block, "gate", "gated") != "gated" else {})


@dataclasses.dataclass(frozen=True)
class Table:
  """Timings of blocks on one device.

  Attributes:
    meta: device, dtype and versions: what else decides the times.
    entries: the measurements, no two of the same thing.
  """

  meta: Mapping[str, Any]
  entries: tuple[Entry, ...] = ()

  def add(self, entries: Iterable[Entry]) -> "Table":
    """Returns a table with more measurements; those of the same thing are replaced."""
    held = {entry[:5]: entry for entry in (*self.entries, *entries)}
    return Table(self.meta, tuple(held[key] for key in sorted(held)))

  @functools.cached_property
  def measured(self) -> dict[tuple, float]:
    """Seconds by kind, sizes, phase, context and batch."""
    return {entry[:5]: entry.seconds for entry in self.entries}

  @functools.cached_property
  def fits(self) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(a, b, c) of seconds = a + b FLOPs + c bytes, all at least 0, by kind and phase."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in self.entries:
      found.setdefault((entry.kind, entry.phase), []).append(entry)
    return {key: _fit(entries) for key, entries in found.items()}

  def has(
    self, cfg: ModelConfig, block: Block | None, *, phase: str, context: int, batch: int
  ) -> bool:
    """Whether this very block, or head, was measured."""
    return (_kind(block), sizes(cfg, block), phase, context, batch) in self.measured

  def save(self, path: str | os.PathLike) -> None:
    """Writes the table as JSON, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
      "format": FORMAT, "meta": dict(self.meta), "entries": [e._asdict() for e in self.entries],
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Table":
    """Returns the table a file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file holds something else, or a time that is not positive.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"timings {path}: no such file")
    try:
      plain = json.loads(path.read_text(encoding="utf-8"))
      found = cls(plain["meta"], tuple(Entry(**entry) for entry in plain["entries"]))
      good = plain["format"] == FORMAT and all(0 < e.seconds < math.inf for e in found.entries)
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"timings {path}: not a table of timings: {error!r}") from error
    if not good:
      raise ValueError(f"timings {path}: not of format {FORMAT!r}, or a time is not positive")
    return found


def _kind(block: Block | None) -> str:
  return HEAD if block is None else block.symbol


def _fit(entries: list[Entry]) -> tuple[float, float, float]:
  taken = np.asarray([entry.seconds for entry in entries])
  terms = np.asarray([[1.0, entry.flops, entry.bytes] for entry in entries])
  scale = terms.max(axis=0)
  found, _ = scipy.optimize.nnls(terms / scale / taken[:, None], np.ones(len(entries)))
  return tuple((found / scale).tolist())


def _from_table(
  table: Table, cfg: ModelConfig, block: Block | None, phase: str, context: int, batch: int
) -> float:
  kind = _kind(block)
  exact = table.measured.get((kind, sizes(cfg, block), phase, context, batch))
  if exact is not None:
    return exact
  if (kind, phase) not in table.fits:
    raise ValueError(f"timings: no {phase} of a block of kind {kind!r} was measured on "
                     f"{table.meta.get('device')}")
  own, (a, b, c) = work(cfg, block, phase, context, batch), table.fits[kind, phase]
  return a + b * own.flops + c * own.bytes


def seconds(
  cfg: ModelConfig, block: Block | None, source: Device | Table, *, phase: str, context: int,
  batch: int,
) -> float:
  """Returns the seconds of one block of a model; None: embedding, final norm and head.

  Raises:
    ValueError: a table of another dtype, or without timings of that kind; a device without a peak
      for the dtype.
  """
  if isinstance(source, Table):
    return _from_table(source, cfg, block, phase, context, batch)
  own = work(cfg, block, phase, context, batch)
  return max(own.flops / source.peak(cfg.dtype), own.bytes / source.bandwidth)


def estimate(
  cfg: ModelConfig, source: Device | Table, *, phase: str, context: int, batch: int
) -> float:
  """Returns the seconds of a model's prefill of a context, or of one decoding step behind it.

  Args:
    cfg: the model.
    source: a device by its peaks (`devices.device("h100")`), or timings of this one.
    phase: "prefill" or "decode".
    context: tokens a sequence.
    batch: sequences.

  Raises:
    ValueError: an unknown phase, no tokens, or a source that cannot say it.
  """
  check_phase(phase, context, batch)
  if isinstance(source, Table) and source.meta.get("dtype", cfg.dtype) != cfg.dtype:
    raise ValueError(f"timings are of {source.meta['dtype']}, the model computes in {cfg.dtype}")
  options = {"phase": phase, "context": context, "batch": batch}
  return seconds(cfg, None, source, **options) + sum(
    count * seconds(cfg, block, source, **options) for block, count in costs.distinct(cfg)
  )


def tokens_per_second(
  cfg: ModelConfig, source: Device | Table, *, context: int, batch: int, prompt: int | None = None
) -> float:
  """Returns the new tokens a second of all sequences together.

  Args:
    cfg: the model.
    source: as in `estimate`.
    context: tokens a sequence, prompt included.
    batch: sequences.
    prompt: tokens read at once before the first new one; None: decoding alone is timed, at the end
      of the context. Otherwise steps count as those in the middle of what is generated.

  Raises:
    ValueError: a prompt that leaves no new token, and what `estimate` refuses.
  """
  if prompt is None:
    return batch / estimate(cfg, source, phase="decode", context=context, batch=batch)
  if not 1 <= prompt < context:
    raise ValueError(f"latency: prompt={prompt} leaves no new token of context={context}")
  new, middle = context - prompt, (context + prompt) // 2
  whole = estimate(cfg, source, phase="prefill", context=prompt, batch=batch)
  whole += new * estimate(cfg, source, phase="decode", context=middle, batch=batch)
  return batch * new / whole
