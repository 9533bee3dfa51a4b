"""The command that generates: what it prints is what the loop draws."""

import jax
import numpy as np
import pytest
import tokenizers as library

import hybridlm
from cases import models
from experiments import console, generate
from hybridlm.data import tokenizers
from hybridlm.decode import loop
from hybridlm.nn import serve

V = tokenizers.Bytes.V
PROMPTS = ("Once upon", "é")


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory):
  cfg = models.make("untied", pattern="M*", V=V, context=64)
  params = models.params(cfg, 8.0)
  folder = tmp_path_factory.mktemp("model") / "tiny"
  hybridlm.save(folder, cfg, params)
  return cfg, params, folder


def run(model, *argv):
  return console.call(
    generate.main, ["generate", f"--model={model[2]}", "--tokenizer=bytes", *argv]
  )


def drawn(model, prompt, **options):
  """Returns the new ids of one prompt, up to the end of text."""
  cfg, params, _ = model
  prompt_BL = np.frombuffer(prompt.encode(), np.uint8)[None].astype(np.int32)
  weights = jax.jit(serve.fuse, static_argnames="cfg")(cfg, params)
  return loop.generate(
    serve.prefill, serve.step, cfg, weights, prompt_BL, stop=(V - 1,), **options
  )[0]


def text(ids):
  return tokenizers.Bytes().decode(i for i in ids if i != V - 1)


def test_one_prompt_is_streamed_and_whole(model, capsys):
  options = {"steps": 21, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}
  argv = [f"--{name}={value}" for name, value in options.items()]
  assert run(model, f"--prompt={PROMPTS[0]}", *argv) == 0
  want = PROMPTS[0] + text(drawn(model, PROMPTS[0], **options))
  assert capsys.readouterr().out == want + "\n"


def test_several_prompts_are_each_as_alone(model, capsys):
  argv = [f"--prompt={prompt}" for prompt in PROMPTS]
  assert run(model, "--steps=9", *argv) == 0
  want = [prompt + text(drawn(model, prompt, steps=9)) + "\n" for prompt in PROMPTS]
  assert capsys.readouterr().out == "".join(want)


def test_a_space_that_a_decoder_drops_at_the_start_of_a_text_is_not_lost(model, capsys):
  cfg, params, folder = model
  marked = {f"\u2581w{i}": i for i in range(V)}  # a word with the space before it
  inner = library.Tokenizer(library.models.WordLevel(marked, unk_token="\u2581w0"))
  inner.pre_tokenizer = library.pre_tokenizers.Metaspace()
  inner.decoder = library.decoders.Metaspace()
  place = folder.with_name("words")
  hybridlm.save(place, cfg, params)
  inner.save(str(place / "tokenizer.json"))
  argv = [f"--model={place}", "--prompt=w5 w7", "--steps=3"]
  assert console.call(generate.main, ["generate", *argv]) == 0
  new = hybridlm.generate(cfg, params, np.array([[5, 7]]), steps=3)[0]
  assert capsys.readouterr().out == " ".join(["w5 w7", *(f"w{i}" for i in new)]) + "\n"


@pytest.mark.parametrize("argv, message", [
  ((), "give --model=PATH and at least one --prompt=TEXT"),
  (("--prompt=a", "--steps=64"), "do not fit the context of 64"),
  (("--prompt=a", "--top_p=2"), "top_p=2.0 must lie in (0, 1]"),
  (("--prompt=a", "--tokenizer=nothing"), "tokenizer 'nothing'"),
  (("--prompt=a", "--model=nowhere"), "nowhere"),
  (("--prompt=a", "--seed=99999999999999999999"), "seed"),
])
def test_a_mistake_is_one_line(model, capsys, argv, message):
  assert run(model, *argv) == 2
  seen = capsys.readouterr()
  assert seen.out == "" and message in seen.err and seen.err.count("\n") == 1
