r"""The SSD scan on this device, beside its peers, and compiled for chips that are not here.

python -m experiments.benchmark --config=configs/benchmark_ssd.py

Every contender is checked against the token-by-token recurrence, values and gradients, before it is
timed, in a process of its own (on a TPU, which one process holds, all in one); contenders of one
case take turns. The section of the device's platform is used.
Cost: on two CPU cores about 6 minutes for the times and, with the extras `aheadtpu` and `aheadgpu`,
20 for the chips that are not here, which `--config.ahead.tpu.targets="()"` and
`--config.ahead.gpu.targets="()"` leave out; a GPU takes about 10.
Expect: on two CPU cores "chunked" at least twice as fast as transformers forward, 1.5 times forward
and backward, at chunks of 128 and 256; no spills in any GPU kernel.
"""

import ml_collections

PUBLISHED = ("8b", "4b", "56b", "nano", "nano_pruned", "hymba")
SMALL = ("small", "small_groups")


def section(**values) -> ml_collections.ConfigDict:
  """What one platform measures: shapes x lengths, and pairs `more`, in every dtype.

  Contenders are names or `name@chunk`; of ours, a bare name takes the chunk it takes by itself.
  A turn starts `queued` calls, waits for them together, and counts one.
  """
  return ml_collections.ConfigDict({"more": (), "turns": 5, "queued": 1} | values)


def compiled(**values) -> ml_collections.ConfigDict:
  """What is compiled for the chips of one platform."""
  return ml_collections.ConfigDict(
    {"shapes": PUBLISHED + SMALL, "lengths": (512, 8192, 32768)} | values
  )


def get_config() -> ml_collections.ConfigDict:
  """Returns what to measure, by platform, and what to compile."""
  c = ml_collections.ConfigDict()
  c.name = "benchmark_ssd"
  c.seed = 0
  # A folder that holds mamba-ssm's source distribution, unpacked; empty: the installed package.
  c.peers_path = ""
  # Largest ||got - want|| / ||want|| of y and of each gradient.
  c.tolerance = ml_collections.ConfigDict({"float32": 1e-4, "bfloat16": 1e-2})
  c.cpu = section(
    shapes=SMALL, lengths=(512, 1024, 2048), dtypes=("float32",),
    more=(("hymba", 512), ("8b", 512), ("nano_pruned", 512)),
    implementations=("chunked", "pallas_tpu", "pallas_gpu"),
    peers=("transformers@32", "transformers@64", "transformers@128", "transformers@256",
           "listing@128", "listing@256", "mamba2_jax@128", "axlearn@1"),
  )
  c.gpu = section(
    shapes=PUBLISHED, lengths=(512, 2048, 8192), dtypes=("bfloat16",), more=(("8b", 32768),),
    implementations=("chunked", "pallas_gpu", "pallas_tpu"),
    peers=("mamba_ssm@64", "mamba_ssm@128", "mamba_ssm@256", "listing@128"), turns=20, queued=10,
  )
  c.tpu = section(
    shapes=PUBLISHED, lengths=(512, 2048, 8192), dtypes=("bfloat16", "float32"),
    more=(("8b", 32768),), implementations=("chunked", "pallas_tpu", "pallas_gpu"),
    peers=("listing@128",), turns=20, queued=10,
  )
  # Peak temporary bytes, compiled for this device and not run, beside those of an array
  # [b, c, l, s, h, n] of chunks of `chunk` tokens.
  c.memory = ml_collections.ConfigDict({
    "shapes": PUBLISHED, "length": 8192, "dtypes": ("float32", "bfloat16"), "chunk": 128,
    "implementations": ("chunked",),
  })
  c.ahead = ml_collections.ConfigDict()
  c.ahead.tpu = compiled(
    targets=("v5e", "v5p", "v6e"), dtypes=("bfloat16", "float32"), implementations=("pallas_tpu",)
  )
  c.ahead.gpu = compiled(
    targets=("h200",), dtypes=("bfloat16",), implementations=("pallas_gpu",)
  )
  return c
