"""The rule that ids of packed documents follow."""

import jax
import numpy as np
from jaxtyping import ArrayLike, Int


def check_segments(segment_BL: Int[ArrayLike, "..."] | None, place: str) -> None:
  """Raises ValueError, naming `place`, for an id other than 0 that comes back after a gap.

  So it does for ids without the axes B and L. Values that are not known yet, inside `jax.jit`,
  pass.
  """
  if segment_BL is None or isinstance(segment_BL, jax.core.Tracer):
    return
  if np.ndim(segment_BL) != 2:
    raise ValueError(f"segment_BL has shape {np.shape(segment_BL)}, without axes BL, in {place}")
  for row, segment_L in enumerate(np.asarray(segment_BL)):
    starts = np.flatnonzero(np.diff(segment_L, prepend=segment_L[:1] - 1))
    ids, counts = np.unique(segment_L[starts], return_counts=True)
    torn = ids[(counts > 1) & (ids != 0)]
    if torn.size:
      raise ValueError(f"segment {torn[0]} of row {row} comes back after a gap in {place}")
