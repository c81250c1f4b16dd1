"""A causal language model with a reward head, which is trained, stored and loaded again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from embrm.core.errors import UserError
from embrm.finetuning.dropout import apply_masks, switch_off_dropout
from embrm.finetuning.spec import LoraSpec, Tune
from embrm.lm.head import LmHead
from embrm.lm.likelihood import log_probabilities
from embrm.results.weights import load_saved_model
from embrm.training.heads import HeadSpec, Parameters, initialise, rewards

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class HeadModule(nn.Module):
    """The parameters of one reward head of `embrm.training.heads`, as a torch module."""

    def __init__(self, parameters: Parameters) -> None:
        """parameters: a bank of one slot, each tensor [1, ...]. Names keep their dots."""
        super().__init__()
        for name, tensor in parameters.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(tensor[0]))

    def bank(self) -> Parameters:
        """Return the parameters as a bank of one slot."""
        return {name: tensor[None] for name, tensor in self.named_parameters()}

    def forward(self, states: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        """Return rewards float32 [n] of states float32 [n, d]; kept: as in `heads.rewards`."""
        return rewards(self.bank(), states, kept)[0]


class RewardModel(nn.Module):
    """A backbone, and a reward head on its state at the final position of a text.

    For GRM the LM head is kept too, which gives S, the log-probability of the response.
    """

    def __init__(
        self,
        causal: Any,
        head: Parameters,
        *,
        tune: Tune = "frozen",
        lora: LoraSpec | None = None,
        with_S: bool = False,
    ) -> None:
        """causal: a transformers causal LM; its modules become this model's and are changed.

        tune: which weights are trained beside the head. with_S: whether S is wanted.
        """
        super().__init__()
        self.backbone = causal.base_model
        self.head = HeadModule(head)
        self.tune = tune
        own = LmHead.from_model(causal)
        self._scale, self._softcap = own.scale, own.softcap
        of_backbone = {id(parameter) for parameter in self.backbone.parameters()}
        # A tied weight belongs to the backbone and is read from there, so that it is in the state
        # dict once.
        self._tied = id(own.weight) in of_backbone
        self.lm_head = nn.ParameterDict()
        if with_S:
            found = {"weight": own.weight, "bias": own.bias}
            for name, tensor in found.items():
                if tensor is not None and id(tensor) not in of_backbone:
                    self.lm_head[name] = tensor
        self._embeddings = self.backbone.get_input_embeddings
        # accelerate shards these layers one by one, unless it is told which.
        self._no_split_modules = self.backbone._no_split_modules
        switch_off_dropout(self.backbone)
        self._masks: list[Tensor] = []
        self.sites = apply_masks(self._masks, self.backbone)
        self.backbone.requires_grad_(tune == "full")
        self.lm_head.requires_grad_(tune == "full")
        if tune == "lora":
            _add_lora(self.backbone, lora or LoraSpec())
        if tune == "frozen":
            self.backbone.eval()

    def train(self, mode: bool = True) -> "RewardModel":
        """Set training mode as for any module, but keep a frozen backbone in evaluation mode."""
        super().train(mode)
        if self.tune == "frozen":
            self.backbone.eval()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Switch gradient checkpointing on; transformers' Trainer calls this if asked to."""
        options = {name: options[name] for name in options if name.endswith("_kwargs")}
        self.backbone.gradient_checkpointing_enable(**options)

    def forward(
        self,
        ids: Tensor,
        final: Tensor,
        kept: Sequence[Tensor] = (),
        predicting: Tensor | None = None,
        targets: Tensor | None = None,
        counts: Sequence[int] = (),
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return rewards, log-probabilities S, the head's squared norm, and features of n texts.

        ids: int64 [n, length], padded on the right. final: int64 [n], the positions whose states
        the head reads. kept: the head's dropout masks. For S: predicting, int64 [t], places among
        all n·length states of those that predict the tokens targets, int64 [t]; counts: how many
        of these belong to each response. masks: float32 [sites, 2, n, d], for two views of every
        text; rewards and S are then those of the first view.

        Returns rewards float32 [n]; S float32 [len(counts)], or None without `predicting`;
        ‖parameters‖² of the head; and the states of both views float32 [2, n, d], or None without
        masks.

        No attention mask is passed: under causal attention padding on the right cannot change the
        positions before it.
        """
        # The masks stay until the next forward step: gradient checkpointing runs the layers again
        # in the backward step, and must drop the same components.
        self._masks[:] = () if masks is None else masks.flatten(1, 2)[:, :, None]
        if masks is not None:
            ids = ids.repeat(2, 1)
        if self.tune == "frozen":
            with torch.no_grad():
                states = self._states(ids)
        else:
            states = self._states(ids)
        places = torch.arange(len(final), device=ids.device)
        features = None
        if masks is not None:
            views = states.unflatten(0, (2, -1))
            features, states = views[:, places, final].float(), views[0]
        with torch.autocast(ids.device.type, enabled=False):
            # A copy, because fully_shard warns of outputs that are views.
            found = self.head(states[places, final].float(), kept).clone()
            squares = torch.stack([tensor.square().sum() for tensor in self.head.parameters()])
        S = None
        if predicting is not None and targets is not None:
            rows = states.flatten(0, 1)[predicting]
            each = log_probabilities(self._lm_head(), rows, targets)
            S = torch.stack([part.sum() for part in each.split([*counts])])
        return found, S, squares.sum(), features

    def pooled(self, ids: Tensor, final: Tensor) -> Tensor:
        """Return the states that the head reads, float32 [n, d]; arguments as of `forward`."""
        return self._states(ids)[torch.arange(len(final), device=ids.device), final].float()

    def stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that define the tuned model given its base model, in float32 on the
        CPU.

        state: the model's state dict, with whole weights if they are sharded.
        """
        tensors = {name: state[name][None] for name in state if name.startswith("head.")}
        if self.tune == "full":
            tensors |= {name: state[name] for name in state if name not in tensors}
        if self.tune == "lora":
            tensors |= {f"backbone.{name}": tensor for name, tensor in _merged(self.backbone)}
        return {
            name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()
        }

    def _states(self, ids: Tensor) -> Tensor:
        states: Tensor = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def _lm_head(self) -> LmHead:
        weight = self._embeddings().weight if self._tied else self.lm_head["weight"]
        bias = self.lm_head.get("bias")
        return LmHead(weight, bias, self._scale, self._softcap)


def new_model(
    causal: Any, head: HeadSpec, seed: int, tune: Tune, lora: LoraSpec, *, with_S: bool
) -> RewardModel:
    """Create the model that a run begins with; its head begins as in a sweep with this seed."""
    width = LmHead.from_model(causal).weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws LoRA's matrices from torch's own generator
        return RewardModel(
            causal, initialise(head, width, seed), tune=tune, lora=lora, with_S=with_S
        )


def load_tuned(path: Path, causal: Any) -> tuple[RewardModel, dict[str, Any]]:
    """Load a stored model for evaluation, with the header of its file.

    causal: the base model, in float32; it is changed.
    Raises: UserError when the file is damaged, or the weights are of another model.
    """
    saved = load_saved_model(path)
    model, whole = RewardModel(causal, saved.head), saved.header["tune"] == "full"
    try:
        found = model.backbone.load_state_dict(saved.backbone, strict=whole)
    except RuntimeError:
        found = None
    if found is None or found.unexpected_keys:
        raise UserError(f"{path} is not of this model: name the one that the cache was made with")
    return model.eval(), saved.header


def _add_lora(backbone: nn.Module, lora: LoraSpec) -> None:
    names = {name.rpartition(".")[2] for name, _ in backbone.named_modules()}
    unknown = sorted(set(lora.targets) - names)
    if unknown:
        raise UserError(
            f"lora.targets = {unknown[0]!r}: the model has no layer of this name: leave it out"
        )
    known = [name for name in _ATTENTION if name in names]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[*lora.targets] or known or "all-linear",
    )
    inject_adapter_in_model(config, backbone)


def _merged(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights that have adapters, merged with them, under their names in the base model."""
    return [
        (f"{name}.weight", module.get_base_layer().weight + module.get_delta_weight("default"))
        for name, module in backbone.named_modules()
        if isinstance(module, LoraLayer)
    ]
