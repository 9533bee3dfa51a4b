"""Smaller vocabularies out of large ones: which tokens stay, and their tokenizer.

Byte-level BPE builds a token out of two parts by a merge. A token may stay only where its parts do,
so every text can still be written, with the bytes themselves if need be: nothing is lost but
length. New ids are the old ones in order; `keep_V[new] = old`.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsInt

import numpy as np
from jaxtyping import Int32, Int64

from hybridlm.data.tokenizers import Bpe, Tokenizer

FORMAT = "hybridlm-remap-1"
REMAP = "remap.json"
# In a tokenizer's JSON: what names ids or tokens outside its vocabulary, as the library writes it.
_PAIRS = ("sep", "cls")


class _Merge(NamedTuple):
  """A token and the two that it is made of, by id."""

  token: int
  parts: tuple[int, int]


class Remap(NamedTuple):
  """Old ids in the order of new ones, and the fingerprints of both tokenizers."""

  keep_V: Int32[np.ndarray, "V"]
  parent: str
  trimmed: str

  def save(self, path: str | os.PathLike) -> None:
    """Writes the map as JSON, whole or not at all."""
    plain = {"format": FORMAT, "old_of_new": self.keep_V.tolist(), "parent": self.parent,
             "trimmed": self.trimmed}
    part = pathlib.Path(f"{os.fspath(path)}.part")
    part.write_text(json.dumps(plain) + "\n", encoding="utf-8")
    os.replace(part, path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Remap":
    """Returns the map that a file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no map of ids, or its ids do not ascend.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f"{path}: no such file")
    try:
      plain = json.loads(path.read_text(encoding="utf-8"))
      if plain["format"] != FORMAT:
        raise ValueError(f"its format is {str(plain['format'])[:40]!r}, not {FORMAT!r}")
      ids = plain["old_of_new"]
      if not all(type(i) is int for i in ids) or ids != sorted(set(ids)) or min(ids) < 0:
        raise ValueError("its ids are not whole numbers in ascending order")
      return cls(np.array(ids, np.int32), str(plain["parent"]), str(plain["trimmed"]))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path} is not a remap of token ids: {error}") from error


def count(tokenizer: Tokenizer, texts: Iterable[str]) -> Int64[np.ndarray, "V"]:
  """Returns how often each id comes in texts."""
  count_V = np.zeros(tokenizer.V, np.int64)
  for ids in tokenizer.encode_all(list(texts)):
    count_V += np.bincount(ids, minlength=tokenizer.V)
  return count_V


def keep(
  tokenizer: Bpe, count_V: Int64[np.ndarray, "V"], *, V: int, also: Iterable[SupportsInt] = ()
) -> Int32[np.ndarray, "kept"]:
  """Returns the ids that stay in a vocabulary of V, ascending.

  All bytes, all special and added tokens, the one that ends a text and `also` stay. Of the others
  those stay that are built most often when the counted texts are encoded, as tokens or as parts of
  tokens. A token's parts are built at least as often, so they stay with it. Where a token goes,
  each of its places has one token more, its two parts (parts may then find other partners): but
  for that, no other choice of closed vocabularies of this size has fewer tokens.

  Raises:
    ValueError: V has no room for what must stay, or is more than there is; counts of other ids.
  """
  parts = json.loads(tokenizer.text)
  vocab = _vocab(parts)
  if count_V.shape != (tokenizer.V,):
    raise ValueError(f"counts are of {count_V.shape[0]} ids, the tokenizer has {tokenizer.V}")
  known = set(vocab.values()) | {tokenizer.eot}
  stay = _fixed(parts, vocab) | {tokenizer.eot} | {int(i) for i in also}
  outside = sorted(stay - known)
  if outside:
    raise ValueError(f"id {outside[0]} is to stay, and no token of the tokenizer has it")
  merges = _merges(parts, vocab)
  stay = _closed(stay, merges)
  if not len(stay) <= V <= len(known):
    raise ValueError(f"V={V} must lie between {len(stay)}, the bytes, the special tokens and the "
                     f"end, and {len(known)}, all there are")
  order = _order(sorted(known), merges, count_V)
  chosen = [i for i in order if i not in stay][: V - len(stay)]
  return np.array(sorted(stay | set(chosen)), np.int32)


