"""Only the scores: the teacher if need be, then one pass over calibration text.

python -m experiments.calibrate --config=configs/quickstart.py [--config.KEY=VALUE]
"""

from experiments import cli, pipeline


def main(job: cli.Job) -> None:
  """Scores every axis and prints where the scores are."""
  folders = pipeline.execute(job, "calibrate")
  if folders:
    print(f"scores: {folders['calibrate'] / 'scores.npz'}")


if __name__ == "__main__":
  cli.start(main)
