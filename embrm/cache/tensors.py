"""Converts the arrays of a cache to torch tensors that share their memory, and back."""

import safetensors.torch
import torch
from torch import Tensor

from embrm.cache.reader import Cache
from embrm.cache.schema import STORAGE, Stored


def to_tensor(vectors: Stored) -> Tensor:
    """Stored vectors as a tensor without a copy; uint16 bits become bfloat16."""
    tensor = torch.from_numpy(vectors)
    return tensor.view(torch.bfloat16) if vectors.dtype == STORAGE["bfloat16"] else tensor


def to_stored(tensor: Tensor) -> Stored:
    """A float32, bfloat16 or float16 tensor as stored vectors, without a copy on the CPU."""
    bfloat16 = tensor.dtype == torch.bfloat16
    stored: Stored = (tensor.view(torch.uint16) if bfloat16 else tensor).numpy(force=True)
    return stored


def torch_dtype(cache: Cache) -> torch.dtype:
    """The type of a cache's states: float32, bfloat16 or float16."""
    dtype: torch.dtype = getattr(torch, cache.dtype)
    return dtype


def lm_head_tensors(cache: Cache) -> dict[str, Tensor]:
    """The tensors of the LM head, with the names of `LmHead.tensors`.

    Empty in an adopted cache. Raises: UserError when the file is missing or damaged.
    """
    return safetensors.torch.load(cache.lm_head_bytes())


def lm_head_content(tensors: dict[str, Tensor]) -> bytes:
    """The safetensors file that stores these tensors."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
