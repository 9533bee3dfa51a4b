"""Every config that comes with the package resolves, says how to run it, and fits together."""

import importlib
import importlib.util
import re

import jax
import pytest
from ml_collections import ConfigDict

from experiments import cli, exchange, settings
from experiments.stages import flat
from hybridlm import config
from hybridlm.prune import select

NAMES = [path.removesuffix(".py").replace("/", ".") for path in cli.installed()]
# Of these no job is made: they are for commands of their own.
BENCHMARKS = ["configs.benchmark_ssd"]
JOBS = [name for name in NAMES if name not in BENCHMARKS]
QUICKSTART, TOY = "configs.quickstart", "configs.quickstart_toy"


def load(name):
  """Returns the module of a config and what it makes."""
  module = importlib.import_module(name)
  return module, module.get_config()


def types(c, prefix=""):
  """Returns the type of each value by its key; one that is unset has the type it would have."""
  found = {}
  for name in c:
    inner = types(c[name], f"{prefix}{name}.") if isinstance(c[name], ConfigDict) else {}
    found |= inner or {f"{prefix}{name}": c.get_type(name)}
  return found


def one_device():
  """Returns the grid of a machine with one device."""
  return jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1])


def test_the_installed_configs_are_found():
  assert {QUICKSTART, TOY, *BENCHMARKS} <= set(NAMES) and "configs.base" not in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_config_owns_its_name_and_its_header_says_command_cost_and_expectation(name):
  module, c = load(name)
  assert c.name == name.rpartition(".")[2]
  command = rf"python -m experiments\.\w+ --config={name.replace('.', '/')}\.py"
  header = module.__doc__.splitlines()
  assert any(re.fullmatch(command, line) for line in header)
  assert any("Cost:" in line for line in header) and any("Expect:" in line for line in header)


@pytest.mark.parametrize("name", JOBS)
def test_a_config_holds_only_what_the_base_declares(name):
  _, c = load(name)
  base = importlib.import_module("configs.base").get_config()
  # Sources have names of their own, and each what every source has.
  own, known = ({re.sub(r"^data\.sources\.\w+", "a source", key) for key in flat(each.to_dict())}
                for each in (c, base))
  assert own == known


@pytest.mark.parametrize("name", JOBS)
def test_a_config_describes_a_teacher_and_a_smaller_model(name, tmp_path):
  _, c = load(name)
  package = c.teacher.path.removeprefix(exchange.PACKAGE).partition("/")[0]
  if package != c.teacher.path and importlib.util.find_spec(package) is None:
    pytest.skip(f"the teacher's package {package} is not installed; the config's header says how")
  s = settings.setup(c, one_device(), cache=tmp_path)
  left = s.small
  if left is None:  # what the search leaves: at its least, this
    choices = {target: min(sizes) for target, sizes in c.search.space.items() if sizes}
    left = select.sized(s.cfg, choices)
  assert config.parameters(left) < config.parameters(s.cfg)
  assert s.cfg.real_vocabulary == s.corpus.tokenizer.V


def test_the_quickstart_has_every_block_kind_and_groups_and_cuts_forty_percent(tmp_path):
  _, c = load(QUICKSTART)
  s = settings.setup(c, one_device(), cache=tmp_path)
  assert set(s.cfg.pattern) == set("M-*") and s.cfg.G >= 2
  cut = 1 - config.parameters(s.small) / config.parameters(s.cfg)
  assert 0.37 <= cut <= 0.43


def test_the_toy_differs_from_the_quickstart_in_values_only():
  toy, quick = (load(name)[1] for name in (TOY, QUICKSTART))
  assert types(toy) == types(quick)
  assert toy.calibrate.estimator == quick.calibrate.estimator
