r"""Which heads to keep, and how many can go: four ways to choose, three calibration seeds.

python -m experiments.evidence --config=configs/evidence/heads.py

Cost: about 3 minutes on two CPU cores with the quickstart's teacher cached beside the workdir, 8
from nothing.
Expect: group-aware scores better than random ones at every size, and better than magnitude and than
packing across groups down to half of the heads; below that, weights alone choose better.
"""

from configs import quickstart


def get_config():
  """Returns the quickstart with a larger study of its teacher."""
  c = quickstart.get_config()
  c.name = "heads"
  c.findings.update(heads=(5, 4, 3, 2, 1), seeds=3, calibration=8, batch=16, batches=8)
  return c
