"""Inputs of the scan, and the scan in float64 numpy: shared by tests and benchmarks."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

B, L, G, H, P, N = 3, 37, 2, 4, 6, 5
ARRAYS = ("x_BLGHP", "dt_BLGH", "a_GH", "b_BLGN", "c_BLGN")


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and contents of one call; `resets` is the chance of a new segment at a token."""

  L: int = L
  G: int = G
  resets: float | None = None
  state: str = "zero"
  dtype: str = "float32"
  decay: float = 1.0
  skip: bool = False
  seed: int = 0


CASES = {
  "plain": Case(),
  "one_group": Case(G=1, seed=1),
  "whole_chunks": Case(L=32, seed=2),
  "one_token": Case(L=1, state="random", seed=3),
  "given_state": Case(state="random", skip=True, seed=4),
  "rare_resets": Case(resets=0.08, state="random", skip=True, seed=5),
  "resets_at_most_tokens": Case(resets=0.6, state="random", seed=6),
  "steep_decay": Case(resets=0.08, state="random", decay=30.0, seed=7),
  "bfloat16": Case(resets=0.08, state="random", dtype="bfloat16", skip=True, seed=8),
}
# Several chunks, the last one ragged; and as few as there may be.
CHUNKS = (8, 64)


def make(case: Case) -> dict:
  """Returns the arguments of `ssd` by name: numpy arrays, float32 or as the case says."""
  rng = np.random.default_rng(case.seed)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  def cast(array):
    return np.asarray(jnp.asarray(array, case.dtype))

  shape = (B, case.L, case.G)
  arguments = {
    "x_BLGHP": cast(normal(*shape, H, P)),
    "dt_BLGH": rng.uniform(0.01, 0.8, (*shape, H)).astype(np.float32),
    "a_GH": -case.decay * rng.uniform(0.1, 2, (case.G, H)).astype(np.float32),
    "b_BLGN": cast(normal(*shape, N)),
    "c_BLGN": cast(normal(*shape, N)),
    "skip_GH": None,
    "segment_BL": None,
    "state_BGHPN": None,
  }
  if case.resets is not None:
    # Only padding's id, 0, comes back after a gap.
    count_BL = np.cumsum(rng.random((B, case.L)) < case.resets, axis=1)
    arguments["segment_BL"] = np.where(count_BL % 3 == 0, 0, count_BL).astype(np.int32)
  if case.state == "random":
    arguments["state_BGHPN"] = normal(B, case.G, H, P, N)
  if case.skip:
    arguments["skip_GH"] = normal(case.G, H)
  return arguments


def rounding(*sizes: int) -> float:
  """Returns the share of the largest entry that float32 may lose in sums over axes of these sizes.

  Rounding errors add up like a random walk: with the root of the number of terms.
  """
  return 2 * float(np.finfo(np.float32).eps) * math.sqrt(math.prod(sizes))


def recurrence(
  x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN, skip_GH=None, segment_BL=None, state_BGHPN=None
):
  """Returns y and the last state in float64, one row, token and head at a time."""
  arrays = [np.asarray(v, np.float64) for v in (x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN)]
  x_BLGHP, dt_BLGH, a_GH, b_BLGN, c_BLGN = arrays
  B, L, G, H, P = x_BLGHP.shape
  y_BLGHP = np.zeros(x_BLGHP.shape)
  last_BGHPN = np.zeros((B, G, H, P, b_BLGN.shape[-1]))
  for row, g, h in np.ndindex(B, G, H):
    state_PN = last_BGHPN[row, g, h]
    if state_BGHPN is not None:
      state_PN += state_BGHPN[row, g, h]
    for t in range(L):
      if segment_BL is not None and t > 0 and segment_BL[row, t] != segment_BL[row, t - 1]:
        state_PN[:] = 0
      dt = dt_BLGH[row, t, g, h]
      state_PN *= np.exp(dt * a_GH[g, h])
      state_PN += dt * np.outer(x_BLGHP[row, t, g, h], b_BLGN[row, t, g])
      y_BLGHP[row, t, g, h] = state_PN @ c_BLGN[row, t, g]
  if skip_GH is not None:
    y_BLGHP += np.asarray(skip_GH, np.float64)[..., None] * x_BLGHP
  return y_BLGHP, last_BGHPN
