"""The model card of an exported reward model: what it is, how good it is, and how to use it.

It contains no time and no path, so that the same export gives the same bytes.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from embrm import __version__
from embrm.core.specs import canonical_json
from embrm.core.table import Table, escape, markdown
from embrm.exports.exported import ExportedModel
from embrm.exports.parity import Parity
from embrm.exports.run_model import RunModel
from embrm.extraction.texts import PreparedTexts
from embrm.metrics.intervals import compare, replicate
from embrm.metrics.outcomes import Outcomes

_METRICS = ("accuracy", "tau")


def card(
    run_model: RunModel,
    prepared: PreparedTexts,
    exported: ExportedModel,
    parity: Parity,
    *,
    stock: bool,
) -> str:
    """Return README.md of the folder. Text from users or data is escaped."""
    parts = [
        _front_matter(prepared),
        f"# {escape(run_model.name)}\n",
        "A reward model: one number for a prompt and a response, higher is better. "
        + (
            "Loads in stock transformers."
            if stock
            else "Its head has no stock class: `modeling_embrm.py` in this folder defines its own."
        )
        + "\n",
        _use(exported, parity, stock=stock),
        markdown(_results(run_model)),
        markdown(_made_of(run_model, prepared)),
        "## Run\n```json\n" + json.dumps(_run(run_model), indent=1, sort_keys=True) + "\n```\n",
        markdown(_parity(parity)),
    ]
    return "\n".join(parts)


def _front_matter(prepared: PreparedTexts) -> str:
    """The YAML header; values are written as JSON strings, which are valid YAML."""
    lines = ["library_name: transformers", "pipeline_tag: text-classification"]
    base = _hub_name(prepared)
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append("tags: [reward-model, embrm]")
    return "\n".join(["---", *lines, "---", ""])


def _hub_name(prepared: PreparedTexts) -> str | None:
    """The model's hub id; None for a local folder, whose path is private."""
    name = prepared.spec.model
    is_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_hub else None


def _use(exported: ExportedModel, parity: Parity, *, stock: bool) -> str:
    trust = "" if stock else ", trust_remote_code=True"
    pooled = getattr(exported.model.config, "pooling", "last")
    policy = exported.policy
    code = [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        'folder = "."  # of this file',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f"model = AutoModelForSequenceClassification.from_pretrained(folder{trust}).eval()",
    ]
    if policy.template == "chat":
        code += [
            'messages = [{"role": "user", "content": "..."}, '
            '{"role": "assistant", "content": "..."}]',
            "text = tokenizer.apply_chat_template(messages, tokenize=False)",
        ]
        example = exported.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            tokenize=False,
        )
        adds_bos = policy.add_bos and not example.startswith(exported.tokenizer.bos_token)
    else:
        eos = " + tokenizer.eos_token" if policy.eos is not None else ""
        code.append(f'text = "prompt" + "response"{eos}')
        adds_bos = policy.add_bos
    special = "" if adds_bos else ", add_special_tokens=False"
    code.append(f'inputs = tokenizer([text], padding=True{special}, return_tensors="pt")')
    if pooled == "mean":
        code.append(
            "inputs['prompt_tokens'] = [...]  # how many tokens of each text are the prompt"
        )
    code.append("reward = model(**inputs).logits[:, 0]")
    notes = []
    if exported.offset:
        notes.append(
            f"The logit is the run's reward plus {exported.offset:.9g}: stock classes have no "
            "bias. Differences between rewards, and so preferences, are the run's; embrm score "
            "subtracts the constant."
        )
    if pooled == "last":
        notes.append(
            "The reward is read at the rightmost token that is not the pad token: never append pad "
            "tokens by hand, and end the text as above."
        )
    if parity.position_ids:
        notes.append(
            "This architecture counts positions from the left end of the batch: pad on the right "
            "(as this tokenizer does), or pass position_ids."
        )
    if exported.policy.pad == exported.policy.eos:
        notes.append(
            "The pad token is the EOS token, so the token before the EOS is read; engines that "
            "pool the last token of a text want it without the EOS."
        )
    return "\n".join(["## Use", "```python", *code, "```", *(f"\n{note}" for note in notes), ""])


