"""A run has the same bits whatever runs share its pack, their number, order and memory."""

import hashlib
import operator
import os
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strict_process import strict_process
from toy_cache import toy_cache

from embrm.cache.reader import open_cache
from embrm.core.specs import canonical_json
from embrm.sweeps import material as material_module
from embrm.sweeps.execute import sweep
from embrm.sweeps.material import Material, laid_out
from embrm.sweeps.pack_trainer import Trainer
from embrm.sweeps.packs import Pack
from embrm.sweeps.spec import Run, Selection, SweepSpec, configurations, runs
from embrm.training.numerics import Numerics, in_use, why_unavailable
from embrm.training.regularizers import KINDS

GRM = [name for name, kind in KINDS.items() if kind.of_pair]

HEADS = (
    {"kind": "linear"},
    {"kind": "mlp", "widths": [12], "dropout": 0.1},
    {"kind": "mlp", "widths": [33, 5]},
)

ADAPTED = (
    {"kind": "linear", "adapter": {"kind": "low-rank", "width": 3}},
    {"kind": "linear", "adapter": {"kind": "mlp", "width": 17}},
    {"kind": "mlp", "widths": [12], "dropout": 0.1, "adapter": {"kind": "mlp", "width": 5}},
)


def _grm(kinds: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(kinds),
            "alpha": st.sampled_from([0.01, 0.5]),
            "beta": st.sampled_from([0.1, 1.0]),
        }
    )


_one_sided = _grm([kind for kind in GRM if "sft" in kind])
_two_sided = st.one_of(
    _grm([kind for kind in GRM if "sft" not in kind]),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["preserve-kl", "preserve-fisher"]),
            "weight": st.sampled_from([0.1, 3.0]),
        }
    ),
)
"""What the runs of a pack may differ in: they read the better response of a pair, or both."""
_weightings = st.one_of(_one_sided, _two_sided)
_samplings = st.fixed_dictionaries(
    {"token_rows": st.sampled_from([2, 3, 100])},
    optional={"top_k": st.sampled_from([2, 6, "all"])},
)
_fisher = st.fixed_dictionaries(
    {"kind": st.just("fisher"), "weight": st.sampled_from([0.1, 3.0])},
    optional={"top_k": st.sampled_from([2, "all"])},
)
_heads = st.one_of(
    st.fixed_dictionaries(
        {
            "head": st.sampled_from(HEADS),
            "preprocess": st.sampled_from(["none", "standardize"]),
        }
    ),
    st.fixed_dictionaries({"head": st.just({"kind": "linear"}), "regularizer": _fisher}),
    st.fixed_dictionaries(
        {"head": st.sampled_from(ADAPTED)},
        optional={"regularizer": st.builds(operator.or_, _weightings, _samplings)},
    ),
)

_objectives = st.one_of(
    st.fixed_dictionaries(
        {"loss": st.sampled_from(["bt", "hinge"]), "margin": st.sampled_from([0.0, 0.5])}
    ),
    st.fixed_dictionaries(
        {
            "loss": st.sampled_from(["bt", "logitnorm", "bt_dr", "classifier"]),
            "label_smoothing": st.sampled_from([0.0, 0.1]),
        }
    ),
)
_fields = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 3e-3, 0.1]),
        "epochs": st.integers(1, 4),
        "batch_pairs": st.sampled_from([8, 20]),
        "bsr": st.sampled_from([0.0, 0.01]),
        "centering": st.sampled_from([0.0, 0.1]),
        "l2": st.sampled_from([0.0, 0.01]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "patience": st.sampled_from([None, 1]),
        "pairs_limit": st.sampled_from([None, 30]),
    }
)
_configurations = st.lists(
    st.builds(lambda *parts: dict(ChainMap(*parts)), _fields, _heads, _objectives),
    min_size=2,
    max_size=7,
    unique_by=lambda fields: canonical_json(fields),
)


def _spec(entries: Sequence[dict[str, Any]], **fields: Any) -> SweepSpec:
    named = [{"name": f"c{number}", **entry} for number, entry in enumerate(entries)]
    found = {"baseline": "c0", "validation": 0.3, "seeds": [0, 1], "runs": named, **fields}
    return SweepSpec.parse(found, "test")


