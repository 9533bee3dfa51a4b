"""hybridlm makes hybrid Mamba-2 / attention / MLP language models smaller and keeps what they know.

Score, plan, cut, distil: `calibrate`, `plan`, `cut` (or `mask`), `distillation_loss`.
"""

from hybridlm.api import (
  calibrate,
  cut,
  forward,
  generate,
  init,
  load,
  mask,
  save,
)
from hybridlm.bind import distillation_loss, language_loss
from hybridlm.config import ModelConfig
from hybridlm.prune.cost import cost
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores
from hybridlm.prune.select import plan

__all__ = [
  "ModelConfig",
  "Plan",
  "Scores",
  "calibrate",
  "cost",
  "cut",
  "distillation_loss",
  "forward",
  "generate",
  "init",
  "language_loss",
  "load",
  "mask",
  "plan",
  "save",
]
