"""Prepares the texts of an extraction before the model runs: loads, tokenizes, identifies them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.data.dataset import Dataset, load
from embrm.data.leaks import leaks
from embrm.data.sources import SourceSpec
from embrm.extraction.engine import Request
from embrm.extraction.engines import REFERENCE
from embrm.extraction.positions import PositionsRule, token_positions
from embrm.extraction.spec import ExtractSpec
from embrm.lm.loading import digest, length_limit, load_config, model_folder
from embrm.lm.tokens import Encoded, TokenPolicy, encode, load_tokenizer, token_policy

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "*.tiktoken")

_RULES: dict[PositionsRule, str] = {
    "random": "without replacement",
    "spaced": "evenly spaced from a random start",
}


@dataclass(frozen=True)
class PreparedTexts:
    """Everything that is known before the model runs.

    folder: of the model. encoded: one entry per row of dataset.responses. leaks: evaluation prompts
    that also occur in training. identity: everything that determines the content of the cache; the
    cache id is its digest.
    """

    spec: ExtractSpec
    folder: Path
    dataset: Dataset
    encoded: list[Encoded]
    leaks: pl.DataFrame
    identity: dict[str, Any]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every response, prompt included."""
        return np.array([len(entry.ids) for entry in self.encoded], dtype=np.int64)

    def requests(self, rows: range | list[int]) -> list[Request]:
        """The requests to an engine for these rows of the dataset."""
        ids = self.dataset.responses["response_id"]
        return [
            Request(
                entry.ids,
                entry.n_prompt,
                entry.final_position,
                token_positions(
                    ids[row],
                    entry.n_prompt,
                    len(entry.ids),
                    self.spec.token_rows,
                    self.spec.seed,
                    self.spec.token_positions,
                ),
            )
            for row, entry in ((row, self.encoded[row]) for row in rows)
        ]


def prepare_texts(spec: ExtractSpec) -> PreparedTexts:
    """Load and tokenise the data, exclude what cannot be read, and compute the cache's identity.

    Raises: UserError for anything wrong with the model's folder, its tokenizer or the data.
    """
    remote = spec.trust_remote_code
    folder = model_folder(spec.model, spec.revision, trust_remote_code=remote)
    config = load_config(folder, trust_remote_code=remote)
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    policy = token_policy(
        tokenizer,
        template=spec.template,
        max_length=length_limit(config, spec.max_length),
        truncation=spec.truncation,
        pad_token=spec.pad_token,
        allow_pad_eos=spec.allow_pad_eos,
    )
    dataset = load([_limited(source, spec.limit) for source in spec.data])
    encoded, drops = encode(dataset.responses, tokenizer, policy)
    dataset, kept = exclude(dataset, encoded, drops)
    largest = max(int(entry.ids.max()) for entry in kept)
    vocabulary = config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise UserError(
            f"model {spec.model}: its tokenizer gives token id {largest}, but the vocabulary has "
            f"{vocabulary} ids: use the tokenizer the model was trained with"
        )
    identity = _identity(spec, folder, policy, dataset, kept)
    return PreparedTexts(spec, folder, dataset, kept, leaks(dataset), identity)


def _limited(source: SourceSpec, limit: int | None) -> SourceSpec:
    return source if source.limit else source.model_copy(update={"limit": limit})


def exclude(
    dataset: Dataset, encoded: list[Encoded | None], drops: pl.DataFrame
) -> tuple[Dataset, list[Encoded]]:
    """Leave out the dropped responses, and pairs whose two responses have the same tokens.

    encoded, drops: as returned by `encode`. Returns the remaining dataset and encoded responses.
    """
    identical = []
    for pair, chosen, rejected in (
        dataset.pairs.select("chosen", "rejected").with_row_index().rows()
    ):
        left, right = encoded[chosen], encoded[rejected]
        if left and right and np.array_equal(left.ids, right.ids):
            cut = left.truncated or right.truncated
            reason = "truncated_to_identical" if cut else "identical"
            identical.append((pair, reason, f"both are the same {len(left.ids)} tokens"))
    if drops.height or identical:
        schema = {"pair": pl.Int32, "reason": pl.String, "detail": pl.String}
        by_id = dict(zip(dataset.responses["response_id"], encoded, strict=True))
        dataset = dataset.without(drops, pl.DataFrame(identical, schema=schema, orient="row"))
        encoded = [by_id[response_id] for response_id in dataset.responses["response_id"]]
    return dataset, [entry for entry in encoded if entry]


def _identity(
    spec: ExtractSpec,
    folder: Path,
    policy: TokenPolicy,
    dataset: Dataset,
    encoded: list[Encoded],
) -> dict[str, Any]:
    """Everything that determines the content of the cache; no paths and no device."""
    tokens = hashlib.sha256()
    for entry in encoded:
        tokens.update(f"{len(entry.ids)} {entry.n_prompt} {entry.final_position}\n".encode())
        tokens.update(entry.ids.tobytes())
    return {
        "model": {
            "weights": digest(folder, "*.safetensors"),
            "config": digest(folder, "config.json"),
            "dtype": spec.dtype,
        },
        "tokenizer": {
            "files": digest(folder, *_TOKENIZER_FILES),
            "template": policy.template,
            "chat_template": policy.chat_template
            and hashlib.sha256(policy.chat_template.encode()).hexdigest(),
            "bos": policy.bos if policy.add_bos else None,
            "eos": policy.eos if policy.template == "plain" else "as the template ends",
            "pad": policy.pad,
            "max_length": policy.max_length,
            "truncation": policy.truncation,
        },
        "states": {
            "views": sorted(spec.states),
            "norm": "post final norm, except prenorm and layer:K",
            "position": "rightmost token that is not the pad token; mean: all response tokens",
        },
        "token_rows": {
            "rule": f"Philox keyed by SHA-256 of seed:response_id, {_RULES[spec.token_positions]}",
            "rows": spec.token_rows,
            "top_k": spec.top_k,
            "seed": spec.seed,
            # Present only when set, so that caches made before this option keep their ids.
            **({"tail_mean": True} if spec.tail_mean else {}),
        }
        if spec.token_rows
        else None,
        "data": {"dataset": dataset.digest(), "token_ids": tokens.hexdigest()},
        **({} if spec.engine in ("auto", REFERENCE) else {"engine": spec.engine}),
    }
