"""The decode loop: a prompt at once, then several tokens a call, the state updated in place."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hybridlm.config import ModelConfig, attention_of
from hybridlm.decode import sampling

# Tokens a call where nobody watches: a call costs as much as some tokens of a small model.
CALL = 32


class Way(NamedTuple):
  """How tokens are drawn and what ends a row; None for `temperature` takes the largest logit."""

  key_B: jax.Array
  temperature: jax.Array | None
  top_p: jax.Array | None
  stop: jax.Array


class Run(NamedTuple):
  """Where decoding stands: tokens drawn so far, the last of each row, and the model's state."""

  count: jax.Array
  token_B: jax.Array
  done_B: jax.Array
  cache: Any


def bucket(size: int) -> int:
  """Returns the next size that programs are compiled for: at most a quarter more, 16 at least."""
  unit = max(16, (1 << (size - 1).bit_length()) // 8)
  return -(-size // unit) * unit


def generate(
  prefill: Callable, step: Callable, cfg: ModelConfig, params: Any, prompt_BL: Int[Any, "B L"],
  *, steps: int = 64, **options: Any,
) -> Int[np.ndarray, "B steps"]:
  """Returns the new tokens; after a stop token its row is filled with that token.

  Arguments and errors are those of `stream`.
  """
  parts = list(stream(prefill, step, cfg, params, prompt_BL, steps=steps, **options))
  rest = steps - sum(part.shape[1] for part in parts)
  return np.concatenate([*parts, np.repeat(parts[-1][:, -1:], rest, axis=1)], axis=1)


def stream(
  prefill: Callable,
  step: Callable,
  cfg: ModelConfig,
  params: Any,
  prompt_BL: Int[Any, "B L"],
  *,
  length_B: Int[Any, "B"] | None = None,
  steps: int = 64,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  row_B: Int[Any, "B"] | None = None,
  stop: Sequence[int] = (),
  every: int = CALL,
) -> Iterator[Int[np.ndarray, "B every"]]:
  """Returns an iterator over the new tokens, `every` columns at a time (the last may be fewer).

  It ends after `steps` tokens, or earlier with the last row's stop token; whoever needs no more
  stops asking. Calls of equal batch size and of prompt and total lengths in the same buckets
  share compiled programs.

  Args:
    prefill: `(cfg, params, token_BL, length_B, *, size) -> (logits_BV, cache)`; see `nn.serve`.
    step: `(cfg, params, cache, token_B) -> (logits_BV, cache)`. Both must be the same objects
      from call to call, as programs are kept by them.
    cfg: the model.
    params: what `prefill` and `step` take.
    prompt_BL: token ids, prompts on the left.
    length_B: real tokens of each prompt; None: all L.
    steps: new tokens at most.
    temperature: 0 takes the largest logit; see `sampling.draw` for this, `top_k` and `top_p`.
    top_k: None keeps all.
    top_p: None keeps all.
    seed: of the draws.
    row_B: a number for each row: equal numbers, prompts and seeds draw equal tokens, whatever
      else is in the batch. None: 0, 1, ..
    stop: ids that end their row.
    every: tokens between looks.

  Raises:
    ValueError: a prompt that is empty or of ids outside the vocabulary, lengths that do not fit,
      prompt and steps longer than the context of a model with attention, numbers that describe no
      draw, or logits that are not numbers.
  """
  prompt_BL, length_B = _prompt(cfg, prompt_BL, length_B)
  sampling.check(temperature=temperature, top_k=top_k, top_p=top_p)
  if steps < 1 or every < 1:
    raise ValueError(f"generation: steps={steps} and every={every} must be at least 1")
  _check_stop(cfg, stop)
  size = _size(cfg, int(length_B.max()), steps)
  row_B = np.arange(len(prompt_BL)) if row_B is None else np.asarray(row_B)
  way = Way(
    sampling.keys(seed, row_B),
    None if temperature == 0 else jnp.float32(temperature),
    None if temperature == 0 or top_p is None else jnp.float32(top_p),
    jnp.asarray(tuple(stop), jnp.int32),
  )
  kept = None if temperature == 0 else top_k
  return _stream(prefill, step, cfg, params, prompt_BL, length_B, size, way, kept, steps, every)


def _stream(prefill, step, cfg, params, prompt_BL, length_B, size, way, top_k, steps, every):
  """Yields the tokens; the arguments are checked by now."""
  run = _begin(
    cfg, params, prompt_BL, length_B, way, prefill=prefill, size=size, top_k=top_k
  )
  first, left = np.asarray(run.token_B)[:, None], steps - 1
  while True:
    number = min(every - first.shape[1], left)
    if number:
      run, token_Bn = _advance(
        cfg, params, run, jnp.int32(number), way, step=step, room=every, top_k=top_k
      )
      first = np.concatenate([first, np.asarray(token_Bn)[:, :number]], axis=1)
    if first.max() >= cfg.V:
      row = int(first.max(axis=1).argmax())
      raise ValueError(f"generation: the logits of row {row} are not numbers")
    left -= number
    yield first
    if not left or bool(run.done_B.all()):
      return
    first = first[:, :0]


@functools.partial(jax.jit, static_argnames=("cfg", "prefill", "size", "top_k"))
def _begin(cfg, params, prompt_BL, length_B, way, *, prefill, size, top_k) -> Run:
  """Returns the run with the first token drawn."""
  logits_BV, cache = prefill(cfg, params, prompt_BL, length_B, size=size)
  token_B = _draw(logits_BV, way, top_k, 0)
  return Run(jnp.int32(1), token_B, _ends(token_B, way.stop), cache)


@functools.partial(
  jax.jit, static_argnames=("cfg", "step", "room", "top_k"), donate_argnames="run"
)
def _advance(cfg, params, run, number, way, *, step, room, top_k):
  """Returns the run `number` tokens on, and them in the first columns of `room`.

  The loop ends early once all rows have ended: the remaining columns repeat their last token.
  """
  end = run.count + number

  def unfinished(carry):
    run, _ = carry
    return (run.count < end) & ~run.done_B.all()

  def body(carry):
    run, token_RB = carry
    logits_BV, cache = step(cfg, params, run.cache, run.token_B)
    drawn_B = _draw(logits_BV, way, top_k, run.count)
    token_B = jnp.where(run.done_B, run.token_B, drawn_B)
    row = run.count - (end - number)
    token_RB = jax.lax.dynamic_update_index_in_dim(token_RB, token_B, row, 0)
    done_B = run.done_B | _ends(token_B, way.stop)
    return Run(run.count + 1, token_B, done_B, cache), token_RB

  start, batch = run.count, run.token_B.shape[0]
  run, token_RB = jax.lax.while_loop(unfinished, body, (run, jnp.zeros((room, batch), jnp.int32)))
  drawn_R1 = (jnp.arange(room) < run.count - start)[:, None]
  return run, jnp.where(drawn_R1, token_RB, run.token_B).T


def _draw(logits_BV, way, top_k, count):
  """Returns token number `count` of each row."""
  if way.temperature is None:
    return sampling.greedy(logits_BV)
  key_B = jax.vmap(jax.random.fold_in, (0, None))(way.key_B, count)
  return sampling.draw(
    logits_BV, key_B, temperature=way.temperature, top_k=top_k, top_p=way.top_p
  )


def _ends(token_B: Int[Array, "B"], stop) -> Array:
  """Returns which rows end with their token; what is no token ends them too."""
  return (token_B[:, None] == stop).any(axis=1)


def _prompt(cfg, prompt_BL, length_B):
  """Returns the checked prompts, padded to a bucket, and their lengths."""
  prompt_BL = _whole("prompt_BL", prompt_BL)
  if prompt_BL.ndim != 2 or prompt_BL.size == 0:
    raise ValueError(f"generation: prompt_BL has shape {prompt_BL.shape}, it must hold a token")
  B, L = prompt_BL.shape
  length_B = np.full(B, L) if length_B is None else _whole("length_B", length_B)
  if length_B.shape != (B,):
    raise ValueError(f"generation: length_B has shape {length_B.shape}, prompts ask for ({B},)")
  if length_B.min() < 1 or length_B.max() > L:
    wrong = int(length_B.min() if length_B.min() < 1 else length_B.max())
    raise ValueError(f"generation: a prompt of {wrong} tokens is not one of 1..L={L}")
  real_BL = np.arange(L) < length_B[:, None]
  low, high = int(prompt_BL[real_BL].min()), int(prompt_BL[real_BL].max())
  if low < 0 or high >= cfg.V:
    wrong = low if low < 0 else high
    raise ValueError(f"generation: token id {wrong} is outside 0..V-1={cfg.V - 1}")
  longest = int(length_B.max())
  room = ((0, 0), (0, bucket(longest) - longest))
  real_BL = np.where(real_BL, prompt_BL, 0)[:, :longest]
  return np.pad(real_BL, room).astype(np.int32), length_B.astype(np.int32)


def _whole(name, array):
  """Returns an array of whole numbers, before any of them is narrowed."""
  array = np.asarray(array)
  if array.size and not np.issubdtype(array.dtype, np.integer):
    raise ValueError(f"generation: {name} has dtype {array.dtype}, it must hold whole numbers")
  return array


def _check_stop(cfg, stop):
  """Raises unless every stop token is one that can be predicted."""
  for token in stop:
    if not 0 <= token < cfg.V:
      raise ValueError(f"generation: stop token {token} is outside 0..V-1={cfg.V - 1}")


def _size(cfg, longest, steps):
  """Returns how many positions attention remembers at most; raises beyond the model's context."""
  if all(attention_of(block) is None for block in cfg.blocks):
    return 1  # nothing is remembered by position, whatever the length
  if cfg.context is not None and cfg.meta + longest + steps > cfg.context:
    meta = f"behind {cfg.meta} meta tokens " if cfg.meta else ""
    raise ValueError(
      f"generation: a prompt of {longest} tokens and {steps} new ones {meta}do not fit the context "
      f"of {cfg.context} tokens of this model with attention"
    )
  return bucket(longest + steps)
