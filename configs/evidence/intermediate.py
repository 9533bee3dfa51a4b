r"""What comparing activations adds to comparing logits, where half of the blocks go.

python -m experiments.bench_intermediate --config=configs/evidence/intermediate.py

Cost: 7 minutes of CPU time, three seeds with a teacher each and three students a teacher.
Expect: all recover more than nine tenths of what the cut lost. Residual streams on top of the
logits bring the KL to the teacher down in every seed, by a fifth (arXiv 2407.14679, table 17, finds
a little too); mixer outputs and states beside them undo that.
"""

from configs import quickstart


def get_config():
  """Returns a hybrid of four equal units of three blocks, cut to the first and the last."""
  c = quickstart.get_config()
  c.name = "intermediate"
  c.data.length = 128
  c.model.update(pattern="M*-M*-M*-M*-", D=64, F=160, K=2, J=1, E=32, G=2, H=2, P=32, N=16)
  c.model.stack = "units"  # one unit is compiled, not four
  quick = dict(batch=8, warmup=20, validate_every=0, save_every=0)
  c.teacher.update(steps=300, **quick)
  for name in ("D", "F", "H"):
    c.targets[name] = None
  c.targets.blocks = (0, 1, 2, 9, 10, 11)
  c.distil.update(steps=150, **quick)
  c.evaluate.update(batches=8, batch=16, ngram=0)
  c.findings.heads = ()
  return c
