"""Tiny random language models and tokenizers for the tests of extract, made offline."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_CHAT = "{{ bos_token }}" + CHAT
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400
TEXT = (
    "The river was low and the boats lay in the mud. Who wrote this? A careful answer names the "
    "source, the year and the page; a poor answer repeats the question. 1 2 3 4 5 6 7 8 9 0\n"
)


def tokenizer(
    *, bos: bool = False, side: str = "right", template: str | None = CHAT, **special: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad <pad>, EOS </s> and BOS <s>, added by itself on `bos`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [TEXT] * 8,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 20,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    fast = PreTrainedTokenizerFast(tokenizer_object=core, padding_side=side, **names)
    fast.chat_template = template
    return fast


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    # Caps this low bend every logit and every attention score of so small a model.
    "gemma2": Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=0.5
    ),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}


def save_model(folder: Path, kind: str, fast: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    """One of `CONFIGS` with random weights, wide enough that every part of it matters."""
    return save_config(folder, CONFIGS[kind], fast, seed)


def save_config(
    folder: Path,
    config: Any,
    fast: PreTrainedTokenizerFast,
    seed: int = 0,
    noise: float = 0.2,
) -> Path:
    """A causal LM of any configuration with such weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
