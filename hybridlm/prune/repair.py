"""Repair of a cut model before any training: its output projections by least squares.

A cut leaves every projection back to the residual stream as it was, but feeds it fewer channels,
computed from fewer. On calibration rows the projection that does best with what it is now fed has a
closed form. With a the inputs of block b's projection in the cut model as it then is (`w_out` reads
`y_BLGHP`, `w_o` reads `head_BLKJE`, `w_down` reads `act_BLF`; of a parallel block's branches, both
together), and r what the cut block's tap lacks of the parent's on the channels D that stay, the
change is

  argmin over d, e of  sum over real tokens |r - a d - e|^2 + ridge * mean(diagonal) * |d|^2

where the diagonal is that of sum a a^T, and the shift e is there where the block has a bias on its
output (`b_o`, `b_down`; it then compensates for what was dropped on average, as FLAP does, arXiv
2312.11983, and sums are taken about their means). The penalty is on the change, not on the weights:
a projection that needs none gets none, and no change can be worse than none on these rows.

Both models run freely, each on its own residual stream: neither reads the other's activations.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hybridlm import axes
from hybridlm.config import Block, block_name
from hybridlm.prune.plan import Plan

# Output projection -> the tap it reads, and the bias on its output where the format has one.
PROJECTIONS: Mapping[str, tuple[str, str | None]] = {
  "w_out_GHPD": ("y_BLGHP", None),
  "w_o_KJED": ("head_BLKJE", "b_o_D"),
  "w_o_KJUD": ("head_BLKJU", "b_o_D"),
  "w_down_FD": ("act_BLF", "b_down_D"),
}
# Blocks in order, each on the outputs of repaired ones; or all at once, on those of the cut model.
ORDERS = ("one_by_one", "together")
# What is matched: the block's own output, or the residual stream after it, which also makes up for
# what blocks before it lost, and those that went; so it is for blocks one by one.
TARGETS = ("mix", "out")
# Before a projection is fitted: nothing, or one factor on the norm's gain (and bias), again by
# least squares. A root mean square over the channels that stay is not the one over all.
GAINS = ("none", "rescale")

Batch = Mapping[str, Any]
Apply = Callable[[Any, Batch, tuple[str, ...]], Mapping[str, Mapping[str, jax.Array]]]
Hidden = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


class Side(NamedTuple):
  """A model: `apply(params, batch, taps) -> taps` by block, `hidden(params, batch)`, parameters."""

  apply: Apply
  hidden: Hidden
  params: Mapping[str, Any]


class Sums(NamedTuple):
  """Sums over real tokens, of inputs a [inputs], what lacks r [D], and the weights of tokens.

  `aa` [inputs, inputs] and `ar` [inputs, D] are sums of products, `rr` and `tt` of squares of what
  lacks and of what it is measured against.
  """

  aa: np.ndarray
  ar: np.ndarray
  a: np.ndarray
  r: np.ndarray
  rr: np.ndarray
  tt: np.ndarray
  weight: np.ndarray


class Fit(NamedTuple):
  """What was lacking before and after, squared, as shares of the parent's tap squared."""

  before: float
  after: float


def solve(
  sums: Sums, *, ridge: float, bias: bool
) -> tuple[Float[np.ndarray, "inputs D"], Float[np.ndarray, "D"], float]:
  """Returns `(change, shift, lacking)`: what to add to the weights and the bias, and `rr` then.

  All in float64. Without `bias` the shift is zero.

  Raises:
    ValueError: sums that are not finite, or inputs so dependent that the ridge does not help.
  """
  if not all(np.isfinite(part).all() for part in sums):
    raise ValueError("activations are not finite")
  aa, ar, rr = sums.aa, sums.ar, float(sums.rr)
  if bias:
    aa = aa - np.outer(sums.a, sums.a) / sums.weight
    ar = ar - np.outer(sums.a, sums.r) / sums.weight
    rr = rr - float(sums.r @ sums.r / sums.weight)
  unit = np.trace(aa) / len(aa)
  change, shift = np.zeros_like(ar), np.zeros_like(sums.r)
  if unit > 0:
    try:
      change = np.linalg.solve(aa + ridge * unit * np.eye(len(aa)), ar)
    except np.linalg.LinAlgError as error:
      raise ValueError(f"ridge={ridge}: the inputs are linearly dependent") from error
  if bias:
    shift = (sums.r - sums.a @ change) / sums.weight
  lacking = rr - 2 * float((change * ar).sum()) + float((change * (aa @ change)).sum())
  if not np.isfinite(lacking) or not np.isfinite(shift).all():
    raise ValueError(f"ridge={ridge}: the least squares have no finite solution")
  if lacking > sums.rr:  # rounding, where nothing is to be gained
    return np.zeros_like(ar), np.zeros_like(sums.r), float(sums.rr)
  return change, shift, max(lacking, 0.0)


