"""A tiny model and a preference file, and the spec that extracts them."""

import json
from pathlib import Path

import numpy as np
from extract_models import save_model, tokenizer

from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec

WORDS = ["river", "boats", "mud", "careful", "answer", "names", "source", "year", "page", "poor"]


def write_pairs(path: Path, prompts: int = 12, per_prompt: int = 4) -> Path:
    random = np.random.default_rng(1)

    def text(longest: int) -> str:
        return " ".join(random.choice(WORDS, size=random.integers(1, longest)))

    rows = [
        {"prompt": f"Question {p}: {text(6)}?", "chosen": text(30), "rejected": text(30)}
        for p in range(prompts)
        for _ in range(per_prompt)
    ]
    rows = [
        row | {"prompt": rows[i - i % per_prompt]["prompt"], "split": "train" if i % 3 else "id"}
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_world(root: Path) -> dict[str, str]:
    """The model and the preference file, made below `root`."""
    save_model(root / "model", "llama-tied", tokenizer(bos=True))
    write_pairs(root / "pairs.jsonl")
    return {"model": str(root / "model"), "data": str(root / "pairs.jsonl")}


def spec_of(world: dict[str, str], **changes) -> ExtractSpec:
    values = {
        "model": world["model"],
        "data": [{"path": world["data"]}],
        "max_length": 200,
        "states": ["last", "mean"],
        "token_rows": 3,
        "top_k": 4,
        "tail_mean": True,
        "token_positions": "spaced",
    }
    return ExtractSpec.parse(values | changes, "test")


def make(world: dict[str, str], out: Path, spec: ExtractSpec | None = None, **options) -> Path:
    return extract(spec or spec_of(world), out, device="cpu", shard_rows=16, **options)
