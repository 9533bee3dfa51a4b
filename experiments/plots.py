"""The report's pictures: importance maps with what was kept and dropped, and loss curves."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from hybridlm import axes
from hybridlm.config import Mamba, Mamba1, block_name, ssm_of
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

KEPT, DROPPED = "#2b6cb0", "#dd6b20"
FEW = 64  # bars that have room for gaps between them
TITLES = {"F": "MLP width F", "KJ": "queries J of each key-value head K", "D": "residual width D",
          "X": "blocks X", "M": "meta tokens M"}


class Curve(NamedTuple):
  """A run in a plot: its label, and points (tokens seen, loss) in training and in validation."""

  label: str
  train: Sequence[tuple[float, float]]
  valid: Sequence[tuple[float, float]]


def _save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> pathlib.Path:
  figure.savefig(path, dpi=120, bbox_inches="tight")
  return path


def _bars(ax, score: np.ndarray, kept: np.ndarray | None, title: str) -> None:
  """Draws one bar an entry, kept and dropped in colours of their own."""
  stays = np.ones(score.size, bool)
  if kept is not None:
    stays[:] = False
    stays[kept] = True
  order = np.arange(score.size)
  for where, colour, label in ((stays, KEPT, "kept"), (~stays, DROPPED, "dropped")):
    if where.any():
      width = 0.9 if score.size <= FEW else 1.0
      ax.bar(order[where], score[where], width=width, color=colour, label=f"{label} {where.sum()}")
  ax.set_title(title, fontsize=9, loc="left")
  ax.set_xlim(-0.5, score.size - 0.5)
  ax.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _flat_kept(plan: Plan, index: int, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
  """Returns the kept entries of a score array laid flat, row by row; None where all stay.

  Of groups that go, and of a branch that is off, nothing stays.
  """
  keep, letters = plan.array(name, index), axes.of(name)
  groups = plan.array(f"keep_{letters[0]}", index) if len(letters) == 2 else None
  if keep is None and groups is None:
    return None
  rows = np.arange(np.prod(shape)).reshape(shape)
  if keep is not None:
    rows = np.take_along_axis(rows, keep, axis=1) if keep.ndim == 2 else rows[keep]
  return (rows if groups is None else rows[groups]).ravel()


def _bar_figure(panels: Sequence[tuple[str, np.ndarray, np.ndarray | None]], x_label: str):
  figure = matplotlib.figure.Figure(figsize=(9, 1.9 * len(panels)), layout="constrained")
  grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
  for ax, (title, score, kept) in zip(grid, panels, strict=True):
    _bars(ax, score, kept, title)
    ax.set_ylabel("score")
  grid[-1].set_xlabel(x_label)
  return figure


def _heads_figure(scores: Scores, plan: Plan, blocks: Sequence[int]):
  """Returns a heat map of heads × channels for each Mamba block; dropped rows and columns crossed.

  White lines part the groups: heads are compared with those of their own group only.
  """
  figure = matplotlib.figure.Figure(figsize=(9, 2.6 * len(blocks)), layout="constrained")
  grid = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
  for ax, index in zip(grid, blocks, strict=True):
    score_GHP = scores.get(f"{block_name(index)}/score_GHP")
    groups, heads, channels = score_GHP.shape
    image = ax.imshow(score_GHP.reshape(-1, channels), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=ax, label="score")
    rows = np.arange(groups * heads)
    kept_rows = _flat_kept(plan, index, "keep_GH", (groups, heads))
    kept_columns = plan.array("keep_P", index)
    lost_rows = [] if kept_rows is None else np.setdiff1d(rows, kept_rows)
    lost_columns = [] if kept_columns is None else np.setdiff1d(np.arange(channels), kept_columns)
    for row in lost_rows:
      ax.plot([-0.5, channels - 0.5], [row, row], color=DROPPED, lw=2.5)
    for column in lost_columns:
      ax.plot([column, column], [-0.5, groups * heads - 0.5], color=DROPPED, lw=2.5)
    for group in range(1, groups):
      ax.axhline(group * heads - 0.5, color="white", lw=2)
    if len(rows) <= FEW:
      ax.set_yticks(rows, [f"G{row // heads} H{row % heads}" for row in rows], fontsize=7)
    ax.set_title(
      f"block {block_name(index)}: {len(lost_rows)} of {groups * heads} heads and "
      f"{len(lost_columns)} of {channels} channels dropped (crossed out)", fontsize=9,
    )
  grid[-1].set_xlabel("channel P")
  return figure


def importance(scores: Scores, plan: Plan, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes one picture an axis that was scored; returns title -> file.

  Args:
    scores: what the plan was made from.
    plan: what stays.
    folder: where `importance_F.png` and its like go.
  """
  cfg, made = plan.config, {}
  mamba = [i for i, block in enumerate(cfg.blocks) if isinstance(ssm_of(block), (Mamba, Mamba1))]
  if mamba and f"{block_name(mamba[0])}/score_GHP" in scores.sums:
    figure = _heads_figure(scores, plan, mamba)
    made["SSM heads H and channels P"] = _save(figure, folder / "importance_HP.png")
  for name in ("score_F", "score_KJ"):
    panels = []
    for index in range(len(cfg.blocks)):
      path = f"{block_name(index)}/{name}"
      if path in scores.sums:
        score, keep = scores.get(path), name.replace("score", "keep")
        kept = _flat_kept(plan, index, keep, score.shape)
        panels.append((f"block {block_name(index)}", score.ravel(), kept))
    if panels:
      title = TITLES[axes.of(name)]
      made[title] = _save(_bar_figure(panels, title), folder / f"importance_{axes.of(name)}.png")
  panels = []
  if any(path.endswith("/score_D") for path in scores.sums):
    panels.append(("D", "summed over norms", scores.width(), plan.array("keep_D")))
  if "score_X" in scores.sums:
    panels.append(("X", "loss of one block", scores.get("score_X"), plan.array("keep_X")))
  if "score_M" in scores.sums:
    panels.append(("M", "before every document", scores.get("score_M"), plan.array("keep_M")))
  for letter, title, score, kept in panels:
    figure = _bar_figure([(title, score, kept)], TITLES[letter])
    made[TITLES[letter]] = _save(figure, folder / f"importance_{letter}.png")
  return made


