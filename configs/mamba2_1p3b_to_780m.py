r"""Mamba-2 1.3B to 780M: states and widths of a model without attention, and 10.5B tokens.

python -m experiments.search --config=configs/mamba2_1p3b_to_780m.py --dry_run

python -m experiments.distill --config=configs/mamba2_1p3b_to_780m.py
    --config.teacher.path=MAMBA2_1P3B --config.data.tokenizer=TOKENIZER_JSON
    --config.data.sources.main.kind=jsonl --config.data.sources.main.path=TEXTS

Cost: the dry run takes seconds and allocates no weights. In earnest: 18 GB and activations; 10,014
steps of 512 x 2048 tokens are 8.2e19 FLOPs, nearly four days on one H100 at 25 % of its peak; the
finalists add half of that, the control from scratch two thirds.
Expect: arXiv 2504.11409, Table 8, has an average of 44.7 over ten tasks after 10.5B tokens, where
the parent has 44.9 and a 780M model trained on 300B tokens 42.5. It prints neither the widths that
were chosen, nor data or learning rate; D=1536 with 48 heads, the sizes of the published 780M model
(780,161,280 parameters), is only the candidate that the dry run looks up. The table gains by three
tasks and loses on three: compare task by task, and with the same tokens without a teacher.

The teacher is a folder of state-spaces/mamba2-1.3b with its weights as safetensors (a pickle,
pytorch_model.bin, is not read). Its tokenizer is that of GPT-NeoX.
"""

from configs import base


def get_config():
  """Returns the job; `teacher.path`, the tokenizer and the text are the user's to give."""
  c = base.get_config()
  c.name = "mamba2_1p3b_to_780m"
  c.model.preset = "mamba2_1p3b"  # what a dry run counts; a run gives teacher.path
  c.data.length = 2048

  c.calibrate.update(axes="HPDN", batches=128, batch=8)
  c.plan.path = "search"
  c.search.space.update(
    D=(1280, 1408, 1536, 1664, 1792, 1920, 2048), heads=(32, 36, 40, 44, 48, 52, 56, 60, 64),
    P=(48, 56, 64), N=(64, 96, 128),
  )
  c.search.winner.update(D=1536, heads=48, P=64, N=128)
  c.search.update(
    method="random", candidates=200, batch=8, batches=32, finalists=8, rungs=(250, 1000),
  )
  c.budget.update(parameters=780_200_000, context=2048, batch=64, device="h100")
  c.rules.divisors.update(D=128, heads=4, P=8, N=16)
  c.rules.update(conv_multiple=8, inner_share=0.4)

  c.distil.update(
    steps=10_014, batch=512, accumulate=1, peak=3e-4, floor=0.1, warmup=100, validate_every=250,
    save_every=250,
  )
  # The control: the same sizes on the same tokens without a teacher.
  c.scratch.update(run="same", peak=6e-4)
  c.evaluate.ngram = 0
  return c
