"""Tests of the list of engines, from which specs, help texts, errors and "auto" are derived."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from extract_world import make_world, spec_of

from embrm.core.errors import UserError
from embrm.extraction import engines
from embrm.extraction.choice import load_engine_for, with_engine
from embrm.extraction.engine import EngineSettings
from embrm.extraction.engines import ENGINES, REFERENCE, EngineEntry, engine_help, engine_module
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import prepare_texts

SPEC: dict[str, Any] = {"model": "model", "data": [{"path": "pairs.jsonl"}]}


@pytest.mark.parametrize("entry", ENGINES, ids=lambda entry: entry.name)
def test_every_engine_module_has_the_functions_of_the_protocol(entry: EngineEntry) -> None:
    module = engine_module(entry.name)
    assert all(
        callable(getattr(module, name)) for name in ("suits", "refuse_unusable", "open_engine")
    )
    assert entry.name in engine_help()


def test_the_last_engine_suits_every_machine_and_is_the_reference() -> None:
    assert ENGINES[-1].name == REFERENCE
    assert engine_module(REFERENCE).suits(["prenorm", "layer:3"], "mps")


def test_an_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"engine = 'vlm': did you mean 'vllm'\?"):
        ExtractSpec.parse(SPEC | {"engine": "vlm"}, "spec")


def test_an_engine_is_added_by_a_module_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[EngineSettings] = []
    module: Any = ModuleType("another_engine")
    module.suits = lambda views, device: device == "cpu" and views == ("last",)
    module.refuse_unusable = lambda _: None
    module.open_engine = lambda settings: loaded.append(settings) or "loaded"
    monkeypatch.setitem(sys.modules, "another_engine", module)
    entry = EngineEntry("another", "another_engine", "on a CPU")
    monkeypatch.setattr(engines, "ENGINES", (entry, *ENGINES))

    assert "another on a CPU, vllm" in engine_help()
    world = make_world(tmp_path)
    texts = prepare_texts(with_engine(spec_of(world, states=["last"], top_k=7), "cpu"))
    assert texts.spec.engine == texts.identity["engine"] == "another"
    assert load_engine_for(texts, "cpu") == "loaded"
    [settings] = loaded
    assert (settings.views, settings.top_k, settings.device) == (("last",), 7, "cpu")
    assert settings.max_length == texts.lengths.max()
    assert with_engine(spec_of(world, states=["prenorm"]), "cpu").engine == REFERENCE
