r"""The job `hymba_prune` at toy size, for tests: every stage runs, no number means anything.

python -m experiments.distill --config=configs/hymba_prune_twin.py

Cost: two minutes on two CPU cores, nearly all compilation. Expect: a report.
"""

from configs import hymba_prune


def get_config():
  """Returns the job with every size cut down."""
  c = hymba_prune.get_config()
  c.name = "hymba_prune_twin"
  c.data.tokenizer = "bytes"
  c.data.length = 32
  c.model.update(
    pattern="=-==", D=16, F=24, K=2, J=3, E=10, U=8, G=2, H=4, P=6, N=5, meta=5, window=9,
    global_layers=(0,), kv_groups=((1, 2),),
  )
  toy = dict(batch=2, warmup=2, validate_every=3, validate_batches=1, save_every=2)
  c.teacher.update(steps=6, **toy)
  c.calibrate.update(batches=2, batch=2)
  c.targets.update(D=12, F=16, H=2, J=2, M=3)
  c.distil.update(steps=4, **toy)
  c.evaluate.update(batches=2, batch=2, speed_repeats=2, ngram=2)
  return c