def trim(tokenizer: Bpe, keep_V: Sequence[int] | Int32[np.ndarray, "kept"]) -> str:
  """Returns the JSON of the tokenizer that knows only these ids, renumbered in order.

  A text whose ids all stay is encoded as before; every other text, into tokens that stay.

  Raises:
    ValueError: a token would stay without its parts, or a byte or special token would not.
  """
  ids = [int(i) for i in keep_V]
  new = {old: at for at, old in enumerate(ids)}
  parts = json.loads(tokenizer.text)
  vocab = _vocab(parts)
  missing = sorted((_fixed(parts, vocab) | {tokenizer.eot}) - set(new))
  if missing:
    raise ValueError(f"keep_V leaves out id {missing[0]}: bytes, special tokens and the end stay")
  merges = _merges(parts, vocab)
  torn = next((m for m in merges if m.token in new and not set(m.parts) <= set(new)), None)
  if torn is not None:
    raise ValueError(f"keep_V keeps id {torn.token} without its parts {torn.parts}")
  model = parts["model"]
  model["vocab"] = {
    token: new[i] for token, i in sorted(model["vocab"].items(), key=lambda item: item[1])
    if i in new
  }
  model["merges"] = [
    pair for pair, merge in zip(model["merges"], merges, strict=True) if merge.token in new
  ]
  parts["added_tokens"] = [
    {**added, "id": new[added["id"]]} for added in parts.get("added_tokens") or []
  ]
  parts["post_processor"] = _renumbered(parts.get("post_processor"), new)
  padding = parts.get("padding")
  if padding:
    kept = padding["pad_id"] in new
    parts["padding"] = {**padding, "pad_id": new[padding["pad_id"]]} if kept else None
  return json.dumps(parts, ensure_ascii=False) + "\n"


def _vocab(parts: Mapping[str, Any]) -> dict[str, int]:
  """Returns id by token, added ones included."""
  added = {token["content"]: token["id"] for token in parts.get("added_tokens") or []}
  return parts["model"]["vocab"] | added


def _fixed(parts: Mapping[str, Any], vocab: Mapping[str, int]) -> set[int]:
  """Returns the ids of single bytes, of added tokens and of the one for what is unknown."""
  bytes_ = {i for token, i in parts["model"]["vocab"].items() if len(token) == 1}
  added = {token["id"] for token in parts.get("added_tokens") or []}
  unknown = parts["model"].get("unk_token")
  return bytes_ | added | ({vocab[unknown]} if unknown in vocab else set())


def _merges(parts: Mapping[str, Any], vocab: Mapping[str, int]) -> list[_Merge]:
  """Returns the merges in their order; the JSON has them as pairs, or with a space between.

  Raises:
    ValueError: tokens are marked as beginnings or ends of words, or one of a merge is missing.
  """
  for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
    if parts["model"].get(mark):
      raise ValueError(f"the tokenizer marks parts of words ({mark}="
                       f"{parts['model'][mark]!r}): its tokens are not their parts side by side")
  found = []
  for pair in parts["model"]["merges"]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    missing = [token for token in (left, right, left + right) if token not in vocab]
    if missing:
      raise ValueError(f"the tokenizer merges {left!r} and {right!r} and has no {missing[0]!r}")
    found.append(_Merge(vocab[left + right], (vocab[left], vocab[right])))
  return found


def _closed(stay: set[int], merges: Sequence[_Merge]) -> set[int]:
  """Returns ids with their parts, their parts' parts, and so on."""
  closed, of = set(stay), _parts(merges)
  waiting = list(stay)
  while waiting:
    for part in of.get(waiting.pop(), ()):
      if part not in closed:
        closed.add(part)
        waiting.append(part)
  return closed


def _parts(merges: Sequence[_Merge]) -> dict[int, tuple[int, ...]]:
  """Returns the parts by token; one that several merges make has the parts of all of them."""
  of: dict[int, tuple[int, ...]] = {}
  for merge in merges:
    of[merge.token] = (*of.get(merge.token, ()), *merge.parts)
  return of


def _order(
  ids: Sequence[int], merges: Sequence[_Merge], count_V: Int64[np.ndarray, "V"]
) -> list[int]:
  """Returns ids, those first that are built most often; parts stand before what they make.

  Of ids that are built equally often those of fewer steps come first, then those merged earlier;
  what no merge makes and no byte is can only come from whole words, and stands last.
  """
  of, rank = _parts(merges), {}
  for at, merge in enumerate(merges):
    rank.setdefault(merge.token, at)
  level: dict[int, int] = {}
  for token in ids:
    _find_level(token, of, level)
  built = {token: int(count_V[token]) for token in ids}
  for token in sorted(of, key=lambda token: -level[token]):
    for part in of[token]:
      built[part] += built[token]
  return sorted(ids, key=lambda i: (-built[i], level[i], rank.get(i, len(merges)), i))


def _find_level(token: int, of: Mapping[int, tuple[int, ...]], level: dict[int, int]) -> None:
  """Writes how many merges stand above one another in a token: 0 where there is none."""
  waiting = [token]
  while waiting:
    last = waiting[-1]
    open_parts = [part for part in of.get(last, ()) if part not in level]
    if open_parts:
      waiting += open_parts
      continue
    level[last] = 1 + max((level[part] for part in of[last]), default=0) if last in of else 0
    waiting.pop()


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
  """Returns a post-processor, which may add special tokens by id, with new ids."""
  if not isinstance(processor, dict):
    return processor
  made = dict(processor)
  if "processors" in made:
    made["processors"] = [_renumbered(each, new) for each in made["processors"]]
  for name in _PAIRS:
    if isinstance(made.get(name), list):
      made[name] = [made[name][0], new[made[name][1]]]
  if isinstance(made.get("special_tokens"), dict):
    made["special_tokens"] = {
      token: {**each, "ids": [new[i] for i in each["ids"]]}
      for token, each in made["special_tokens"].items()
    }
  return made
