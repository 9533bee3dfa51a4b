"""The adapter to the lm-evaluation-harness: its requests, answered by a model's functions.

Importing this module needs the extra `harness`; nothing here needs torch.
"""

import difflib
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lm_eval
import numpy as np
import tqdm
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from hybridlm.eval import chat, requests, targets
from hybridlm.eval.prompts import Prompts

# `generate(token_BL, *, length_B, steps, temperature, top_k, top_p, seed, row_B, stop)` yields new
# ids, some columns [B, _] at a time, until all rows met an id of `stop`; prompts lie on the left of
# rows. What a row draws follows from `seed` and its number in `row_B`.
Generate = Callable[..., Iterator[Any]]
# Settings that change no text, by the value they may have; None: any.
_HARMLESS = {"use_cache": None, "num_return_sequences": 1, "num_beams": 1}
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class Adapter(LM):
  """A language model as the harness calls it.

  score: as `eval.targets.make` returns it.  params: of the model.  prompts: its texts and ids.
  vocabulary: ids the model knows.
  generate: continues prompts; None: tasks that generate are refused.  batch: rows a batch.
  length: positions the model reads at once.  steps: new tokens where a task does not say.
  seed: of sampled texts; what a request draws follows from it and the request's place in the list.
  """

  def __init__(
    self,
    score: targets.Score,
    params: Any,
    prompts: Prompts,
    *,
    vocabulary: int,
    generate: Generate | None = None,
    batch: int = 8,
    length: int = 2048,
    steps: int = 256,
    seed: int = 0,
  ):
    super().__init__()
    self._score, self._params, self._prompts = score, params, prompts
    self._vocabulary, self._seed = vocabulary, seed
    self._generate, self._batch, self._length, self._steps = generate, batch, length, steps

  def loglikelihood(self, instances: Sequence[Any]) -> list[tuple[float, bool]]:
    """Returns log-probability (nats) and greediness of each `(context, continuation)`."""
    prompts = self._prompts
    asked = [requests.pair(prompts.encode, *each.args, prefix=prompts.prefix)
             for each in instances]
    return [tuple(found) for found in self._run(asked, "loglikelihood")]

  def loglikelihood_rolling(self, instances: Sequence[Any]) -> list[float]:
    """Returns the log-probability (nats) of each `(text,)`, every token of it once."""
    asked, owner = [], []
    for number, each in enumerate(instances):
      ids = self._prompts.encode(each.args[0])
      found = requests.windows(ids, prefix=self._prompts.prefix, length=self._length)
      asked += found
      owner += [number] * len(found)
    totals = [0.0] * len(instances)
    for number, found in zip(owner, self._run(asked, "rolling loglikelihood"), strict=True):
      totals[number] += found.logprob
    return totals

  def _run(self, asked: Sequence[requests.Pair], name: str) -> list[requests.Result]:
    long = sum(len(one.context) + len(one.target) > self._length + 1 for one in asked)
    if long:
      logging.getLogger(__name__).warning(
        "%d of %d requests are longer than %d tokens: their contexts lose the left end",
        long, len(asked), self._length,
      )
    with tqdm.tqdm(total=len(asked), desc=name, disable=None) as bar:
      return requests.run(self._score, self._params, asked, vocabulary=self._vocabulary,
                          batch=self._batch, length=self._length, done=bar.update)

  def generate_until(self, instances: Sequence[Any]) -> list[str]:
    """Returns what the model writes after each `(context, settings)`, up to a stop string.

    Raises:
      ValueError: no `generate` was given, a setting is unknown, or no room is left for a prompt.
    """
    if self._generate is None:
      raise ValueError("a task generates text, and this model was given no way to generate")
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(instances):
      groups.setdefault(json.dumps(each.args[1], sort_keys=True), []).append(number)
    texts: dict[int, str] = {}
    with tqdm.tqdm(total=len(instances), desc="generate", disable=None) as bar:
      for numbers in groups.values():
        settings = _settings(instances[numbers[0]].args[1], self._steps)
        room = self._length - settings["steps"]
        if room < 1:
          raise ValueError(f"{settings['steps']} new tokens leave no room for a prompt in "
                           f"{self._length} positions")
        ids = {i: list(self._prompts.encode(instances[i].args[0]))[-room:] for i in numbers}
        order = sorted(numbers, key=lambda i: -len(ids[i]))
        for first in range(0, len(order), self._batch):
          chosen = order[first : first + self._batch]
          written = self._continue([ids[i] or [self._prompts.prefix] for i in chosen],
                                   numbers=chosen, **settings)
          texts |= zip(chosen, written, strict=True)
          bar.update(len(chosen))
    return [texts[number] for number in range(len(instances))]

  def _continue(
    self, prompts: list[list[int]], *, numbers: list[int], steps: int, stops: list[str],
    **sampling,
  ) -> list[str]:
    """Returns the texts a batch of prompts goes on with; `numbers` are those of the requests."""
    spare = self._batch - len(prompts)
    rows, row_B = prompts + prompts[:1] * spare, np.array(numbers + numbers[:1] * spare)
    length_B = np.array([len(row) for row in rows], np.int32)
    token_BL = np.zeros((len(rows), length_B.max()), np.int32)
    for token_L, row in zip(token_BL, rows, strict=True):
      token_L[: len(row)] = row
    ends, decode = self._prompts.ends, self._prompts.decode
    new: list[list[int]] = [[] for _ in prompts]
    live = set(range(len(prompts)))
    parts = self._generate(token_BL, length_B=length_B, steps=steps, stop=ends, seed=self._seed,
                           row_B=row_B, **sampling)
    for token_B in itertools.chain.from_iterable(np.asarray(part).T for part in parts):
      for row in tuple(live):
        new[row].append(int(token_B[row]))
        if requests.finished(new[row], stops, ends, decode):
          live.discard(row)
      if not live:
        break
    return [requests.before(decode([i for i in ids if i not in ends], False), stops) for ids in new]

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns a chat as a prompt; a template that refuses system messages goes without them."""
    template = self.chat_template(True)
    words = self._prompts.words
    users = [message for message in chat_history if message["role"] != "system"]
    if len(users) < len(chat_history) and not _takes_system(template, words):
      logging.getLogger(__name__).warning("the chat template refuses system messages: left out")
      chat_history = users
    return chat.render(template, chat_history, words=words, reply=add_generation_prompt)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the template of a name, True for the usual one; None where none is to be used.

    Raises:
      ValueError: the model has none of that name.
    """
    if chat_template is False or chat_template is None:
      return None
    name = "default" if chat_template is True else chat_template
    known = self._prompts.templates
    if name not in known:
      raise ValueError(f"{self._prompts.name} has no chat template {name!r}; it has "
                       f"{', '.join(sorted(known)) or 'none'}")
    return known[name]

  @property
  def tokenizer_name(self) -> str:
    """The name under which the harness remembers requests made with this tokenizer."""
    return self._prompts.name

  @property
  def max_length(self) -> int:
    """Positions the model reads at once."""
    return self._length


