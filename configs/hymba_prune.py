r"""Prunes a small Hymba by 40 % and distils it back, on two CPU cores.

python -m experiments.distill --config=configs/hymba_prune.py

Attention and Mamba-2 heads side by side in four layers: the first and the last see everything, the
two between share keys and values, and 16 meta tokens come first. What goes: heads of both branches,
the attention of a whole layer, MLP and residual width, meta tokens.
Cost: 23 minutes and 4.8 GB on two CPU cores beside other work, 11 of them the teacher's.
Expect: the teacher beats a byte 4-gram (2.03 bits per byte) trained on the same split; distillation
recovers at least 80 % of the loss that pruning cost (seen: 96 %) and beats the same size from
scratch on the same tokens.
"""

from configs import base


def get_config():
  """Returns the job on US presidential messages."""
  c = base.get_config()
  c.name = "hymba_prune"
  c.data.tokenizer = "sotu_1024"
  c.data.length = 256

  # Values twice as wide as keys, as Hymba's; both branches are 256 channels wide.
  c.model.update(
    pattern="=-" * 4, D=160, F=384, K=2, J=4, E=16, U=32, G=2, H=4, P=32, N=16, W=4, meta=16,
    window=64, rope=10000.0, global_layers=(0, 3), kv_groups=((1, 2),), activation="swiglu",
    tied=True,
  )
  c.teacher.update(steps=450, batch=16, peak=3e-3, warmup=30)

  c.calibrate.update(batches=8, batch=16, axes="HPFDJM", noop="kl")
  c.targets.update(D=136, F=208, H=3, J=3, M=12, attention_off=1)

  c.distil.update(steps=250, batch=16, peak=3e-3, warmup=20)
  c.evaluate.update(batches=12, batch=16)
  return c
