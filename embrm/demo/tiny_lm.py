"""A tiny causal language model of the synthetic world: a word-level Llama trained in a minute.

It is trained on all tokens of the world's corpus (`world.corpus`). The token after a response is
often a mark, "tick" or "cross", so the state at the end of a response predicts whether the answer
is right. This stands in for what makes the final states of real models informative about reward.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embrm.core.errors import UserError
from embrm.core.files import disk_errors, write_bytes
from embrm.core.progress import progress
from embrm.core.specs import content_id
from embrm.demo.world import Conversation, World, corpus, vocabulary

PAD, BOS, END, UNK = "<pad>", "<bos>", "<end>", "<unk>"
ROLES = ("<user>", "<assistant>")
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <end>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKER = "embrm-demo.json"
"""Written last, so a folder that has this file has a finished model of the settings in it."""


@dataclass(frozen=True)
class Recipe:
    """Size and training of the language model. The defaults are the demo's."""

    width: int = 96
    layers: int = 3
    heads: int = 4
    steps: int = 1500
    batch: int = 32
    """Documents a step."""
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    held_out: int = 512
    """Documents on which the loss is measured."""
    seed: int = 0


def make_tokenizer() -> Any:
    """Make the word-level tokenizer, in which every word of the world is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD, BOS, END, UNK, *ROLES]
    words = {word: index for index, word in enumerate([*specials, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNK,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        model_max_length=2048,
    )


def train_lm(out: Path, world: World, recipe: Recipe) -> dict[str, float]:
    """Train the model and save it and its tokenizer in `out`; a finished folder is kept.

    Returns "loss" and "unigram_entropy", in nats a token on held-out documents. A loss well below
    the entropy shows that the model uses context.
    Raises UserError if `out` holds a finished model of other settings.
    """
    identity = content_id({"world": asdict(world), "recipe": asdict(recipe)})
    marker = out / MARKER
    if marker.exists():
        finished = json.loads(marker.read_text())
        if finished.pop("identity") != identity:
            raise UserError(f"{out} holds a model of other settings: delete the folder")
        return finished

    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of saving one small file

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = [
        _encode(document, tokenizer)
        for document in corpus(world, recipe.steps * recipe.batch + recipe.held_out)
    ]
    held_out, rows = rows[: recipe.held_out], rows[recipe.held_out :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
        batches = _batches(rows, recipe.batch)
    with _one_thread():
        _optimise(model, batches, recipe)
    losses = {"loss": _mean_loss(model, held_out), "unigram_entropy": _entropy(held_out)}
    with disk_errors(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    write_bytes(marker, json.dumps({"identity": identity, **losses}, indent=1).encode())
    return losses


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, unless the user has chosen a number with OMP_NUM_THREADS.

    The model is so small that a second thread gains nothing on an idle machine and makes training
    many times slower on a busy one. The weights then do not depend on the number of CPUs either.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _encode(document: Conversation, tokenizer: Any) -> list[int]:
    """Token ids of a document as the chat template renders it, and BOS of the next document."""
    text = document.text
    if document.prompt:
        text = f"<user> {document.prompt} {END}<assistant> {text} {END} {document.mark}"
    return list(tokenizer.encode(f"{BOS} {text} {BOS}", add_special_tokens=False))


def _batches(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    """Batches of rows of similar length, in an order drawn by torch's global generator."""
    by_length: list[list[int]] = []
    block = 16 * size  # sorting within blocks saves padding and still mixes lengths over time
    for start in range(0, len(rows), block):
        by_length += sorted(rows[start : start + block], key=len)
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return [batches[index] for index in torch.randperm(len(batches)).tolist()]


def _padded(rows: list[list[int]]) -> Tensor:
    """Token ids, int64 [rows, longest], padded with zeros (PAD) on the right."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return padded


def _loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy over the targets that are not padding.

    No attention mask is needed: in a causal model, padding on the right affects no earlier token.
    """
    logits = model(input_ids=ids[:, :-1]).logits
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _optimise(model: torch.nn.Module, batches: list[list[list[int]]], recipe: Recipe) -> None:
    """Train by AdamW with linear warm-up and cosine decay to a tenth of the learning rate."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.95),
    )

    def scale(step: int) -> float:
        decay = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / recipe.steps))
        return min(1.0, (step + 1) / recipe.warmup) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    with progress("language model", total=len(batches), unit="steps") as bar:
        for batch in batches:
            loss = _loss(model, _padded(batch))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance()
    model.eval()


@torch.inference_mode()
def _mean_loss(model: torch.nn.Module, rows: list[list[int]]) -> float:
    """Mean loss over all tokens of `rows`, in nats."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        count = sum(len(row) - 1 for row in batch)
        total += float(_loss(model, _padded(batch))) * count
        tokens += count
    return total / tokens


def _entropy(rows: list[list[int]]) -> float:
    """Entropy of the token frequencies, in nats: the best loss of a model without context."""
    counts = Counter(token for row in rows for token in row[1:])
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())
