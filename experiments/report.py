"""The report: what each model is worth, in a table, in words, and in pictures."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import hybridlm
from experiments import artefacts, observing, plots
from hybridlm import config
from hybridlm.config import ModelConfig, Parallel
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores

# Rows in order; rounds of a schedule come after the teachers, named as in "round1_pruned".
NAMES = {
  "teacher": "teacher",
  "corrected": "teacher, corrected",
  "pruned": "pruned",
  "repaired": "pruned + repaired",
  "distilled": "pruned + distilled",
  "scratch": "same size from scratch",
}
HEADER = (
  "model", "parameters", "bits/byte in domain", "bits/byte out of domain", "top-1 agreement",
  "KL to teacher (nats)", "training tokens/s", "forward tokens/s",
)

TIMES = (
  "Shares are of wall time. The device waits for data only while it has nothing else to do; other: "
  "the host looks at results and calls steps. MFU: FLOPs of the model's forward and backward, "
  "padding included and nothing computed twice counted, of the published peak; a dash: the device "
  "has none here."
)


def label(name: str) -> str:
  """Returns what a model is called in tables: `round1_pruned` -> "round 1: pruned"."""
  if name in NAMES:
    return NAMES[name]
  number, _, plain = name.removeprefix("round").partition("_")
  return f"round {number}: {NAMES[plain]}"


def ordered(names: Iterable[str]) -> list[str]:
  """Returns names of models in the order of the table's rows."""
  def place(name: str) -> tuple[float, int]:
    number, _, plain = name.removeprefix("round").rpartition("_")
    late = 0 if plain in ("teacher", "corrected") else math.inf
    return (int(number) if number else late, list(NAMES).index(plain))

  return sorted(names, key=place)


def reference(names: Iterable[str]) -> str:
  """Returns the model that others are measured against: the corrected teacher where there is one.

  It is what distillation learns from.
  """
  return "corrected" if "corrected" in names else "teacher"


def recovery(results: Mapping[str, Any]) -> float:
  """Returns the share of the in-domain loss gap, opened by pruning, that distillation closed."""
  teacher, pruned, distilled = (
    results[name]["inside"]["cross_entropy"]
    for name in (reference(results), "pruned", "distilled")
  )
  return (pruned - distilled) / (pruned - teacher) if pruned != teacher else math.nan