def repair(
  plan: Plan,
  parent: Side,
  small: Side,
  batches: Iterable[Batch],
  *,
  ridge: float,
  order: str = "one_by_one",
  target: str = "mix",
  gain: str = "none",
) -> tuple[dict[str, Any], dict[str, Fit]]:
  """Returns the cut model's repaired parameters, and how well each block's projection fits.

  Products are summed in float32 over the rows of a batch, in float64 over batches.

  Args:
    plan: what was cut.
    parent: the model it was cut from.
    small: the cut model.
    batches: dicts with `token_BL`, `weight_BL` (0 for padding, which never counts) and
      `segment_BL`; read several times.
    ridge: how strongly changes are held back, relative to the mean square of the inputs; positive.
    order: one of `ORDERS`.
    target: one of `TARGETS`.
    gain: one of `GAINS`.

  Raises:
    ValueError: an unknown name, "out" for blocks that are fitted together, a ridge that is not
      positive, no real token, or activations that are not finite; names the block.
  """
  for name, value, known in (("order", order, ORDERS), ("target", target, TARGETS),
                             ("gain", gain, GAINS)):
    if value not in known:
      raise ValueError(f"repair: {name}={value!r} is not one of {', '.join(known)}")
  if (order, target) == ("together", "out"):
    raise ValueError("repair: target='out' needs order='one_by_one': at once, every block would "
                     "make up for the same lack")
  if not 0 < ridge < np.inf:
    raise ValueError(f"repair: ridge={ridge} must be positive")
  batches = [{name: jnp.asarray(batch[name]) for name in batch} for batch in batches]
  if not any(float(np.sum(batch["weight_BL"])) for batch in batches):
    raise ValueError("repair: no batch holds a real token")
  blocks = {block_name(new): block_name(old) for new, old in enumerate(plan.blocks)}
  kinds = {block_name(new): block for new, block in enumerate(plan.small_config().blocks)}
  keep_D = plan.array("keep_D")
  keep_D = np.arange(plan.config.D) if keep_D is None else keep_D
  groups = [[name] for name in blocks] if order == "one_by_one" else [list(blocks)]
  params, fits = dict(small.params), {}
  for names in groups:
    matched = {name: blocks[name] for name in names}
    if gain == "rescale":
      params = _rescale(parent, small._replace(params=params), batches, matched, keep_D)
    params, found = _project(
      parent, small._replace(params=params), batches, matched, keep_D, f"{target}_BLD", ridge,
      kinds,
    )
    fits |= found
  if gain == "rescale":
    params = _rescale_final(parent, small._replace(params=params), batches, keep_D)
  return params, fits


def _total(fold, batches: Sequence[Batch], blocks: int, *params) -> Any:
  """Returns the float64 sums of what a fold gives for each batch.

  A fold of all blocks is one program, in which a tap dies as soon as it is summed. Folds of single
  blocks would be as many programs as blocks: they share that of the whole model instead, which
  holds the taps of a batch all at once.
  """
  fold, total = jax.jit(fold) if blocks > 1 else fold, None
  for batch in batches:
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(fold(*params, batch)))
    total = found if total is None else jax.tree.map(np.add, total, found)
  return total


_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _sums(a_TI, r_TD, t_TD, weight_T) -> Sums:
  """Returns the sums of one batch's rows, in float32."""
  a_TI, r_TD, t_TD = (x.astype(jnp.float32) for x in (a_TI, r_TD, t_TD))
  weighted = a_TI * weight_T[:, None]
  return Sums(
    aa=_einsum("ti,tj->ij", weighted, a_TI), ar=_einsum("ti,td->id", weighted, r_TD),
    a=weighted.sum(0), r=_einsum("t,td->d", weight_T, r_TD),
    rr=_einsum("t,td,td->", weight_T, r_TD, r_TD), tt=_einsum("t,td,td->", weight_T, t_TD, t_TD),
    weight=weight_T.sum(),
  )


class Reads(NamedTuple):
  """What a block writes to the residual stream: projections, the taps they read, biases."""

  leaves: tuple[str, ...]
  taps: tuple[str, ...]
  biases: tuple[str, ...]


FUSED = "w_out_YD"


def _reads(block: Block, folder: Mapping[str, Any]) -> Reads:
  """Returns the projections of a block that are fitted, together where there are two."""
  if FUSED in folder:
    parts = {"attention": block.attention, "ssm": block.ssm}
    heads = f"head_BLKJ{block.attention.value}" if block.attention else None
    taps = {"attention": heads, "ssm": "y_BLGHP"}
    return Reads((FUSED,), tuple(taps[name] for name, part in parts.items() if part), ())
  leaves = tuple(name for name in PROJECTIONS if name in folder)
  taps = tuple(PROJECTIONS[leaf][0] for leaf in leaves)
  return Reads(leaves, taps, tuple(bias for bias in ("b_o_D", "b_down_D") if bias in folder))


