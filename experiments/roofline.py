"""What a scan costs on paper, and what this machine's products and memory give when measured.

The counts of FLOPs are the same for every contender: whole Q x Q blocks, C B^T once a group, and a
forward with its backward as three forwards; only the chunk length Q is the contender's own.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
  """Sizes of one scan: groups, heads a group, head channels, state; and rows."""

  G: int
  H: int
  P: int
  N: int
  B: int = 1


SHAPES = {
  "8b": Shape(8, 16, 64, 128),  # Nemotron-H 8B
  "4b": Shape(8, 14, 64, 128),  # its pruned 4B
  "56b": Shape(8, 32, 64, 256),  # Nemotron-H 56B
  "nano": Shape(8, 16, 80, 128),  # Nemotron Nano 2, 12B
  "nano_pruned": Shape(8, 12, 80, 128),  # its pruned 9B
  "hymba": Shape(1, 50, 64, 16),
  "small": Shape(1, 16, 64, 128),  # fits a CPU; one group
  "small_groups": Shape(8, 2, 64, 128),  # the same heads in eight groups
  "toy": Shape(2, 3, 5, 7),  # seconds
}
PASSES = ("forward", "forward+backward")
# name -> sizes of the square product, the batched products, and elements streamed.
PROBES = {
  "cpu": (2048, (128, 256, 256, 64), 2**25),
  "gpu": (8192, (1024, 256, 256, 128), 2**28),
  "tpu": (8192, (1024, 256, 256, 128), 2**28),
}

SWEEPS = 8  # reads and writes of all elements in one call


class Peaks(NamedTuple):
  """Measured rates: FLOP/s of one large product and of batched small ones, bytes/s of memory."""

  matmul: float
  batched: float
  memory: float


def flops(shape: Shape, L: int, chunk: int, *, passes: str) -> float:
  """Returns the useful FLOPs of the matrix products over `L` tokens, in chunks of `chunk`.

  Source: Mamba-2 (arXiv 2405.21060), section 6: C B^T a group, then a head's Q x Q block against
  x, and the state's two products.
  """
  head = 2 * chunk * shape.P + 4 * shape.N * shape.P
  token = shape.G * (2 * chunk * shape.N + shape.H * head)
  return float(shape.B * L * token * (1 if passes == PASSES[0] else 3))


def traffic(shape: Shape, L: int, itemsize: int, *, passes: str) -> float:
  """Returns the bytes that any implementation must move: arguments read once, results written once.

  The backward reads the arguments again and y's cotangent, and writes theirs; dt is float32.
  """
  x, dt = shape.G * shape.H * shape.P * itemsize, shape.G * shape.H * 4
  bc = 2 * shape.G * shape.N * itemsize
  token = x + dt + bc + x
  if passes != PASSES[0]:
    token += (x + dt + bc + x) + (x + dt + bc)
  return float(shape.B * L * token)


def slow_path_bytes(shape: Shape, L: int, chunk: int) -> float:
  """Returns the bytes of the float32 [b, c, l, s, h, n] array of an uncontracted scan.

  transformers materialised it up to 5.13: 64 GiB at the 8B's heads, 8192 tokens and chunk 128.
  """
  return float(shape.B * L * chunk * shape.G * shape.H * shape.N * 4)


def probes(dtype: str) -> dict[str, tuple[Callable[[], object], float]]:
  """Returns name -> (a call, FLOPs or bytes of it): what `Peaks` is measured from."""
  side, (count, rows, inner, columns), size = PROBES[jax.default_backend()]
  keys = jax.random.split(jax.random.key(0), 5)
  square = [jax.random.normal(k, (side, side), dtype) for k in keys[:2]]
  left = jax.random.normal(keys[2], (count, rows, inner), dtype)
  right = jax.random.normal(keys[3], (count, inner, columns), dtype)
  flat = jax.random.normal(keys[4], (size,), dtype)
  wide = {"preferred_element_type": jnp.float32}
  dot = jax.jit(lambda a, b: jnp.matmul(a, b, **wide))
  # In place: a result of its own would measure how fast the system hands out pages.
  sweep = jax.jit(lambda a: jax.lax.fori_loop(0, SWEEPS, lambda _, a: -a, a), donate_argnums=0)
  held = [flat]

  def swept():
    held.append(sweep(held.pop()))
    return held[0]

  return {
    "matmul": (lambda: dot(*square), 2.0 * side**3),
    "batched": (lambda: dot(left, right), 2.0 * count * rows * inner * columns),
    "memory": (swept, 2.0 * SWEEPS * held[0].nbytes),
  }


def take_turns(calls: dict[Any, Callable[[], float]], turns: int) -> dict[Any, list[float]]:
  """Returns the seconds of each call's turns; all take turns, after one turn that is not counted.

  So whatever else the machine does slows all of them alike. Calls measure themselves.
  """
  seconds = {name: [] for name in calls}
  for turn in range(turns + 1):
    for name, call in calls.items():
      found = call()
      if turn:
        seconds[name].append(found)
  return seconds


def timed(call: Callable[[], object]) -> float:
  """Returns the seconds until what a call returns is ready."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def measure(dtype: str, turns: int) -> Peaks:
  """Returns the median rates of products and memory of this device in a dtype."""
  made = probes(dtype)
  calls = {name: functools.partial(timed, call) for name, (call, _) in made.items()}
  seconds = take_turns(calls, turns)
  return Peaks(**{name: made[name][1] / statistics.median(seconds[name]) for name in made})
