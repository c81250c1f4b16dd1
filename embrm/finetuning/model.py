"""A causal language model with a reward head: what is trained, stored and read again."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from embrm.core.errors import UserError
from embrm.finetuning.spec import LoraSpec, Tune
from embrm.lm.head import LmHead
from embrm.lm.likelihood import log_probabilities
from embrm.sweeps.ledger import MODEL_FORMAT
from embrm.training.heads import HeadSpec, Parameters, initialise, rewards

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Head(nn.Module):
    """A reward head of `embrm.training.heads`, one slot of a bank."""

    def __init__(self, parameters: Parameters) -> None:
        """parameters: each [1, ...], of a head without an adapter."""
        super().__init__()
        layers = sum(name.startswith("hidden.") for name in parameters) // 2

        def of(layer: str, *names: str) -> nn.ParameterDict:
            return nn.ParameterDict({name: parameters[f"{layer}.{name}"][0] for name in names})

        self.hidden = nn.ModuleList(of(f"hidden.{i}", "weight", "bias") for i in range(layers))
        self.output = of("output", "weight")

    def bank(self) -> Parameters:
        """The parameters as a bank of one slot."""
        return {name: tensor[None] for name, tensor in self.named_parameters()}

    def forward(self, states: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
        """Rewards float32 [n] of states [n, d]; kept: see `heads.rewards`."""
        return rewards(self.bank(), states, kept)[0]


class RewardModel(nn.Module):
    """backbone → state of the final position → head; for GRM also backbone → LM head → S."""

    def __init__(
        self,
        causal: Any,
        head: Parameters,
        *,
        tune: Tune = "frozen",
        lora: LoraSpec | None = None,
        with_S: bool = False,
    ) -> None:
        """causal: a transformers causal LM, whose modules are used and changed.

        tune: what is trained beside the head. with_S: whether log-probabilities are wanted.
        """
        super().__init__()
        self.backbone = causal.base_model
        self.head = Head(head)
        self.tune = tune
        own = LmHead.from_model(causal)
        self._scale, self._softcap = own.scale, own.softcap
        of_backbone = {id(parameter) for parameter in self.backbone.parameters()}
        # A tied weight is the backbone's: read through it, so that a state dict has it once.
        self._tied = id(own.weight) in of_backbone
        self.lm_head = nn.ParameterDict()
        if with_S:
            found = {"weight": own.weight, "bias": own.bias}
            for name, tensor in found.items():
                if tensor is not None and id(tensor) not in of_backbone:
                    self.lm_head[name] = tensor
        self._embeddings = self.backbone.get_input_embeddings
        # The layers that accelerate shards one by one, if it is not told which.
        self._no_split_modules = self.backbone._no_split_modules
        _switch_off_dropout(self.backbone)
        self._masks: list[Tensor] = []
        self.sites = _drop_by(self._masks, self.backbone)
        self.backbone.requires_grad_(tune == "full")
        self.lm_head.requires_grad_(tune == "full")
        if tune == "lora":
            _add_lora(self.backbone, lora or LoraSpec())
        if tune == "frozen":
            self.backbone.eval()

    def train(self, mode: bool = True) -> "RewardModel":
        """As of any module; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.tune == "frozen":
            self.backbone.eval()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """What transformers' Trainer calls where it is asked for."""
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
        """Of n texts int64 [n, length], padded on the right: their rewards float32 [n]; log-
        probabilities float32 [len(counts)], where asked for; the head's ‖parameters‖²; and with
        masks float32 [sites, 2, n, d] the pooled states of two views float32 [2, n, d], of which
        rewards and log-probabilities are the first's.

        final: int64 [n], the positions that are pooled. kept: dropout masks of the head. counts:
        how many of predicting and targets are each response's; predicting: int64 [t], places among
        all n·length states, of those that predict the tokens targets int64 [t].

        No mask is passed: see `TransformersEngine.hidden`.
        """
        # Kept until the next forward step: gradient checkpointing drops again, and alike.
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
            # No view, of which fully_shard warns.
            found = self.head(states[places, final].float(), kept).clone()
            squares = torch.stack([tensor.square().sum() for tensor in self.head.parameters()])
        S = None
        if predicting is not None and targets is not None:
            rows = states.flatten(0, 1)[predicting]
            each = log_probabilities(self._lm_head(), rows, targets)
            S = torch.stack([part.sum() for part in each.split([*counts])])
        return found, S, squares.sum(), features

    def pooled(self, ids: Tensor, final: Tensor) -> Tensor:
        """The states that the head reads, float32 [n, d]: see `forward`."""
        return self._states(ids)[torch.arange(len(final), device=ids.device), final].float()

    def stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What defines the tuned model beside its base: float32 tensors on the CPU.

        state: its state dict, gathered where its weights are sharded.
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
    """The model that a run begins with; the head's weights are those of a sweep's run."""
    width = LmHead.from_model(causal).weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of LoRA's matrices
        return RewardModel(
            causal, initialise(head, width, seed), tune=tune, lora=lora, with_S=with_S
        )


def load_tuned(path: Path, causal: Any) -> tuple[RewardModel, dict[str, Any]]:
    """A stored model for evaluation, and its header; causal: the base model, in float32.

    Raises: UserError when the file is damaged, or of another model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["embrm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is missing or damaged: delete it and its parts folder, and run embrm finetune "
            "again"
        ) from None
    if header["format"] != MODEL_FORMAT:
        raise UserError(
            f"{path} has format {header['format']!r}: this embrm reads {MODEL_FORMAT!r}"
        )

    def of(part: str) -> dict[str, Tensor]:
        return {name[len(part) :]: tensors[name] for name in tensors if name.startswith(part)}

    model = RewardModel(causal, of("head."))
    try:
        found = model.backbone.load_state_dict(of("backbone."), strict=header["tune"] == "full")
    except RuntimeError:
        found = None
    if found is None or found.unexpected_keys:
        raise UserError(f"{path} is not of this model: name the one that the cache was made with")
    return model.eval(), header


def _switch_off_dropout(backbone: nn.Module) -> None:
    """Dropout is a module's, or a number that attention reads."""
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _drop_by(masks: list[Tensor], backbone: nn.Module) -> int:
    """Have the backbone drop by masks [rows, 1, d], one a site, while there are any in the list:
    x₀ → x₀·m₀, of what enters the first layer, and xₗ → xₗ₋₁ + (xₗ - xₗ₋₁)·mₗ, of what a layer
    adds. The same for every architecture; returns the number of sites, 0 where it has no layers.
    """

    def entering(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0] * masks[0], *args[1:]) if masks else None

    def added(site: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not masks:
            return None
        after, *rest = output if isinstance(output, tuple) else (output,)
        after = args[0] + (after - args[0]) * masks[site]
        return (after, *rest) if isinstance(output, tuple) else after

    layers = [own for own in backbone.modules() if isinstance(own, GradientCheckpointingLayer)]
    for site, layer in enumerate(layers, start=1):
        layer.register_forward_hook(partial(added, site))
    if layers:
        layers[0].register_forward_pre_hook(entering)
        return len(layers) + 1
    return 0


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
    """Weights that adapters have changed, under the names they had before."""
    return [
        (f"{name}.weight", module.get_base_layer().weight + module.get_delta_weight("default"))
        for name, module in backbone.named_modules()
        if isinstance(module, LoraLayer)
    ]
