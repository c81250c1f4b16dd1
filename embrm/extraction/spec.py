"""The spec of an extraction: everything that decides the content of a cache."""

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

    Settings that must not change its result are arguments of `extract` instead: the device, the
    token budget of a batch, torch.compile.
    """

    model: str
    """Causal LM: a folder saved by save_pretrained, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    data: tuple[SourceSpec, ...] = Field(min_length=1)
    """Datasets of preferences, one `[[data]]` table each."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How a text is made: chat, the tokenizer's chat template; plain, prompt and response joined;
    auto: chat if the tokenizer has a template."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and response together; None: 2,048, or what the model reads if less."""
    truncation: Literal["drop", "left"] = "drop"
    """What happens to a longer text: drop leaves it out; left cuts tokens from the left of its
    prompt."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which the model computes and in which states are stored."""
    states: tuple[str, ...] = ("last",)
    """Views to store: last, mean, prenorm, layer:K."""
    token_rows: int = Field(default=0, ge=0)
    """Sampled positions per response, for regularizers."""
    # Fields added after version 1 of the format are recorded only where they are set, so that other
    # manifests keep their bytes.
    token_positions: PositionsRule = Field(
        default="random", exclude_if=lambda rule: rule == "random"
    )
    """How positions are sampled: random, without replacement; spaced, evenly spaced from a random
    start."""
    top_k: int = Field(default=32, ge=0)
    """Largest logits kept per sampled position."""
    tail_mean: bool = Field(default=False, exclude_if=operator.not_)
    """Keep the mean gradient of all other logits too, one vector per sampled position."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampled positions."""
    engine: str = Field(
        default="auto",
        description=f"What runs the model: {engine_help()}. Engines agree within the dtype's "
        "tolerance, not in their bytes.",
        exclude_if=lambda engine: engine in ("auto", REFERENCE),
    )
    pad_token: str | None = None
    """Vocabulary token to pad with, for a tokenizer without a pad token."""
    allow_pad_eos: bool = False
    """Accept a pad token that is the EOS token; the final position is then before the EOS."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""
    limit: int | None = Field(default=None, ge=1)
    """First rows (groups: prompts) to read of every source without a limit of its own."""

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        return check_engine_name(engine)

    @field_validator("states")
    @classmethod
    def _known_views(cls, states: tuple[str, ...]) -> tuple[str, ...]:
        known_views(states)
        if not states or len(set(states)) < len(states):
            raise ValueError("name at least one view, and each once")
        return states

    @model_validator(mode="after")
    def _tails_have_rows(self) -> "ExtractSpec":
        if self.tail_mean and not self.token_rows:
            raise ValueError(
                "tail_mean = true needs sampled positions, and token_rows = 0: set token_rows"
            )
        return self