def points(
  panels: Mapping[str, Mapping[str, tuple[float, float]]], path: pathlib.Path, *, x_label: str
) -> pathlib.Path:
  """Writes one panel a title with named points, x on a logarithmic axis; returns the file."""
  figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for ax, (title, named) in zip(grid, panels.items(), strict=True):
    for number, (name, place) in enumerate(named.items()):
      ax.plot(*place, color=f"C{number}", marker="o", ls="", label=name)
    ax.set_xscale("log")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x_label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
  return _save(figure, path)


def curves(
  panels: Mapping[str, Iterable[Curve]],
  levels: Mapping[str, Mapping[str, float]],
  path: pathlib.Path,
  *,
  y_label: str,
) -> pathlib.Path:
  """Writes one panel a title, with its runs and dashed lines at named levels; returns the file.

  A run is a thin line (training) under one with dots (validation).
  """
  figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for ax, (title, lines) in zip(grid, panels.items(), strict=True):
    for number, line in enumerate(lines):
      ax.plot(*zip(*line.train, strict=True), color=f"C{number}", lw=0.7, alpha=0.5)
      ax.plot(*zip(*line.valid, strict=True), color=f"C{number}", marker=".", label=line.label)
    for number, (label, level) in enumerate(levels.get(title, {}).items()):
      ax.axhline(level, color=f"C{5 + number}", ls="--", lw=1, label=label)
    ax.set_title(title, fontsize=10)
    ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    ax.set_xlabel("tokens seen")
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
  return _save(figure, path)
