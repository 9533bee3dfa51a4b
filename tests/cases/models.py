"""Small models that every law is tried on: sizes pairwise different, gains and biases random."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import hybridlm
from hybridlm import axes, config
from hybridlm.config import KINDS, Fusion, Mamba1, Parallel, Rope, attention_of, ssm_of
from hybridlm.nn.lm import HybridLM
from hybridlm.prune import cut
from hybridlm.prune.plan import ALIKE, Plan, pairs
from hybridlm.prune.scores import Scores
from hybridlm.prune.trees import tree_hash

SIZES = {"V": 31, "D": 16, "F": 24, "K": 2, "J": 3, "E": 10, "G": 2, "H": 4, "P": 6, "N": 5, "W": 4}
PATTERN = "M-M*-"
# What a block of each kind takes of SIZES; side by side, U makes both branches 48 channels wide.
TAKES = {"M": "GHPNW", "C": "GHPW", "*": "KJE", "-": "F", "S": "HNRW", "=": "KJEUGHPNRW"}
SIDES = {
  "mamba2": {"U": 8, "chunk": 8},
  "mamba1": {"U": 8, "ssm": "mamba1", "G": 1, "H": 48, "P": 1, "R": 7, "chunk": 8},
}
SCORES = (
  "score_GHP", "score_GN", "score_KJ", "score_E", "score_F", "score_D", "score_U", "score_R",
)
VARIANTS = {
  "untied": {},
  "tied": {"tied": True},
  "layernorm": {
    "norm": "layernorm1p", "bias": True, "rope": Rope(rotary=4), "window": 9, "chunk": 8,
  },
  "swiglu": {"activation": "swiglu", "conv_bias": False, "bias": True, "chunk": 8},
}


def make(variant="untied", pattern=PATTERN, **changes):
  """Returns the config of a variant; `changes` override sizes and fields."""
  used = "VD" + "".join(TAKES[symbol] for symbol in set(pattern) & set(KINDS))
  sizes = {letter: size for letter, size in SIZES.items() if letter in used}
  return hybridlm.ModelConfig.from_pattern(pattern, **{**sizes, **VARIANTS[variant], **changes})


def hymba(ssm="mamba2", pattern="=-=-=-=-", **changes):
  """Returns a small Hymba: the first and the last layer global, those between share keys."""
  layers = pattern.count("=")
  shared = {"kv_groups": (tuple(range(1, layers - 1)),)} if layers > 3 else {}
  return make(pattern=pattern, **{
    **SIDES[ssm], **({"activation": "swiglu"} if "-" in pattern else {}), "rope": Rope(),
    "window": 11, "meta": 9, "tied": True,
    "global_layers": (0, layers - 1), **shared, **changes,
  })


def apart(cfg):
  """Returns a Hymba whose branches write other channels: those of one can be permuted alone."""
  def change(block):
    if not isinstance(block, Parallel):
      return block
    Y = block.Y
    return dataclasses.replace(block, fusion=Fusion("mean", 2 * Y, ((0, Y),), ((Y, 2 * Y),)))

  return cfg.replace(blocks=tuple(change(block) for block in cfg.blocks))


@functools.cache
def params(cfg, scale=1.0, seed=0):
  """Returns parameters with random gains and biases; projections are `scale` times the default."""
  rng = np.random.default_rng(seed)

  def change(path, leaf):
    name = path[-1].key
    if "gain" in name or name.startswith("skip"):
      return leaf * jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    if "bias" in name or name.startswith("b_"):
      return leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype)
    return leaf * scale if name.startswith("w_") else leaf

  return jax.tree_util.tree_map_with_path(change, drawn(cfg, seed))


def numbers(cfg, scale=0.1, seed=0):
  """Returns random parameters in the host's memory, gains and biases too: nothing is compiled."""
  rng = np.random.default_rng(seed)
  ranges = {"skip": (0.5, 1.5), "a_log": (0.0, 1.0), "dt_bias": (-2.0, 0.0)}

  def draw(name, shape):
    low_high = (0.5, 1.5) if "gain" in name else ranges.get(axes.stem(name))
    drawn = rng.uniform(*low_high, shape) if low_high else rng.normal(0, scale, shape)
    return drawn.astype(np.float32)

  return jax.tree_util.tree_map_with_path(
    lambda path, shape: draw(path[-1].key, shape), config.shapes(cfg),
    is_leaf=lambda leaf: isinstance(leaf, tuple))


