"""A byte-level BPE tokenizer trained on the training split of the config's mixed sources.

python -m experiments.tokenizer --config=configs/quickstart.py --config.tokenizer.V=2048
"""

from experiments import cli, settings
from hybridlm.data import tokenizers


def main(job: cli.Job) -> None:
  """Trains `tokenizer.V` ids and writes them to `tokenizer.path`, for `data.tokenizer` to name."""
  corpus = settings.corpus(job.config)
  names = sorted({name for _, weights in corpus.phases for name, _ in weights})
  texts = [document.text for name in names for document in corpus.documents(name, "train")]
  size = sum(len(text.encode()) for text in texts)
  print(f"training {job.config.tokenizer.V} ids on {size:,} bytes of {', '.join(names)}")
  if not job.dry_run:
    made = tokenizers.train(texts, V=job.config.tokenizer.V)
    made.save(job.config.tokenizer.path)
    print(f"tokenizer: {job.config.tokenizer.path}")


if __name__ == "__main__":
  cli.start(main)
