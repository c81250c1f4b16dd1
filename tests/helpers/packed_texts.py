"""Texts that share prompts, as the engines are asked to read them."""

import numpy as np
from extract_models import VOCABULARY

from embrm.extraction.engine import Request
from embrm.extraction.positions import token_positions

VIEWS = ("last", "mean", "prenorm", "layer:1")


def texts(prompts: list[int], responses: list[list[int]], seed: int = 0) -> list[Request]:
    """A prompt of every length in `prompts`, with responses of the lengths at its place."""
    random = np.random.default_rng(seed)
    made = []
    for n_prompt, lengths in zip(prompts, responses, strict=True):
        prompt = random.integers(3, VOCABULARY, n_prompt)
        for n in lengths:
            ids = np.concatenate([prompt, random.integers(3, VOCABULARY, n)]).astype(np.int32)
            positions = token_positions(str(len(made)), n_prompt, len(ids), 3, 0)
            made.append(Request(ids, n_prompt, len(ids) - 1, positions))
    return made


SHARED = texts([20, 0, 3, 9, 40], [[5, 30, 1], [4, 6], [2, 2], [7], [12, 12, 3, 8]])
