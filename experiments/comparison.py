"""Whether a model on disk is the one it was made from: finite, and equal leaf by leaf."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import api, axes, config, lazy, patterns, strides
from hybridlm.config import Block, ModelConfig, block_name
from hybridlm.nn import lm
from hybridlm.prune import cut, stream
from hybridlm.prune.plan import Plan

# Largest difference of outputs, as a share of the largest; the second where numbers that are stored
# as others, like 1 + w as w, lost digits there. Otherwise the source is rounded as the target is.
TOLERANCE, NARROWED = 1e-4, 1e-2
# Rounding of 1 + w that is stored as w in float32, as a share; and of w in bfloat16.
ULP, SHORT_ULP = 2.0**-22, 2.0**-8
# Bytes in float32 up to which whole models run, instead of one block after the other.
SMALL = 1 << 30
PROBE = (2, 37)
# Small beside what a normed block adds to it, so that adding it costs no digits.
SCALE = 1e-2
# Bits that are all set in a number that is not finite, as an unsigned whole number.
EXPONENTS: Mapping[str, tuple[type, int]] = {
  "bfloat16": (np.uint16, 0x7F80),
  "float16": (np.uint16, 0x7C00),
  "float32": (np.uint32, 0x7F800000),
}
PIECE = 1 << 18
# What is turned into the other side's memory order at once.
TURNED = 16 << 20


class Side(NamedTuple):
  """One of two models to compare."""

  cfg: ModelConfig
  leaves: lazy.Leaves


class _Asked(NamedTuple):
  """What a target may differ in: digits, and stems of leaves that it stores as other numbers."""

  dtype: str | None
  changed: tuple[str, ...]


def finite(path: str, leaf: lazy.Leaf, place: str) -> lazy.Leaf:
  """Returns the leaf with a read that raises where a value is infinite or not a number.

  Raises (when it is read):
    ValueError: names the leaf, `place` and the first such index.
  """

  def read() -> np.ndarray:
    array = leaf.read()
    kind, exponent = EXPONENTS[str(array.dtype)]
    bits = array.transpose(strides.memory_order(array)).view(kind)
    for piece in strides.pieces(bits, PIECE):
      if piece.size and int((piece & exponent).max()) == exponent:
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array.astype(np.float32)))[0])
        raise ValueError(
          f"{place}: leaf {path!r} holds {float(array[where])} at {where}; weights must be finite"
        )
    return array

  return lazy.Leaf(leaf.shape, leaf.dtype, read)


def compare(
  source: Side, made: Side, plan: Plan | None, *, dtype: str | None = None, published: bool = False
) -> float:
  """Returns the largest difference of outputs, as a share of the largest; 0 where none can be.

  Every leaf is compared by value with the source's, cut by the plan and rounded as asked: they are
  equal bit by bit, but for rounding in those that a published class stores as another number.
  Then the masked source and what was made of it run on random input in float32, which tells that
  the cut means what the plan says: as whole models where both are small, else block by block,
  without those that are equal and not cut. One leaf or block of each side is in memory, and the
  next.

  Args:
    source: the parent.
    made: what was written, opened again.
    plan: what `made` keeps of it; None: everything.
    dtype: the one asked for; None: leaves keep their digits.
    published: whether `made` is of a published class.

  Raises:
    RuntimeError: they differ, or `made` is of another shape; names the place.
  """
  small = source.cfg if plan is None else plan.small_config(source.cfg)
  found, wanted = (
    (cfg.D, cfg.real_vocabulary, cfg.norm, cfg.eps, len(cfg.blocks)) for cfg in (made.cfg, small)
  )
  same = found == wanted and all(map(_same, made.cfg.blocks, small.blocks))
  if not same or (made.cfg.tied and not source.cfg.tied):
    raise RuntimeError("verification: the target read back is a model of another shape")
  changed = ("norm_gain",) if published and made.cfg.norm == "layernorm1p" else ()
  asked, chosen = _Asked(dtype, changed), plan or Plan(source.cfg, "", {})
  whole = max(4 * config.parameters(side.cfg) for side in (source, made)) < SMALL
  exact = _outside(source, made, chosen, asked)
  errors = {}
  for index, equal, error in _inside(source, made, chosen, asked, outputs=not whole):
    exact &= equal
    errors[f"block {index}"] = error
  if whole:
    errors = {"logits": _logits(source, made, plan)}
  tolerance = TOLERANCE if exact or dtype != "bfloat16" else NARROWED
  for place, error in errors.items():
    if not error <= tolerance:
      raise RuntimeError(
        f"verification: {place} of the target differs by {error:.2e} of the largest"
      )
  return max(errors.values())


def _same(one: Block, other: Block) -> bool:
  """Whether blocks are equal, however they say by which angles their heads turn."""
  turned = [config.attention_of(block) for block in (one, other)]
  if not all(attention is not None and attention.rope for attention in turned):
    return one == other
  plain = [
    patterns.with_attention(block, dataclasses.replace(attention, rope=None))
    for block, attention in zip((one, other), turned, strict=True)
  ]
  angles = [attention.rope.frequencies(attention.E) for attention in turned]
  return plain[0] == plain[1] and len(angles[0]) == len(angles[1]) and np.allclose(
    *angles, rtol=1e-9, atol=0
  )


def _equal(path: str, got: np.ndarray, want: np.ndarray, asked: _Asked) -> bool:
  """Returns whether a leaf is the source's bit by bit, rounded if that was asked for.

  Raises:
    RuntimeError: it is not, and is none that is stored as another number or differs by more.
  """
  place, name = f"verification: leaf {path!r} of the target", path.rpartition("/")[2]
  narrower = got.dtype.itemsize < want.dtype.itemsize
  if got.shape != want.shape or (narrower and str(got.dtype) != asked.dtype):
    raise RuntimeError(f"{place} is {got.dtype} {got.shape}, not {want.dtype} {want.shape}")
  order, (kind, exponent) = strides.memory_order(got), EXPONENTS[str(got.dtype)]
  flat, at, exact = strides.contiguous(got.transpose(order)).reshape(-1), 0, True
  for piece in strides.pieces(want.transpose(order), TURNED):
    one = strides.contiguous(piece).reshape(-1).astype(flat.dtype, copy=False)
    two, at = flat[at : at + one.size], at + one.size
    if narrower and int((one.view(kind) & exponent).max()) == exponent:
      raise RuntimeError(f"{place}: {asked.dtype} cannot hold a value of the source")
    if np.array_equal(one.view(kind), two.view(kind)):
      continue
    exact, gap = False, np.abs(two.astype(np.float64) - one.astype(np.float64))
    if not np.all(gap <= _rounding(one.astype(np.float64), name, asked)):
      raise RuntimeError(f"{place} differs by up to {gap.max():.2e} from the source's")
  return exact


def _rounding(factor: np.ndarray, name: str, asked: _Asked) -> np.ndarray:
  """Returns how far values may be from those of the source, beyond the digits they have."""
  if axes.stem(name) not in asked.changed:
    return np.zeros_like(factor)
  short = SHORT_ULP * np.abs(factor - 1) if asked.dtype == "bfloat16" else 0.0
  return ULP * np.maximum(1, np.abs(factor)) + short


def _outside(source: Side, made: Side, plan: Plan, asked: _Asked) -> bool:
  """Compares the leaves outside the blocks; returns whether they are equal bit by bit."""

  def read(path: str) -> tuple[str, np.ndarray, np.ndarray]:
    name = path.rpartition("/")[2]
    if path in source.leaves:
      want = source.leaves[path].read()
    else:  # a tied head that the target spells out
      want = source.leaves["embed/w_embed_VD"].read().T
    # Padded rows of the vocabulary may be left out.
    real = tuple(slice(made.cfg.V if letter == "V" else None) for letter in axes.of(name))
    return path, made.leaves[path].read(), stream.take(want, axes.of(name), plan.outside())[real]

  paths = [path for path in made.leaves if not path.startswith("blocks/")]
  exact = True
  for path, got, want in _ahead([functools.partial(read, path) for path in paths]):
    exact &= _equal(path, got, want, asked)
    del got, want
  return exact


def _inside(
  source: Side, made: Side, plan: Plan, asked: _Asked, *, outputs: bool
) -> Iterator[tuple[int, bool, float]]:
  """Yields number, whether all leaves are equal, and difference of outputs of each block."""

  def read(new: int, old: int) -> tuple[int, int, Any, Any]:
    return new, old, _folder(source.leaves, old), _folder(made.leaves, new)

  keep_D = plan.outside().get("keep_D", np.arange(source.cfg.D))
  small_BLD = SCALE * np.random.default_rng(0).standard_normal((*PROBE, len(keep_D)), np.float32)
  x_BLD = np.zeros((*PROBE, source.cfg.D), np.float32)
  x_BLD[..., keep_D] = small_BLD
  # From the first on: files are written backwards, and what came last is in the page cache.
  steps = [functools.partial(read, *pair) for pair in enumerate(plan.blocks)]
  small = plan.small_config(source.cfg)
  for new, old, theirs, ours in _ahead(steps):
    inside, equal, error = plan.inside(old), True, 0.0
    for name, got in ours.items():
      scale = cut.query_scale(name, source.cfg.blocks[old], small.blocks[new])
      want = stream.scaled(stream.take(theirs[name], axes.of(name), inside), scale)
      equal &= _equal(f"blocks/{block_name(new)}/{name}", got, want, asked)
      theirs[name] = _as_rounded(theirs[name], got.dtype, scale)
      del want
    if outputs and (inside or not equal):
      leaves = {name: jnp.asarray(strides.contiguous(leaf)) for name, leaf in theirs.items()}
      masked, kept = stream.mask_block(source.cfg, plan, old, leaves)
      want_BLD = _added(_exact(source.cfg), source.cfg.blocks[old], masked, x_BLD, kept)
      leaves = {name: jnp.asarray(strides.contiguous(leaf)) for name, leaf in ours.items()}
      got_BLD = _added(_exact(made.cfg), made.cfg.blocks[new], leaves, small_BLD, {})
      error = _error(got_BLD, want_BLD[..., keep_D])
      del leaves, masked
    yield new, equal, error
    del theirs, ours


def _folder(leaves: lazy.Leaves, index: int) -> dict[str, np.ndarray]:
  prefix = f"blocks/{block_name(index)}/"
  return {
    path.removeprefix(prefix): leaf.read()
    for path, leaf in leaves.items() if path.startswith(prefix)
  }


def _ahead(steps: Sequence[Callable[[], Any]]) -> Iterator[Any]:
  """Yields what each step returns, while another thread works on the next."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = [pool.submit(step) for step in steps[:1]]
    for following in [*steps[1:], None]:
      found = coming.pop().result()
      if following is not None:
        coming.append(pool.submit(following))
      yield found
      del found


