"""Every value an experiment can set, with its default. Configs start from here and change some.

A misspelt override (`--config.distil.stesp=3`) is an error that names the nearest valid keys.
`None` stands for "not set": keep the parent's size, let the library choose.
"""

import ml_collections
from ml_collections import config_dict

# Targets that a search can choose. H is heads a group, `heads` heads a block.
SEARCHED = (
  "D", "F", "H", "heads", "P", "J", "K", "E", "U", "N", "R", "G", "M", "blocks", "layers", "noop",
  "attention_off", "ssm_off",
)


def source(kind: str, path: str = "") -> ml_collections.ConfigDict:
  """A source of text; fields as in `hybridlm.data.sources.Source`."""
  return ml_collections.ConfigDict(
    {"kind": kind, "path": path, "field": "text", "rule": "tenth", "template": "plain",
     "pairs": 8, "distance": 0, "documents": 1000})


def training(steps: int, peak: float) -> ml_collections.ConfigDict:
  """One run of the loop: AdamW over `steps` batches."""
  return ml_collections.ConfigDict({
    "steps": steps,
    "batch": 8,  # rows of data.length tokens a step
    "accumulate": 1,  # micro-batches a step; they divide the batch
    "schedule": "cosine",  # or "wsd"
    "peak": peak,  # learning rate
    "floor": 0.1,  # last learning rate, as a share of the peak
    "warmup": 20,  # steps
    "decay": 0,  # steps of the fall, for "wsd"
    "weight_decay": 0.1,
    "clip": 1.0,  # global norm of the gradient
    "beta1": 0.9,
    "beta2": 0.95,
    "validate_every": 100,  # steps
    "validate_batches": 4,
    "save_every": 200,  # steps between checkpoints, kept while the run lasts
    "keep": 2,  # of them the last so many
    "profile": (),  # (START, STOP): the steps after START up to STOP leave a trace for XProf
  })


def model() -> ml_collections.ConfigDict:
  """A teacher that is pretrained: its pattern and sizes, and how it computes."""
  c = ml_collections.ConfigDict()
  c.preset = ""  # a published model by name; then pattern and sizes stay unset
  # One character a block: M Mamba-2, S Mamba-1, * attention, = attention and an SSM side by side,
  # - MLP.
  c.pattern = ""
  for letter in "VDFKJEUGHPNRW":
    c[letter] = config_dict.placeholder(int)  # V unset: as many rows as the tokenizer has ids
  # Unset: what `hybridlm.ModelConfig` and its blocks take, or the preset. Of an imported teacher
  # only dtype, remat, stack, ssd, attention and chunk can be set.
  for name in ("activation", "norm", "dtype", "remat", "stack", "ssd", "attention"):
    c[name] = config_dict.placeholder(str)
  c.tied = config_dict.placeholder(bool)
  c.chunk = config_dict.placeholder(int)
  c.meta = config_dict.placeholder(int)  # learnt vectors before every document
  c.window = config_dict.placeholder(int)  # positions that attention sees; unset: all
  c.rope = config_dict.placeholder(float)  # base of rotary positions; unset: there are none
  # Layers with attention, counted from 0: those without the window, and groups in a row that share
  # the first one's keys and values: ((1, 2), (3, 4)).
  c.global_layers = ()
  c.kv_groups = ()
  # Of =: "mamba2" or "mamba1"; "mean" or "sum" of both branches. What a Mamba-2 mixer norms:
  # "gated", "before" or "none".
  for name in ("ssm", "fusion", "gate"):
    c[name] = config_dict.placeholder(str)
  return c


