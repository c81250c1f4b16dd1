"""Tests of loading: models that cannot be loaded are refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from extract_models import CONFIGS
from transformers import LlamaForSequenceClassification

from embrm.core.errors import UserError
from embrm.extraction.transformers_engine import load_engine
from embrm.lm.loading import length_limit, load_config, load_model, model_folder


@pytest.mark.parametrize(
    ("dtype", "has", "warns"),
    [
        ("bfloat16", {"avx2": True}, True),
        ("bfloat16", {"avx512_bf16": True}, False),
        ("float16", {"avx512_bf16": True}, True),
        ("float16", {"fp16_arith": True, "avx512_fp16": False}, False),
        ("float32", {}, False),
    ],
)
def test_a_dtype_without_native_arithmetic_gives_a_warning(
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    has: dict[str, bool],
    warns: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    load_model(model_folders["gpt2"], dtype=dtype, device="cpu")
    warned = capsys.readouterr().err
    assert (f"dtype = '{dtype}': this processor has no {dtype} arithmetic" in warned) == warns
    assert warned.count("\n") == warns


def _edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folders["llama-untied"], tmp_path / "model"))


def test_unknown_models_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nobody/nothing", "./nowhere", "nothing"):
        with pytest.raises(UserError, match="no such folder") as caught:
            model_folder(name, None)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        model_folder(str(tmp_path), None)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        model_folder(str(copy), None)


def test_a_model_without_lm_head_is_refused(copy: Path) -> None:
    model = LlamaForSequenceClassification(CONFIGS["llama-untied"])
    model.save_pretrained(copy)
    with pytest.raises(UserError, match="LlamaForSequenceClassification has no LM head"):
        load_config(copy)
    _edit_config(copy, architectures=None)
    load_config(copy)
    with pytest.raises(UserError, match=r"lack 'lm_head\.weight'"):
        load_engine(copy, dtype="float32", device="cpu")


def test_an_encoder_is_refused(copy: Path) -> None:
    _edit_config(copy, model_type="t5", architectures=None)
    with pytest.raises(UserError, match="cannot be loaded as a causal LM") as caught:
        load_engine(copy, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


def test_damaged_weights_and_configs_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_engine(copy, dtype="float32", device="cpu")
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_config(copy)


def test_lengths_beyond_the_models_positions_are_refused(copy: Path) -> None:
    assert length_limit(load_config(copy), 255) == 255
    assert length_limit(load_config(copy), None) == 256
    with pytest.raises(UserError, match="set max_length to 256 or less"):
        length_limit(load_config(copy), 257)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    _edit_config(copy, rope_parameters=rope | {"original_max_position_embeddings": 128})
    assert length_limit(load_config(copy), None) == 128
    with pytest.raises(UserError, match="depend on the batch"):
        length_limit(load_config(copy), 129)


@pytest.mark.parametrize("device", ["tpu", "cuda:2", "cuda:x", "cuda:-1", "cpu:x"])
def test_unavailable_devices_are_refused(
    model_folders: dict[str, Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"device = '{device}' is not available here"):
        load_engine(model_folders["gpt2"], dtype="float32", device=device)
