"""Scenarios: divides groups into training and four evaluation splits (arXiv 2505.07271).

The evaluation splits differ in what they share with training: prompts, response models, or neither.

    train    training prompts answered by training models
    id       other responses of the training models to the training prompts
    prompt   responses of the training models to unseen prompts
    model    responses of unseen models to the training prompts
    mutual   responses of unseen models to unseen prompts

No response is in two splits.
"""

import itertools
from collections.abc import Sequence
from typing import Self

import polars as pl
from pydantic import Field, model_validator

from embrm.core.errors import UserError
from embrm.core.specs import Spec
from embrm.data.collector import PAIRS, pair_id_of
from embrm.data.groups import Member, PairRule, pair_members
from embrm.data.splits import draws, holdout

SCENARIOS = ("train", "id", "prompt", "model", "mutual")
"""The splits that groups are divided into."""

SHARED = ("id", "model")
"""The evaluation splits whose prompts are training prompts too, by design."""


class Scenarios(Spec):
    """How groups are divided. A hash of its id or name and the seed decides whether a prompt, model
    or response is held out; a larger share holds out a superset of a smaller one."""

    splits: tuple[str, ...] = Field(default=("train",), min_length=1)
    """Splits of the cache whose groups are divided; the pairs derived here replace theirs."""
    prompts: float = Field(default=0.2, gt=0, lt=1)
    """Share of the prompts that are unseen in training."""
    models: float = Field(default=0.25, gt=0, lt=1)
    """Share of the response models that are unseen in training."""
    responses: float = Field(default=0.2, gt=0, lt=1)
    """Share of the training models' responses to training prompts that go to id, not to train. Each
    is drawn by itself, so a model with few of them may have all in id."""
    seed: int = 0
    """Seed of the choice of prompts, models and responses."""
    pairs: PairRule = PairRule()
    """How pairs are derived within each split; length_balanced compares lengths in tokens."""
    cross_prompt: bool = False
    """Train on pairs of responses to different prompts: prompts are ordered by a hash, and the
    responses to each are paired with those to the next. Evaluation pairs stay within a prompt."""

    def overlap(self, split: str) -> float:
        """Share held out over share trained on, of what is unseen in `split`: the correction of
        Nadeau and Bengio (2003, Machine Learning 52) for divisions that share training data.

        In mutual both prompts and models are unseen; the larger of their two ratios counts.
        """
        shares = {"id": [self.responses], "prompt": [self.prompts], "model": [self.models]}
        shares["mutual"] = [self.prompts, self.models]
        return max((share / (1 - share) for share in shares.get(split, [])), default=0.0)

    @model_validator(mode="after")
    def _one_pairing(self) -> Self:
        if self.cross_prompt and self.pairs.by_rank:
            raise ValueError("by_rank ranks within a prompt: leave cross_prompt or by_rank out")
        return self


