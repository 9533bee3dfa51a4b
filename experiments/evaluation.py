"""Numbers of the report: bits per byte, distance to the teacher, n-grams, speed on this machine."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hybridlm
from hybridlm import api
from hybridlm.config import ModelConfig
from hybridlm.data.pipeline import Batch, Corpus
from hybridlm.eval import lm, ngram

Model = tuple[ModelConfig, Mapping[str, Any]]


def quality(
  student: Model, teacher: Model, tests: Mapping[str, Sequence[Batch]], byte_lengths_V: np.ndarray
) -> dict[str, dict[str, float]]:
  """Returns, by the name of a test, the metrics of `eval.lm.report`: bits per byte, KL and more."""
  (cfg, params), (teacher_cfg, teacher_params) = student, teacher
  evaluate = lm.make(
    functools.partial(api.apply_hidden, cfg), bytes_V=jnp.asarray(byte_lengths_V),
    teacher=functools.partial(api.apply_hidden, teacher_cfg), vocabulary=cfg.real_vocabulary,
  )
  return {name: evaluate(params, teacher_params, batches) for name, batches in tests.items()}


def ngrams(
  corpus: Corpus, *, train: Sequence[str], test: Mapping[str, str], split: str, order: int
) -> dict[str, list[float]]:
  """Returns bits per byte of Witten–Bell n-grams of orders 1, 2, .., by the name of a test.

  Args:
    corpus: where the texts are.
    train: sources whose training split is counted.
    test: name -> source whose split is predicted, all of it.
    split: the split that is predicted.
    order: the largest.
  """
  texts = [document.text for source in train for document in corpus.documents(source, "train")]
  counted = ngram.fit(texts, order=order)
  return {
    name: ngram.bits_per_byte(
      counted, [document.text for document in corpus.documents(source, split)]
    ).tolist()
    for name, source in test.items()
  }


def forward_speed(models: Mapping[str, Model], batch: Batch, *, repeats: int) -> dict[str, float]:
  """Returns tokens a second of the forward pass and its loss, the median of interleaved repeats.

  The models take turns, so that whatever else the machine does slows all of them alike: numbers of
  two calls do not compare. Models of one config share a program.
  """
  programs = {cfg: jax.jit(hybridlm.language_loss(cfg)) for cfg, _ in models.values()}
  seconds: dict[str, list[float]] = {name: [] for name in models}
  for turn in range(repeats + 1):
    for name, (cfg, params) in models.items():
      start = time.perf_counter()
      jax.block_until_ready(programs[cfg](params, None, batch))
      if turn:  # the first turn compiles
        seconds[name].append(time.perf_counter() - start)
  tokens = batch["token_BL"].size
  return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def machine() -> str:
  """Returns the machine in words: devices, cores, architecture and JAX version."""
  kinds = sorted({device.device_kind for device in jax.devices()})
  cores = f", {len(os.sched_getaffinity(0))} cores" if hasattr(os, "sched_getaffinity") else ""
  return (
    f"{jax.device_count()} × {'/'.join(kinds)}{cores}, {platform.machine()}, JAX {jax.__version__}"
  )
