"""The whole Mamba-2 block and a hybrid of 12 layers against transformers, forward and backward.

python -m experiments.bench_blocks [--parts=block,model] [--turns=5] [--out=docs/results/blocks.md]

Needs torch and transformers. Both sides have the same weights and take turns on this machine, each
in a process of its own: what one leaves of the other's heap would cost it page faults. Values and
gradients are compared before anything is timed. Times are medians of the turns.
"""

import contextlib
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import hybridlm
from experiments import artefacts, bench_decode, console, evaluation, memory
from hybridlm import api
from hybridlm.distill import loss
from hybridlm.nn import mamba

BLOCK = {
  "vocab_size": 64, "hidden_size": 512, "intermediate_size": 64, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 32, "mamba_num_heads": 16, "mamba_head_dim": 64,
  "ssm_state_size": 128, "hybrid_override_pattern": "M",
}
GROUPS, LENGTHS = (1, 8), (512, 1024, 2048)
BATCHES = ((1, 1024), (1, 2048), (4, 1024))  # rows, tokens
CHUNKS = {"block": (64, 128, 256), "model": (128,)}
# Largest difference, as a share of the largest value: float32 sums in another order.
TOLERANCE = 1e-3


class Pair(NamedTuple):
  """One measurement: `theirs` takes a chunk size; both have arrays to be compared."""

  name: str
  theirs: "Side | Away"
  ours: "Side | Away"


def main(argv: Sequence[str]) -> None:
  """Measures, prints a table for each part, and writes them to `--out`.

  Raises:
    ValueError: a flag is wrong.
  """
  values = flags.FlagValues()
  flags.DEFINE_list("parts", ["block", "model"], "What to measure.", flag_values=values)
  flags.DEFINE_integer("turns", 5, "Times that each is measured.", flag_values=values)
  flags.DEFINE_string("out", None, "Markdown file to write.", flag_values=values)
  if not console.parse(values, argv, __doc__):
    return
  for part in values.parts:
    if part not in MAKERS:
      raise ValueError(f"--parts: {part!r} is not one of {', '.join(MAKERS)}")
  lines = []
  for part in values.parts:
    lines += [*table(apart(part), CHUNKS[part], values.turns), ""]
  command = " ".join(["python -m experiments.bench_blocks", *argv[1:]])
  text = "\n".join(["# Blocks", "", f"`{command}` on {evaluation.machine()}.", "", *lines])
  print(text)
  if values.out:
    artefacts.write_bytes(pathlib.Path(values.out), text.encode())


def table(pairs: Iterable[Pair], chunks: Sequence[int], turns: int) -> list[str]:
  """Returns a row a pair: transformers at every chunk size, hybridlm, and the best's ratio."""
  names = [f"transformers, chunk {chunk}, ms" for chunk in chunks]
  lines = [
    " | ".join(["| what", *names, "hybridlm, ms", "times |"]), "|---" * (len(chunks) + 3) + "|"
  ]
  ratios = []
  for pair in pairs:
    compare(pair, chunks)
    *theirs, ours = medians([*((pair.theirs, c) for c in chunks), (pair.ours,)], turns)
    ratios.append(min(theirs) / ours)
    cells = [pair.name, *(f"{t:.1f}" for t in (*theirs, ours)), f"{ratios[-1]:.2f}"]
    lines.append(f"| {' | '.join(cells)} |")
  mean = statistics.geometric_mean(ratios)
  return [*lines, "", f"Geometric mean {mean:.2f} times, least {min(ratios):.2f}."]


def compare(pair: Pair, chunks: Sequence[int]) -> None:
  """Raises RuntimeError where the two sides do not give the same values."""
  ours = pair.ours.values()
  for chunk in chunks:
    for got, want in zip(ours, pair.theirs.values(chunk), strict=True):
      error = np.abs(got - want).max() / np.abs(want).max()
      if not error < TOLERANCE:
        raise RuntimeError(f"{pair.name}, chunk {chunk}: {error:.1e} of the largest value apart")


