"""The face of the library: the one file that knows both the model and the pruning."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridlm import config, lazy
from hybridlm.bind import apply, apply_hidden, apply_taps, language_loss
from hybridlm.config import ModelConfig
from hybridlm.decode import loop
from hybridlm.interop import dispatch
from hybridlm.nn import serve, stack
from hybridlm.nn.lm import HybridLM
from hybridlm.ops.segments import check_segments
from hybridlm.prune import cut as cutting
from hybridlm.prune import store as stores
from hybridlm.prune.plan import Plan
from hybridlm.prune.scores import Scores
from hybridlm.prune.trees import check_finite, shared_buffers
from hybridlm.train import checkpoint

# Largest difference of masked and cut logits that `cut` accepts, as a share of the largest logit.
TOLERANCE = 1e-4
PROBE = (2, 37)


def init(cfg: ModelConfig, *, seed: int = 0) -> dict[str, Any]:
  """Returns freshly drawn float32 parameters: nested dicts whose leaf names end in axes.

  >>> cfg = hybridlm.ModelConfig.from_pattern("M-", V=31, D=16, F=24, G=2, H=4, P=6, N=5)
  >>> params = hybridlm.init(cfg, seed=0)
  >>> params["blocks"]["01"]["w_up_DF"].shape
  (16, 24)
  """

  @jax.jit
  def draw(key):
    return HybridLM(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  return draw(jax.random.key(seed))


def load(path: str | os.PathLike, *, dtype: str | None = None) -> tuple[ModelConfig, dict]:
  """Returns the config and the parameters of the model a path holds.

  A Hugging Face folder, one of our own, the folder `checkpoints` of a training run, or a GGUF file.
  `dtype` converts the parameters; None keeps each leaf as it is stored, float16 widened.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is no model, of an unknown architecture, damaged, or its weights not finite.

  >>> cfg, params = hybridlm.load(folder)
  """
  if dtype not in (None, *config.DTYPES):
    raise ValueError(f"load: dtype {dtype!r} is not one of {', '.join(config.DTYPES)}")
  if os.path.isfile(os.path.join(path, checkpoint.MODEL)):
    cfg, trained = checkpoint.load_model(path, stack.unstacked)
    leaves = lazy.of(trained)
  else:
    cfg, leaves = dispatch.open(path)
  params = lazy.tree({name: jnp.asarray(leaf.read(), dtype) for name, leaf in leaves.items()})
  check_finite(params, f"load {os.fspath(path)}")
  return cfg, params


def save(
  path: str | os.PathLike,
  cfg: ModelConfig,
  params: Mapping[str, Any],
  *,
  format: str = "hybridlm",
  family: str | None = None,
  like: str | os.PathLike | None = None,
) -> None:
  """Writes a model as a folder that is whole or not there.

  Args:
    path: the folder, new or one that this function wrote.
    cfg: the model.
    params: its parameters.
    format: "hybridlm", our own; "hf": `config.json` and safetensors for transformers and vLLM.
    family: "hf" only: the published class, such as "nemotron_h"; None: the first that can say it.
    like: a model on disk whose tokenizer files and token ids are carried on.

  Raises:
    ValueError: parameters of another model or not finite; a model that no class can say, and why.

  >>> hybridlm.save(folder, cfg, params, format="hf")
  """
  config.check(cfg, params)
  check_finite(params, "save")
  dispatch.write(path, cfg, lazy.of(params), format=format, family=family, like=like)


def forward(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  token_BL: Int[Any, "B L"],
  segment_BL: Int[Any, "B L"] | None = None,
  kept: Mapping[str, Any] | None = None,
) -> Float[Array, "B L V"]:
  """Returns float32 logits of every position.

  Args:
    cfg: the model.
    params: its canonical tree.
    token_BL: token ids below V.
    segment_BL: documents of a packed row, each in one piece; positions of others are never seen.
    kept: surviving entries of a masked model, the second result of `mask`; logits of tokens that
      do not stay are minus infinity.

  Raises:
    ValueError: ids outside the vocabulary, a document in pieces (under `jax.jit` neither is seen),
      no position at all, counts that `mask` did not return, or parameters of another model.

  >>> hybridlm.forward(cfg, params, jnp.zeros((1, 7), jnp.int32)).shape
  (1, 7, 31)
  """
  config.check(cfg, params)
  _check_tokens(cfg, token_BL, "forward")
  _check_kept(cfg, kept)
  check_segments(segment_BL, "forward")
  segment_BL = None if segment_BL is None else jnp.asarray(segment_BL)
  return apply(cfg, params, jnp.asarray(token_BL), segment_BL, kept)[0]


fuse = jax.jit(serve.fuse, static_argnums=0)


def generate(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  prompt_BL: Int[Any, "B L"],
  *,
  length_B: Int[Any, "B"] | None = None,
  steps: int = 64,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  stop: Sequence[int] = (),
) -> Int[np.ndarray, "B steps"]:
  """Returns the tokens that follow each prompt; after a stop token its row is filled with it.

  Prompts stand on the left of `prompt_BL`, row b with `length_B[b]` real tokens; what is behind is
  never seen. `temperature` 0 takes the likeliest token; otherwise tokens are drawn from the `top_k`
  likeliest, of these from the fewest that hold `top_p`.

  Raises:
    ValueError: parameters of another model, and whatever `decode.loop.stream` refuses.

  >>> hybridlm.generate(cfg, params, token_BL, steps=5).shape
  (2, 5)
  """
  config.check(cfg, params)
  return loop.generate(
    serve.prefill, serve.step, cfg, fuse(cfg, params), prompt_BL, length_B=length_B, steps=steps,
    temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
  )


def _check_tokens(cfg: ModelConfig, token_BL: Any, place: str) -> None:
  """Raises where ids are outside the vocabulary; ids that are being traced cannot be looked at."""
  if token_BL.size == 0:
    raise ValueError(f"{place}: token_BL has shape {token_BL.shape}, it must hold a token")
  if isinstance(token_BL, jax.core.Tracer):
    return
  low, high = int(token_BL.min()), int(token_BL.max())
  if low < 0 or high >= cfg.V:
    raise ValueError(f"{place}: token id {low if low < 0 else high} is outside 0..V-1={cfg.V - 1}")


def _check_kept(cfg: ModelConfig, kept: Mapping[str, Any] | None) -> None:
  wanted = {"count", "stay_V", "blocks", *(("stay_M",) if cfg.meta else ())}
  if kept is not None and set(kept) != wanted:
    raise ValueError(f"kept has the keys {sorted(kept)}, not those that `mask` returns")


@functools.cache
def _bound(cfg: ModelConfig) -> tuple[Callable, Callable, Callable]:
  """Returns what calibration runs, the same functions every time: programs are kept by them."""
  taps, hidden = functools.partial(apply_taps, cfg), functools.partial(apply_hidden, cfg)
  return taps, hidden, language_loss(cfg)


def calibrate(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  batches: Iterable[Mapping[str, Any]],
  *,
  estimator: str = "activation",
  axes: str = "HPFDJ",
  depth: str | None = None,
  window: int | None = None,
  noop: str | None = None,
  data: str = "",
  seed: int = 0,
  store: str | os.PathLike | None = None,
  every: int = 4,
  place: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Scores:
  """Returns the scores of the given axes and, if asked, of whole blocks.

  Args:
    cfg: the model.
    params: its parameters.
    batches: dicts with `token_BL`, `weight_BL` (1 for real tokens, 0 for padding), `segment_BL`
      and, for estimators that read gradients, `target_BL`.
    estimator: a name of `prune.scores.ESTIMATORS`, with exceptions by letter: "activation,F=flap".
    axes: letters to score, of HPGFDJKENVURM.
    depth: None, "kl", "mse", "greedy", "influence" or "window": how whole blocks are scored.
    window: blocks that go together, for depth "window".
    noop: None, or "kl": what each block loses without its SSM, and each parallel one without one
      of its branches.
    data: fingerprint of the text, kept with the scores; not of how many batches are drawn.
    seed: of the "random" estimator.
    store: a file that keeps what is done: an interrupted call goes on, and more batches of the same
      text extend it.
    every: batches between saves of the store.
    place: lays a batch out on the devices; the parameters are taken where they lie.

  Raises:
    ValueError: an unknown name, an axis that its estimator cannot score, ids outside the
      vocabulary, activations that are not finite, or a store of another calibration.

  >>> scores = hybridlm.calibrate(cfg, params, batches)
  >>> scores.get("01/score_F").shape
  (24,)
  """
  config.check(cfg, params)
  batches = list(batches)
  for number, batch in enumerate(batches):
    _check_tokens(cfg, batch["token_BL"], f"calibration batch {number}")
  model = stores.Model(cfg, params, *_bound(cfg), place)
  spec = stores.Spec(estimator, axes, depth, window, noop, data, seed)
  return stores.calibrate(model, batches, spec, path=store, every=every)


def mask(
  cfg: ModelConfig, params: Mapping[str, Any], plan: Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns `(masked, kept)`: the parent's shapes with zeros, and what its norms divide by.

  >>> masked, kept = hybridlm.mask(cfg, params, plan)
  >>> float(kept["count"]), masked["blocks"]["01"]["w_up_DF"].shape
  (16.0, (16, 24))
  >>> logits_BLV = hybridlm.forward(cfg, masked, token_BL, kept=kept)
  """
  return cutting.mask(cfg, params, plan)


