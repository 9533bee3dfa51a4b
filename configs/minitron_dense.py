r"""Nemotron-4 15B to 8B as Minitron did it: a transformer cut in width, 94B tokens.

python -m experiments.search --config=configs/minitron_dense.py --dry_run

python -m experiments.distill --config=configs/minitron_dense.py
    --config.teacher.path=NEMOTRON_4_15B --config.data.tokenizer=teacher --config.mesh.tensor=8
    --config.data.sources.main.kind=jsonl --config.data.sources.main.path=TEXTS

Cost: the dry run takes seconds and allocates no weights. In earnest: 165 GB for the student in
training and the teacher in bfloat16, and activations; a step of 1152 x 4096 tokens is 3.6e17 FLOPs,
19,920 of them with 400 for each of 18 finalists 9.8e21: six days on 64 H100 at 30 % of their peak.
Expect: the published student among the feasible: 32 layers, D=4096, F=16384, 48 heads and
8,271,699,968 parameters, 5-shot MMLU 63.8 where the parent has 66.6 (arXiv 2407.14679). Any folder
of the class NemotronForCausalLM takes the parent's place, or one of Llama 3.1 8B (preset
`llama_3p1_8b`), with choices and a budget of its own.

From the paper: ranges, batch, learning rates, fewer than 20 finalists of 400 steps (1.8B tokens)
each, forward KL alone. Ours: the widths between the ends of the ranges, 100 steps of warm-up, and
that candidates are ranked by KL to the teacher.
"""

from configs import base


def get_config():
  """Returns the job; `teacher.path` and the text are the user's to give."""
  c = base.get_config()
  c.name = "minitron_dense"
  c.model.preset = "nemotron_4_15b"  # what a dry run counts; a run gives teacher.path
  c.data.length = 4096

  c.calibrate.update(axes="FDJ", depth="kl", batches=128, batch=8)
  c.plan.path = "search"
  c.search.space.update(
    D=(4096, 4608, 5120, 5632, 6144),
    F=(10240, 12288, 14336, 16384, 18432, 20480, 22528, 24576), J=(4, 6), layers=(29, 30, 31, 32),
  )
  c.search.winner.update(D=4096, F=16384, J=6, layers=32)
  c.search.update(
    method="grid", candidates=400, score="kl", batch=8, batches=32, finalists=18, rungs=(400,),
  )
  c.budget.update(parameters=8_300_000_000, context=4096, batch=1, device="h100")
  c.rules.divisors.update(D=256, F=256)
  c.rules.update(shards=(1, 2, 4, 8), family="nemotron")

  c.distil.update(
    steps=19_920, batch=1152, accumulate=1, peak=2e-4, floor=0.00225, warmup=100,
    validate_every=200, save_every=200,
  )
  c.export.update(format="hf", family="nemotron")
  c.scratch.run = "none"
  c.evaluate.ngram = 0
  return c
