"""Loads a causal LM: finds its files and device, loads its weights, and limits text lengths."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from embrm.core.errors import UserError
from embrm.core.files import sha256
from embrm.lm.tokens import reason_of

_ARITHMETIC = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "avx10_2", "fp16_arith"},
}
"""CPU capabilities, by torch's names; native arithmetic in a dtype needs at least one of them."""

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_HUB_IGNORED = ["original/*", "consolidated*", "onnx/*"]

_MAX_LENGTH = 2048


def model_folder(model: str, revision: str | None, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model: `model` itself, or the download of that hub id.

    Raises: UserError when it is neither a folder nor a hub id, or has no safetensors weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.count("/") > 1 or model.startswith((".", "/", "~")):
            raise UserError(f"model = {model!r}: no such folder: check the path")
        code = ["*.py"] if trust_remote_code else []
        try:
            folder = Path(
                snapshot_download(
                    model,
                    revision=revision,
                    allow_patterns=_HUB_FILES + code,
                    ignore_patterns=_HUB_IGNORED,
                )
            )
        except Exception as error:  # offline, unknown id, gated: each has its own exception
            raise UserError(
                f"model = {model!r}: no such folder, and the hub gave {reason_of(error)}: "
                "check the name and the connection, or name a local folder"
            ) from None
    if not list(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        raise UserError(
            f"model {model}: pickled weights ({pickled[0].name}) are refused: save the model with "
            "safe_serialization=True (safetensors)"
            if pickled
            else f"model {model}: the folder has no *.safetensors weights: check the path"
        )
    return folder


def digest(folder: Path, *patterns: str) -> str:
    """Hex SHA-256 over the names and contents of the files in `folder` that match a pattern."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    lines = [f"{path.name} {sha256(path)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a causal LM.

    Raises: UserError when it cannot be read, or when the architecture has no LM head.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, **_remote(trust_remote_code)
        )
    except Exception as error:  # transformers has many errors for a broken config
        raise UserError(
            f"model {folder}: its config.json cannot be read ({reason_of(error)}): "
            "name a folder saved by save_pretrained, or a hub id"
        ) from None
    names = getattr(config, "architectures", None) or []
    if names and not trust_remote_code and not _causal_names().intersection(names):
        raise UserError(
            f"model {folder}: architecture {', '.join(names)} has no LM head, and S and token rows "
            "need one: use a causal LM (…ForCausalLM)"
        )
    return config


def load_model(
    folder: Path, *, dtype: str, device: str = "auto", trust_remote_code: bool = False
) -> Any:
    """Load the causal LM at `folder` in evaluation mode.

    dtype: float32, bfloat16 or float16. device: auto, cpu, cuda, cuda:1 or mps.
    Raises: UserError when the device is absent or too small, or weights are missing or damaged.
    """
    chosen = find_device(device)
    if chosen.type == "cpu":
        _warn_of_emulation(dtype)
    remote = _remote(trust_remote_code)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **remote)
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **attention(config),
            **remote,
        )
        model = model.to(chosen).eval()
    except torch.OutOfMemoryError:
        raise UserError(
            f"model {folder} does not fit on {chosen}: use dtype = 'bfloat16' (--dtype bfloat16) "
            "or a smaller model"
        ) from None
    except Exception as error:  # unknown architectures, damaged or mismatched weight files
        raise UserError(
            f"model {folder} cannot be loaded as a causal LM ({reason_of(error)}): "
            "check its files, or use a model with an LM head"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {folder}: the weights lack {missing[0]!r} ({len(missing)} tensors in all), "
            "which would be random: use a complete causal LM, LM head included"
        )
    return model


def attention(config: Any) -> dict[str, str]:
    """Arguments of from_pretrained for a model that cannot use its default attention.

    SDPA kernels ignore the soft-capping of attention scores (Gemma-2); eager attention applies it.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def _warn_of_emulation(dtype: str) -> None:
    has = {name for name, value in torch.cpu.get_capabilities().items() if value}
    if dtype in _ARITHMETIC and not has & _ARITHMETIC[dtype]:
        print(
            f"warning: dtype = {dtype!r}: this processor has no {dtype} arithmetic, and its "
            "emulation can take many times as long as float32",
            file=sys.stderr,
        )


def _remote(trust_remote_code: bool) -> dict[str, bool]:
    return {"trust_remote_code": True} if trust_remote_code else {}


def find_device(name: str) -> torch.device:
    """Resolve a device name: auto, cpu, cuda, cuda:1 or mps.

    Raises: UserError when it is not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    kind, _, index = name.partition(":")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    known = not index or (index.isdecimal() and int(index) < there)
    if not available.get(kind, False) or not known:
        raise UserError(
            f"device = {name!r} is not available here: use auto, "
            f"{' or '.join(kind for kind, there in available.items() if there)}"
        )
    return torch.device(name)


def _causal_names() -> set[str]:
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return names


def length_limit(config: Any, max_length: int | None) -> int:
    """Maximum tokens of a text: `max_length`; None: 2,048, or the model's limit if that is lower.

    Raises: UserError when `max_length` exceeds the model's limit.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    # Beyond the original length, these rotary embeddings depend on the longest sequence of a batch,
    # so that a response's state would depend on the other responses in its batch.
    rope = getattr(config, "rope_parameters", None) or {}
    varies = rope.get("rope_type") in ("dynamic", "longrope")
    original = rope.get("original_max_position_embeddings") or limit
    if max_length is None:
        return min(_MAX_LENGTH, limit or _MAX_LENGTH, (varies and original) or _MAX_LENGTH)
    if limit is not None and max_length > limit:
        raise UserError(
            f"max_length = {max_length} exceeds the model's {limit} positions: "
            f"set max_length to {limit} or less"
        )
    if varies and original and max_length > original:
        raise UserError(
            f"max_length = {max_length}: beyond {original} tokens this model's "
            f"{rope['rope_type']} positions depend on the batch: "
            f"set max_length to {original} or less"
        )
    return max_length