def _fewer(array: Any, dtype: np.dtype) -> Any:
  """Returns an array with no more digits than a dtype has."""
  return array.astype(dtype) if np.dtype(dtype).itemsize < array.dtype.itemsize else array


def _as_rounded(array: Any, dtype: np.dtype, scale: np.float32) -> Any:
  """Returns a leaf of the source as if it had been scaled, rounded, and scaled back."""
  if scale == 1:
    return _fewer(array, dtype)
  return _fewer(array * scale, dtype).astype(jnp.float32) / scale


def _exact(cfg: ModelConfig) -> ModelConfig:
  return cfg.replace(dtype="float32", remat="none", ssd="reference", attention="xla", chunk=None)


@functools.partial(jax.jit, static_argnames=("cfg", "block"))
def _added(cfg: ModelConfig, block: Block, leaves: Any, x_BLD: Any, kept: Any) -> jax.Array:
  """What a block adds to the residual stream, computed in float32; one program a kind of block."""
  leaves = {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}
  return lm.apply_block(cfg, block, leaves, x_BLD, **kept)[0] - x_BLD


def _error(got: Any, want: Any) -> float:
  return float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1e-30))


def _tree(leaves: lazy.Leaves) -> dict[str, Any]:
  return lazy.tree({path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()})


def _logits(source: Side, made: Side, plan: Plan | None) -> float:
  """Returns the largest difference of logits, as a share of the largest.

  The source is masked as it is, which its hash tells, and rounded like the target afterwards.
  """
  rng = np.random.default_rng(0)
  shape = (PROBE[0], min(PROBE[1], source.cfg.context or PROBE[1]))
  chosen = plan or Plan(source.cfg, "", {})
  small, token_V = chosen.small_config(source.cfg), chosen.tokens
  probe_BL = rng.integers(0, len(token_V), shape).astype(np.int32)
  params, kept = _tree(source.leaves), None
  if plan is not None:
    params, kept = cut.mask(source.cfg, params, plan)
  old = {block_name(new): index for new, index in enumerate(chosen.blocks)}
  rounded = dict(axes.leaves(params))
  for path, leaf in made.leaves.items():
    *folder, name = path.split("/")
    place, scale = path, np.float32(1)
    if folder[0] == "blocks":
      index = old[folder[1]]
      place = f"blocks/{block_name(index)}/{name}"
      scale = cut.query_scale(name, source.cfg.blocks[index], small.blocks[int(folder[1])])
    if place in rounded:  # a tied head may be spelled out
      rounded[place] = _as_rounded(rounded[place], leaf.dtype, scale)
  token_BL = jnp.asarray(token_V[probe_BL])
  want = api.apply(_exact(source.cfg), lazy.tree(rounded), token_BL, kept=kept)[0][..., token_V]
  got = api.apply(_exact(made.cfg), _tree(made.leaves), jnp.asarray(probe_BL))[0]
  return _error(got[..., : len(token_V)], want)
