"""Whether a model on disk is the one it was made from: finite, equal block by block, or whole."""

import concurrent.futures
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import api, axes, config, lazy, strides
from hybridlm.config import Block, ModelConfig, block_name
from hybridlm.nn import lm
from hybridlm.prune import cut, stream
from hybridlm.prune.plan import Plan

# Largest difference, as a share of the largest output. Where the target has fewer digits the source
# is rounded first; what is stored as another number, like 1 + w as w, is rounded at another place.
TOLERANCE, NARROWED = 1e-4, 5e-2
# Bytes in float32 up to which whole models are compared, instead of one block after the other.
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


class Side(NamedTuple):
  """One of two models to compare."""

  cfg: ModelConfig
  leaves: lazy.Leaves


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


def compare(source: Side, made: Side, plan: Plan | None, *, narrowed: bool) -> float:
  """Returns the largest difference of outputs, as a share of the largest.

  The masked source and what was made of it run on random input in float32: as whole models where
  both are small, else block by block, with everything outside the blocks compared by value.

  Args:
    source: the parent.
    made: what was written, opened again.
    plan: what `made` keeps of it; None: everything.
    narrowed: whether weights lost digits.

  Raises:
    RuntimeError: they differ, or `made` is of another shape; names the place.
  """
  small = source.cfg if plan is None else plan.small_config()
  found, wanted = (
    (cfg.D, cfg.real_vocabulary, cfg.norm, cfg.eps, cfg.blocks) for cfg in (made.cfg, small)
  )
  if found != wanted:
    raise RuntimeError("conversion: the target read back is a model of another shape")
  tolerance = NARROWED if narrowed else TOLERANCE
  source = _rounded(source, made) if narrowed else source
  sizes = [4 * config.parameters(side.cfg) for side in (source, made)]
  errors = _whole(source, made, plan) if max(sizes) < SMALL else _parts(source, made, plan)
  for place, error in errors.items():
    if not error <= tolerance:
      raise RuntimeError(f"conversion: {place} of the target differs by {error:.2e} of the largest")
  return max(errors.values())


def _rounded(source: Side, made: Side) -> Side:
  """Returns the source with the digits that the target's leaves of the same name have."""
  short = np.dtype(jnp.bfloat16)
  names = {path.rpartition("/")[2] for path, leaf in made.leaves.items() if leaf.dtype == short}

  def fewer(path: str, leaf: lazy.Leaf) -> lazy.Leaf:
    if path.rpartition("/")[2] not in names:
      return leaf
    return lazy.Leaf(leaf.shape, short, lambda: leaf.read().astype(short))

  return Side(source.cfg, {path: fewer(path, leaf) for path, leaf in source.leaves.items()})


def _exact(cfg: ModelConfig) -> ModelConfig:
  return cfg.replace(dtype="float32", remat="none", ssd="reference", attention="xla", chunk=None)


def _tree(leaves: lazy.Leaves) -> dict[str, Any]:
  return lazy.tree({path: jnp.asarray(leaf.read()) for path, leaf in leaves.items()})


def _whole(source: Side, made: Side, plan: Plan | None) -> dict[str, float]:
  rng = np.random.default_rng(0)
  shape = (PROBE[0], min(PROBE[1], source.cfg.context or PROBE[1]))
  token_BL = jnp.asarray(rng.integers(0, source.cfg.real_vocabulary, shape), jnp.int32)
  params, kept = _tree(source.leaves), None
  if plan is not None:
    params, kept = cut.mask(source.cfg, params, plan)
  real = slice(None, source.cfg.real_vocabulary)
  want = api.apply(_exact(source.cfg), params, token_BL, kept=kept)[0][..., real]
  got = api.apply(_exact(made.cfg), _tree(made.leaves), token_BL)[0][..., real]
  return {"logits": _error(got, want)}


def _error(got: Any, want: Any) -> float:
  return float(jnp.abs(got - want).max() / jnp.maximum(jnp.abs(want).max(), 1e-30))


@functools.partial(jax.jit, static_argnames=("cfg", "block"))
def _added(cfg: ModelConfig, block: Block, leaves: Any, x_BLD: Any, kept: Any) -> jax.Array:
  """What a block adds to the residual stream, computed in float32; one program a kind of block."""
  leaves = {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}
  return lm.apply_block(cfg, block, leaves, x_BLD, **kept)[0] - x_BLD


def _parts(source: Side, made: Side, plan: Plan | None) -> dict[str, float]:
  plan = plan or Plan(source.cfg, "", {})
  errors = {}
  for path, leaf in made.leaves.items():
    if not path.startswith("blocks/"):
      errors[path] = _outside(source, path, leaf, plan)
  keep_D = plan.outside().get("keep_D", np.arange(source.cfg.D))
  small_BLD = SCALE * np.random.default_rng(0).standard_normal((*PROBE, len(keep_D)), np.float32)
  x_BLD = np.zeros((*PROBE, source.cfg.D), np.float32)
  x_BLD[..., keep_D] = small_BLD
  for new, old, theirs, ours in _blocks(source, made, plan):
    masked, kept = stream.mask_block(source.cfg, plan, old, theirs)
    want_BLD = _added(_exact(source.cfg), source.cfg.blocks[old], masked, x_BLD, kept)
    got_BLD = _added(_exact(made.cfg), made.cfg.blocks[new], ours, small_BLD, {})
    errors[f"block {new}"] = _error(got_BLD, want_BLD[..., keep_D])
    del theirs, ours, masked
  return errors


def _blocks(source: Side, made: Side, plan: Plan) -> Iterator[tuple[int, int, Any, Any]]:
  """Yields numbers and leaves of blocks on both sides; the next is read while one is compared."""

  def read(new: int, old: int) -> tuple[int, int, Any, Any]:
    return new, old, _folder(source.leaves, old), _folder(made.leaves, new)

  # From the first on: files are written backwards, and what came last is in the page cache.
  order = list(enumerate(plan.blocks))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(read, *order[0])
    for following in [*order[1:], None]:
      found = ahead.result()
      ahead = None if following is None else pool.submit(read, *following)
      yield found
      del found


def _folder(leaves: lazy.Leaves, index: int) -> dict[str, jax.Array]:
  prefix = f"blocks/{block_name(index)}/"
  return {
    path.removeprefix(prefix): jnp.asarray(strides.contiguous(leaf.read()))
    for path, leaf in leaves.items() if path.startswith(prefix)
  }


def _outside(source: Side, path: str, leaf: lazy.Leaf, plan: Plan) -> float:
  """Returns the largest difference of a leaf outside the blocks, as a share of the largest."""
  name = path.rpartition("/")[2]
  if path in source.leaves:
    want = stream.take(source.leaves[path].read(), axes.of(name), plan.outside())
  else:  # a tied head that the target spells out
    embed_VD = source.leaves["embed/w_embed_VD"].read()
    want = stream.take(embed_VD, "VD", plan.outside()).T
  got, worst, largest = leaf.read(), 0.0, 0.0
  want = want[tuple(slice(size) for size in got.shape)]  # padded vocabulary may be left out
  rows = max(1, PIECE * 64 * len(got) // max(1, got.size))
  for start in range(0, len(got), rows):
    one, two = (strides.contiguous(x[start : start + rows]).astype(np.float32) for x in (got, want))
    worst = max(worst, float(np.abs(one - two).max()))
    largest = max(largest, float(np.abs(two).max()))
  return worst / max(largest, 1e-30)
