"""The small model without distillation: scores, plan and a verified cut.

python -m experiments.prune --config=configs/quickstart.py [--config.targets.D=128]
"""

from experiments import artefacts, cli, pipeline


def main(job: cli.Job) -> None:
  """Plans and cuts, and prints where the manifest and the small model are."""
  folders = pipeline.execute(job, "cut")
  if folders:
    print(f"plan: {folders['plan'] / 'plan.json'}")
    print(f"model: {folders['cut'] / artefacts.MODEL}")


if __name__ == "__main__":
  cli.start(main)
