"""Attention by query blocks against the dense formula, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import programs
from hybridlm.ops import attention

B, L, K, J, E = 2, 37, 2, 3, 10


def inputs(S=L, length=L, seed=0, dtype=jnp.float32):
  """Returns queries, keys, values and segments of both."""
  rng = np.random.default_rng(seed)
  q = jnp.asarray(rng.normal(size=(B, length, K, J, E)), dtype)
  k, v = (jnp.asarray(rng.normal(size=(B, S, K, E)), dtype) for _ in range(2))
  segment_BS = jnp.asarray(np.cumsum(rng.random((B, S)) < 0.1, axis=1), jnp.int32)
  return q, k, v, segment_BS[:, S - length :], segment_BS


def dense(q, k, v, segment_BL, segment_BS, window):
  """Returns attention with the whole L × S matrix; a row that sees nothing is zero."""
  length, S = q.shape[1], k.shape[1]
  behind = (S - length + np.arange(length))[:, None] - np.arange(S)
  seen = (behind >= 0) & (behind < (window or S))
  seen = seen[None] & (segment_BL[:, :, None] == segment_BS[:, None, :])
  logit = jnp.einsum("blkje,bske->bkjls", q, k) / np.sqrt(q.shape[-1])
  weight = jax.nn.softmax(jnp.where(seen[:, None, None], logit, -1e30), axis=-1)
  weight = jnp.where(seen.any(-1)[:, None, None, :, None], weight, 0.0)
  return jnp.einsum("bkjls,bske->blkje", weight, v)


@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize(
  "S, length, block", [(37, 37, 8), (37, 37, 128), (45, 13, 8), (64, 64, 16)]
)
def test_blocks_equal_the_dense_formula_in_value_and_gradient(S, length, block, window):
  q, k, v, segment_BL, segment_BS = inputs(S, length)
  cotangent = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

  def total(form, q, k, v):
    return jnp.sum(form(q, k, v) * cotangent)

  ours = functools.partial(
    attention.attend, segment_BL=segment_BL, segment_BS=segment_BS, window=window, block=block
  )
  theirs = functools.partial(
    dense, segment_BL=segment_BL, segment_BS=segment_BS, window=window
  )
  np.testing.assert_allclose(ours(q, k, v), theirs(q, k, v), rtol=1e-5, atol=2e-6)
  got = jax.grad(functools.partial(total, ours), argnums=(0, 1, 2))(q, k, v)
  want = jax.grad(functools.partial(total, theirs), argnums=(0, 1, 2))(q, k, v)
  for one, two in zip(got, want, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_without_segments_every_earlier_position_is_seen():
  q, k, v, *_ = inputs()
  ones = jnp.ones((B, L), jnp.int32)
  want = dense(q, k, v, ones, ones, None)
  np.testing.assert_allclose(attention.attend(q, k, v, block=8), want, rtol=1e-5, atol=2e-6)


def test_a_query_of_a_segment_without_keys_returns_zero():
  q, k, v, *_ = inputs(45, 13)
  segment_BL, segment_BS = jnp.full((B, 13), 7), jnp.ones((B, 45), jnp.int32)
  got = attention.attend(q, k, v, segment_BL=segment_BL, segment_BS=segment_BS, block=8)
  np.testing.assert_array_equal(got, 0.0)


def test_packed_documents_equal_the_same_documents_one_by_one():
  q, k, v, *_ = inputs()
  segment_BL = jnp.repeat(jnp.arange(3), jnp.array([9, 21, 7]), total_repeat_length=L)[None]
  segment_BL = jnp.tile(segment_BL, (B, 1))
  packed = attention.attend(q, k, v, segment_BL=segment_BL, segment_BS=segment_BL, block=8)
  for start, stop in ((0, 9), (9, 30), (30, 37)):
    part = (a[:, start:stop] for a in (q, k, v))
    np.testing.assert_allclose(
      packed[:, start:stop], attention.attend(*part, block=8), rtol=1e-5, atol=2e-6
    )


def test_no_array_of_all_queries_by_all_keys_is_held():
  q, k, v, *_ = inputs(256, 256)

  def total(q, k, v):
    return attention.attend(q, k, v, block=16).sum()

  held = programs.shapes(jax.value_and_grad(total, argnums=(0, 1, 2)), q, k, v)
  biggest = max(np.prod(shape) for shape in held if shape)
  assert biggest < B * K * J * 256 * 256
  assert not any(shape.count(256) > 1 for shape in held)


def test_bfloat16_in_gives_bfloat16_out_near_the_float32_result():
  q, k, v, *_ = inputs(dtype=jnp.bfloat16)
  got = attention.attend(q, k, v)
  assert got.dtype == jnp.bfloat16
  want = attention.attend(*(a.astype(jnp.float32) for a in (q, k, v)))
  np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2e-2, atol=2e-2)


def test_splash_in_interpret_mode_agrees_with_the_portable_form():
  rng = np.random.default_rng(2)
  q = jnp.asarray(rng.normal(size=(1, 128, 2, 2, 128)), jnp.float32)
  k, v = (jnp.asarray(rng.normal(size=(1, 128, 2, 128)), jnp.float32) for _ in range(2))
  segment_BL = jnp.asarray(np.cumsum(rng.random((1, 128)) < 0.05, axis=1), jnp.int32)
  form = {"window": 50, "scale": 0.1}
  got = attention._splash(q, k, v, segment_BL, segment_BL, **form, interpret=True)
  want = attention.attend(q, k, v, segment_BL=segment_BL, segment_BS=segment_BL, **form)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"impl": "flash"}, "attention 'flash' is not one of xla, cudnn, splash"),
    ({"impl": "cudnn"}, "attention 'cudnn' needs a GPU"),
    ({"impl": "splash"}, "attention 'splash' needs a TPU"),
    ({"window": 0}, "window 0 is below 1"),
    ({"block": 0}, "block 0 is below 1"),
    ({"segment_BS": jnp.ones((B, L), jnp.int32)}, "segment_BS was given without segment_BL"),
  ],
)
def test_what_cannot_run_is_refused_by_name(change, message):
  q, k, v, *_ = inputs()
  with pytest.raises(ValueError, match=message):
    attention.attend(q, k, v, **change)
  with pytest.raises(ValueError, match="40 queries cannot be the last of 37 positions"):
    attention.attend(*inputs(L, 40)[:1], k, v)


def test_rotated_products_depend_on_distance_alone():
  rng = np.random.default_rng(3)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, E)), jnp.float32) for _ in range(2))

  def product(at, to):
    turned = (attention.rotate(x, jnp.array([p]), base=100.0, rotary=6)
              for x, p in ((q, at), (k, to)))
    one, other = turned
    return float(jnp.sum(one * other))

  assert product(7, 3) == pytest.approx(product(29, 25), rel=1e-4)
  assert product(7, 3) != pytest.approx(product(8, 3), rel=1e-3)


def test_rotation_turns_half_pairs_by_the_published_angles():
  x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 5, 2, E)), jnp.float32)
  got = attention.rotate(x, jnp.arange(5), base=100.0, rotary=6)
  for position in range(5):
    for pair in range(3):
      angle = position * 100.0 ** (-2 * pair / 6)
      turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
      before = np.stack([x[0, position, :, pair], x[0, position, :, pair + 3]])
      after = np.stack([got[0, position, :, pair], got[0, position, :, pair + 3]])
      np.testing.assert_allclose(after, turn @ before, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got[..., 6:], x[..., 6:])


@pytest.mark.parametrize("rotary", [5, 12, -2])
def test_rotary_channels_that_a_head_has_not_are_refused(rotary):
  with pytest.raises(ValueError, match=f"rotary {rotary} is not an even number of the 10"):
    attention.rotate(jnp.zeros((1, 2, E)), jnp.arange(2), base=10.0, rotary=rotary)
