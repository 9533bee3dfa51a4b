r"""A search at toy size, for tests: every step runs, no number means anything.

python -m experiments.search --config=configs/search_toy.py

Cost: seconds. Expect: a table of finalists.
"""

from configs import quickstart_toy


def get_config():
  """Returns the toy job with a space, a budget and two short rungs."""
  c = quickstart_toy.get_config()
  c.name = "search_toy"
  c.calibrate.depth = "kl"
  c.budget.update(parameters=9_000, context=32, device="h100")
  c.search.space.update(D=(12, 16), F=(12, 16, 24), H=(2, 4), J=(2, 3))
  c.search.update(
    method="random", candidates=6, batch=2, batches=2, solutions=2, evolve=2, population=2,
    finalists=3, rungs=(2, 4),
  )
  return c
