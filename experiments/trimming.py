"""A model with a smaller vocabulary: its rows, its tokenizer, and the map between old and new ids.

The model is cut by a plan with `keep_V` like any other, so its logits are those of the parent at
the tokens that stay. The files beside it speak of the new ids.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import hybridlm
from experiments import artefacts
from experiments.mistakes import about
from hybridlm import config
from hybridlm.config import ModelConfig
from hybridlm.data import tokenizers, trim
from hybridlm.data.tokenizers import Bpe
from hybridlm.interop import beside, dispatch, folders, huggingface
from hybridlm.prune import trees
from hybridlm.prune.plan import Plan

# Files that say again what tokenizer.json does, and keys that name ids which may be gone.
_AGAIN = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids",
          "sequence_bias")
# Files with other keys of ids, which must stay, and how those keys end.
_SETTINGS, _ID = ("tokenizer_config.json", beside.GENERATION), "_token_id"
_SAMPLE = 200_000  # characters whose ids are turned back


class Job(NamedTuple):
  """What to trim: a model on disk, its tokenizer by name or path, and how many ids are to stay."""

  model: pathlib.Path
  tokenizer: str
  V: int
  target: pathlib.Path
  end: str | None = None
  format: str = "hybridlm"
  family: str | None = None


class Report(NamedTuple):
  """What came of it: ids, parameters, tokens and bytes of the counted text, before and after."""

  ids: tuple[int, int]
  parameters: tuple[int, int]
  tokens: tuple[int, int]
  bytes: int


def run(job: Job, texts: Sequence[str], *, say: Callable[[str], None]) -> Report:
  """Writes the trimmed model and returns what changed; the folder is whole or not there.

  Args:
    job: what is asked for.
    texts: what tokens are counted on.
    say: takes one line a step.

  Raises:
    FileNotFoundError: the model or the tokenizer is not there.
    ValueError: they do not belong together, V is out of range, the format cannot hold the model,
      or the target holds other things.
    RuntimeError: the trimmed tokenizer does not write the texts.
  """
  folders.check_target(job.target)
  cfg, _ = dispatch.open(job.model)
  tokenizer = tokenizers.load(job.tokenizer, end=job.end)
  if not isinstance(tokenizer, Bpe):
    raise ValueError(f"tokenizer {job.tokenizer!r} has no merges: there is nothing to trim")
  if tokenizer.V > cfg.real_vocabulary:
    raise ValueError(f"tokenizer {job.tokenizer!r} has {tokenizer.V} ids, the model {job.model} "
                     f"knows {cfg.real_vocabulary}: they do not belong together")
  found = beside.gather(job.model)
  count_V = trim.count(tokenizer, texts)
  with about(f"--V={job.V}"):
    keep_V = trim.keep(tokenizer, count_V, V=job.V, also=_ids(found))
  if job.format == "hf":
    huggingface.describe(_plan(cfg, "", keep_V).small_config(), job.family)
  small = Bpe(trim.trim(tokenizer, keep_V), end=_end(tokenizer), place="the trimmed tokenizer")
  tokens = check(tokenizer, small, keep_V, texts)
  say(f"tokens: {count_V.sum():,} with {tokenizer.V:,} ids, {tokens:,} with {small.V:,}")
  cfg, params = hybridlm.load(job.model)
  plan = _plan(cfg, trees.tree_hash(params), keep_V)
  small_cfg, small_params = hybridlm.cut(cfg, params, plan)
  remap = trim.Remap(keep_V, tokenizer.fingerprint, small.fingerprint)
  with tempfile.TemporaryDirectory() as folder:
    like = pathlib.Path(folder)
    write_like(like, found, small, remap)
    hybridlm.save(job.target, small_cfg, small_params, format=job.format, family=job.family,
                  like=like)
  parameters = config.parameters(cfg), config.parameters(small_cfg)
  say(f"parameters: {parameters[0]:,} before, {parameters[1]:,} after; logits of the tokens that "
      "stay are the parent's")
  size = sum(len(text.encode()) for text in texts)
  return Report((tokenizer.V, small.V), parameters, (int(count_V.sum()), tokens), size)


def _plan(cfg: ModelConfig, source: str, keep_V: np.ndarray) -> Plan:
  return Plan(cfg, source, {"keep_V": keep_V})


def _end(tokenizer: Bpe) -> str | None:
  """Returns the token that ends a text; None where the tokenizer has none of its own for it."""
  added = json.loads(tokenizer.text).get("added_tokens") or []
  own = [token["content"] for token in added if token["id"] == tokenizer.eot]
  return own[0] if own else None


def check(
  tokenizer: Bpe, small: Bpe, keep_V: np.ndarray, texts: Sequence[str]
) -> int:
  """Returns the tokens that texts have with the trimmed tokenizer, a sample of them turned back.

  Raises:
    RuntimeError: old ids of the trimmed text do not write the text, or the ends differ.
  """
  ids = small.encode_all(list(texts))
  room = _SAMPLE
  for text, each in zip(texts, ids, strict=True):
    room -= len(text)
    if room < 0 and text is not texts[0]:
      break
    if tokenizer.decode(keep_V[each]) != text:
      raise RuntimeError(f"trimming: {text[:40]!r} does not come back from the ids that stay")
  if keep_V[small.eot] != tokenizer.eot:
    raise RuntimeError(f"trimming: {small.eot} ends a text, which was {keep_V[small.eot]}")
  return sum(map(len, ids))


def write_like(
  folder: pathlib.Path, found: beside.Beside, small: Bpe, remap: trim.Remap
) -> None:
  """Fills a folder with the files beside the model, in new ids, and a config.json of the ids."""
  new = {int(old): at for at, old in enumerate(remap.keep_V)}
  for name, content in found.files.items():
    changed = _file(name, content, small, new)
    if changed is not None:
      (folder / name).write_bytes(changed)
  (folder / beside.TOKENIZER).write_text(small.text, encoding="utf-8", newline="\n")
  remap.save(folder / trim.REMAP)
  ids = {key: _renumbered(value, new) for key, value in found.ids.items()}
  family = {} if found.family is None else {"model_type": found.family}
  artefacts.write_json(folder / beside.CONFIG, family | ids)


def _file(name: str, content: bytes, small: Bpe, new: Mapping[int, int]) -> bytes | None:
  """Returns what a file says of the new ids; None for one that tokenizer.json replaces."""
  if name in _AGAIN:
    return None
  if name not in _SETTINGS:
    return content
  plain = folders.parse_json(content, name)
  made = {
    key: _renumbered(value, new) if key.endswith(_ID) else value
    for key, value in plain.items() if key not in _LISTS
  }
  if isinstance(made.get("added_tokens_decoder"), dict):
    made["added_tokens_decoder"] = {
      str(new[int(i)]): token for i, token in made["added_tokens_decoder"].items()
      if int(i) in new
    }
  return (json.dumps(made, indent=1) + "\n").encode()


def _ids(found: beside.Beside) -> list[int]:
  """Returns the ids that a model's files name: of beginnings, ends, padding and the like."""
  values = list(found.ids.values())
  for name in _SETTINGS:
    plain = folders.parse_json(found.files.get(name, b"{}"), name)
    values += [value for key, value in plain.items() if key.endswith(_ID)]
  listed = (value if isinstance(value, list) else [value] for value in values)
  return [i for each in listed for i in each if type(i) is int and i >= 0]


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
  """Returns an id, or a list of them, as the trimmed model has it; -1 and null stand for none."""
  if isinstance(value, list):
    return [_renumbered(each, new) for each in value]
  return new[value] if type(value) is int and value >= 0 else value
