"""What the study of a teacher's heads says, in tables and one sentence a question."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report, studies

# Part of the stage's fingerprint: raise it when the same inputs give another result.
VERSION = 2
Rows = Sequence[Mapping[str, Any]]


def study(cfg, params, calibration, batches, *, heads: Sequence[int]) -> dict[str, Any]:
  """Returns the zero-shot losses (nats a token) of every way to choose heads, as plain data.

  Args:
    cfg: the teacher.
    params: its parameters.
    calibration: batches of each calibration seed.
    batches: what the losses are measured on.
    heads: heads a group to keep; each at most the teacher's.

  Raises:
    ValueError: a size the teacher cannot be cut to.
  """
  whole = studies.whole_plan(cfg, params)
  return {
    "full": studies.masked_loss(cfg, params, whole, batches),
    "groups": cfg.size("G"),
    "parent": cfg.size("H"),
    "projections": studies.compare_projections(cfg, params, calibration, batches, heads),
    "choices": studies.compare_choices(cfg, params, calibration, batches, heads),
  }


def means(rows: Rows) -> dict[str, dict[int, float]]:
  """Returns choice -> heads kept -> mean loss over seeds."""
  found: dict[str, dict[int, float]] = {}
  for row in rows:
    found.setdefault(row["choice"], {})[row["heads"]] = studies.spread(row["loss"])[0]
  return found


def grid(result: Mapping[str, Any], rows: Rows) -> str:
  """Returns a Markdown table: a row a choice, a column a size, mean ± standard deviation."""
  sizes = sorted({row["heads"] for row in rows}, reverse=True)
  cells = {(row["choice"], row["heads"]): row["loss"] for row in rows}
  lines = []
  for choice in dict.fromkeys(row["choice"] for row in rows):
    spreads = [studies.spread(cells[choice, size]) for size in sizes]
    lines.append([choice, *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in spreads)])
  whole = f"{result['groups']} × {result['parent']}"
  header = [f"loss, nats a token (uncut {result['full']:.3f})"]
  return report.table([*header, *(f"{result['groups']} × {k} of {whole}" for k in sizes)], lines)


def best_projection(result: Mapping[str, Any]) -> str:
  """Returns whether heads are best scored on W_x, as published (arXiv 2504.11409, Table 2)."""
  mean = means(result["projections"])
  sizes = sorted(mean["W_x"], reverse=True)
  won = [size for size in sizes if mean["W_x"][size] <= min(m[size] for m in mean.values())]
  best = min(mean, key=lambda name: sum(mean[name].values()))
  verdict = "agrees" if best == "W_x" else "disagrees"
  return (
    f"Published: heads are best scored on the output of W_x. This teacher {verdict}: W_x is best "
    f"at {len(won)} of {len(sizes)} sizes, and over all sizes {best} is."
  )


def price_of_heads(result: Mapping[str, Any]) -> str:
  """Returns whether a few heads are nearly free and half of them are not, as published."""
  mean = means(result["projections"])["W_x"]
  parent = result["parent"]
  few, half = (
    max(size for size in mean if size < parent),
    min(mean, key=lambda k: abs(2 * k - parent)),
  )
  cost = {size: mean[size] - result["full"] for size in (few, half)}
  published = "Published: cutting a few heads is nearly free, half of them is not."
  if few == half:
    return (
      f"{published} One size says nothing about it: keeping {few} of {parent} heads a group costs "
      f"{cost[few]:.3f} nats."
    )
  each = {size: cost[size] / (parent - size) for size in cost}
  agrees = each[half] > each[few] and cost[few] < cost[half] / 4
  return (
    f"{published} This teacher {'agrees' if agrees else 'disagrees'}: keeping {few} of {parent} "
    f"heads a group costs {cost[few]:.3f} nats, keeping {half} costs {cost[half]:.3f} "
    f"({each[few]:.3f} and {each[half]:.3f} for each head that goes). To agree, a head must cost "
    "more at half than at few, and the few less than a quarter of the half."
  )


def group_aware(result: Mapping[str, Any]) -> str:
  """Returns where the group-aware choice stands among the others."""
  mean = means(result["choices"])
  ours = mean["group-aware"]
  beaten = {
    name: sum(ours[size] <= other[size] for size in ours)
    for name, other in mean.items()
    if name != "group-aware"
  }
  counts = "; ".join(f"{name}: {count} of {len(ours)} sizes" for name, count in beaten.items())
  return f"Group-aware activation scores are at least as good as — {counts}."


def markdown(result: Mapping[str, Any]) -> str:
  """Returns both tables and the sentences, as Markdown."""
  seeds = len(result["choices"][0]["loss"])
  return "\n\n".join(
    [
      f"Masked teacher before any distillation; mean ± standard deviation over {seeds} calibration "
      f"{'seed' if seeds == 1 else 'seeds'}. Sizes are groups × heads a group.",
      grid(result, result["choices"]),
      group_aware(result),
      grid(result, result["projections"]),
      best_projection(result),
      price_of_heads(result),
    ]
  )
