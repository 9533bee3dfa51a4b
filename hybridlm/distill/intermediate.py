"""How far two aligned activations are apart: zero, exactly, where they are the same."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Distance = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


def _cosine(own: jax.Array, theirs: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns 1 − cos, as half the squared distance of the directions: small where it is small."""
  return _square(_direction(own, axes) - _direction(theirs, axes), axes) / 2


def _direction(vector: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns vectors of length 1; an empty one stays empty, and has no gradient."""
  square = jnp.square(vector).sum(axes, keepdims=True)
  some = square > 0
  return jnp.where(some, vector * jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


def _square(vector: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.square(vector).sum(axes)


def _mse(own: jax.Array, theirs: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.square(own - theirs).mean(axes)


def _normalized_mse(own: jax.Array, theirs: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  tiny = jnp.finfo(theirs.dtype).tiny
  return _square(own - theirs, axes) / jnp.maximum(_square(theirs, axes), tiny)


# 1 − cosine; mean square; squared distance as a share of the teacher's square.
TABLE: Mapping[str, Distance] = {
  "cosine": _cosine, "mse": _mse, "normalized_mse": _normalized_mse,
}


def check(kinds: Sequence[str], loss: str, weight: float | None, kl: float) -> None:
  """Raises unless a way to compare activations can be what it says.

  Raises:
    ValueError: a kind named twice, an unknown loss, a weight out of range, or one that follows a
      divergence that is not there.
  """
  if len(set(kinds)) != len(kinds):
    raise ValueError(f"intermediate={tuple(kinds)} names a kind twice")
  if loss not in TABLE:
    raise ValueError(f"intermediate_loss={loss!r} is not one of {', '.join(TABLE)}")
  if weight is not None and not 0 < weight < math.inf:
    raise ValueError(f"intermediate_weight={weight} must be positive")
  if kinds and weight is None and not kl:
    raise ValueError("intermediate_weight must be set with kl=0: there is no divergence to follow")


def added(
  sums: Mapping[str, jax.Array], apart: jax.Array, *, weight: float | None, logits: jax.Array
) -> dict[str, jax.Array]:
  """Returns the sums of a loss with "intermediate", which "loss" includes.

  Args:
    sums: of `loss.sums`.
    apart: Σ w·distance.
    weight: its factor; None: as much as makes it equal to `logits`, without a gradient.
    logits: what the divergence adds to "loss".
  """
  if weight is None:
    factor = jnp.where(apart > 0, logits / jnp.where(apart > 0, apart, 1), 0)
    weight = jax.lax.stop_gradient(factor)
  return {**sums, "intermediate": apart, "loss": sums["loss"] + weight * apart}


def total(
  own: Float[Array, "..."],
  theirs: Float[Array, "..."],
  weight_BL: Float[Array, "B L"],
  *,
  axes: str,
  vector: str,
  loss: str,
) -> Float[Array, ""]:
  """Returns Σ w·distance in float32 or wider; gradients flow to `own` alone.

  Args:
    own: the student's activation.
    theirs: the teacher's, aligned: of the same shape.
    weight_BL: weight of each position; an activation without L weighs what its row's positions do.
    axes: letters of both activations, such as "BLD".
    vector: letters that make one vector; the mean is taken over others that are neither B nor L.
    loss: a name of `TABLE`.
  """
  dtype = jnp.promote_types(own.dtype, jnp.float32)
  own, theirs = own.astype(dtype), jax.lax.stop_gradient(theirs.astype(dtype))
  distance = TABLE[loss](own, theirs, tuple(axes.index(letter) for letter in vector))
  left = [letter for letter in axes if letter not in vector]
  distance = distance.mean(tuple(i for i, letter in enumerate(left) if letter not in "BL"))
  weight = (weight_BL if "L" in axes else weight_BL.sum(1)).astype(dtype)
  return jnp.where(weight != 0, weight * distance, 0).sum()
