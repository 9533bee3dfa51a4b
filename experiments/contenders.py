"""Scans under one form, ours and peers', and the check that each must pass before it is timed."""

import importlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import mistakes, peers
from experiments.roofline import PASSES, SHAPES, Shape
from hybridlm.ops.ssd import api

RESULTS = ("y", "x_bar", "dt_bar", "a_bar", "b_bar", "c_bar")
# The widest floats of a platform, for the recurrence that everything is held to.
EXACT = {"cpu": "float64", "gpu": "float64", "tpu": "float32"}
BLOCK = 128  # tokens of the recurrence whose steps its gradient keeps at a time


class Case(NamedTuple):
  """One problem: a published shape by name, tokens, and the dtype of x, B and C."""

  shape: str
  L: int
  dtype: str

  @property
  def sizes(self) -> Shape:
    """The sizes behind the name."""
    return SHAPES[self.shape]


class Contender(NamedTuple):
  """A scan that is ready for a case, or the reason why it is not.

  calls: forward, and forward with backward: they start, and return y, or y and the cotangents of
  x, dt, a, b and c; `wait` waits for what they return.  temporary: peak bytes of both beside
  arguments and results, or None.  error: the largest that the check found.
  """

  label: str
  chunk: int
  calls: tuple[Callable, Callable] | None = None
  wait: Callable | None = None
  temporary: tuple[int | None, int | None] = (None, None)
  reason: str = ""
  error: float | None = None


def split(label: str) -> tuple[str, int | None]:
  """Returns name and chunk of `name@chunk`; None where no chunk is given.

  Raises:
    ValueError: no such implementation or peer, or a chunk that is no length.
  """
  name, at, chunk = label.partition("@")
  known = (*api.IMPLEMENTATIONS, *peers.PEERS)
  if name not in known:
    raise ValueError(f"contender {label!r}: {name!r} is not one of {', '.join(known)}")
  if at and not (chunk.isdecimal() and int(chunk) > 0):
    raise ValueError(f"contender {label!r}: the chunk {chunk!r} is not a number of tokens")
  if not at and name in peers.PEERS:
    raise ValueError(f"contender {label!r}: a peer takes a chunk, as in {name}@128")
  return name, int(chunk) if at else None


def own_chunk(name: str, case: Case, platform: str) -> int:
  """Returns the chunk that an implementation of ours takes by itself; the recurrence's is 1."""
  if name == "reference":
    return 1
  if name == "chunked":
    return api.CPU_CHUNK if platform == "cpu" else api.ACCELERATOR_CHUNK
  G, H, P, N, _ = case.sizes
  module = importlib.import_module(f"hybridlm.ops.ssd.{name}")
  return module.default_chunk(G, H, P, N, jnp.dtype(case.dtype))


def scan(name: str, chunk: int | None) -> Callable:
  """Returns `(x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN) -> y_BLGHP` of an implementation of ours."""
  return lambda *arrays: api.ssd(*arrays, impl=name, chunk=chunk)[0]


def inputs(case: Case, *, seed: int) -> dict[str, np.ndarray]:
  """Returns the arguments of a scan and y's cotangent by name, drawn as a model's would be."""
  rng = np.random.default_rng(seed)
  G, H, P, N, B = case.sizes
  tokens = (B, case.L, G)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype))

  return {
    "x_BLGHP": normal(*tokens, H, P),
    "dt_BLGH": rng.uniform(0.001, 0.1, (*tokens, H)).astype(np.float32),
    "a_GH": -rng.uniform(1, 16, (G, H)).astype(np.float32),
    "b_BLGN": normal(*tokens, N),
    "c_BLGN": normal(*tokens, N),
    "y_bar_BLGHP": normal(*tokens, H, P),
  }