def _results(run_model: RunModel) -> Table:
    """Accuracy and Kendall's τ-b of the run on every split, with intervals over prompts."""
    results = run_model.results
    run_id = run_model.row["run_id"]
    rows = []
    data_seed = run_model.row.get("data_seed") or 0
    prompts = results.prompts
    if "data_seed" in prompts.columns:
        prompts = prompts.filter(pl.col("data_seed").fill_null(data_seed) == data_seed)
    for split in prompts["split"].unique(maintain_order=True):
        outcomes = Outcomes.of(
            prompts.filter(pl.col("split") == split).drop("split"),
            results.outcomes.filter(pl.col("split") == split, pl.col("run_id") == run_id),
            [run_id],
            [run_model.row.get("data_seed") or 0],
        )
        rows.append(
            (
                split,
                f"{run_model.row[f'pairs@{split}']:,.0f}",
                f"{run_model.row[f'prompts@{split}']:,.0f}",
                *(_interval(run_model, outcomes, split, metric) for metric in _METRICS),
                _number(run_model.row.get(f"ties@{split}"), 100, " %"),
                _number(run_model.row.get(f"length_accuracy@{split}"), 100, " %"),
            )
        )
    return Table(
        title="Results",
        columns=("split", "pairs", "prompts", "accuracy", "Kendall tau-b", "ties", "longer"),
        rows=tuple(rows),
        note="Square brackets: 95 % intervals, bootstrap over prompts; variance between seeds "
        "is not included. Ties count neither for nor against. longer: the accuracy of preferring "
        "the longer response.",
    )


def _interval(run_model: RunModel, outcomes: Outcomes, split: str, metric: str) -> str:
    if run_model.row.get(f"{metric}@{split}") is None:
        return "n/a"
    runs = pl.DataFrame({"name": [run_model.row["config"]], "seed": [run_model.row["seed"]]})
    found = compare(replicate(outcomes, metric), runs, None).row(0, named=True)
    scale, unit = (100, " %") if metric == "accuracy" else (1, "")
    decimals = 1 if metric == "accuracy" else 3
    estimate = _number(found["estimate"], scale, unit, decimals)
    if found["low"] is None:
        return estimate
    low, high = (_number(found[end], scale, "", decimals) for end in ("low", "high"))
    return f"{estimate} [{low}, {high}]"


def _number(value: float | None, scale: float, unit: str, decimals: int = 1) -> str:
    return "n/a" if value is None else f"{value * scale:.{decimals}f}{unit}"


def _run(run_model: RunModel) -> dict[str, Any]:
    """The run's fields; a label table is named by its digest, since its path is private."""
    fields, labels = run_model.run, run_model.run.get("labels")
    return fields if labels is None else fields | {"labels": labels.rpartition("#")[2]}


def _made_of(run_model: RunModel, prepared: PreparedTexts) -> Table:
    row, manifest = run_model.row, run_model.cache.manifest
    tokens = prepared.identity["tokenizer"]
    spec = run_model.results.spec
    divided = spec.scenarios
    rows: list[tuple[str, str]] = [
        ("base model", _hub_name(prepared) or prepared.folder.name),
        ("its weights, SHA-256", prepared.identity["model"]["weights"]),
        ("dtype", prepared.spec.dtype),
        ("backbone", "fine-tuned" if run_model.backbone else "frozen"),
        ("head", row["head"]),
        ("loss", row["loss"]),
        ("state", run_model.view),
        ("template", tokens["template"]),
        ("longest text", f"{tokens['max_length']} tokens"),
        ("trained on", ", ".join(spec.train)),
        *([("scenarios", canonical_json(divided.model_dump(mode="json")))] if divided else []),
        ("pairs trained on", f"{row['train_pairs']:,}" if row["train_pairs"] else "none: gold"),
        ("sources", ", ".join(_sources(manifest.data))),
        ("run", row["run_id"]),
        ("cache", manifest.cache_id),
        ("dataset, SHA-256", prepared.identity["data"]["dataset"]),
        ("embrm", __version__),
    ]
    return Table(title="Made of", columns=("", ""), rows=tuple(rows), left=2)


def _sources(data: dict[str, object]) -> Sequence[str]:
    rules = data.get("rules")
    found = rules.get("sources", []) if isinstance(rules, dict) else []
    return [str(entry["source"]) for entry in found]


def _parity(parity: Parity) -> Table:
    return Table(
        title="Parity",
        columns=("read", "largest difference", "reordered"),
        rows=tuple(
            (how, f"{value:.1g}", f"{parity.reordered[how]:.2%}")
            for how, value in parity.differences.items()
        ),
        note=f"Rewards of {parity.responses} responses of the cache through this folder, against "
        f"the run's own; at most {parity.tolerance:.1g} was allowed. reordered: the share of pairs "
        "of responses ordered by the run that the folder reorders or ties; at most "
        f"{parity.bound:.0%} was allowed.",
    )