def divide(
    members: pl.DataFrame, responses: pl.DataFrame, rule: Scenarios, data_seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Divide the groups of `rule.splits` into `SCENARIOS`; returns their (pairs, members).

    members: with the columns of `collector.MEMBERS`, of any splits. responses: columns response_id
    and n_response (tokens), one row per response number. The returned tables have the columns of
    `collector.PAIRS` and those of `members`. Pairs have label and weight 1, the gold difference as
    margin, and the source and row of their chosen response.
    data_seed: is added to the seed of `rule`; it also chooses the sweep's validation prompts.

    Left out are members of unseen models whose response a training model gave too, and groups of
    id and model whose prompt has no training pair.

    Raises: UserError when there are no groups, a member has no model, all or none of the prompts
    or models are held out, or a split has no pair.
    """
    found = members.filter(pl.col("split").is_in(rule.splits))
    _check(found, rule)
    found = found.with_columns(
        responses["response_id"].gather(found["response"]).alias("response_id")
    )
    shares = (
        ("prompts", "prompt_id", rule.prompts),
        ("models", "model", rule.models),
        ("responses", "response_id", rule.responses),
    )
    held = pl.DataFrame(
        {
            name: holdout(found[column], share, rule.seed + data_seed, f"scenario {name}")
            for name, column, share in shares
        }
    )
    for name, column, share in shares[:2]:
        if held[name].all() or not held[name].any():
            which = "all" if held[name].any() else "none"
            raise UserError(
                f"scenarios: {name} = {share:g} holds out {which} of {found[column].n_unique()} "
                f"{name}: change it, or take another seed"
            )
    unseen_prompt, unseen_model, other_response = (pl.col(name) for name, _, _ in shares)
    split = (
        pl.when(unseen_prompt & unseen_model)
        .then(pl.lit("mutual"))
        .when(unseen_prompt)
        .then(pl.lit("prompt"))
        .when(unseen_model)
        .then(pl.lit("model"))
        .when(other_response)
        .then(pl.lit("id"))
        .otherwise(pl.lit("train"))
    )
    seen_too = unseen_model & (~unseen_model).any().over("response")
    divided = found.hstack(held).with_columns(split=split).filter(~seen_too)
    pairs = _pairs(divided, responses, rule, data_seed)
    trained_on = pl.col("prompt_id").is_in(pairs.filter(split="train")["prompt_id"].implode())
    kept = trained_on | ~pl.col("split").is_in(SHARED)
    pairs, divided = pairs.filter(kept), divided.filter(kept)
    for name in SCENARIOS:
        if name not in pairs["split"]:
            raise UserError(
                f"scenarios: split {name!r} has no pairs, from {(divided['split'] == name).sum()} "
                "responses: a pair needs two responses to a prompt whose gold scores differ by "
                f"more than {rule.pairs.gap:g}: hold out another share of prompts, models or "
                "responses, or change the pairs rule"
            )
    return pairs, divided.select(members.columns)


def _check(found: pl.DataFrame, rule: Scenarios) -> None:
    names = ", ".join(map(repr, rule.splits))
    if found.is_empty():
        raise UserError(
            f"scenarios: there are no groups in {names}: extract data with the columns prompt, "
            "response, model and gold, or name other splits"
        )
    nameless = found["model"].null_count()
    if nameless:
        raise UserError(
            f"scenarios: {nameless} of {found.height} responses in {names} have no model, and "
            "scenarios divide by it: extract with columns = { model = 'COLUMN' }"
        )


def _pairs(
    members: pl.DataFrame, responses: pl.DataFrame, rule: Scenarios, data_seed: int
) -> pl.DataFrame:
    """Derive pairs for each group (split, prompt_id), in the order in which groups appear."""
    lengths = responses["n_response"].gather(members["response"])
    columns = [members[name] for name in ("response", "response_id", "gold", "model")]
    groups: dict[tuple[str, str], list[Member]] = {}
    for row, (split, prompt_id, response, response_id, gold, model, length) in enumerate(
        zip(members["split"], members["prompt_id"], *columns, lengths, strict=True)
    ):
        member = Member(response, response_id, gold, length, model, row)
        groups.setdefault((split, prompt_id), []).append(member)
    found: dict[str, list[object]] = {
        name: [] for name in ("pair_id", "chosen", "rejected", "margin", "rejected_model")
    }
    places: list[int] = []
    following = _following(groups, data_seed) if rule.cross_prompt else {}
    for (split, prompt_id), group in groups.items():
        others: list[Member] = []
        if rule.cross_prompt and split == "train":
            if prompt_id not in following:
                continue
            others = following[prompt_id]
        for chosen, rejected, margin in pair_members(group, rule.pairs, prompt_id, others):
            places.append(chosen.row)
            values = (
                pair_id_of(split, chosen.response_id, rejected.response_id),
                chosen.response,
                rejected.response,
                margin,
                rejected.model,
            )
            for column, value in zip(found.values(), values, strict=True):
                column.append(value)
    return (
        members.select(pl.all().gather(places))
        .rename({"model": "chosen_model"})
        .with_columns(
            *(pl.Series(name, values, dtype=PAIRS[name]) for name, values in found.items()),
            label=pl.lit(1.0),
            weight=pl.lit(1.0),
        )
        .select(_present(members.columns))
    )


def _following(
    groups: dict[tuple[str, str], list[Member]], data_seed: int
) -> dict[str, list[Member]]:
    """For each training prompt but the last, the training group that follows it in hash order.

    The order is that of the hash which chooses a sweep's validation prompts. Those come first in
    it, so only one pair of neighbouring prompts joins validation and training.
    """
    prompts = [prompt_id for split, prompt_id in groups if split == "train"]
    drawn = dict(zip(prompts, draws(prompts, data_seed, "validation"), strict=True))
    ordered = sorted(prompts, key=lambda prompt_id: (drawn[prompt_id], prompt_id))
    return {one: groups["train", following] for one, following in itertools.pairwise(ordered)}


def _present(columns: Sequence[str]) -> list[str]:
    """The columns of `PAIRS`; source and row only if the members have them."""
    return [name for name in PAIRS if name not in ("source", "row") or name in columns]