def medians(jobs: Sequence[tuple], turns: int) -> list[float]:
  """Returns milliseconds of each job (a `Side` and its arguments), which take turns."""
  seconds = [[] for _ in jobs]
  for _ in range(turns):
    for (side, *arguments), found in zip(jobs, seconds, strict=True):
      found.append(side.seconds(*arguments))
  return [1e3 * statistics.median(found) for found in seconds]


class Side:
  """One side of a pair: a function of this process."""

  def __init__(self, run: Callable[..., list]):
    self._run = run

  def values(self, *arguments: int) -> list[np.ndarray]:
    """Returns what the function does."""
    return [np.asarray(v) for v in self._run(*arguments)]

  def seconds(self, *arguments: int) -> float:
    """Returns how long the function takes."""
    start = time.perf_counter()
    self._run(*arguments)
    return time.perf_counter() - start


class Away:
  """One side of the pair at hand in another process, which runs it and measures its own time."""

  def __init__(self, line: Connection, side: str):
    self._line, self._side = line, side

  def values(self, *arguments: int) -> list[np.ndarray]:
    """Returns what the function does."""
    self._line.send((self._side, "values", arguments))
    return self._line.recv()

  def seconds(self, *arguments: int) -> float:
    """Returns how long the function takes, without the way back."""
    self._line.send((self._side, "seconds", arguments))
    return self._line.recv()


def apart(part: str) -> Iterator[Pair]:
  """Yields the pairs of a part with each side in a process of its own; valid until the next.

  Raises EOFError where a process ended, whose traceback is on the standard error.
  """
  context = multiprocessing.get_context("spawn")
  with contextlib.ExitStack() as stack:
    lines = {}
    for side in ("theirs", "ours"):
      here, there = context.Pipe()
      worker = context.Process(target=serve, args=(part, there), daemon=True)
      worker.start()
      there.close()  # so that its end is seen here
      stack.callback(worker.join)
      lines[side] = stack.enter_context(here)
    names = [line.recv() for line in lines.values()]
    while None not in names:
      yield Pair(names[0], *(Away(line, side) for side, line in lines.items()))
      for line in lines.values():
        line.send(None)
      names = [line.recv() for line in lines.values()]


def serve(part: str, line: Connection) -> None:
  """Names each pair of a part in turn, and runs its sides until it is told to go on.

  Freed memory is kept, as commands that train keep it, whichever side this is.
  """
  memory.keep_freed()
  with contextlib.suppress(EOFError, BrokenPipeError):  # the other end went away
    for pair in MAKERS[part]():
      line.send(pair.name)
      while (job := line.recv()) is not None:
        side, what, arguments = job
        line.send(getattr(getattr(pair, side), what)(*arguments))
    line.send(None)


