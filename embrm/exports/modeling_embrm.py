"""A reward model made by embrm whose head is not a single linear layer on the last state.

The head may be an MLP, one with a nonlinear adapter, an ensemble, or one on the mean over the
response. This file is saved beside the weights and needs torch and transformers only:

    AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)

It reads the folder's config and safetensors, and runs nothing else. Its `logits` are rewards.
"""

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class EmbrmRewardConfig(PreTrainedConfig):
    """The config of an `EmbrmRewardModel`.

    backbone: the config of the language model. head: the shape of every parameter of the head.
    pooling: "last" or "mean". combine, penalty: how the members of an ensemble become one reward.
    """

    model_type = "embrm_reward"

    backbone: dict[str, Any] = field(default_factory=dict)
    head: dict[str, list[int]] = field(default_factory=dict)
    pooling: str = "last"
    combine: str = "mean"
    penalty: float = 0.5
    pad_token_id: int | None = None
    num_labels: int = 1


class RewardHead(nn.Module):
    """A reward head, or an ensemble of them: parameters [members, ...], named as in embrm.

    A state h becomes h' = (h - mean) / scale; with an adapter h' + up·down·h', or
    h' + up·ReLU(down·h' + b); hidden layers with ReLU follow; the reward is output·activations.
    The members' rewards r are averaged. Or they are standardized, z = (r - reference_mean) /
    reference_sd, and their min, mean - penalty·variance ("uwo") or mean - penalty·standard
    deviation ("lcb") is brought back to the members' mean scale and mean.
    """

    def __init__(
        self, shapes: dict[str, list[int]], combine: str = "mean", penalty: float = 0.5
    ) -> None:
        super().__init__()
        self.combine, self.penalty = combine, penalty
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def forward(self, states: Tensor) -> Tensor:
        """Return rewards float32 [n] of states [n, width] of any dtype."""
        own = dict(self.named_parameters())
        x = states.float()
        if "scale" in own:
            x = (x - own["mean"]) / own["scale"]
        x = x.expand(len(own["output_weight"]), *x.shape)
        if "adapter_up_weight" in own:
            inner = x @ own["adapter_down_weight"].mT
            if "adapter_down_bias" in own:
                inner = torch.relu(inner + own["adapter_down_bias"][:, None])
            x = x + inner @ own["adapter_up_weight"].mT
        for layer in range(sum(name.startswith("hidden_") for name in own) // 2):
            weight, bias = own[f"hidden_{layer}_weight"], own[f"hidden_{layer}_bias"]
            x = torch.relu(x @ weight.mT + bias[:, None])
        rewards = (x * own["output_weight"][:, None]).sum(-1)
        if self.combine == "mean":
            return rewards.mean(0)
        mean, sd = own["reference_mean"], own["reference_sd"]
        z = (rewards - mean[:, None]) / sd.where(sd > 0, 1.0)[:, None]
        if self.combine == "min":
            combined = z.amin(0)
        else:
            variance = z.var(0, correction=0)
            spread = variance if self.combine == "uwo" else variance.sqrt()
            combined = z.mean(0) - self.penalty * spread
        scale = sd.sum() / (sd > 0).sum().clamp(min=1)  # of the members that vary
        return mean.mean() + scale * combined


class EmbrmRewardModel(PreTrainedModel):
    """A language model without its LM head, and a reward head."""

    config_class = EmbrmRewardConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["head"]  # noqa: RUF012

    def __init__(self, config: EmbrmRewardConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(AutoConfig.for_model(**config.backbone))
        self.head = RewardHead(config.head, config.combine, config.penalty)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_tokens: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return the rewards of texts, padded on either side, as logits [batch, 1].

        input_ids, attention_mask: int64 [batch, length]. prompt_tokens: int64 [batch], how many
        tokens of each text, padding not counted, are the prompt. They are needed where
        config.pooling is "mean", because the mean is over the response only.
        """
        options.pop("labels", None)
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **options,
        ).last_hidden_state
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.config.pooling == "mean":
            if prompt_tokens is None:
                raise ValueError(
                    "this model pools the mean over the response: pass prompt_tokens=[...], the "
                    "number of prompt tokens of each text"
                )
            there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompt = torch.as_tensor(prompt_tokens, device=input_ids.device)[:, None]
            kept = ((there.cumsum(1) > prompt) & there.bool())[..., None]
            pooled = (states.float() * kept).sum(1) / kept.sum(1)
            pooled = pooled.to(states.dtype)
        else:
            last = (places * (input_ids != self.config.pad_token_id)).argmax(1)
            pooled = states[torch.arange(len(input_ids), device=input_ids.device), last]
        return SequenceClassifierOutputWithPast(logits=self.head(pooled)[:, None])
