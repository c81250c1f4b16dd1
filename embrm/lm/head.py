"""The LM head: from final hidden states to logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LmHead:
    """The map from post-norm states to logits: softcap·tanh(scale·(W h + b) / softcap).

    weight: [V, d]; bias: [V] or None; scale: Cohere's logit_scale, 1 / Granite's logits_scaling,
    Falcon-H1's lm_head_multiplier, otherwise 1; softcap: Gemma-2's final_logit_softcapping
    (arXiv 2408.00118, section 2) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_model(cls, model: Any) -> "LmHead":
        """The head of a transformers causal LM, tied or not. The engine checks that it fits."""
        config = model.config.get_text_config()
        output = model.get_output_embeddings()
        scale = 1.0
        if config.model_type.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        elif config.model_type.startswith("cohere"):
            scale = config.logit_scale
        elif config.model_type == "falcon_h1":
            scale = config.lm_head_multiplier
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(output.weight, getattr(output, "bias", None), scale, softcap)

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits [n, V] of states [n, d]; the product is in the model's dtype."""
        logits = torch.nn.functional.linear(states, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slopes(self, logits: Tensor) -> Tensor | float:
        """∂z/∂(W h) of logits [n, V]: of the same shape, or one number without soft-capping."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """What a cache stores of the head: weight, scale, and bias and softcap where they exist."""
        stored = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            stored["bias"] = self.bias.detach().cpu().contiguous()
        stored["scale"] = torch.tensor([self.scale], dtype=torch.float32)
        if self.softcap is not None:
            stored["softcap"] = torch.tensor([self.softcap], dtype=torch.float32)
        return stored
