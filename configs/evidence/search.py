r"""What a search picks, beside "the largest that fits" and the published uniform width cut.

python -m experiments.search_picks --config=configs/evidence/search.py

Options are chosen block by block by a mixed-integer programme, refined by evolution, the best four
distilled briefly. The rivals are distilled on the same batches and schedule, and all are compared
on the test split, which no choice has seen.
Cost: 19 minutes on two CPU cores that a dozen other programs shared, with the quickstart's teacher
cached beside the workdir; less on cores at rest.
Expect: the search's pick has the lowest loss of the three.
"""

from configs import quickstart


def get_config():
  """Returns the quickstart with a budget, a space and rivals."""
  c = quickstart.get_config()
  c.name = "search"
  # The quickstart's own targets leave 964,040, and would be the largest that fits if that were the
  # budget. Seconds are bounds by published peaks.
  c.budget.update(parameters=966_000, context=256, device="h100")
  c.search.method = "milp"
  c.search.space.update(
    D=(144, 160, 176, 192), F=(192, 224, 256, 288, 320, 384, 448, 512), H=(2, 3, 4, 5, 6),
    P=(16, 24, 32), J=(2, 3), blocks=(5, 6, 7),
  )
  c.search.update(
    candidates=300, batch=8, batches=2, solutions=6, diversity=2, evolve=6, population=8,
    finalists=4, rungs=(40, 120), rivals=("largest", "targets"),
  )
  return c
