r"""Nemotron-H 8B to 4B as Minitron-SSM did it: search under 4.5B parameters, distil 380B tokens.

python -m experiments.search --config=configs/nemotron_h_8b_to_4b.py --dry_run

python -m experiments.distill --config=configs/nemotron_h_8b_to_4b.py
    --config.teacher.path=NEMOTRON_H_8B --config.data.tokenizer=teacher --config.mesh.fsdp=64
    --config.distil.accumulate=12
    --config.data.sources.main.kind=jsonl --config.data.sources.main.path=TEXTS

python -m experiments.distill --config=configs/nemotron_h_8b_to_4b.py --aot=v5p:4x4x4
    --config.mesh.fsdp=64 --config.distil.accumulate=12

Cost: the dry run takes half a minute on one CPU core and allocates no weights. In earnest: 90 GB
for the student in training and the teacher in bfloat16, activations apart; a step of 768 x 8192
tokens is 2.6e17 FLOPs (student forward and backward, teacher forward), so 22 finalists of 604 steps
and the winner's 60,417 are about 1.9e22: 12 days on 64 H100 at 30 % of their peak. Compiled ahead
of time (docs/results/aot.md), the step with one row at a time on a chip takes 13.2 of 95 GiB of a
v5p:4x4x4 (fsdp=64, accumulate=12), 11.1 of 14.9 of a v5e:16x16 and 12.6 of 29.8 of a v6e:16x16
(fsdp=256, accumulate=3): all fit.
Expect: 52 blocks, D=3072, F=12288, 112 heads of 64 channels and 4,489,223,040 parameters among the
feasible: the published winner (arXiv 2504.11409, Table 1), at 96 % of the parent's accuracy after
380B tokens of its own data. Other data give another winner: that is what the search is for.

From the paper: ranges, budget, 1024 samples of 8192 tokens, leave-one-out KL for depth, 3.8B
tokens for each of 22 finalists, batch 768, 60 steps of warm-up, forward KL alone. Ours: the choices
inside the ranges, the last learning rate (the paper prints a final rate above the first), that
candidates are ranked by KL to the teacher on a million tokens (its hidden states, 9 GB, stay on the
devices), and that heads times channels keep half of the parent's.
"""

from configs import base


def get_config():
  """Returns the job; `teacher.path` and the text are the user's to give."""
  c = base.get_config()
  c.name = "nemotron_h_8b_to_4b"
  c.model.preset = "nemotron_h_8b"  # what a dry run counts; a run gives teacher.path
  c.model.update(stack="units", remat="block")  # 7 blocks to compile, not 52; docs/aot.md
  c.data.length = 8192

  c.calibrate.update(axes="HPFD", depth="kl", batches=16, batch=64)
  c.plan.path = "search"
  c.search.space.update(
    D=(3072, 3328, 3584, 3840, 4096),
    F=(9984, 10752, 11520, 11648, 12288, 13056, 13824, 14592, 15360, 16128, 17664, 19200, 21504),
    heads=(64, 72, 80, 88, 96, 104, 112, 120, 128),
    P=(32, 40, 48, 56, 60, 64),
    blocks=(26, 36, 40, 44, 48, 52),
  )
  c.search.winner.update(D=3072, F=12288, heads=112, P=64, blocks=52)
  c.search.update(
    method="random", candidates=125, score="kl", batch=64, batches=2, finalists=22, rungs=(604,),
  )
  # Weights, keys and values in bfloat16, SSM states in float32; time on one H100.
  c.budget.update(parameters=4_500_000_000, context=65536, batch=1, device="h100")
  c.rules.divisors.update(D=256, F=64, heads=8, P=4)
  c.rules.update(
    floors=(("*", 2),), conv_multiple=8, shards=(1, 2, 4, 8), inner_share=0.5, family="nemotron_h",
  )

  c.distil.update(
    steps=60_417, batch=768, accumulate=1, peak=1.6e-4, floor=0.05, warmup=60, validate_every=500,
    save_every=500,
  )
  c.export.update(format="hf", family="nemotron_h")
  c.scratch.run = "none"
  c.evaluate.update(ngram=0, batch=64)
  for part in ("findings", "repair"):  # every batch has a row for each of 64 devices
    c[part].batch = 64
  return c
