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
HEADS = {"K": 2, "J": 3, "E": 10, "U": 7, "window": 5, "rope": ROPE}
MIXER = {"G": 2, "H": 4, "P": 6, "N": 5}
BLOCKS = (
  # Branches of other widths, which share some of the channels where they meet.
  Parallel(
    Attention(**HEADS, bias=True), Mamba(**MIXER, gate="none"),
    Fusion("mean", 55, ((0, 30), (40, 52)), ((5, 46), (48, 55))),
  ),
  Mlp(F=24),
  # Two more that read the keys of the first.
  Parallel(Attention(**HEADS, shared=True), Mamba(**MIXER), Fusion("sum")),
  Attention(**HEADS, shared=True, bias=True),
  Parallel(Attention(K=1, J=3, E=7), Mamba1(H=21, N=5, R=7), Fusion("mean", 21)),
  # One branch alone.
  Parallel(Attention(K=2, J=2, E=10, U=4, rope=ROPE), None, Fusion("mean", 16)),
  Parallel(None, GatedConv(G=2, H=2, P=6, W=3, gate="none"), Fusion("mean", 24)),
  Mamba(**MIXER, gate="before", conv_bias=False),
  Mamba1(H=33, N=4, R=3, W=2, norms=False),
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