def expected(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns y and the five cotangents of the token-by-token recurrence, in the widest floats."""
  exact = EXACT[jax.default_backend()]
  length = arrays["x_BLGHP"].shape[1]
  block = max(size for size in range(1, min(BLOCK, length) + 1) if length % size == 0)
  with jax.enable_x64(exact == "float64"):
    wide = [jnp.asarray(v.astype(exact)) for v in arrays.values()]

    def blocks(v_BL):
      return jnp.moveaxis(v_BL.reshape(v_BL.shape[0], -1, block, *v_BL.shape[2:]), 1, 0)

    def whole(x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN):
      @jax.checkpoint
      def step(state_BGHPN, part):
        x, dt, b, c = part
        y, state = api.ssd(x, dt, a_GH, b, c, state_BGHPN=state_BGHPN, impl="reference")
        return state, y

      B, _, G, H, P = x_BLGHP.shape
      state_BGHPN = jnp.zeros((B, G, H, P, b_BLGN.shape[-1]), exact)
      parts = [blocks(v) for v in (x_BLGHP, dt_BLGH, b_BLGN, c_BLGN)]
      y_CBQGHP = jax.lax.scan(step, state_BGHPN, parts)[1]
      return jnp.moveaxis(y_CBQGHP, 0, 1).reshape(x_BLGHP.shape)

    @jax.jit
    def both(args, y_bar):
      y, back = jax.vjp(whole, *args)
      return y, *back(y_bar)

    found = both(wide[:-1], wide[-1])
    return {name: np.asarray(v) for name, v in zip(RESULTS, found, strict=True)}


def prepare(
  label: str, case: Case, arrays: Mapping[str, np.ndarray], *, peers_path: str, platform: str
) -> Contender:
  """Returns a contender ready to run on a device of `platform`, or the reason why it cannot.

  Raises:
    ValueError: an unknown name, or a peer's path that holds no peer.
  """
  name, chunk = split(label)
  try:
    if name in peers.PEERS:
      fn = peers.load(name, peers_path, chunk)
      if peers.PEERS[name].framework == "torch":
        return Contender(label, chunk, *peers.torch_calls(fn, peers.merge(arrays), platform))
      return Contender(label, chunk, *peers.jax_calls(fn, peers.merge(arrays)))
    calls = {key.rpartition("_")[0]: v for key, v in arrays.items()}
    if chunk is None:
      chunk = own_chunk(name, case, platform)
    found = peers.jax_calls(scan(name, None if name == "reference" else chunk), calls)
    return Contender(label, chunk, *found)
  except peers.Missing as error:
    return Contender(label, chunk, reason=str(error))
  except Exception as error:
    # What a peer's name or path gets wrong is the user's mistake, not the peer's refusal.
    if name in peers.PEERS and mistakes.is_mistake(error):
      raise
    return Contender(label, chunk or 0, reason=refused(error))


def refused(error: Exception) -> str:
  """Returns why a contender did not run: our refusal, want of memory, or the error it died of.

  One contender's failure costs no other its numbers: it stands in the page.
  """
  text = " ".join(str(error).split())
  if mistakes.is_mistake(error):
    return text
  full = any(words in text for words in ("out of memory", "RESOURCE_EXHAUSTED"))
  kind = "out of memory" if full else f"failed with {type(error).__name__}"
  return f"{kind}: {text[:160]}"


def check(contender: Contender, want: Mapping[str, np.ndarray], *, tolerance: float) -> Contender:
  """Returns the contender if values and gradients are right, or else with the reason and no calls.

  Right means: ||got - want|| <= tolerance ||want||, for y of both calls and each cotangent.
  """
  forward, both = contender.calls
  try:
    found = {"y (forward)": forward()[0], **dict(zip(RESULTS, both(), strict=True))}
    found = {name: peers.fetch(v) for name, v in found.items()}
  except Exception as error:
    return contender._replace(calls=None, reason=refused(error))
  off = errors(found, want)
  name = max(off, key=lambda key: off[key] if off[key] == off[key] else np.inf)
  if not off[name] <= tolerance:
    reason = f"wrong: {name} is off by {off[name]:.1e} of its norm, more than {tolerance:g}"
    return contender._replace(calls=None, reason=reason, error=off[name])
  return contender._replace(error=off[name])


def seconds(call: Callable, wait: Callable, queued: int) -> float:
  """Returns the seconds of one of `queued` calls that are started together, then waited for.

  So on an accelerator the cost of starting a call hides behind the one before, as it does in a
  model.
  """
  start = time.perf_counter()
  for _ in range(queued):
    out = call()
  wait(out)
  return (time.perf_counter() - start) / queued


def errors(found: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns, by name, the norm of the difference over the norm of what is wanted."""
  off = {}
  for name, got in found.items():
    right = want[name.partition(" ")[0]].ravel()
    # A zero norm would divide away the difference.
    norm = max(float(np.linalg.norm(right)), np.finfo(np.float32).tiny)
    off[name] = float(np.linalg.norm(got.astype(np.float64).ravel() - right)) / norm
  return off


def cases(
  shapes: Sequence[str], lengths: Sequence[int], dtypes: Sequence[str], more=()
) -> list[Case]:
  """Returns the problems: every shape at every length, then the pairs `more`, in each dtype.

  Raises:
    ValueError: an unknown shape or dtype, or a length that is no number of tokens.
  """
  pairs = [*itertools.product(shapes, lengths), *more]
  for shape, L in pairs:
    if shape not in SHAPES:
      raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    if not (isinstance(L, int) and L > 0):
      raise ValueError(f"length {L!r} of shape {shape!r} is not a number of tokens")
  for dtype in dtypes:
    if dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16")
  return [Case(shape, L, dtype) for dtype in dtypes for shape, L in pairs]


def program(*, name: str, chunk: int | None, shape: str, L: int, dtype: str, passes: str):
  """Returns `(fn, argument shapes)` of an implementation of ours: what compilers are given."""
  case = Case(shape, L, dtype)
  G, H, P, N, B = case.sizes
  shapes = {
    "x": ((B, L, G, H, P), dtype), "dt": ((B, L, G, H), "float32"), "a": ((G, H), "float32"),
    "b": ((B, L, G, N), dtype), "c": ((B, L, G, N), dtype), "y_bar": ((B, L, G, H, P), dtype),
  }
  arguments = [jax.ShapeDtypeStruct(*v) for v in shapes.values()]
  fn = scan(name, chunk)

  def both(*args):
    y, back = jax.vjp(fn, *args[:-1])
    return y, *back(args[-1])

  return (fn, arguments[:-1]) if passes == PASSES[0] else (both, arguments)
