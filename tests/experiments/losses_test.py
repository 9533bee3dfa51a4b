"""From a config's values to a loss: what is refused, and which plans a distillation reads."""

import jax
import pytest

from configs import base, quickstart_toy
from experiments import losses, pipeline, settings
from hybridlm import config
from hybridlm.config import ModelConfig

CFG = ModelConfig.from_pattern("M-*M", V=31, D=16, F=24, K=2, J=3, E=10, G=2, H=4, P=6, N=5)


@pytest.mark.parametrize(
  "values,message",
  [
    ({"divergence": "kl"}, "distil.divergence='kl' is not one of forward_kl, reverse_kl"),
    ({"skew": 0.0}, "distil.skew=0.0 must lie between 0 and 1"),
    ({"top_k": -1}, "distil.top_k=-1 must not be negative"),
    ({"intermediate": ("hidden",)}, "'hidden' is not one of out, mix, state"),
    ({"intermediate": ("out", "out")}, "distil: intermediate=.* names a kind twice"),
    ({"intermediate_loss": "l2"}, "distil: intermediate_loss='l2' is not one of cosine, mse, norm"),
    ({"intermediate": ("out",), "intermediate_weight": -1.0}, "intermediate_weight=-1.0 must be"),
    ({"intermediate": ("out",), "kl": 0.0, "ce": 1.0}, "must be set with kl=0"),
    ({"intermediate": ("out",), "store": "there"}, "distil.store='there' stands for it"),
    ({"temperature": 0.0}, "distil.temperature=0.0 must be positive"),
  ],
)
def test_a_loss_that_cannot_be_is_refused_under_its_key(values, message):
  run = base.get_config().distil
  losses.check(run)
  run.update(values)
  with pytest.raises(ValueError, match=message):
    losses.check(run)


def test_more_tokens_than_the_vocabulary_has_are_refused_before_anything_is_compiled():
  run = base.get_config().distil
  run.update(top_k=32)
  with pytest.raises(ValueError, match="top_k=32 must lie in 1..31"):
    losses.online(CFG, CFG, run)


def test_the_values_of_a_config_reach_the_loss():
  run = base.get_config().distil
  run.update(divergence="reverse_kl", top_k=5, temperature=2.0)
  run.update(intermediate=("out",), intermediate_weight=0.5)  # not read without plans
  params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
                        config.shapes(CFG), is_leaf=lambda leaf: isinstance(leaf, tuple))
  batch = {name: jax.ShapeDtypeStruct((2, 9), kind) for name, kind in
           (("token_BL", "int32"), ("target_BL", "int32"), ("weight_BL", "float32"))}
  names = set(jax.eval_shape(losses.online(CFG, CFG, run), params, params, batch))
  assert names == {"loss", "weight", "ce", "correct", "agree", "reverse_kl"}
  shape = {"top_id_BLT": "int32", "top_log_BLT": "float32"}
  batch |= {name: jax.ShapeDtypeStruct((2, 9, 5), kind) for name, kind in shape.items()}
  batch["tail_log_BL"] = jax.ShapeDtypeStruct((2, 9), "float32")
  assert set(jax.eval_shape(losses.stored(CFG, run), params, None, batch)) == names


def test_a_distillation_reads_every_plan_since_the_teacher_where_activations_count(tmp_path):
  def needs(intermediate):
    c = quickstart_toy.get_config()
    c.evaluate.outside = "main"
    c.distil.intermediate = intermediate
    c.schedule = ({"targets": {"D": 14}}, {"targets": {"F": 20}})
    grid = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])
    made = pipeline.build(settings.setup(c, grid, cache=tmp_path))
    return {stage.name: stage.needs for stage in made if stage.name.endswith("distil")}

  plain, aligned = needs(()), needs(("out", "state"))
  assert plain["distil"] == ("teacher", "cut")
  assert plain["round2_distil"] == ("teacher", "round2_cut")
  assert aligned == {
    "round1_distil": (*plain["round1_distil"], "round1_plan"),
    "round2_distil": (*plain["round2_distil"], "round1_plan", "round2_plan"),
    "distil": (*plain["distil"], "round1_plan", "round2_plan", "plan"),
  }