def search() -> ml_collections.ConfigDict:
  """What `experiments.search` chooses from, and how; limits are in `budget` and `rules`."""
  c = ml_collections.ConfigDict()
  c.method = "grid"  # every candidate; "random" ones; "milp": options block by block
  # Target -> its choices, e.g. D=(160, 192); () keeps the parent's size. Under "milp", `blocks`,
  # `noop`, `attention_off` and `ssm_off` bound how many blocks stay, or go without that.
  c.space = ml_collections.ConfigDict({name: () for name in SEARCHED})
  c.candidates = 300  # "random": how many are scored; "grid": the most there may be
  c.score = "kl"  # to the teacher, or "ce": what candidates are ranked by
  c.split = "valid"
  c.batch = 8
  c.batches = 2
  c.solutions = 4  # "milp": solutions for each D ..
  c.diversity = 1  # .. and blocks in which any two of them differ at least
  c.evolve = 0  # rounds of evolution after that ..
  c.population = 8  # .. parents and children of each
  c.finalists = 4  # the best, which are distilled briefly, as `distil` says but for steps ..
  c.rungs = ()  # .. in all at each rung, e.g. (20, 60); the better half goes on; () none are
  c.rivals = ()  # distilled as long beside the winner: "largest" that fits, "targets"
  # One candidate that a dry run looks up in the space.
  c.winner = ml_collections.ConfigDict(
    {name: config_dict.placeholder(int) for name in SEARCHED})
  return c


def calibrate() -> ml_collections.ConfigDict:
  """What is scored, how, and on which text."""
  c = ml_collections.ConfigDict()
  # A name, or one with exceptions by letter: "activation,F=flap,N=ghost" (docs/estimators.md).
  c.estimator = "activation"
  c.axes = "HPFDJ"  # letters of HPGFDJKEUNRVM
  # "kl", "mse", "greedy", "influence" or "window" also scores whole blocks.
  c.depth = config_dict.placeholder(str)
  c.window = config_dict.placeholder(int)  # blocks that go together, for "window"
  # "kl" also scores blocks without their SSM, and those of two branches without either.
  c.noop = config_dict.placeholder(str)
  c.save_every = 4  # batches between saves of what is done
  c.split = "train"
  c.batches = 16
  c.batch = 8
  return c


def targets() -> ml_collections.ConfigDict:
  """Sizes of the small model; unset: the parent's."""
  c = ml_collections.ConfigDict()
  # H is heads a group, `heads` heads a block: two units. An inside axis takes pairs of a block and
  # its size too: F = ((1, 16), (3, 8)); N = 0 leaves a block its convolution, gate and norm alone.
  # `blocks` is how many blocks stay, or which; `layers` how many pairs of a mixer and an MLP;
  # `noop` of how many blocks, or of which, N is 0; `floors` how many blocks of a kind stay at
  # least: (("*", 2),). `M` is of the whole model; `attention_off` and `ssm_off` are how many blocks
  # with both branches lose that one, or which.
  for name in (
    "D", "F", "H", "heads", "P", "J", "K", "E", "U", "N", "R", "G", "M", "blocks", "layers", "noop",
    "attention_off", "ssm_off", "floors",
  ):
    c[name] = config_dict.placeholder(object)
  return c


def repair() -> ml_collections.ConfigDict:
  """The cut model's output projections by least squares, before distillation."""
  c = ml_collections.ConfigDict()
  c.run = "none"  # or "least_squares"
  c.ridge = 1e-3  # of the inputs' mean square: how strongly changes are held back
  c.order = "one_by_one"  # each block on repaired ones before it, or "together"
  c.target = "out"  # what is matched: the stream after a block, or "mix": its own output
  c.gain = "none"  # "rescale" first gives each norm the factor that fits
  c.split = "train"
  c.batches = 16
  c.batch = 8
  return c


def evaluate() -> ml_collections.ConfigDict:
  """Where and on how much text models are measured."""
  c = ml_collections.ConfigDict()
  c.inside = "main"
  c.outside = "other"
  c.split = "test"
  c.batch = 8
  c.batches = 32  # at most, spread evenly over the split
  c.speed_repeats = 5
  c.ngram = 6  # largest order of the byte n-gram baselines; 0 leaves them out
  return c