class Leaves(HybridLM):
  """The leaves of a model without what runs on them."""

  @nn.compact
  def __call__(self):
    """Declares every leaf."""
    self._blocks()
    for name in ("embed", "final") if self.cfg.tied else ("embed", "final", "head"):
      self._folder(name)


@functools.cache
def drawn(cfg, seed=0):
  """Returns parameters as `hybridlm.init` draws them, up to rounding, once for a config.

  Not compiled as one program: draws of a shape are compiled once for all configs.
  """
  return Leaves(cfg).init(jax.random.key(seed))["params"]


def wide(tree):
  """Returns a tree's leaves as float64 arrays of NumPy's."""
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def tokens(cfg, shape=(2, 37), seed=1):
  """Returns random token ids."""
  return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.V, shape), jnp.int32)


def batches(cfg, count=2, shape=(3, 37), seed=2):
  """Returns random batches with two documents a row and some padding."""
  rng, made = np.random.default_rng(seed), []
  for _ in range(count):
    segment_BL = np.ones(shape, np.int32)
    for row in segment_BL:
      first, end = sorted(rng.integers(5, shape[1], 2))
      row[first:], row[end:] = 2, 0
    token_BL = rng.integers(0, cfg.V, shape).astype(np.int32)
    weight_BL = (segment_BL > 0).astype(np.float32)
    batch = {"token_BL": token_BL, "segment_BL": segment_BL, "weight_BL": weight_BL}
    made.append(batch | {"target_BL": np.roll(token_BL, -1, 1)})
  return made


def error(got, want):
  """Returns the largest difference as a share of the largest value."""
  return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def permute(cfg, tree, index, letter, order, *, across=False):
  """Returns the tree with one axis of block `index` (None: D or V of all) reordered.

  An order of two axes, `order_GH`, orders within each group; `across` orders all heads of a block
  at once. Of a parallel block, rows of the projection behind the mean go with the branch that
  writes them; the other must write others (`apart`).
  """

  def change(path, leaf):
    letters = axes.of(path[-1].key)
    where = [key.key for key in path]
    mine = index is None or (where[0] == "blocks" and where[1] == f"{index:02d}")
    if mine and path[-1].key == "w_out_YD":
      block = cfg.blocks[int(where[1])]
      for branch, other in (("attention", "ssm"), ("ssm", "attention")):
        own = _written(getattr(block, branch))
        if letter in own:
          places = np.array(block.fusion.places(branch))
          theirs = () if getattr(block, other) is None else block.fusion.places(other)
          assert set(places).isdisjoint(theirs)
          row = reorder(places.reshape([getattr(block, each) for each in own]), own)
          leaf = leaf.at[places].set(leaf[row.ravel()])
    return reorder(leaf, letters) if mine and letter in letters else leaf

  def reorder(leaf, letters):
    axis = letters.index(letter)
    if not across and np.ndim(order) == 1:
      return jnp.take(leaf, order, axis=axis)
    flat = leaf.reshape(*leaf.shape[: axis - 1], -1, *leaf.shape[axis + 1 :])
    rows = np.arange(flat.shape[axis - 1]).reshape(leaf.shape[axis - 1], -1)
    picked = order if across else np.take_along_axis(rows, order, axis=1).ravel()
    return jnp.take(flat, picked, axis=axis - 1).reshape(leaf.shape)

  return jax.tree_util.tree_map_with_path(change, tree)


def _written(part):
  """Returns the letters of the channels that a branch writes."""
  if part is None:
    return ""
  return f"KJ{part.value}" if hasattr(part, "value") else "GHP"


