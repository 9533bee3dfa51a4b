r"""The quickstart at toy size, for tests: every stage runs, no number means anything.

python -m experiments.distill --config=configs/quickstart_toy.py

Cost: seconds. Expect: a report.
"""

from configs import quickstart


def get_config():
  """Returns the quickstart with every size cut down."""
  c = quickstart.get_config()
  c.name = "quickstart_toy"
  c.data.tokenizer = "bytes"
  c.data.length = 32
  c.model.update(pattern="M-*", D=16, F=24, K=2, J=3, E=10, G=2, H=4, P=6, N=5)
  toy = dict(batch=2, warmup=2, validate_every=3, validate_batches=1, save_every=2)
  c.teacher.update(steps=6, **toy)
  c.calibrate.update(batches=2, batch=2)
  c.targets.update(D=12, F=16, H=2, P=4, J=2)
  c.distil.update(steps=4, **toy)
  c.evaluate.update(batches=2, batch=2, speed_repeats=2, ngram=2)
  c.findings.update(heads=(3, 2), calibration=1, batch=2, batches=1)
  return c
