"""A tiny language model, a cache of its states over made-up pairs, and specs to fine-tune it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from extract_models import save_model, tokenizer
from torch import Tensor

from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec
from embrm.results.ledger import open_results

WORDS = ["river", "boats", "mud", "careful", "answer", "names", "source", "year", "page", "poor"]

DEFAULTS = """
baseline = "bt"
seeds = [0]
validation = 0.2
"""

BT = """
[defaults]
epochs = 2
batch_pairs = 8
lr = 0.003
[[runs]]
name = "bt"
"""


def made(folder: Path, kind: str = "llama-tied", prompts: int = 30, **extraction: Any) -> Path:
    """Model and data below `folder`; returns the cache, also below it."""
    random = np.random.default_rng(1)

    def text(longest: int) -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, longest)))

    rows = []
    for number in range(prompts):
        prompt, shared = f"Question {number}: {text(6)}?", text(12)
        for place in range(2):
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": shared if place else text(12),
                    "rejected": text(12) if place else shared,
                    "split": "id" if number % 5 == 0 else "train",
                    "margin": round(float(random.random()), 3),
                    "label": 0.7 if number % 3 == 0 else 1.0,
                    "weight": 2.0 if number % 4 == 0 else 1.0,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(folder / "model", kind, tokenizer(bos=True))
    values = {
        "model": str(folder / "model"),
        "data": [{"path": str(folder / "pairs.jsonl")}],
        "max_length": 200,
    }
    spec = ExtractSpec.parse(values | extraction, "test")
    return extract(spec, folder / "cache", device="cpu")


def with_groups(folder: Path) -> Path:
    """As `made`, and a split far of groups: 5 prompts with 4 responses, one with 2."""
    random = np.random.default_rng(2)
    rows = [
        {
            "prompt": f"Far question {number}?",
            "response": f"{place} " + " ".join(random.choice(WORDS, size=random.integers(1, 9))),
            "gold": place,
            "split": "far",
        }
        for number in range(6)
        for place in range(4 if number else 2)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = {"path": str(folder / "groups.jsonl"), "pairs": {"per_prompt": 0}}
    return made(folder, data=[{"path": str(folder / "pairs.jsonl")}, groups])


def written(path: Path, text: str = BT, **fields: object) -> Path:
    """A spec of these fields and this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {_toml(value)}" for name, value in fields.items()]
    path.write_text("\n".join([DEFAULTS, *lines, text]))
    return path


def _toml(value: object) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{name} = {_toml(own)}" for name, own in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def weights(folder: Path) -> dict[str, Tensor]:
    """All runs' tensors: configuration, then name."""
    return {
        f"{row['config']} {name}": tensor
        for row in open_results(folder).ledger.to_dicts()
        for name, tensor in safetensors.torch.load_file(
            folder / "weights" / f"{row['run_id']}.safetensors"
        ).items()
    }


def weights_are_close(found: dict[str, Tensor], expected: dict[str, Tensor], start: Path) -> None:
    """Equal but for rounding: a thousandth of what training has changed at all."""
    assert found.keys() == expected.keys()
    base = safetensors.torch.load_file(start / "model" / "model.safetensors")
    for name, tensor in expected.items():
        was = base.get(name.partition("backbone.")[2] and f"model.{name.partition('backbone.')[2]}")
        moved = tensor if was is None else tensor - was
        assert (found[name] - tensor).norm() <= 1e-3 * moved.norm(), name
