"""Laws of the decode loop, on a model that decodes and on one that only counts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from cases import models
from hybridlm.decode import loop
from hybridlm.nn import serve

LENGTHS = np.array([5, 13, 9])
STEPS = 20


def hymba():
  return models.hymba("mamba2", pattern="==", global_layers=(0,), context=70)


@functools.cache
def case(variant="layernorm", pattern=models.PATTERN, **changes):
  cfg = hymba() if variant == "hymba" else models.make(variant, pattern=pattern, **changes)
  params = models.params(cfg, 5.0)
  fused = jax.jit(serve.fuse, static_argnames="cfg")(cfg, params)
  return cfg, params, fused, np.asarray(models.tokens(cfg, (3, 13)))


def generate(cfg, fused, prompt_BL, **options):
  options = {"steps": STEPS, "every": 7} | options
  return loop.generate(serve.prefill, serve.step, cfg, fused, prompt_BL, **options)


@pytest.mark.parametrize(
  "variant", ["untied", "layernorm", pytest.param("hymba", marks=pytest.mark.slow)])
def test_greedy_tokens_are_the_largest_logits_of_repeated_forward_passes(variant):
  cfg, params, fused, prompt_BL = case(variant)
  got_BL = generate(cfg, fused, prompt_BL, length_B=LENGTHS)
  for prompt_L, length, new_L in zip(prompt_BL, LENGTHS, got_BL, strict=True):
    token_L = np.zeros(40, np.int32)
    token_L[:length] = prompt_L[:length]
    token_L[length : length + STEPS] = new_L
    logits_LV = hybridlm.forward(cfg, params, token_L[None])[0]
    # Each token is the largest after those before it, which are what a loop would have drawn.
    want_L = jnp.argmax(logits_LV[length - 1 : length + STEPS - 1], axis=1)
    np.testing.assert_array_equal(new_L, want_L)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 4}])
def test_a_row_of_a_ragged_batch_is_the_row_alone(options):
  cfg, _, fused, prompt_BL = case()
  whole_BL = generate(cfg, fused, prompt_BL, length_B=LENGTHS, **options)
  for row, length in enumerate(LENGTHS):
    alone_BL = generate(
      cfg, fused, prompt_BL[row : row + 1, :length], row_B=np.array([row]), every=20, **options
    )
    np.testing.assert_array_equal(alone_BL[0], whole_BL[row])


def test_what_stands_behind_a_prompt_changes_nothing():
  cfg, _, fused, prompt_BL = case()
  other_BL = np.where(np.arange(13) < LENGTHS[:, None], prompt_BL, 999)
  got, want = (generate(cfg, fused, each, length_B=LENGTHS) for each in (other_BL, prompt_BL))
  np.testing.assert_array_equal(got, want)


def test_seeds_reproduce_and_differ_and_one_candidate_is_greedy():
  cfg, _, fused, prompt_BL = case()
  draw = functools.partial(generate, cfg, fused, prompt_BL, temperature=1.5)
  np.testing.assert_array_equal(draw(seed=3), draw(seed=3, every=20))
  assert (draw(seed=3) != draw(seed=4)).any()
  greedy_BL = generate(cfg, fused, prompt_BL)
  np.testing.assert_array_equal(draw(top_k=1), greedy_BL)
  assert (draw(seed=3) != greedy_BL).any()


def test_padded_vocabulary_is_never_sampled():
  cfg, _, fused, prompt_BL = case("untied", "M-", vocabulary=29)
  for options in ({}, {"top_k": 31}, {"top_p": 1.0}):
    token_BL = generate(cfg, fused, prompt_BL, temperature=50.0, **options)
    assert 20 < token_BL.max() < 29


def test_a_row_ends_with_its_stop_token():
  cfg, _, fused, prompt_BL = case()
  free_BL = generate(cfg, fused, prompt_BL, length_B=LENGTHS)
  stop = (int(free_BL[0, 3]), int(free_BL[2, 11]))
  got_BL = generate(cfg, fused, prompt_BL, length_B=LENGTHS, stop=stop)
  ended = 0
  for free_L, got_L in zip(free_BL, got_BL, strict=True):
    hits = np.flatnonzero(np.isin(free_L, stop))
    end = hits[0] if len(hits) else STEPS - 1
    ended += len(hits) > 0
    np.testing.assert_array_equal(got_L[: end + 1], free_L[: end + 1])
    np.testing.assert_array_equal(got_L[end:], free_L[end])
  assert ended >= 2


# A model that says the number after its token, and whose state counts the calls.
COUNTER = hybridlm.ModelConfig.from_pattern("-", V=50, D=2, F=3)


def counter_prefill(cfg, params, token_BL, length_B, *, size):
  last_B1 = jnp.take_along_axis(token_BL, length_B[:, None] - 1, axis=1)
  return _next(cfg, params, last_B1[:, 0]), jnp.zeros((), jnp.int32)


def counter_step(cfg, params, cache, token_B):
  return _next(cfg, params, token_B), cache + 1


def _next(cfg, params, token_B):
  return jax.nn.one_hot(token_B + 1, cfg.V) * params["scale"]


def count(start_B, *, scale=1.0, **options):
  params = {"scale": jnp.float32(scale)}
  prompt_BL = np.asarray(start_B, np.int32)[:, None]
  return loop.stream(counter_prefill, counter_step, COUNTER, params, prompt_BL, **options)


@pytest.mark.parametrize("steps, every", [(1, 4), (4, 4), (5, 4), (9, 4), (3, 1)])
def test_a_stream_gives_every_token_once_in_parts_of_the_size_asked_for(steps, every):
  parts = list(count([3, 20], steps=steps, every=every))
  assert [part.shape[1] for part in parts] == [
    min(every, steps - start) for start in range(0, steps, every)
  ]
  np.testing.assert_array_equal(
    np.concatenate(parts, axis=1), np.array([[4], [21]]) + np.arange(steps)
  )


def test_a_stream_ends_with_the_last_rows_stop_token():
  parts = list(count([3, 1], steps=40, every=4, stop=(7,)))
  np.testing.assert_array_equal(
    np.concatenate(parts, axis=1), [[4, 5, 6, 7, 7, 7, 7, 7], [2, 3, 4, 5, 6, 7, 7, 7]]
  )


def test_a_stream_computes_no_more_than_was_asked_for():
  parts = count([3], steps=40, every=4)
  assert [int(part[0, -1]) for part in itertools.islice(parts, 2)] == [7, 11]
  parts.close()
  assert list(parts) == []


def test_calls_of_equal_buckets_compile_nothing_new():
  compiled = loop._advance._cache_size
  for length in (3, 14):
    prompt_BL = np.ones((2, length), np.int32)
    arguments = (counter_prefill, counter_step, COUNTER, {"scale": jnp.float32(1)}, prompt_BL)
    options = {"steps": 9 + length // 4, "temperature": 0.7 + length, "seed": length}
    loop.generate(*arguments, top_p=0.5, **options)
    before = before if length > 3 else (loop._begin._cache_size(), compiled())
  assert before == (loop._begin._cache_size(), compiled())


@pytest.mark.parametrize("size, want", [(1, 16), (16, 16), (17, 32), (128, 128), (129, 160),
                                        (1000, 1024), (1025, 1280)])
def test_buckets_hold_their_size_with_a_quarter_to_spare_at_most(size, want):
  assert loop.bucket(size) == want


def test_a_prompt_beyond_the_context_of_attention_is_refused_and_not_of_a_pure_ssm():
  prompt_BL = np.zeros((1, 13), np.int32)
  cfg, _, fused, _ = case("untied", "M*", context=20)
  with pytest.raises(ValueError, match="13 tokens and 8 new ones do not fit the context of 20"):
    generate(cfg, fused, prompt_BL, steps=8)
  assert generate(cfg, fused, prompt_BL, steps=7).shape == (1, 7)
  with pytest.raises(ValueError, match="49 new ones behind 9 meta tokens do not fit"):
    generate(hymba(), fused, prompt_BL, steps=49)  # before any weight is looked at
  cfg, _, fused, _ = case("untied", "M", context=20)
  assert generate(cfg, fused, prompt_BL, steps=8).shape == (1, 8)


@pytest.mark.parametrize("options, message", [
  ({"length_B": np.array([0])}, "a prompt of 0 tokens is not one of 1..L=1"),
  ({"length_B": np.array([2])}, "a prompt of 2 tokens"),
  ({"steps": 0}, "steps=0"),
  ({"every": 0}, "every=0"),
  ({"stop": (50,)}, "stop token 50 is outside 0..V-1=49"),
  ({"temperature": -1.0}, "temperature=-1.0"),
])
def test_what_cannot_be_generated_is_refused_in_one_line(options, message):
  with pytest.raises(ValueError, match=message):
    list(count([3], **options))


def test_one_length_a_prompt_is_asked_for():
  with pytest.raises(ValueError, match=r"length_B has shape \(2,\), prompts ask for \(1,\)"):
    loop._prompt(COUNTER, np.ones((1, 3), np.int32), np.array([1, 1]))


def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused():
  with pytest.raises(ValueError, match="token id 50 is outside 0..V-1=49"):
    list(count([50]))
  with pytest.raises(ValueError, match=r"shape \(0, 1\)"):
    list(count([]))


@pytest.mark.parametrize("prompt, length, message", [
  ([[2**32 + 5]], None, "token id 4294967301 is outside"),
  ([[1.7]], None, "prompt_BL has dtype float64, it must hold whole numbers"),
  ([[1, 2]], [1.9], "length_B has dtype float64"),
])
def test_numbers_are_looked_at_before_they_are_narrowed(prompt, length, message):
  with pytest.raises(ValueError, match=message):
    loop._prompt(COUNTER, prompt, length)


def test_logits_that_are_not_numbers_are_an_error():
  with pytest.raises(ValueError, match="logits of row 0 are not numbers"):
    list(count([3], scale=float("nan")))
