"""Pictures of parallel blocks show what each branch keeps, and one that is off as dropped whole."""

import numpy as np

from cases import models
from experiments import plots, report
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

CFG = models.hymba(pattern="=-=")


def test_groups_and_branches_that_go_keep_nothing():
  plan = Plan(CFG, "", {
    "00": {"keep_K": [], "keep_GH": [[0, 2], [1, 3]]},
    "02": {"keep_KJ": [[0, 1], [1, 2]], "keep_G": [1], "keep_GH": [[0, 2], [1, 3]]},
  })

  def kept(index, name, *shape):
    return plots._flat_kept(plan, index, name, shape)

  assert kept(0, "keep_KJ", 2, 3).tolist() == []
  assert kept(0, "keep_GH", 2, 4).tolist() == [0, 2, 5, 7]
  assert kept(2, "keep_KJ", 2, 3).tolist() == [0, 1, 4, 5]
  assert kept(2, "keep_GH", 2, 4).tolist() == [5, 7]
  assert kept(1, "keep_F", 24) is None


def test_scores_of_both_branches_and_of_meta_tokens_have_a_picture(tmp_path):
  sums = {"00/score_GHP": np.ones((2, 4, 6)), "00/score_KJ": np.ones((2, 3)),
          "02/score_GHP": np.ones((2, 4, 6)), "score_M": np.arange(9.0)}
  plan = Plan(CFG, "", {"keep_M": [3, 8], "00": {"keep_K": []}})
  made = plots.importance(Scores(sums, 1.0, {}), plan, tmp_path)
  assert sorted(path.name for path in made.values()) == [
    "importance_HP.png", "importance_KJ.png", "importance_M.png"]


def test_a_model_in_one_line_says_its_meta_tokens_and_what_is_off():
  assert " M=9, " in report.sizes(CFG) and " off " not in report.sizes(CFG)
  small = Plan(CFG, "", {"keep_M": [], "00": {"keep_K": []}, "02": {"keep_G": []}}).small_config()
  said = report.sizes(small)
  assert "attention off in 0, SSM off in 2" in said and "M=" not in said
