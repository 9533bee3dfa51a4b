"""Only the teacher: pretrains it, once, into the cache that workdirs share.

python -m experiments.pretrain --config=configs/quickstart.py [--config.KEY=VALUE]
"""

from experiments import artefacts, cli, pipeline


def main(job: cli.Job) -> None:
  """Trains the teacher if the cache does not hold it, and prints where it is."""
  folders = pipeline.execute(job, "teacher")
  if folders:
    print(f"teacher: {folders['teacher'] / artefacts.MODEL}")


if __name__ == "__main__":
  cli.start(main)