def evaluate(
  model: LM,
  names: Sequence[str],
  *,
  include_path: str | None = None,
  limit: int | None = None,
  chat: bool = False,
) -> dict[str, dict[str, Any]]:
  """Returns the harness's results by task: each metric and its standard error.

  Args:
    model: an `Adapter`, or any other model of the harness.
    names: tasks, groups, or YAML files.
    include_path: folder of task files beside the harness's own.
    limit: items of each task at most.
    chat: whether prompts are put into the model's chat template.

  Raises:
    ValueError: a task is unknown, named twice, or cannot be loaded with its data.
  """
  manager = _manager(names, include_path)
  for name in names:
    if name not in manager.all_tasks and not pathlib.Path(name).is_file():
      near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.0)
      raise ValueError(f"task {name!r} is unknown; nearest: {', '.join(near)}")
  found = lm_eval.simple_evaluate(
    model=model, tasks=list(names), task_manager=manager, limit=limit, apply_chat_template=chat,
    log_samples=False, torch_random_seed=None, bootstrap_iters=1000,
  )
  return {
    task: {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key}
    for task, metrics in found["results"].items()
  }


class _Tasks(TaskManager):
  """The harness's tasks, loaded one name after the other: a failure is that of a name."""

  def load(self, task_list: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns tasks and groups as the harness does; names that are given twice count once."""
    merged: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(task_list):
      try:
        found = super().load([name])
      except Exception as error:  # of the harness, of datasets, or of what a task's file names
        raise ValueError(f"task {name!r} cannot be loaded: {_cause(error)}") from error
      twice = sorted(set(found["tasks"]) & set(merged["tasks"]))
      if twice:
        raise ValueError(f"task {name!r} holds {twice[0]!r}, which another name holds too")
      for kind, known in merged.items():
        known |= found[kind]
    return merged


def _cause(error: Exception) -> str:
  """Returns what went wrong in one line, and what helps where the network was shut off."""
  said = f"{type(error).__name__}: {' '.join(str(error).split())}"
  if isinstance(error, ConnectionError) or "offline" in said.lower():
    said += "; HF_DATASETS_OFFLINE=0 HF_HUB_OFFLINE=0 in the environment let it use the network"
  return said


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
  """Returns the tasks there are; the harness's own, thousands of files, only where they matter."""
  if include_path is not None:
    local = _Tasks(include_path=include_path, include_defaults=False)
    if set(names) <= set(local.all_tasks) and not local.all_groups:
      return local
  return _Tasks(include_path=include_path)


def _settings(given: dict[str, Any], steps: int) -> dict[str, Any]:
  """Returns a task's generation settings as `generate` takes them, and its stop strings."""
  values = dict(normalize_gen_kwargs(given, steps))
  for key, value in sorted(values.items()):
    if key not in (*_KNOWN, *_HARMLESS):
      raise ValueError(f"generation setting {key!r} is unknown; known: {', '.join(_KNOWN)}")
    if _HARMLESS.get(key) is not None and value != _HARMLESS[key]:
      raise ValueError(f"generation setting {key}={value!r} must be {_HARMLESS[key]}")
  sampled, kept = values["do_sample"], values.get("top_k")
  return {
    "steps": values["max_gen_toks"],
    "stops": [stop for stop in values["until"] if stop],
    "temperature": float(values.get("temperature", 0.0)) if sampled else 0.0,
    "top_k": kept if sampled and kept is not None and kept > 0 else None,
    "top_p": values.get("top_p") if sampled else None,
  }


def _takes_system(template: str, words) -> bool:
  """Whether a template renders a chat that a system message opens."""
  probe = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
  try:
    chat.render(template, probe, words=words, reply=True)
  except ValueError:
    return False
  return True
