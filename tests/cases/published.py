"""Random models with a tokenizer and a chat template of their own, saved by transformers."""

SPECIAL = ("<bos>", "<eos>")
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant] {% endif %}"
)
V = 500


def tokenizer(texts):
  """Returns a byte-level BPE of V ids that starts every text with `<bos>`."""
  import tokenizers
  from tokenizers import pre_tokenizers

  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
  ])
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
    vocab_size=V, special_tokens=list(SPECIAL), show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  ))
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", 0)]
  )
  return inner


def save(kind, folder, texts, *, context):
  """Writes a random "llama" or "nemotron_h" whose logits are far apart, and its tokenizer."""
  import torch
  import transformers

  torch.manual_seed(0)
  shared = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1,
    "max_position_embeddings": context, "initializer_range": 0.3, "dtype": "float32",
  }
  if kind == "llama":
    cfg = transformers.LlamaConfig(num_hidden_layers=2, **shared)
  else:
    cfg = transformers.NemotronHConfig(
      hybrid_override_pattern="M-*M", num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=8,
      n_groups=2, ssm_state_size=16, chunk_size=32, time_step_min=0.001, **shared,
    )
  model = transformers.AutoModelForCausalLM.from_config(cfg)
  for name, leaf in model.named_parameters():
    if name.endswith("dt_bias"):  # no dt below the limit that prefill and decode there treat apart
      leaf.data.uniform_(2, 3)
    if "norm" in name:
      leaf.data.uniform_(0.5, 1.5)
  model.save_pretrained(folder)
  kept = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer(texts), bos_token=SPECIAL[0], eos_token=SPECIAL[1]
  )
  kept.chat_template = TEMPLATE
  kept.save_pretrained(folder)