def cut(
  cfg: ModelConfig, params: Mapping[str, Any], plan: Plan
) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the smaller config and parameters, verified.

  Verified means: as many elements as the config says, logits equal to those of the masked parent
  on a probe batch in float32, all finite, and no buffer shared with the parent.

  Raises:
    ValueError: the plan was made for another model.
    RuntimeError: the verification failed; the cut is wrong and nothing is returned.

  >>> small_cfg, small_params = hybridlm.cut(cfg, params, plan)
  >>> small_params["blocks"]["01"]["w_up_DF"].shape
  (16, 11)
  """
  small_cfg, small = cutting.cut(cfg, params, plan)
  verify(cfg, params, plan, small_cfg, small)
  return small_cfg, small


def verify(
  cfg: ModelConfig,
  params: Mapping[str, Any],
  plan: Plan,
  small_cfg: ModelConfig,
  small: Mapping[str, Any],
) -> float:
  """Returns the largest difference of masked and cut logits, as a share of the largest logit.

  Raises:
    RuntimeError: the cut model is not what the plan says; the message names the check.
  """
  found = sum(leaf.size for leaf in jax.tree.leaves(small))
  if found != config.parameters(small_cfg):
    raise RuntimeError(f"cut: {found} elements, the config says {config.parameters(small_cfg)}")
  shared = shared_buffers(small, params)
  if shared:
    raise RuntimeError(f"cut: leaf {shared[0]!r} shares its buffer with the parent")
  token_V = plan.tokens
  probe_BL = np.random.default_rng(0).integers(0, len(token_V), PROBE).astype(np.int32)
  masked, kept = cutting.mask(cfg, params, plan)
  masked = cutting.as_rounded(cfg, masked, plan)
  exact = {"dtype": "float32"}
  want = apply(cfg.replace(**exact), masked, jnp.asarray(token_V[probe_BL]), kept=kept)[0]
  got = apply(small_cfg.replace(**exact), small, jnp.asarray(probe_BL))[0][..., : len(token_V)]
  want = want[..., token_V]
  if not bool(jnp.isfinite(got).all()):
    raise RuntimeError("cut: the cut model's logits are not finite")
  error = float(jnp.abs(want - got).max() / jnp.abs(want).max())
  if not error <= TOLERANCE:
    raise RuntimeError(f"cut: logits differ from the masked parent's by {error:.2e} of the largest")
  return error
