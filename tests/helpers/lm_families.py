"""Random models of four families, of sizes that vLLM's CPU build can read."""

from typing import Any

from extract_models import VOCABULARY
from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

# The CPU build's attention wants heads of 32 or more.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES | {"num_attention_heads": 2}, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=3,
        n_head=2,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    # Caps this low bend every logit; the window is shorter than the sequences.
    "gemma2": Gemma2Config(
        **SIZES, final_logit_softcapping=0.5, attn_logit_softcapping=0.5, sliding_window=48
    ),
}
