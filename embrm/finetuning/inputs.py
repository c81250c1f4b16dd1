"""The inputs of a fine-tune: its spec, the cache, the texts and the runs, checked together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations import INTEGRATION_TO_CALLBACK

from embrm.cache.reader import Cache
from embrm.cache.writer import difference
from embrm.core.errors import UserError, nearest
from embrm.core.sampling import evenly_spaced
from embrm.core.specs import read_toml
from embrm.extraction.engine import TOLERANCE
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts
from embrm.finetuning.batches import pad_texts
from embrm.finetuning.meta import group_rows
from embrm.finetuning.model import RewardModel
from embrm.finetuning.sharding import check_sharding
from embrm.finetuning.spec import FinetuneRun, FinetuneSpec, check_fits
from embrm.lm.loading import load_model
from embrm.lm.tokens import reason_of
from embrm.sweeps.prepare import cache_for, check_data, pin
from embrm.sweeps.spec import Configuration, Run, Selection, configurations, identified
from embrm.sweeps.tables import read_tables

_REFERENCE_SAMPLE = 8
"""How many responses have their cached S compared with the model's."""


@dataclass(frozen=True)
class FinetuneInputs:
    """A fine-tune whose spec fits its cache. Create it with `read_inputs`.

    where: the spec's path, for messages. runs: every configuration with every seed. evaluate: the
    splits to evaluate. texts: the token ids of all responses of the cache.
    """

    where: str
    spec: FinetuneSpec
    cache: Cache
    selection: Selection
    runs: list[Run]
    evaluate: list[str]
    texts: PreparedTexts

    def base_model(self) -> Any:
        """Load the causal language model that the cache was made with, in float32 on the CPU."""
        return load_model(
            self.texts.folder,
            dtype="float32",
            device="cpu",
            trust_remote_code=self.texts.spec.trust_remote_code,
        )

    def unlabelled_groups(self, run: FinetuneRun) -> list[NDArray[np.int64]]:
        """Return the responses to each prompt that a run with metarm draws from; [] without metarm.

        Raises: UserError as `meta.group_rows` does.
        """
        return _unlabelled_groups(self.cache, self.selection, run)


def read_inputs(spec_path: Path, cache_folder: Path | None) -> FinetuneInputs:
    """Read the spec, open its cache, tokenize the texts again, and check that they fit together.

    Raises: UserError for anything wrong in the spec, the cache, the model's folder or the data.
    """
    where = str(spec_path)
    spec = FinetuneSpec.parse(read_toml(spec_path), where)
    found = pin(configurations(spec, where), where)
    for configuration in found:
        check_fits(run_spec(configuration), spec.tune, f"{where}: run {configuration.name!r}")
    _check_trackers(spec, where)
    check_sharding({one.name: run_spec(one) for one in found}, spec.tune, where)
    cache = cache_for(spec, cache_folder, where)
    selection, _, evaluate = check_data(spec, found, cache, where)
    for configuration in found:
        try:
            _unlabelled_groups(cache, selection, run_spec(configuration))
        except UserError as error:
            raise UserError(f"{where}: run {configuration.name!r}: {error}") from None
    runs = [
        run
        for configuration in found
        for run in identified(
            [configuration], spec.seeds, selection, spec.identity(configuration.spec)
        )
    ]
    inputs = FinetuneInputs(
        where, spec, cache, selection, runs, evaluate, _read_texts(cache, spec, where)
    )
    if any(run.spec.active_regularizer for run in runs):
        _check_reference(inputs)
    return inputs


def run_spec(one: Configuration | Run) -> FinetuneRun:
    """Return the spec of a configuration or run, typed as a fine-tune's."""
    return cast(FinetuneRun, one.spec)


def _unlabelled_groups(
    cache: Cache, selection: Selection, run: FinetuneRun
) -> list[NDArray[np.int64]]:
    if run.metarm is None:
        return []
    members = read_tables(cache, selection.scenarios).members
    return group_rows(members.select("split", "prompt_id", "response"), run.metarm, selection.train)


def _check_trackers(spec: FinetuneSpec, where: str) -> None:
    for name in spec.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"{where}: report_to = {name!r}: {nearest(name, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"{where}: report_to = {name!r} is not installed ({reason_of(error)}): install it, "
                "or remove it"
            ) from None


def _read_texts(cache: Cache, spec: FinetuneSpec, where: str) -> PreparedTexts:
    """Tokenize the texts that the cache was made of.

    Raises: UserError when texts, tokenizer or model are no longer those of the cache.
    """
    extraction = cache.manifest.extraction
    if not extraction:
        raise UserError(
            f"{where}: {cache.folder} does not say what it was extracted from: extract one with "
            "embrm extract"
        )
    moved: dict[str, Any] = {"engine": "transformers"}
    if spec.model is not None:
        moved |= {"model": spec.model, "revision": None}
    if spec.data is not None:
        moved["data"] = spec.data
    found = prepare_texts(ExtractSpec.parse(extraction | moved, str(cache.folder)))
    recorded = {name: value for name, value in cache.manifest.identity.items() if name != "engine"}
    differs = difference(recorded, found.identity)
    if differs:
        raise UserError(
            f"{where}: {cache.folder} was extracted with {differs}: name the model and the data "
            "it was made from, with model and data"
        )
    return found


def _check_reference(inputs: FinetuneInputs) -> None:
    """Check on some responses that the cached log-probability S is the base model's.

    grm-* uses the cached S as the reference model's, so that no second model is kept in memory.
    Raises: UserError when S is missing or differs.
    """
    cache, encoded = inputs.cache, inputs.texts.encoded
    S = cache.responses["S"].to_numpy()
    missing = int((~np.isfinite(S)).sum())
    if missing:
        raise UserError(
            f"{inputs.where}: grm-* compares with S, the responses' log-probability, and "
            f"{cache.folder} lacks it for {missing} responses: extract them with embrm extract"
        )
    rows = evenly_spaced(len(S), _REFERENCE_SAMPLE).tolist()
    unused_head = {"output.weight": torch.zeros(1, cache.width)}
    model = RewardModel(inputs.base_model(), unused_head, with_S=True)
    with torch.inference_mode():
        found = model.eval()(**pad_texts([encoded[row] for row in rows], [True] * len(rows)))[1]
    errors = np.abs(found.double().numpy() - S[rows]) / np.abs(S[rows])
    if not errors.max() <= TOLERANCE[cache.dtype]:
        worst = int(errors.argmax())
        raise UserError(
            f"{inputs.where}: {cache.folder} holds S = {S[rows[worst]]:g} of a "
            f"response for which the model gives {float(found[worst]):g}: "
            "check it with embrm cache probe"
        )
