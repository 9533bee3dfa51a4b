"""Inputs of the selective scan, and the scan in float64 numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np

B, L, H, N = 3, 38, 6, 5
ARRAYS = ("x_BLH", "dt_BLH", "a_HN", "b_BLN", "c_BLN")


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes and contents of one call; `resets` is the chance of a new segment at a token.

  `bare` leaves out all that may be left out: skip, segments, first state and restart.
  """

  L: int = L
  resets: float = 0.08
  bare: bool = False
  dtype: str = "float32"
  decay: float = 1.0
  seed: int = 0


CASES = {
  "bare": Case(bare=True),
  "one_token": Case(L=1, seed=1),
  "one_document": Case(resets=0.0, seed=2),
  "rare_resets": Case(seed=3),
  "resets_at_most_tokens": Case(resets=0.6, seed=4),
  "steep_decay": Case(decay=30.0, seed=5),
}
BFLOAT16 = Case(dtype="bfloat16", seed=6)


def make(case: Case) -> dict:
  """Returns the arguments of `selective` by name: numpy arrays, float32 or as the case says."""
  rng = np.random.default_rng(case.seed)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  def cast(array):
    return np.asarray(jnp.asarray(array, case.dtype))

  arguments = {
    "x_BLH": cast(normal(B, case.L, H)),
    "dt_BLH": rng.uniform(0.01, 0.8, (B, case.L, H)).astype(np.float32),
    "a_HN": -case.decay * rng.uniform(0.1, 2, (H, N)).astype(np.float32),
    "b_BLN": cast(normal(B, case.L, N)),
    "c_BLN": cast(normal(B, case.L, N)),
  }
  if case.bare:
    return arguments
  # Only padding's id, 0, comes back after a gap.
  count_BL = np.cumsum(rng.random((B, case.L)) < case.resets, axis=1)
  return arguments | {
    "skip_H": normal(H),
    "segment_BL": np.where(count_BL % 3 == 0, 0, count_BL).astype(np.int32),
    "state_BHN": normal(B, H, N),
    "restart_HN": normal(H, N),
  }


def recurrence(
  x_BLH, dt_BLH, a_HN, b_BLN, c_BLN, skip_H=None, segment_BL=None, state_BHN=None, restart_HN=None
):
  """Returns y and the last state in float64, one row, token and channel at a time."""
  arrays = [np.asarray(v, np.float64) for v in (x_BLH, dt_BLH, a_HN, b_BLN, c_BLN)]
  x_BLH, dt_BLH, a_HN, b_BLN, c_BLN = arrays
  B, L, H = x_BLH.shape
  y_BLH, last_BHN = np.zeros(x_BLH.shape), np.zeros((B, H, a_HN.shape[1]))
  for row, h in np.ndindex(B, H):
    state_N = last_BHN[row, h]
    if state_BHN is not None or restart_HN is not None:
      state_N += restart_HN[h] if state_BHN is None else state_BHN[row, h]
    for t in range(L):
      if segment_BL is not None and t > 0 and segment_BL[row, t] != segment_BL[row, t - 1]:
        state_N[:] = 0 if restart_HN is None else restart_HN[h]
      dt = dt_BLH[row, t, h]
      state_N *= np.exp(dt * a_HN[h])
      state_N += dt * x_BLH[row, t, h] * b_BLN[row, t]
      y_BLH[row, t, h] = state_N @ c_BLN[row, t]
      if skip_H is not None:
        y_BLH[row, t, h] += skip_H[h] * x_BLH[row, t, h]
  return y_BLH, last_BHN
