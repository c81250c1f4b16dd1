"""Finished sweeps of tiny models, for the tests of export."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from extract_models import CHAT, save_model, tokenizer
from extract_world import write_pairs

from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec
from embrm.sweeps.execute import sweep

SPEC = """
seeds = [0]
validation = 0.3
[defaults]
epochs = 2
batch_pairs = 16
"""
RUNS = {
    "bt": "",
    "wild": "lr = 1e30",
    "standardized": 'preprocess = "standardize"\nmembers = 2',
    "low-rank": 'head = { adapter = { kind = "low-rank", width = 4 } }\nlr = 0.01',
    "mlp": 'head = { kind = "mlp", widths = [8, 4] }\nmembers = 2\npreprocess = "center"',
    "worst": 'members = 3\ncombine = "min"\nlr = 0.1',
    "timid": 'members = 3\ncombine = "uwo"\nhead = { kind = "mlp", widths = [8] }\nlr = 0.01',
    "bagged": 'members = 3\ncombine = "lcb"\nbootstrap = true\nstate = "mean"\nlr = 0.1',
    "adapter": 'head = { adapter = { kind = "mlp", width = 4 } }\nstate = "mean"\nlr = 0.01',
    "deep": 'state = "layer:1"',
    "with S": 'state = "last+S"\nlr = 1e-5',
    "pooled": 'state = "tokens"',
}


def write_groups(path: Path) -> Path:
    """Groups of three responses, one of them said twice over."""
    random = np.random.default_rng(2)
    rows = [
        {
            "prompt": f"Question {number}?",
            "model": f"m{answer}",
            "response": " ".join(random.choice(["boats", "mud", "page"], size=1 + answer * 3)),
            "gold": float(answer),
        }
        for number in range(5)
        for answer in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    return path


def write_cache(
    folder: Path,
    kind: str,
    *,
    plain: bool = False,
    dtype: str = "float32",
    prompts: int = 12,
    states: Sequence[str] = ("last", "mean", "layer:1"),
) -> Path:
    """A cache, with its data and its model, unless there is one, in `folder`."""
    if not (folder / "model").exists():
        save_model(folder / "model", kind, tokenizer(bos=plain, template=None if plain else CHAT))
    values = {
        "model": str(folder / "model"),
        "data": [{"path": str(write_pairs(folder / "pairs.jsonl", prompts))}],
        "max_length": 200,
        "states": list(states),
        "token_rows": 3,
        "top_k": 4,
        "dtype": dtype,
    }
    return extract(ExtractSpec.parse(values, "test"), folder / "cache", device="cpu", shard_rows=32)


def write_sweep(folder: Path, *names: str) -> Path:
    """Results of these of `RUNS`, on a cache in `folder`."""
    folder.mkdir(exist_ok=True)
    runs = [f'[[runs]]\nname = "{name}"\n{RUNS[name]}\n' for name in names]
    spec = f'baseline = "{names[0]}"' + SPEC + "".join(runs)
    (folder / "sweep.toml").write_text(spec)
    return sweep(folder / "sweep.toml", write_cache(folder, "llama-tied"), jobs=1)
