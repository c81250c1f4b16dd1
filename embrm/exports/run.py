"""Export: writes a run as a folder that transformers loads and that scores as the run does."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from embrm import __version__
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY, disk_errors, write_bytes
from embrm.core.sampling import evenly_spaced
from embrm.exports.card import card
from embrm.exports.exported import load_exported
from embrm.exports.model import CODE, CUSTOM, custom_model, quiet, stock_model, why_not_stock
from embrm.exports.parity import Parity, check_parity, expected_rewards
from embrm.exports.run_model import RunModel, open_run_model
from embrm.extraction.texts import PreparedTexts
from embrm.lm.tokens import load_tokenizer, reason_of


@dataclass(frozen=True)
class Export:
    """What was written.

    stock: whether transformers loads it without our code. offset: the reward is the logit minus it.
    """

    folder: Path
    stock: bool
    offset: float
    parity: Parity


def export(
    source: Path,
    run: str,
    out: Path,
    *,
    cache: Path | None = None,
    model: str | None = None,
    custom: bool = False,
    push: str | None = None,
    tolerance: float = 1e-4,
    sample: int = 256,
    device: str = "auto",
) -> Export:
    """Write run `run` of the results in `source` to the new folder `out` as a reward model.

    run: a run id, the beginning of one, or CONFIGURATION@SEED. cache, model: where they are, if
    they have moved. custom: allow our own small model class, for a head that no stock class can
    hold, and in half precision also to keep the head in float32. push: a hub repository to upload
    the folder to; a new one is made private. tolerance, sample: of the comparison with the run's
    rewards, see `check_parity`; sample is the number of responses.

    `out` appears once everything is in it and has been checked, or not at all. The same run gives
    the same bytes.

    Raises: UserError for a run that cannot be exported, a model or data that are no longer those of
    the cache, rewards that differ by more than the tolerance, or a folder that is not empty.
    """
    _refuse_content(out)
    run_model = open_run_model(source, run, cache)
    made = write_model(
        run_model,
        run_model.prepared(model),
        out,
        custom=custom,
        tolerance=tolerance,
        sample=sample,
        device=device,
    )
    if push is not None:
        upload(out, push)
    return made


def write_model(
    run_model: RunModel,
    prepared: PreparedTexts,
    out: Path,
    *,
    custom: bool = False,
    tolerance: float = 1e-4,
    sample: int = 256,
    device: str = "auto",
) -> Export:
    """Export a run that is open already, as `export` does. prepared: the texts of its cache."""
    _refuse_content(out)
    if prepared.spec.trust_remote_code:
        raise UserError(
            "the cache was made with trust_remote_code: a model with code of its own cannot be "
            "exported"
        )
    if run_model.view not in CUSTOM:
        raise UserError(
            f"run {run_model.name} reads state {run_model.view!r}, which cannot be exported: take "
            "a run on 'last' or 'mean', or score with embrm score FOLDER:RUN"
        )
    reason = why_not_stock(run_model, prepared)
    if reason and not custom:
        raise UserError(
            f"run {run_model.name} has no stock form: {reason}; with custom (--custom) it is saved "
            "with a "
            "small class of ours, or score with embrm score FOLDER:RUN"
        )
    rows = evenly_spaced(len(prepared.encoded), sample).tolist()
    expected = expected_rewards(run_model, prepared, rows, device)
    # A stock class has its score layer in the dtype of the backbone; our class keeps the head in
    # float32.
    stock = not reason and not (custom and prepared.spec.dtype != "float32")
    build = stock_model if stock else custom_model
    built = build(run_model, prepared, _about(run_model, prepared))
    with _new_folder(out) as folder:
        with quiet():
            built.save_pretrained(folder)
        offset = float(built.config.embrm["offset"])
        del built  # so that one large model is in memory at a time
        _save_tokenizer(folder, prepared)
        if not stock:
            shutil.copyfile(CODE, folder / CODE.name)
        exported = load_exported(folder, device=device)
        parity = check_parity(exported, expected, prepared, rows, tolerance)
        text = card(run_model, prepared, exported, parity, stock=stock)
        write_bytes(folder / "README.md", text.encode())
    return Export(out, stock, offset, parity)


def _refuse_content(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder, or remove it first")


def upload(folder: Path, repository: str) -> None:
    """Upload `folder` to a hub repository, which is created as a private one if it is new.

    Raises: UserError when the hub refuses; the folder stays.
    """
    hub = HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # offline, no token, a wrong name: each has its own exception
        raise UserError(
            f"{folder} is exported, but the hub gave {reason_of(error)}: check the name and "
            "hf auth login, then upload the folder"
        ) from None


def _about(run_model: RunModel, prepared: PreparedTexts) -> dict[str, Any]:
    """What config.json records under "embrm", beside the offset: the model's origin, and how texts
    become tokens."""
    tokens = prepared.identity["tokenizer"]
    return {
        "version": __version__,
        "run_id": run_model.row["run_id"],
        "cache_id": run_model.cache.cache_id,
        **{name: tokens[name] for name in ("template", "max_length", "truncation")},
    }


def _save_tokenizer(folder: Path, prepared: PreparedTexts) -> None:
    """Save the tokenizer with the pad token, chat template and length that the cache was made with.

    It pads on the right, where absolute positions need no position_ids, and truncates on the left,
    where the prompt is.
    """
    tokens = prepared.identity["tokenizer"]
    tokenizer = load_tokenizer(prepared.folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokens["pad"])
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    tokenizer.model_max_length = tokens["max_length"]
    if tokens["template"] == "plain":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` if the block succeeds, and removed otherwise."""
    temporary = path.absolute().with_name(TEMPORARY + path.absolute().name)
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