def _contents(folder: Path) -> dict[str, str]:
    """Digest of every result that must not change, which excludes part folders and timings."""
    tables = ("ledger", "curves", "prompts", "outcomes", "geometry")
    paths = [folder / f"{name}.parquet" for name in tables] + sorted(folder.glob("weights/*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(entries=_configurations, order=st.permutations(range(7)))
@pytest.mark.slow
def test_a_sweep_has_the_same_bytes_in_any_order_over_any_workers_streamed_or_not(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[dict[str, Any]],
    order: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("sweep")
    cache = toy_cache(folder / "cache", prompts=60, width=20, token_rows=4)
    names = [index for index in order if index < len(entries)]
    for name, chosen in (("one", range(len(entries))), ("two", names)):
        text = ['baseline = "c0"', "validation = 0.3", "seeds = [0, 1]", "[defaults]"]
        for index in chosen:
            text += ["[[runs]]", f'name = "c{index}"']
            text += [f"{key} = {_toml(value)}" for key, value in entries[index].items() if value]
        (folder / f"{name}.toml").write_text("\n".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        sweep(folder / "one.toml", cache, jobs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        patch.setattr(material_module, "PROCESS_BYTES", 0)
        patch.setattr(material_module, "LEAST_RESIDENT", 1)
        patch.setattr(material_module, "_minibatch_bytes", lambda *_: 0)
        sweep(folder / "two.toml", cache, jobs=2, memory=20_000)
    one, two = _contents(folder / "one"), _contents(folder / "two")
    assert len(one) == 5 + 2 * len(entries)
    assert one == two


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return canonical_json(value)


def _streamed(material: Material) -> Material:
    """The same data, streamed: a worker keeps almost nothing in memory."""
    tokens = material.tokens
    if tokens:
        files = {name: replace(file, resident=1) for name, file in tokens.matrices.items()}
        tokens = replace(tokens, matrices=files)
    states = {view: replace(file, resident=1) for view, file in material.states.items()}
    return replace(material, states=states, tokens=tokens)


def _of_packs(
    cache: Path, folder: Path, found: Sequence[Sequence[Run]], numerics: Numerics, *, stream: bool
) -> dict[str, str]:
    """Digest of all stored data of each run; a run that was trained twice must have only one."""
    source = open_cache(cache)
    selection = Selection(source.cache_id, ("train",), 0.3)
    digests: dict[str, str] = {}
    with laid_out(source, selection, [run for pack in found for run in pack], folder) as material:
        if stream:
            material = _streamed(material)
        trainer = Trainer(material, numerics)
        for pack in found:
            files = trainer.run(Pack(tuple(pack)))
            for run in pack:
                digest = hashlib.sha256()
                for name, content in sorted(files.items()):
                    if run.run_id in name:
                        digest.update(content)
                    if name.startswith("parts/") and not name.endswith("timings.parquet"):
                        own = pl.read_parquet(content).filter(run_id=run.run_id)
                        digest.update(repr(own.select(sorted(own.columns)).rows()).encode())
                value = digests.setdefault(run.run_id, digest.hexdigest())
                assert value == digest.hexdigest()
    return digests


def _runs(entries: Sequence[dict[str, Any]]) -> list[Run]:
    spec = _spec(entries)
    selection = Selection("cache", ("train",), 0.3)
    return runs(configurations(spec, "test"), [0], selection, "native")


@pytest.fixture(scope="module")
def strict() -> Any:
    with strict_process() as call:
        yield call


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_cache(tmp_path_factory.mktemp("toy") / "cache", prompts=60, width=20, token_rows=4)


_OWN = (
    "lr", "epochs", "bsr", "centering", "l2", "weight_decay", "patience",
    "loss", "margin", "label_smoothing",
)  # fmt: skip
"""Fields that runs of one pack may differ in, beside a regularizer's kind and weight."""


def _weighted(head: dict[str, Any], weighting: dict[str, Any]) -> dict[str, Any]:
    """The same head; its regularizer has another kind and weight but reads the same token rows."""
    if "adapter" not in head["head"] or "regularizer" not in head:
        return head
    read = {k: v for k, v in head["regularizer"].items() if k in ("token_rows", "top_k")}
    return head | {"regularizer": read | weighting}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    entries=_configurations,
    shared=_fields,
    head=_heads,
    weightings=st.one_of(
        st.lists(_one_sided, min_size=7, max_size=7), st.lists(_two_sided, min_size=7, max_size=7)
    ),
    order=st.permutations(range(7)),
    cut=st.integers(1, 6),
    stream=st.booleans(),
)
def test_a_run_keeps_its_bits_alone_in_other_slots_beside_others_and_streamed(
    strict: Callable[..., Any],
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[dict[str, Any]],
    shared: dict[str, Any],
    head: dict[str, Any],
    weightings: list[dict[str, Any]],
    order: list[int],
    cut: int,
    stream: bool,
) -> None:
    same = {key: shared[key] for key in ("batch_pairs", "pairs_limit")}
    heads = [_weighted(head, weighting) for weighting in weightings]
    own = ({key: value for key, value in entry.items() if key in _OWN} for entry in entries)
    entries = [fields | same | head for fields, head in zip(own, heads, strict=False)]
    distinct = {canonical_json(entry): entry for entry in entries}
    found = _runs([*distinct.values()])
    moved = [found[index] for index in order if index < len(found)]
    folder = tmp_path_factory.mktemp("states")
    together = strict(_of_packs, cache, folder, [found], "native", stream=False)
    others = [moved[:cut], moved[cut:], *([run] for run in found)]
    packs = [pack for pack in others if pack]
    assert strict(_of_packs, cache, folder, packs, "native", stream=stream) == together


HIDDEN = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512CD,-AVX512BW,-AVX512DQ,-AVX512VL",
}
"""What makes the libraries believe in a CPU without AVX-512."""


def test_portable_numerics_are_the_same_with_avx512_hidden(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why_unavailable("portable"):
        pytest.skip("this CPU has no AVX2")
    shared = {"epochs": 3, "batch_pairs": 20}
    entries = [
        {"head": head, "loss": loss, "preprocess": "standardize", **shared}
        for head in HEADS
        for loss in ("bt", "logitnorm", "hinge")
    ]
    entries += [
        {"head": head, "regularizer": {"kind": kind}, **shared}
        for head, kind in zip(ADAPTED, ("grm-sft", "grm-dpo", "preserve-kl"), strict=True)
    ]
    found = _runs(entries)
    packs = [found[:3], found[3:6], found[6:9]]
    packs += [[run] for run in found[9:]]
    with strict_process("portable") as call:
        assert "AVX512" not in call(in_use, "portable")
        open_to_see = call(_of_packs, cache, tmp_path, packs, "portable", stream=False)
    for name, value in HIDDEN.items():
        monkeypatch.setenv(name, value)
    with strict_process("portable") as call:
        assert call(os.getenv, "GLIBC_TUNABLES") == HIDDEN["GLIBC_TUNABLES"]
        assert call(_of_packs, cache, tmp_path, packs, "portable", stream=False) == open_to_see
