"""The registry: a name -> an estimator, and specs such as "activation,F=flap,N=ghost"."""

from collections.abc import Mapping

from hybridlm import axes
from hybridlm.config import Block, ModelConfig, block_name
from hybridlm.prune.estimators import activation, contribution, ghost, weights
from hybridlm.prune.estimators.base import Estimator, Statistic

# Raise it when the same input gives other scores.
VERSION = 2
# The score each axis is chosen by.
SCORE_OF = {
  "H": "score_GHP", "P": "score_GHP", "G": "score_GHP", "F": "score_F", "D": "score_D",
  "J": "score_KJ", "K": "score_KJ", "E": "score_E", "N": "score_GN", "V": "score_V",
  "U": "score_U", "R": "score_R", "M": "score_M",
}
REGISTRY: Mapping[str, Estimator] = {
  "activation": activation.ACTIVATION,
  "activation_z": activation.ON_GATE,
  "activation_out": activation.ON_OUTPUT,
  "activation_post": activation.AFTER,
  "flap": contribution.FLAP,
  "wanda": contribution.WANDA,
  "energy": contribution.ENERGY,
  "ghost": ghost.GHOST,
  "magnitude": weights.MAGNITUDE,
  "taylor": weights.TAYLOR,
  "fisher": weights.FISHER,
  "random": weights.RANDOM,
}


def named(name: str) -> Estimator:
  """Returns the estimator of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in REGISTRY:
    raise ValueError(f"estimator {name!r} is not one of {', '.join(REGISTRY)}")
  return REGISTRY[name]


def parse(spec: str, letters: str) -> dict[str, str]:
  """Returns score -> name of the estimator that measures it.

  Args:
    spec: a name, or a name and exceptions by letter: "activation,F=flap,N=ghost". Letters that
      share a score (H, P and G; K and J) share its estimator.
    letters: the axes to score. An exception for an axis that is not among them is not used.

  Raises:
    ValueError: an unknown name or letter, two exceptions for one score, or an axis that its
      estimator cannot score.
  """
  if not letters or not set(letters) <= set(SCORE_OF):
    raise ValueError(f"axes {letters!r}: choose from {''.join(SCORE_OF)}")
  first, *rest = (part.strip() for part in spec.split(","))
  named(first)
  own: dict[str, str] = {}
  for part in rest:
    letter, equals, name = part.partition("=")
    if not equals or letter not in SCORE_OF or letter == "V":
      raise ValueError(f"estimator {spec!r}: {part!r} is not LETTER=NAME with a letter of "
                       f"{''.join(SCORE_OF).replace('V', '')}")
    named(name)
    score = SCORE_OF[letter]
    if own.setdefault(score, name) != name:
      raise ValueError(f"estimator {spec!r}: {letter} shares {score} with an axis that is scored "
                       f"by {own[score]}")
  found = {}
  for letter in letters:
    score = SCORE_OF[letter]
    name = own.get(score, first)
    if score != "score_V" and score not in named(name).statistics:
      able = [each for each, one in REGISTRY.items() if score in one.statistics]
      raise ValueError(f"estimator {name!r} cannot score axis {letter}: take one of "
                       f"{', '.join(able)}, as in {letter}={able[0]}")
    found[score] = name
  return found


def has(block: Block, score: str) -> bool:
  """Whether a kind of block has the axes of a score."""
  return set(axes.of(score)) <= {"D", *block.axes}


def asked(
  cfg: ModelConfig, chosen: Mapping[str, str], reads: str
) -> dict[str, dict[str, Estimator]]:
  """Returns block folder -> score -> estimator, of those that read `reads`.

  Args:
    cfg: the model.
    chosen: from `parse`.
    reads: a kind of `Estimator.reads`.

  Raises:
    ValueError: a block whose axis that estimator cannot score; says why.
  """
  found: dict[str, dict[str, Estimator]] = {}
  for index, block in enumerate(cfg.blocks):
    mine = {score: named(name) for score, name in chosen.items()
            if score != "score_V" and named(name).reads == reads and has(block, score)}
    for score, each in mine.items():
      why = each.statistics[score].bars(block)
      if why:
        raise ValueError(f"estimator {chosen[score]!r} cannot score axis {axes.of(score)} of block "
                         f"{block_name(index)}: {why}; take activation, as in "
                         f"{axes.of(score)}=activation")
    if mine:
      found[block_name(index)] = mine
  return found


def check(cfg: ModelConfig, chosen: Mapping[str, str]) -> None:
  """Raises where an estimator cannot score an axis of a block: see `asked`."""
  for reads in sorted({named(name).reads for score, name in chosen.items() if score != "score_V"}):
    asked(cfg, chosen, reads)


def meta(cfg: ModelConfig, chosen: Mapping[str, str], reads: str) -> Statistic | None:
  """Returns what scores the meta tokens; None: nothing does, or it does not read `reads`."""
  name = chosen.get("score_M") if cfg.meta else None
  return named(name).statistics["score_M"] if name and named(name).reads == reads else None
