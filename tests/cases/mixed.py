"""A model of blocks of every kind: shared keys, sums, means, branches that are off or narrower."""

import jax.numpy as jnp
import numpy as np

from hybridlm import axes, config
from hybridlm.config import (
  Attention,
  Fusion,
  GatedConv,
  Mamba,
  Mamba1,
  Mlp,
  ModelConfig,
  Parallel,
  Rope,
)

ROPE = Rope(base=50.0, rotary=4)
SIZES = {"K": 2, "J": 3, "E": 10, "window": 5, "rope": ROPE}
BLOCKS = (
  Attention(**SIZES, bias=True, U=7),
  Mlp(F=24),
  # A sum whose attention reads keys of the first block.
  Parallel(Attention(**SIZES, U=7, shared=True), Mamba(G=2, H=4, P=6, N=5), Fusion("sum")),
  Attention(**SIZES, U=7, shared=True),
  # Means of one branch alone.
  Parallel(None, Mamba1(H=21, N=5, R=7, norms=False), Fusion("mean", 21)),
  Parallel(Attention(K=2, J=3, E=10), None, Fusion("mean", 60)),
  # Branches of other widths, which share some of the channels where they meet.
  Parallel(
    Attention(K=2, J=1, E=10, U=9, shared=False, bias=True, rope=ROPE),
    GatedConv(G=2, H=2, P=6, W=3, gate="none"),
    Fusion("mean", 29, ((0, 12), (23, 29)), ((5, 29),)),
  ),
  Mamba(G=2, H=4, P=6, N=5, gate="before", conv_bias=False),
  Mamba1(H=33, N=4, R=3, W=2),
)


def make(**changes):
  """Returns its config, with fewer meta tokens than a convolution reaches back."""
  return ModelConfig(**{"V": 31, "D": 16, "blocks": BLOCKS, "meta": 2, "chunk": 8} | changes)


# How leaves are drawn whose names begin so; all others are normal, a third wide.
DRAWS = {
  "a_log": lambda rng, shape: np.log(rng.uniform(1, 4, shape)),
  "dt_bias": lambda rng, shape: rng.uniform(-3, 0, shape),
  "skip": lambda rng, shape: rng.uniform(0.5, 1.5, shape),
}


def params(cfg, seed=0):
  """Returns random parameters of a config, drawn without compiling anything."""
  rng, tree = np.random.default_rng(seed), {}
  for path, shape in axes.leaves(config.shapes(cfg)):
    *folders, name = path.split("/")
    gain = "skip" if "gain" in name else axes.stem(name)
    draw = DRAWS.get(gain, lambda rng, shape: rng.normal(0, 0.3, shape))
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = jnp.asarray(draw(rng, shape), jnp.float32)
  return tree