def row(name: str, result: Mapping[str, Any], training: Mapping[str, Any] | None) -> list[str]:
  """Returns one model's cells of the table, as `HEADER` orders them."""
  inside, outside = result["inside"], result["outside"]
  return [
    label(name),
    f"{result['parameters']:,}",
    f"{inside['bits_per_byte']:.3f}",
    f"{outside['bits_per_byte']:.3f}",
    f"{inside['agreement']:.1%}",
    f"{inside['kl']:z.4f}",
    f"{training['tokens_per_second']:,.0f}" if training else "–",
    f"{result['forward_tokens_per_second']:,.0f}",
  ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table, numbers to the right."""
  lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(timed: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the table of where training runs spent their time: name -> `observing.split`."""
  rows = [observing.row(label(name), timed[name]) for name in ordered(timed)]
  return table(observing.HEADER, rows)


def verdicts(results: Mapping[str, Any], ngrams: Mapping[str, Sequence[float]]) -> list[str]:
  """Returns what the numbers say, one sentence each, whichever way it went."""
  bits = {name: result["inside"]["bits_per_byte"] for name, result in results.items()}
  lines = _against_ngrams(results["teacher"]["inside"], ngrams.get("inside", ()))
  if "corrected" in results:
    verb = "gains" if bits["corrected"] < bits["teacher"] else "loses"
    lines.append(f"Correction of the teacher {verb} {abs(bits['teacher'] - bits['corrected']):.3f} "
                 "bits a byte; what follows is measured against the corrected one.")
  lines.append(f"Pruning costs {bits['pruned'] - bits[reference(bits)]:.3f} bits a byte; "
               f"distillation brings back {bits['pruned'] - bits['distilled']:.3f} of it: "
               f"{recovery(results):.1%} of the loss gap.")
  if "repaired" in results:
    verb = "brings back" if bits["repaired"] < bits["pruned"] else "loses"
    lines.append(f"Repair before distillation {verb} "
                 f"{abs(bits['pruned'] - bits['repaired']):.3f} bits a byte.")
  if "scratch" in results:
    verb = "beats" if bits["distilled"] < bits["scratch"] else "does not beat"
    lines.append(f"Distilled ({bits['distilled']:.3f}) {verb} the same size trained from scratch "
                 f"on as many tokens ({bits['scratch']:.3f}).")
  return lines


def _against_ngrams(teacher: Mapping[str, float], bits: Sequence[float]) -> list[str]:
  """Returns how the teacher stands against the 4-gram and the strongest n-gram, where counted."""
  if not bits:
    return []
  ours, best = teacher["bits_per_byte"], min(range(len(bits)), key=lambda index: bits[index])
  sentence = f"The teacher ({ours:.3f} bits a byte)"
  if len(bits) >= 4:
    verb = "beats" if ours < bits[3] else "does not beat"
    sentence += f" {verb} a byte 4-gram ({bits[3]:.3f}); it"
  verb = "beats" if ours < bits[best] else "does not beat"
  return [
    f"{sentence} {verb} the strongest n-gram printed, the {best + 1}-gram ({bits[best]:.3f}). The "
    f"model is measured on a sample of {teacher['tokens']:,.0f} tokens of the split, the n-grams "
    "on all of it."
  ]


def ngram_table(ngrams: Mapping[str, Sequence[float]]) -> str:
  """Returns the baselines' bits per byte, one row an order."""
  columns = [key for key in ("inside", "outside") if key in ngrams]
  rows = [
    [f"byte {order}-gram", *(f"{ngrams[key][order - 1]:.3f}" for key in columns)]
    for order in range(1, len(ngrams[columns[0]]) + 1)
  ]
  names = {"inside": "bits/byte in domain", "outside": "bits/byte out of domain"}
  return table(["Witten–Bell", *(names[key] for key in columns)], rows)


def sizes(cfg: ModelConfig) -> str:
  """Returns a model in one line: pattern, the sizes its blocks have by letter, what is off."""
  found: dict[str, set[int]] = {}
  for index in range(len(cfg.blocks)):
    for letter, size in cfg.sizes(index).items():
      found.setdefault(letter, set()).add(size)
  if cfg.meta:
    found["M"] = {cfg.meta}
  text = " ".join(f"{letter}={'/'.join(map(str, sorted(s)))}" for letter, s in found.items())
  off = "".join(f", {name} off in {' '.join(map(str, gone))}"
                for name, gone in _off(cfg).items() if gone)
  return f"`{cfg.pattern}` {text}{off}, {config.parameters(cfg):,} parameters"


def _off(cfg: ModelConfig) -> dict[str, list[int]]:
  """Returns which parallel blocks have lost a branch, by its name."""
  blocks = [(i, block) for i, block in enumerate(cfg.blocks) if isinstance(block, Parallel)]
  return {
    "attention": [i for i, block in blocks if block.attention is None],
    "SSM": [i for i, block in blocks if block.ssm is None],
  }


def forecast(models: Mapping[str, ModelConfig], *, length: int, batch: int) -> str:
  """Returns sizes, memory and cost of models before anything is computed, in Markdown.

  Args:
    models: "teacher", the rounds and, where targets say it, "small model".
    length: tokens a row.
    batch: rows whose decode state is counted.
  """
  rows, lines = [], []
  for name, cfg in models.items():
    cost = hybridlm.cost(cfg, context=length, batch=batch)
    count = cost.parameters
    shown = (4 * count, 16 * count, cost.state_bytes)
    rows.append([
      name, f"{count:,}", *(f"{size / 1e6:,.1f}" for size in shown),
      f"{cost.prefill_flops / 1e6:,.1f}",
    ])
    lines.append(f"{name}: {sizes(cfg)}")
  if "small model" in models:
    teacher, small = (config.parameters(models[name]) for name in ("teacher", "small model"))
    lines.append(f"the small model keeps {small / teacher:.1%} of the parameters")
  else:
    lines.append("small model: its sizes are known after the scores")
  header = ["model", "parameters", "weights MB", "training MB", "decode state MB", "MFLOP/token"]
  notes = (
    "training MB: float32 weights, gradients and AdamW's two moments; distillation adds the "
    f"teacher's weights; activations are not in it. Decode state: {batch} sequences of {length} "
    "tokens."
  )
  return "\n".join([*lines, table(header, rows), notes])


def _curve_panels(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[plots.Curve]]:
  panels: dict[str, list[plots.Curve]] = {}
  for name in ordered(logs):
    log, title = logs[name], "teacher" if name in ("teacher", "corrected") else "small model"
    points = (
      [(point["tokens"], point["ce"]) for point in log[split]] for split in ("train", "valid")
    )
    panels.setdefault(title, []).append(plots.Curve(label(name), *points))
  return panels


def write(
  folder: pathlib.Path,
  *,
  title: str,
  results: Mapping[str, Any],
  ngrams: Mapping[str, Sequence[float]],
  logs: Mapping[str, Mapping[str, Any]],
  scores: Scores,
  plan: Plan,
  facts: Mapping[str, str],
  findings: str = "",
) -> str:
  """Writes `report.md` and its pictures into a folder; returns the table.

  Args:
    folder: where everything goes.
    title: first line.
    results: model name -> what `evaluate` stages measured; see `NAMES` for the names. Those of a
      round begin with "round1_" and its like.
    ngrams: "inside" and "outside" -> bits per byte of orders 1, 2, ..
    logs: model name -> what `training.log` returned.
    scores: what the plan was made from.
    plan: what was kept.
    facts: what else a reader needs to know, name -> sentence.
    findings: what the study of the teacher's heads says, in Markdown.
  """
  summaries = {name: log["summary"] for name, log in logs.items()}
  rows = [row(name, results[name], summaries.get(name)) for name in ordered(results)]
  body = [f"# {title}", "", *(f"* {line}" for line in verdicts(results, ngrams)), ""]
  main = table(HEADER, rows)
  body += [main, "", "Bits per byte count every predicted token, ends of documents too. Agreement "
           "and KL are in domain. Training speed of a distilled model includes its teacher's "
           "forward pass.", ""]
  if ngrams:
    body += ["## Baselines", "", "Counted on the same training split; predicted is the whole test "
             "split.", "", ngram_table(ngrams), ""]
  body += ["## What was kept", ""]
  for name, path in plots.importance(scores, plan, folder).items():
    body += [f"![{name}]({path.name})", ""]
  panels = _curve_panels(logs)
  if panels:
    levels = {}
    if reference(logs) in logs:
      ended = logs[reference(logs)]["valid"][-1]["ce"]
      levels["small model"] = {f"{label(reference(logs))}, at its end": ended}
    plots.curves(panels, levels, folder / "loss.png", y_label="cross-entropy (nats a token)")
    body += ["## Loss", "", "Thin: training. Dotted: validation.", "", "![loss](loss.png)", ""]
  timed = {name: made["time"] for name, made in summaries.items() if "time" in made}
  if timed:
    body += ["## Where the time went", "", times(timed), "", TIMES, ""]
  if findings:
    body += ["## Which heads, and how many", "", findings, ""]
  body += ["## How it was made", "", *(f"* {name}: {text}" for name, text in facts.items()), ""]
  artefacts.write_bytes(folder / "report.md", "\n".join(body).encode())
  return main
