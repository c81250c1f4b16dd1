"""MetaRM: the gradient is taken at weights that tell unlabelled responses apart better.

θ' = θ + η·∇J(θ), then an optimizer step of θ along -∇L(θ') (arXiv 2401.06080). This is first order:
the gradient is taken with respect to θ'. J = (2/k²)·Σ_{i<j} sigmoid(|r(x, s_i) - r(x, s_j)|) for k
responses s to a prompt x, averaged over prompts.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from embrm.core.errors import UserError, nearest
from embrm.core.specs import Spec
from embrm.core.streams import stream


class MetaSpec(Spec):
    """The look-ahead before every step. Gold scores of the responses are not used."""

    split: str
    """A split with groups (several responses to a prompt) that is not trained on."""
    eta: float = Field(gt=0)
    """η: the weights move by η·∇J."""
    responses: int = Field(default=4, ge=2)
    """k: how many responses to a prompt are drawn for a step."""
    prompts: int = Field(default=4, gt=0)
    """How many prompts are drawn for a step."""


class UnlabelledGroups:
    """Groups of unlabelled responses, from which every step draws some."""

    def __init__(self, spec: MetaSpec, rows: Sequence[NDArray[np.int64]], seed: int) -> None:
        """rows: the responses to each prompt, as `group_rows` returns them."""
        self.eta = spec.eta
        self._spec, self._rows, self._seed = spec, rows, seed

    def draw(self, step: int) -> NDArray[np.int64]:
        """Draw responses int64 [prompts, responses] without replacement; the draw depends on the
        seed and the step only."""
        random = stream(self._seed, "meta", step)
        prompts = random.choice(len(self._rows), self._spec.prompts, replace=False)
        drawn = [
            random.choice(self._rows[prompt], self._spec.responses, replace=False)
            for prompt in prompts
        ]
        return np.stack(drawn)


def group_rows(
    members: pl.DataFrame, spec: MetaSpec, train: Sequence[str]
) -> list[NDArray[np.int64]]:
    """Return the distinct responses, int64, to every prompt of spec.split that has enough.

    members: the columns split, prompt_id and response of a cache's groups. train: the splits that
    are trained on.
    Raises: UserError when the split is trained on, has no groups, or has too few or too small ones.
    """
    found = f"metarm.split = {spec.split!r}"
    if spec.split in train:
        raise UserError(f"{found} is trained on: name another split of groups")
    with_groups = sorted({*members["split"]} - {*train})
    if spec.split not in with_groups:
        known = nearest(spec.split, with_groups) if with_groups else "the cache has none"
        raise UserError(f"{found} has no groups, several responses to a prompt: {known}")
    groups = (
        members.filter(pl.col("split") == spec.split)
        .group_by("prompt_id")
        .agg(pl.col("response").unique().sort())
        .sort("prompt_id")
    )
    sizes = groups["response"].list.len()
    enough = groups.filter(sizes >= spec.responses)
    if len(enough) < spec.prompts:
        raise UserError(
            f"metarm.prompts = {spec.prompts}, and {len(enough)} of {len(groups)} prompts of "
            f"{spec.split!r} have metarm.responses = {spec.responses} different responses (at "
            f"most {max(sizes)}): lower one of the two"
        )
    return [rows.to_numpy().astype(np.int64) for rows in enough["response"]]


def discrimination(r: Tensor) -> Tensor:
    """Return J of each of n prompts, [n], given the rewards [n, k] of its responses."""
    k = r.shape[1]
    first, second = torch.triu_indices(k, k, 1, device=r.device)
    return 2 / k**2 * (r[:, first] - r[:, second]).abs().sigmoid().sum(1)
