r"""What FP8 costs the loss: the quickstart's small model trained in float32, bfloat16 and FP8.

python -m experiments.bench_precision --config=configs/evidence/precision.py

Cost: about 6 minutes on two CPU cores, two seeds in three precisions; CPUs round to eight bits
and multiply what comes out in float32. On a GPU the table has the real speed.
Expect: curves that lie on each other, FP8 within a hundredth of a nat of bfloat16 at the end.
"""

from configs import quickstart


def get_config():
  """Returns the quickstart with shorter runs and five of its seven blocks in FP8."""
  c = quickstart.get_config()
  c.name = "precision"
  c.distil.update(
    steps=200, batch=8, peak=3e-3, warmup=20, wide_ends=1, validate_every=25, validate_batches=2
  )
  return c