def scored(cfg, seed=0, **sums):
  """Returns random scores of every axis and depth of a model; those of a rotary pair are equal."""
  rng, made = np.random.default_rng(seed), {}
  for index, block in enumerate(cfg.blocks):
    for name in SCORES:
      if set(axes.of(name)) <= {"D", *block.axes}:
        made[f"{index:02d}/{name}"] = rng.uniform(1, 2, axes.shape(name, cfg.sizes(index)))
    if getattr(attention_of(block), "rope", None):
      score_E, half = made[f"{index:02d}/score_E"], pairs(block)
      score_E[half : 2 * half] = score_E[:half]
  for name in ("score_X", "score_ssm_X", "score_attention_X", "score_ssm_branch_X"):
    made[name] = rng.uniform(1, 2, len(cfg.blocks))
  made["score_M"] = rng.uniform(1, 2, cfg.meta)
  made = {path: value.astype(np.float32) for path, value in (made | sums).items()}
  return Scores(made, 1.0, {"parameters": "x"})


def plan(cfg, tree, sizes, seed=0):
  """Returns a plan that keeps random entries: sizes by letter, or by block index and letter.

  D, V, M and X (the blocks that stay, listed) are outside sizes. N=0 makes a block a gated
  convolution, K=0 and G=0 turn off a branch. Under rotary positions channels stay by pairs, and a
  share of the others. Blocks that read keys keep what the one that has them does.
  """
  rng, keep = np.random.default_rng(seed), {}

  def some(parent, size):
    return np.sort(rng.permutation(parent)[:size])

  for letter, size in sizes.items():
    if letter in ("D", "V", "M"):
      keep[f"keep_{letter}"] = some(getattr(cfg, letter), size)
  if "X" in sizes:
    keep["keep_X"] = sizes["X"]
  for index, block in enumerate(cfg.blocks):
    own = {**{k: v for k, v in sizes.items() if not isinstance(k, int)}, **sizes.get(index, {})}
    keep[f"{index:02d}"] = {}
    for letter in sorted(set(own) & set(block.axes)):
      if letter in "GP" and own[letter] and isinstance(ssm_of(block), Mamba1):
        continue
      outer = {"H": "G", "N": "G", "J": "K"}.get(letter, "")
      rows = [some(getattr(block, letter), own[letter]) for _ in range(getattr(block, outer, 1))]
      if letter == "E":
        rows = [channels(block, own["E"], rng)]
      keep[f"{index:02d}"][f"keep_{outer}{letter}"] = rows if outer else rows[0]
  for owner, *readers in cfg.kv_groups:
    theirs = {name: keep[f"{owner:02d}"][name] for name in ALIKE if name in keep[f"{owner:02d}"]}
    for index in readers:
      mine = keep[f"{index:02d}"]
      off = len(mine.get("keep_K", "on")) == 0
      rest = {name: rows for name, rows in mine.items() if name not in ALIKE}
      keep[f"{index:02d}"] = rest | theirs | ({"keep_K": []} if off else {})
  return Plan(cfg, tree_hash(tree), keep)


def parent_ids(cfg, plan):
  """Returns the parent's ids of the real tokens that stay."""
  row_V = plan.array("keep_V") if "keep_V" in plan.keep else np.arange(cfg.V)
  return row_V[row_V < cfg.real_vocabulary]


def both(cfg, params, plan, *, seed=1, segment_BL=None, shape=(2, 37)):
  """Returns the logits of the masked and of the cut model for the tokens both know."""
  small_cfg, small = cut.cut(cfg, params, plan)
  masked, kept = hybridlm.mask(cfg, params, plan)
  token_V = parent_ids(cfg, plan)
  token_BL = np.random.default_rng(seed).integers(0, len(token_V), shape)
  got = hybridlm.forward(cfg, masked, token_V[token_BL], segment_BL, kept=kept)
  want = hybridlm.forward(small_cfg, small, token_BL, segment_BL)
  assert np.isneginf(np.delete(got, token_V, axis=-1)).all()
  return got[..., token_V], want[..., : len(token_V)]


def channels(block, size, rng):
  """Returns `size` channels of an attention head, rotary ones by pairs."""
  half = pairs(block)
  turned = rng.permutation(half)[: max(half * size // block.E, 1)] if half else np.arange(0)
  free = 2 * half + rng.permutation(block.E - 2 * half)[: size - 2 * len(turned)]
  return np.sort([*turned, *(turned + half), *free])