def both(settings: dict, *, seed: int = 0):
  """Returns transformers' model of `settings`, our config, and our parameters of its values."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.manual_seed(seed)
  model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**settings)).eval()
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    cfg, params = hybridlm.load(folder)
  return model, cfg, params


def blocks(settings: dict = BLOCK, lengths: Sequence[int] = LENGTHS) -> Iterable[Pair]:
  """Yields the Mamba-2 block, projections to output: forward, and with gradients of everything."""
  for groups in GROUPS:
    model, cfg, params = both(settings | {"n_groups": groups})
    mixer, leaves = model.model.layers[0].mixer, params["blocks"]["00"]
    for length in lengths:
      yield from _block(mixer, cfg, leaves, length, f"block, G={groups}, L={length}")


def _block(mixer, cfg, leaves, length, name) -> Iterable[Pair]:
  import torch

  rng = np.random.default_rng(length)
  x_BLD, weight_BLD = rng.standard_normal((2, 1, length, cfg.D)).astype(np.float32)
  x_here_BLD, weight_here_BLD = jnp.asarray(x_BLD), jnp.asarray(weight_BLD)

  def theirs(chunk):
    mixer.chunk_size = chunk
    with torch.no_grad():
      return [mixer(torch.from_numpy(x_BLD)).numpy()]

  def theirs_back(chunk):
    mixer.chunk_size = chunk
    mixer.zero_grad()
    given_BLD = torch.from_numpy(x_BLD).requires_grad_()
    mixer(given_BLD).backward(torch.from_numpy(weight_BLD))
    return [v.grad.numpy() for v in (given_BLD, mixer.A_log, mixer.D)]

  @jax.jit
  def run(leaves, x_BLD):
    return mamba.mix(cfg, cfg.blocks[0], leaves, x_BLD)[0]

  @jax.jit
  def back(leaves, x_BLD, weight_BLD):
    return jax.vjp(run, leaves, x_BLD)[1](weight_BLD)

  def ours():
    return [run(leaves, x_here_BLD).block_until_ready()]

  def ours_back():
    bars, x_bar_BLD = jax.block_until_ready(back(leaves, x_here_BLD, weight_here_BLD))
    return [x_bar_BLD, bars["a_log_GH"].ravel(), bars["skip_GH"].ravel()]

  yield Pair(f"{name}, forward", Side(theirs), Side(ours))
  yield Pair(f"{name}, forward and backward", Side(theirs_back), Side(ours_back))


def models(
  settings: dict = bench_decode.HYBRID, batches: Sequence[tuple[int, int]] = BATCHES
) -> Iterable[Pair]:
  """Yields a hybrid: logits, and the next-token loss with gradients of all parameters."""
  model, cfg, params = both(settings)
  for rows, length in batches:
    name = f"{len(cfg.blocks)} layers, {rows} × {length} tokens"
    yield from _model(model, cfg, params, (rows, length + 1), name)


def _model(model, cfg, params, shape, name) -> Iterable[Pair]:
  import torch

  token_BL = np.random.default_rng(shape[1]).integers(0, cfg.V, shape)
  source_BL, target_BL = torch.from_numpy(token_BL[:, :-1]), torch.from_numpy(token_BL[:, 1:])
  here_BL, next_BL = (jnp.asarray(v, jnp.int32) for v in (source_BL, target_BL))

  def logits(chunk):
    for layer in model.model.layers:
      if hasattr(layer.mixer, "chunk_size"):
        layer.mixer.chunk_size = chunk
    return model(source_BL, use_cache=False).logits

  def theirs(chunk):
    with torch.no_grad():
      return [logits(chunk).numpy()]

  def theirs_back(chunk):
    model.zero_grad()
    total = torch.nn.functional.cross_entropy(
      logits(chunk).flatten(0, 1), target_BL.flatten(), reduction="sum"
    )
    total.backward()
    return [total.detach().numpy(), model.model.embeddings.weight.grad.numpy()]

  @jax.jit
  def run(params, token_BL):
    return api.apply(cfg, params, token_BL)[0]

  @jax.jit
  def back(params, token_BL, target_BL):
    def total(params):
      hidden_BLD, head_DV = api.apply_hidden(cfg, params, {"token_BL": token_BL})
      weight_BL = jnp.ones(target_BL.shape, jnp.float32)
      return loss.sums(hidden_BLD, head_DV, target_BL, weight_BL, kl=0.0, ce=1.0)["loss"]

    return jax.value_and_grad(total)(params)

  def ours():
    return [run(params, here_BL).block_until_ready()]

  def ours_back():
    total, bars = jax.block_until_ready(back(params, here_BL, next_BL))
    return [total, bars["embed"]["w_embed_VD"]]

  yield Pair(f"{name}, forward", Side(theirs), Side(ours))
  yield Pair(f"{name}, forward and backward", Side(theirs_back), Side(ours_back))


MAKERS = {"block": blocks, "model": models}

if __name__ == "__main__":
  sys.exit(console.call(main, sys.argv))
