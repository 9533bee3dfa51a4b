r"""Prunes a small hybrid by 40 % and distils it back: minutes on two CPU cores.

python -m experiments.distill --config=configs/quickstart.py

Cost: at most 12 minutes and 4 GB on two CPU cores, teacher included; at most 6 minutes when the
teacher is cached.
Expect: the teacher beats a byte 4-gram (2.03 bits per byte) trained on the same split; pruning
hurts; distillation recovers at least 80 % of the loss that pruning cost and beats the same size
trained from scratch on the same tokens.
"""

from configs import base


def get_config():
  """Returns the quickstart: US presidential messages, a teacher of 7 blocks and 2 SSM groups."""
  c = base.get_config()
  c.name = "quickstart"
  c.data.tokenizer = "sotu_1024"
  c.data.length = 256

  c.model.update(pattern="M-M*-M-", D=192, F=512, K=2, J=3, E=32, G=2, H=6, P=32, N=32, W=4)
  c.model.tied = True
  c.teacher.update(steps=450, batch=16, peak=3e-3, warmup=30)

  c.calibrate.update(batches=8, batch=16, depth="kl")
  c.targets.update(D=160, F=288, H=4)

  c.distil.update(steps=250, batch=16, peak=3e-3, warmup=20)
  c.evaluate.update(batches=12, batch=16)
  c.findings.update(heads=(5, 4, 3, 2), batch=16, batches=2)
  return c