def assess() -> ml_collections.ConfigDict:
  """What a pretrained model is worth beside others of its size, see `experiments.roadmap`."""
  c = ml_collections.ConfigDict()
  c.members = ""  # models to set side by side, as `experiments.sweep` takes them, "list:.."
  c.seeds = 1
  c.tolerance = 0.02  # by which their parameters may differ, as a share
  # Pairs of members whose difference is said in words: (("meta", "sharing"), ..).
  c.pairs = ()
  c.recall = ()  # sources of kind "recall" whose answers are counted; tables show the first
  c.batch = 8
  c.batches = 16  # of documents, one a row
  c.context = 8192  # tokens whose decode state is counted, at 16 bits a number
  c.steps = 16  # tokens that decoding is timed on at that context, `turns` times
  c.turns = 5
  return c


def findings() -> ml_collections.ConfigDict:
  """A study of the teacher's Mamba heads before distillation: which are kept, and how many."""
  c = ml_collections.ConfigDict()
  c.heads = ()  # heads a group to keep, e.g. (5, 3); empty leaves the study out
  c.seeds = 1  # calibration samples
  c.calibration = 4  # batches a sample
  c.batch = 8
  c.batches = 8  # of the validation split, where losses are measured
  return c


def budget() -> ml_collections.ConfigDict:
  """What the small model may cost at most, several bounds at once; unset: no bound."""
  # Time is that of this device as measured (`experiments.timings`), or of a named one by its
  # published peaks.
  c = ml_collections.ConfigDict()
  c.parameters = config_dict.placeholder(int)
  for name in ("memory_gib", "prefill_ms", "decode_ms", "tokens_per_second"):
    c[name] = config_dict.placeholder(float)
  c.context = 8192  # tokens a sequence
  c.batch = 1  # sequences
  c.device = ""  # "" or one of hybridlm/prune/devices.py: "h100", "v5p", ..
  for name in ("weight_dtype", "kv_dtype", "conv_dtype"):
    c[name] = config_dict.placeholder(str)  # in memory; unset: the compute dtype
  c.ssm_dtype = "float32"
  return c


def rules() -> ml_collections.ConfigDict:
  """What the small model must be, whatever it costs."""
  c = ml_collections.ConfigDict()
  c.divisors = ml_collections.ConfigDict()  # letter, "heads" or "blocks" -> a divisor
  for name in ("D", "F", "H", "heads", "P", "J", "K", "E", "U", "N", "R", "G", "M", "blocks"):
    c.divisors[name] = 1
  c.floors = ()  # (("*", 2),): at least so many blocks of a kind
  c.conv_multiple = 1  # channels of a convolution; CUDA kernels take multiples of 8
  c.shards = ()  # numbers of devices that a server must be able to split the model over
  c.inner_share = 0.0  # heads x channels at least this share of the parent's
  c.family = config_dict.placeholder(str)  # that must be able to express it; "any"
  return c


def distil() -> ml_collections.ConfigDict:
  """Distillation: a run of the loop, and what the student is compared with."""
  c = training(steps=400, peak=2e-3)
  c.temperature = 1.0
  c.kl = 1.0
  c.ce = 0.0
  # Of the student from the teacher: "forward_kl", "reverse_kl", "jensen_shannon", or "skewed_kl",
  # against a mixture with this share of the teacher.
  c.divergence = "forward_kl"
  c.skew = 0.1
  c.top_k = 0  # of the teacher's tokens, and one bucket for the rest; 0: all
  # What else is compared, block by block: "out", the stream after a block, "mix", what it adds,
  # "state", an SSM's last. By "cosine", "mse" or "normalized_mse". Weight unset: as large as kl's.
  c.intermediate = ()
  c.intermediate_loss = "cosine"
  c.intermediate_weight = config_dict.placeholder(float)
  # What the student is trained in: "float32", "bfloat16" or "fp8" (its projections; the rest, and
  # so many blocks at either end, in bfloat16); "": as model.dtype says.
  c.precision = ""
  c.wide_ends = 4
  # What the teacher's weights are held in: "bfloat16", "int8", "fp8"; "": as they were saved.
  c.teacher_precision = ""
  # A folder that `experiments.teacher` wrote: its tokens and probabilities stand for the teacher.
  c.store = ""
  # Several runs, each from where the last one ended: ({"steps": 100, "length": 8192}, {"steps": 50,
  # "length": 49152, "batch": 2, "phases": (..)}). What one does not say is as above; () is one run.
  c.stages = ()
  return c


