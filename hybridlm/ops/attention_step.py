"""Attention of one query a row over a cache whose slot s holds the newest position = s mod S."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FLOOR = -1e30


def held(position_B: Int[Array, "B"], size: int) -> Int[Array, "B S"]:
  """Returns the position that each of `size` slots holds once `position_B` is stored.

  That is the newest position up to `position_B` of the slot's remainder; negative where the row
  has not come so far.
  """
  position_B1 = position_B[:, None]
  return position_B1 - (position_B1 - jnp.arange(size)) % size


def put(
  cache_BKSE: Float[Array, "B K S E"],
  new_BKE: Float[Array, "B K E"],
  position_B: Int[Array, "B"],
) -> Float[Array, "B K S E"]:
  """Returns the cache with each row's newest key (or value) in the slot of its position."""
  slot_B = position_B % cache_BKSE.shape[2]
  rows_B = jnp.arange(cache_BKSE.shape[0])
  if len(rows_B) == 1:
    # Written twice: XLA makes one update a slice, and then copies the whole cache on CPU.
    rows_B, slot_B, new_BKE = (jnp.concatenate([v, v]) for v in (rows_B, slot_B, new_BKE))
  return cache_BKSE.at[rows_B, :, slot_B].set(new_BKE.astype(cache_BKSE.dtype))


def attend(
  q_BKJE: Float[Array, "B K J E"],
  k_BKSE: Float[Array, "B K S E"],
  v_BKSE: Float[Array, "B K S width"],
  position_B: Int[Array, "B"],
  before: tuple[Float[Array, "M K E"], Float[Array, "M K width"]] | None = None,
) -> Float[Array, "B K J width"]:
  """Returns softmax(q k / sqrt(E)) v over the filled slots, in q's dtype, softmax in float32.

  The query stands at `position_B`, whose own key is stored. A cache of S slots is a window of S.
  Keys and values `before` the first position are those of every row, and no window leaves them.
  """
  dtype, scale = jnp.promote_types(q_BKJE.dtype, jnp.float32), q_BKJE.shape[-1] ** -0.5
  logit_BKJS = jnp.einsum("BKJE,BKSE->BKJS", q_BKJE, k_BKSE, preferred_element_type=dtype)
  seen_BS = held(position_B, k_BKSE.shape[2]) >= 0
  logit_BKJS = jnp.where(seen_BS[:, None, None], logit_BKJS * scale, FLOOR)
  if before is not None:
    k_MKE, v_MKE = before
    first_BKJM = jnp.einsum("BKJE,MKE->BKJM", q_BKJE, k_MKE, preferred_element_type=dtype) * scale
    logit_BKJS = jnp.concatenate([logit_BKJS, first_BKJM], axis=-1)
  weight_BKJS = jax.nn.softmax(logit_BKJS, axis=-1).astype(v_BKSE.dtype)
  if before is None:
    o_BKJE = jnp.einsum("BKJS,BKSE->BKJE", weight_BKJS, v_BKSE, preferred_element_type=dtype)
  else:
    weight_BKJS, weight_BKJM = jnp.split(weight_BKJS, [v_BKSE.shape[2]], axis=-1)
    o_BKJE = jnp.einsum("BKJS,BKSE->BKJE", weight_BKJS, v_BKSE, preferred_element_type=dtype)
    o_BKJE += jnp.einsum("BKJM,MKE->BKJE", weight_BKJM, v_MKE, preferred_element_type=dtype)
  return o_BKJE.astype(q_BKJE.dtype)
