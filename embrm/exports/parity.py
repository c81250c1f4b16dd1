"""The check of an exported folder: does it give the rewards that the run gives?

The folder is loaded as any user would load it, and reads a sample of the cache's responses one at a
time, and in batches padded on the right and on the left. Two things are compared with the run: how
far rewards differ, and how many pairs of responses are put in another order or tied. The second is
needed because a score layer in bfloat16 has steps of 1/16 between 8 and 16, which are small beside
a logit of 15, and large beside rewards that differ by 0.5.

The rewards to meet are those of the cached states for a run of a sweep. For a fine-tuned run, whose
states no cache holds, they are those that extraction and the head give with its weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embrm.core.errors import UserError
from embrm.exports.exported import ExportedModel, Side
from embrm.exports.run_model import RunModel
from embrm.extraction.engine import TOLERANCE
from embrm.extraction.reading import read
from embrm.extraction.texts import PreparedTexts

BATCH = 16
"""Texts of a batch in the comparison."""

REORDERED = {"float32": 0.01, "bfloat16": 0.03, "float16": 0.03}
"""Largest share of pairs of responses that may be reordered or newly tied, by dtype. In half
precision the states themselves depend on the batch that they are read in; with tiny models this
alone reorders up to 1.4 % of the pairs."""

_PASSES: tuple[tuple[str, Side, int], ...] = (
    ("batch 1", "right", 1),
    (f"batch {BATCH}, padded on the right", "right", BATCH),
    (f"batch {BATCH}, padded on the left", "left", BATCH),
)


@dataclass(frozen=True)
class Parity:
    """The result of the comparison of an exported folder with its run.

    responses: how many were compared. differences: the largest |exported - run| for each way of
    reading the texts; tolerance: the largest that is allowed. reordered: the share of pairs of
    responses that `reordered` counts, for each way of reading; bound: the largest that is allowed.
    scale: what rounding errors are relative to: the largest |reward| in float32, otherwise the
    largest |logit|, offset included. position_ids: whether the class needs position_ids to read
    texts padded on the left, because it does not make them from the attention mask.
    """

    responses: int
    tolerance: float
    scale: float
    differences: dict[str, float]
    bound: float
    reordered: dict[str, float]
    position_ids: bool


def expected_rewards(
    run_model: RunModel, prepared: PreparedTexts, rows: list[int], device: str
) -> Tensor:
    """float32 [n], the rewards of the run for these responses of the cache."""
    if not run_model.backbone:
        return run_model.cached_rewards(rows)
    engine, requests = run_model.engine(prepared, device), prepared.requests(rows)
    return run_model.rewards(read(engine, requests, engine.batch_tokens), requests)


def check_parity(
    exported: ExportedModel,
    expected: Tensor,
    prepared: PreparedTexts,
    rows: list[int],
    tolerance: float,
) -> Parity:
    """Compare an exported model with the run's rewards `expected`, float32 [n], of the responses
    `rows`.

    tolerance: largest difference in float32, in units of max(1, the largest |reward|). Half
    precision has the tolerance of its states, in units of the largest |logit|.
    Raises: UserError when, for any way of reading the texts, rewards differ by more, or more pairs
    of responses than `REORDERED` allows are reordered.
    """
    dtype = prepared.spec.dtype
    half = dtype != "float32"
    relative = max(tolerance, TOLERANCE[dtype] * half)
    scale = float((expected + exported.offset * half).abs().max())
    bound = REORDERED[dtype]
    allowed = relative * max(1.0, scale)
    texts = [prepared.encoded[row] for row in rows]
    differences, shares, position_ids = {}, {}, False
    for name, side, size in _PASSES:
        batches = [
            range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)
        ]
        found = exported.rewards(texts, batches, side)
        largest, share = _largest(found, expected), reordered(found, expected)
        if not (largest <= allowed and share <= bound) and side == "left":
            position_ids = True
            found = exported.rewards(texts, batches, side, position_ids=True)
            largest, share = _largest(found, expected), reordered(found, expected)
        if not largest <= allowed:
            raise UserError(
                f"the exported model's rewards differ by {largest:.2g} from the run's ({name}), "
                f"more than {allowed:.2g}: nothing is exported; check the cache with embrm cache "
                "verify and embrm cache probe"
            )
        if share > bound:
            raise UserError(
                f"the exported model reorders or ties {share:.1%} of the pairs of responses that "
                f"the run orders ({name}), more than {bound:.0%}: nothing is exported; "
                "custom (--custom) keeps the head in float32, a cache extracted in float32 all of "
                "it"
            )
        differences[name], shares[name] = largest, share
    return Parity(len(rows), allowed, scale, differences, bound, shares, position_ids)


def reordered(found: Tensor, expected: Tensor) -> float:
    """Return the share of pairs of responses that `found` [n] reorders or ties, among the pairs
    whose rewards in `expected` [n] differ."""
    changed = decided = 0
    for row in range(len(expected)):  # row by row, so that n² pairs are never in memory
        before = torch.sign(expected[row + 1 :] - expected[row])
        after = torch.sign(found[row + 1 :] - found[row])
        decided += int((before != 0).sum())
        changed += int(((before != 0) & (after != before)).sum())
    return changed / decided if decided else 0.0


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max())