def mesh() -> ml_collections.ConfigDict:
  """The devices as a grid, and what lies where on it."""
  c = ml_collections.ConfigDict()
  c.data = config_dict.placeholder(int)  # devices along the batch; unset: all that are left
  c.fsdp = 1  # devices along the batch and, of parameters and moments, along D
  c.tensor = 1  # devices along G, K, F and V; along H and J where they do not divide G and K
  c.sequence = 1  # devices along positions
  # Where a model that is trained lies on it, and its teacher ("": the same): "sharded", "copied"
  # (parameters whole along fsdp) or "rows" (tensor holds rows too), see hybridlm/layout.py.
  c.layout = "sharded"
  c.teacher_layout = ""
  return c


def get_config() -> ml_collections.ConfigDict:
  """Returns the tree of defaults."""
  c = ml_collections.ConfigDict()
  c.name = "base"  # owns the workdir: another config's name is refused there
  c.seed = 0

  c.data = ml_collections.ConfigDict()
  # A packaged one, a JSON file of the tokenizers library, or what an imported teacher brings along.
  c.data.tokenizer = "bytes"  # or "sotu_1024", a path, "teacher"
  c.data.end = config_dict.placeholder(str)  # its token that ends a document; unset: its own
  c.data.length = 128  # tokens a row, L
  c.data.sources = ml_collections.ConfigDict()
  c.data.sources.main = source("sotu")
  c.data.sources.other = source("stdlib")
  # ((step, (("main", 0.9), ("other", 0.1))), ...): what training mixes from which step on.
  c.data.phases = ((0, (("main", 1.0),)),)

  c.model = model()
  c.teacher = training(steps=1000, peak=3e-3)
  # A Hugging Face folder, one of ours, or a GGUF file; "package:NAME/FILE" lies in an installed
  # package. Empty: pretrain a teacher, once, and cache it.
  c.teacher.path = ""

  c.calibrate = calibrate()

  c.plan = ml_collections.ConfigDict()
  # A manifest to replay on the same teacher, with every target unset, or "search": the best that
  # the search finds.
  c.plan.path = ""

  c.targets = targets()
  # Rounds before that, each cut and distilled on the way: ({"targets": {"D": 176}, "distil":
  # {"steps": 100}}, ...). What a round's distillation does not say is as below.
  c.schedule = ()

  c.repair = repair()

  # A short continued training of the teacher on the student's text: "before" everything, or
  # "beside" it, for the distillation alone. A fifth of the peak that the teacher was trained with.
  c.correct = training(steps=100, peak=6e-4)
  c.correct.run = "none"

  c.distil = distil()
  # How `experiments.teacher` keeps log-probabilities: "float16", or exactly, "float32".
  c.store = ml_collections.ConfigDict({"dtype": "float16", "file_mib": 256})

  # "hf" writes the distilled model as a Hugging Face folder, by the name of a family or the first
  # that can express it, and loads it back.
  c.export = ml_collections.ConfigDict(
    {"format": "none", "family": config_dict.placeholder(str)})

  # The same sizes from scratch on the tokens distillation saw; "none" leaves the baseline out.
  c.scratch = ml_collections.ConfigDict({"run": "same", "peak": 3e-3})

  c.evaluate = evaluate()

  c.assess = assess()
  c.findings = findings()

  c.search = search()

  c.budget = budget()

  c.rules = rules()

  # What a training run does about a step whose loss or gradient is not finite, or whose loss is a
  # spike: "stop", "skip" the update, or "rollback" and go on past the batch.
  c.guard = ml_collections.ConfigDict({
    "action": "stop",
    "spike": 0.0,  # times the running median of the loss; 0: no loss is one
    "limit": 10,  # bad steps that a run may meet
    "back": 1,  # checkpoints that "rollback" goes back, at most the run's `keep`
  })

  c.tokenizer = ml_collections.ConfigDict()  # what `experiments.tokenizer` trains
  c.tokenizer.V = 4096
  c.tokenizer.path = "tokenizer.json"

  c.mesh = mesh()
  return c
