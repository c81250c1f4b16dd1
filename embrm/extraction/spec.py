"""The spec of an extraction: all settings that determine the content of a cache."""

import operator
from typing import Literal

from pydantic import Field, field_validator, model_validator

from embrm.cache.schema import known_views
from embrm.core.specs import Spec
from embrm.data.sources import SourceSpec
from embrm.extraction.engines import REFERENCE, check_engine_name, engine_help
from embrm.extraction.positions import PositionsRule


class ExtractSpec(Spec):
    """Settings that define an extraction.

    Settings that must not change the result (device, token budget of a batch, torch.compile) are
    arguments of `extract` instead.
    """

    model: str
    """Causal LM: a folder saved by save_pretrained, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    data: tuple[SourceSpec, ...] = Field(min_length=1)
    """Preference datasets, one `[[data]]` table each."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How prompt and response become one text. chat: by the tokenizer's chat template; plain:
    concatenated; auto: chat if the tokenizer has a template, else plain."""
    max_length: int | None = Field(default=None, ge=2)
    """Maximum tokens of prompt and response together. Default: 2,048, or the model's limit if that
    is lower."""
    truncation: Literal["drop", "left"] = "drop"
    """What to do with a longer text. drop: leave it out; left: cut tokens from the left of its
    prompt."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the model's computation and of the stored states."""
    states: tuple[str, ...] = ("last",)
    """Views (kinds of state) to store: last, mean, prenorm, layer:K."""
    token_rows: int = Field(default=0, ge=0)
    """Number of token rows per response, which are sampled positions; regularizers need them."""
    # Fields added after version 1 of the format are serialized only when set, so that older
    # manifests keep their bytes.
    token_positions: PositionsRule = Field(
        default="random", exclude_if=lambda rule: rule == "random"
    )
    """How positions are sampled. random: without replacement; spaced: evenly spaced from a random
    start."""
    top_k: int = Field(default=32, ge=0)
    """Number of largest logits to store per token row."""
    tail_mean: bool = Field(default=False, exclude_if=operator.not_)
    """Also store the mean gradient of all other logits, one vector per token row."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling of positions."""
    engine: str = Field(
        default="auto",
        description=f"Engine that runs the model: {engine_help()}. Engines agree within the "
        "dtype's tolerance, but not to the bit.",
        exclude_if=lambda engine: engine in ("auto", REFERENCE),
    )
    pad_token: str | None = None
    """Pad token, from the vocabulary, for a tokenizer that has none."""
    allow_pad_eos: bool = False
    """Accept a pad token equal to the EOS token; the final position is then before the EOS."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows (of groups: prompts) of each source without a limit of its own."""

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        return check_engine_name(engine)

    @field_validator("states")
    @classmethod
    def _known_views(cls, states: tuple[str, ...]) -> tuple[str, ...]:
        known_views(states)
        if not states or len(set(states)) < len(states):
            raise ValueError("name at least one view, and no view twice")
        return states

    @model_validator(mode="after")
    def _tails_have_rows(self) -> "ExtractSpec":
        if self.tail_mean and not self.token_rows:
            raise ValueError(
                "tail_mean = true needs token rows, but token_rows = 0: set token_rows"
            )
        return self
