"""Which candidates no other one beats in everything."""

import numpy as np
from jaxtyping import Float


def front(cost_CR: Float[np.ndarray, "C R"]) -> list[int]:
  """Returns the candidates that no other is at least as good as in every cost and better in one.

  Args:
    cost_CR: for each candidate R costs, less is better. Equal candidates all stay.

  Raises:
    ValueError: a cost that is not a number.
  """
  if np.isnan(cost_CR).any():
    raise ValueError(f"front: candidate {int(np.isnan(cost_CR).any(axis=1).argmax())} has a cost "
                     "that is not a number")
  kept = []
  for index, cost_R in enumerate(cost_CR):
    no_worse = (cost_CR <= cost_R).all(axis=1)
    better = (cost_CR < cost_R).any(axis=1)
    if not (no_worse & better).any():
      kept.append(index)
  return kept
