r"""Nemotron-H 56B to 47B as MiniPuzzle did it: blocks and MLP widths that fit a 32 GiB card.

python -m experiments.search --config=configs/nemotron_h_56b_to_47b.py --dry_run

python -m experiments.distill --config=configs/nemotron_h_56b_to_47b.py
    --config.teacher.path=NEMOTRON_H_56B --config.data.tokenizer=teacher --config.mesh.tensor=8
    --config.data.sources.main.kind=jsonl --config.data.sources.main.path=TEXTS

Cost: the dry run takes seconds on one CPU core and allocates no weights. In earnest: 113 GB for
the teacher in bfloat16 and 750 GB for the student in training, activations apart; a step of
768 x 8192 tokens is 2.5e18 FLOPs; three finalists of 1,113 steps and the winner's 10,014 are about
3.3e22: three weeks on 64 H100 at 30 % of their peak. Scoring 668 options is forward passes alone.
Expect: a model of at most 31.7 GiB with a million tokens of context. The published one keeps 98
of 118 blocks (45 Mamba, 5 attention, 48 MLP) and F=30720: 46.79B parameters, 99.94 % of the parent
over four benchmarks (arXiv 2504.03624).

The budget in our terms: weights in 4 bits (`budget.weight_dtype`, scales not counted), keys and
values in 8, convolutions and SSM states in 16, at 1,000,000 tokens and batch 1. So counted, the
published model needs 31.68 GiB and its parent 45.73; with SSM states in float32 it would need 32.03
and not fit. From the paper: the range of F, the limit of 31.7 GiB, depth by the error of the last
hidden state, 7B tokens for each of 3 finalists and 63B for the winner, forward KL alone. Ours:
options are chosen block by block by a mixed-integer programme, so that kinds of blocks need no
counts of their own and widths may differ from block to block, which no published class can say. The
paper keeps widths equal: `--config.search.method=grid`, with `rules.family=nemotron_h` for export.
"""

from configs import base


def get_config():
  """Returns the job; `teacher.path` and the text are the user's to give."""
  c = base.get_config()
  c.name = "nemotron_h_56b_to_47b"
  c.model.preset = "nemotron_h_56b"  # what a dry run counts; a run gives teacher.path
  c.data.length = 8192

  c.calibrate.update(axes="F", depth="mse", batches=128, batch=8)
  c.plan.path = "search"
  c.search.space.update(
    F=(24576, 25600, 26624, 27648, 28672, 29696, 30720, 31744, 32768),
    blocks=tuple(range(88, 119)),
  )
  c.search.update(
    method="milp", candidates=400, score="kl", batch=4, batches=32, solutions=24, diversity=6,
    evolve=4, population=16, finalists=3, rungs=(1113,),
  )
  c.budget.update(
    memory_gib=31.7, context=1_000_000, batch=1, device="h100", weight_dtype="float4_e2m1fn",
    kv_dtype="float8_e4m3fn", conv_dtype="bfloat16", ssm_dtype="bfloat16",
  )
  c.rules.divisors.update(F=1024)
  c.rules.update(floors=(("*", 4), ("M", 40), ("-", 40)), shards=(1, 2, 4, 8))

  c.distil.update(
    steps=10_014, batch=768, accumulate=1, peak=8e-5, floor=0.1, warmup=60, validate_every=200,
    save_every=200,
  )
  c.scratch.run = "none"
  c.evaluate.ngram = 0
  return c
