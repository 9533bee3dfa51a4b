r"""From a Llama to a Hymba, one change at a time: what each is worth at the same size and data.

python -m experiments.roadmap --config=configs/evidence/hymba.py

Half of the rows are US presidential messages, half associative recall: 8 letters with a value
each, then 8 questions, 30 symbols later and more, which is beyond a window of 32 tokens.
The first third of the steps learns from 4 letters, 14 symbols apart. Sizes of the MLP make up for
what a layout saves, so that all have as many parameters within 2 %.
Cost: at most 4 minutes a model on two CPU cores, seven models a seed.
Expect: docs/results/hymba_study.md.
"""

from configs import base

# What each model sets, in order; what one sets to None, or leaves out, it has not.
SSM = {"G": 1, "H": 6, "P": 32, "N": 16, "W": 4}
SIDES = {"pattern": "=-" * 6, "K": 1, "J": 6, "U": 32, "F": 224, **SSM}
FAR = {"window": 32, "global_layers": (0, 5)}
SHARED = {"kv_groups": ((1, 2), (3, 4)), "F": 228}
MODELS = {
  "llama": {},
  "mamba2": {"pattern": "M-" * 6, "K": None, "J": None, "E": None, "rope": None, "F": 272, **SSM},
  "sequential": {"pattern": "M-*-" * 3, "K": 2, "J": 3, "U": 32, "F": 312, **SSM},
  "parallel": SIDES,
  "windows": {**SIDES, **FAR},
  "sharing": {**SIDES, **FAR, **SHARED},
  "meta": {**SIDES, **FAR, **SHARED, "meta": 16},
}


def member(name: str, changes: dict) -> str:
  """Returns a model as a sweep's list takes it."""
  pairs = (f"model.{key}={value!r}".replace(" ", "").replace("'", "") for key, value in
           changes.items())
  return f"{name}:{','.join(pairs)}"


def get_config():
  """Returns the Llama, and what the others change."""
  c = base.get_config()
  c.name = "hymba"
  c.data.tokenizer = "sotu_1024"
  c.data.length = 256
  c.data.sources.recall = base.source("recall")
  c.data.sources.recall.update(pairs=8, distance=30, documents=20_000)
  c.data.sources.short = base.source("recall")
  c.data.sources.short.update(pairs=4, distance=14, documents=20_000)
  c.data.phases = (
    (0, (("main", 0.5), ("short", 0.5))),
    (250, (("main", 0.5), ("recall", 0.4), ("short", 0.1))),
  )

  c.model.update(
    pattern="*-" * 6, D=96, F=352, K=6, J=1, E=16, rope=10000.0, activation="swiglu", tied=True,
  )
  c.teacher.update(steps=700, batch=8, peak=3e-3, warmup=50, validate_every=0, save_every=0)
  c.targets.F = 16  # for commands that prune; this study does not

  c.evaluate.update(batches=12, batch=16, ngram=0)
  c.assess.recall = ("recall", "short")
  c.assess.members = "list:" + ";".join(member(name, each) for name, each in MODELS.items())
  c.assess.pairs = (
    ("parallel", "sequential"), ("windows", "parallel"), ("sharing", "parallel"),
    ("sharing", "llama"), ("meta", "sharing"),
  )
  return c