def _inputs(block: Block, reads: Reads, taps: Mapping[str, jax.Array]) -> jax.Array:
  """Returns what a block's projections read, inputs flat: [B, L, inputs]."""
  flat = [taps[tap].reshape(*taps[tap].shape[:2], -1) for tap in reads.taps]
  if reads.leaves != (FUSED,):
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=2)
  names = [name for name in ("attention", "ssm") if getattr(block, name)]
  met_BLY = jnp.zeros((*flat[0].shape[:2], block.fusion.Y), flat[0].dtype)
  for name, each in zip(names, flat, strict=True):
    met_BLY = met_BLY.at[..., np.asarray(block.fusion.places(name))].add(each / 2)
  return met_BLY


def _project(parent, small, batches, blocks, keep_D, target, ridge, kinds):
  """Returns the cut model's parameters with these blocks' projections fitted, and the fits."""
  folders = small.params["blocks"]
  every = {name: _reads(kinds[name], folder) for name, folder in folders.items()}
  taps = tuple(sorted({tap for reads in every.values() for tap in reads.taps} | {target}))

  def fold(params, parent_params, batch):
    mine = small.apply(params, batch, taps)
    theirs = parent.apply(parent_params, batch, (target,))
    weight_T = jnp.asarray(batch["weight_BL"], jnp.float32).ravel()
    made = {}
    for name, old in blocks.items():
      a = _inputs(kinds[name], every[name], mine[name])
      want = theirs[old][target][..., keep_D]
      rows = (x.reshape(weight_T.size, -1) for x in (a, want - mine[name][target], want))
      made[name] = _sums(*rows, weight_T)
    return made

  total = _total(fold, batches, len(blocks), small.params, parent.params)
  changed, fits = dict(folders), {}
  for name, sums in total.items():
    reads, folder = every[name], folders[name]
    try:
      change, shift, lacking = solve(sums, ridge=ridge, bias=bool(reads.biases))
    except ValueError as error:
      leaves = " and ".join(reads.leaves)
      raise ValueError(f"repair of block {name}, {leaves}: {error}") from error
    ends = np.cumsum([folder[leaf].size // len(keep_D) for leaf in reads.leaves])[:-1]
    new = {leaf: _added(folder[leaf], part)
           for leaf, part in zip(reads.leaves, np.split(change, ends), strict=True)}
    new |= {bias: _added(folder[bias], shift) for bias in reads.biases}
    changed[name] = {**folder, **new}
    scale = max(float(sums.tt), np.finfo(np.float32).tiny)
    fits[name] = Fit(float(sums.rr) / scale, lacking / scale)
  return {**small.params, "blocks": changed}, fits


def _added(leaf: Any, change: np.ndarray) -> jax.Array:
  """Returns a leaf with a change in float64, laid flat, added in its own dtype."""
  return (jnp.asarray(leaf) + jnp.asarray(change.reshape(leaf.shape), jnp.float32)).astype(
    leaf.dtype)


@jax.jit
def _factor_sums(mine_BLD, theirs_BLD, weight_BL):
  """Returns the sums that the best factor between two arrays is the quotient of."""
  weight_BL = jnp.asarray(weight_BL, jnp.float32)
  mine_BLD, theirs_BLD = mine_BLD.astype(jnp.float32), theirs_BLD.astype(jnp.float32)
  return (_einsum("bl,bld,bld->", weight_BL, mine_BLD, theirs_BLD),
          _einsum("bl,bld,bld->", weight_BL, mine_BLD, mine_BLD))


def _scaled(folder: Mapping[str, Any], sums: tuple[Any, Any], place: str):
  """Returns a folder whose norm gives its output times the best factor; only a positive one."""
  product, square = map(float, sums)
  if not np.isfinite(product) or not np.isfinite(square):
    raise ValueError(f"repair of {place}: activations are not finite")
  if product <= 0 or square <= 0:
    return dict(folder)
  return {
    name: (leaf * jnp.float32(product / square)).astype(leaf.dtype)
    if axes.stem(name) in ("norm_gain", "norm_bias") else leaf
    for name, leaf in folder.items()
  }


def _rescale(parent, small, batches, blocks, keep_D):
  """Returns the cut model's parameters with these blocks' norms scaled to the parent's."""

  def fold(params, parent_params, batch):
    mine = small.apply(params, batch, ("norm_BLD",))
    theirs = parent.apply(parent_params, batch, ("norm_BLD",))
    return {
      name: _factor_sums(
        mine[name]["norm_BLD"], theirs[old]["norm_BLD"][..., keep_D], batch["weight_BL"])
      for name, old in blocks.items()
    }

  total = _total(fold, batches, len(blocks), small.params, parent.params)
  folders = small.params["blocks"]
  changed = {name: _scaled(folders[name], sums, f"block {name}") for name, sums in total.items()}
  return {**small.params, "blocks": {**folders, **changed}}


def _rescale_final(parent, small, batches, keep_D):
  """Returns the cut model's parameters with the last norm scaled to the parent's."""

  def fold(params, parent_params, batch):
    mine, _ = small.hidden(params, batch)
    theirs, _ = parent.hidden(parent_params, batch)
    return _factor_sums(mine, theirs[..., keep_D], batch["weight_BL"])

  sums = _total(fold, batches, 1, small.params, parent.params)
  return {**small.params, "final": _scaled(small.params["final"], sums, "the last norm")}
