"""A reward model on disk: loaded as any user would load it, and asked for the rewards of texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from embrm.core.errors import UserError, nearest
from embrm.exports.model import has_linear_score, quiet
from embrm.exports.modeling_embrm import EmbrmRewardModel
from embrm.lm.loading import attention, find_device, length_limit
from embrm.lm.tokens import Encoded, TokenPolicy, load_tokenizer, reason_of, token_policy

_DTYPES = ("float32", "bfloat16", "float16")

_CLASSIFIERS = ("ForSequenceClassification", EmbrmRewardModel.__name__)

Side = Literal["left", "right"]


@dataclass(frozen=True)
class ExportedModel:
    """A sequence classifier with one label, and its tokenizer. Create it with `load_exported`."""

    model: Any
    tokenizer: Any
    policy: TokenPolicy
    """How texts become tokens: as for the run's cache, or as another model's tokenizer says."""
    offset: float
    """The reward is the logit minus this offset."""

    @torch.inference_mode()
    def rewards(
        self,
        texts: Sequence[Encoded],
        batches: Sequence[Sequence[int]],
        side: Side = "right",
        *,
        position_ids: bool = False,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Tensor:
        """Return the rewards float32 [n] of texts.

        batches: the texts' indices, batch by batch. side: the side that a batch is padded on.
        position_ids: whether to pass each token's place in its own text. advance: called with the
        number of tokens of each finished batch.
        Raises: UserError when the device has no memory for a batch.
        """
        out = torch.full((len(texts),), torch.nan)
        for batch in batches:
            own = [texts[index] for index in batch]
            inputs = self._inputs(own, side, position_ids)
            try:
                logits = self.model(**inputs, use_cache=False).logits[:, 0]
            except torch.OutOfMemoryError:
                raise UserError(
                    f"out of memory on {self.model.device} with a batch of "
                    f"{inputs['input_ids'].numel():,} tokens: lower batch_tokens (--batch-tokens)"
                ) from None
            out[list(batch)] = logits.float().cpu() - self.offset
            advance(sum(len(text.ids) for text in own))
        return out

    def _inputs(self, texts: Sequence[Encoded], side: Side, position_ids: bool) -> dict[str, Any]:
        length = max(len(text.ids) for text in texts)
        ids = np.full((len(texts), length), self.policy.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, there, text in zip(ids, mask, texts, strict=True):
            own = slice(length - len(text.ids), None) if side == "left" else slice(len(text.ids))
            row[own] = text.ids
            there[own] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if position_ids:
            inputs["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        if getattr(self.model.config, "pooling", None) == "mean":
            inputs["prompt_tokens"] = np.array([text.n_prompt for text in texts])
        return {
            name: torch.from_numpy(values).to(self.model.device) for name, values in inputs.items()
        }


def load_exported(folder: Path, *, dtype: str | None = None, device: str = "auto") -> ExportedModel:
    """Load a folder that embrm export wrote, or any other sequence classifier with one label.

    dtype: float32, bfloat16 or float16; None: the one it was saved in. No code of the folder runs.

    Raises: UserError when it is not a reward model, is damaged, or has no pad token.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype (--dtype) = {dtype!r}: {nearest(dtype, _DTYPES)}")
    chosen = find_device(device)
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **here)
        text = config.get_text_config()
        kinds = getattr(config, "architectures", None) or []
        if kinds and not any(kind.endswith(_CLASSIFIERS) for kind in kinds):
            raise UserError(
                f"model {folder} is a {', '.join(kinds)}, which gives no reward: name a reward "
                "model, or RESULTS_FOLDER:RUN"
            )
        if config.num_labels != 1:
            raise UserError(
                f"model {folder} has {config.num_labels} labels: a reward model has one"
            )
        if text.pad_token_id is None:
            raise UserError(
                f"model {folder}: its config.json has no pad_token_id, so the position it pools is "
                "undefined in a batch: set pad_token_id there to the token it was trained with"
            )
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                **here,
                **({"dtype": getattr(torch, dtype)} if dtype else {}),
                **({} if config._attn_implementation else attention(config)),
            )
        model = model.to(chosen).eval()
    except torch.OutOfMemoryError:
        raise UserError(
            f"model {folder} does not fit on {chosen}: use dtype = 'bfloat16' (--dtype bfloat16)"
        ) from None
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for files it cannot use
        raise UserError(
            f"model {folder} cannot be loaded as a reward model ({reason_of(error)}): name a "
            "folder of embrm export, a sequence classifier with one label, or RESULTS_FOLDER:RUN"
        ) from None
    if not isinstance(model, EmbrmRewardModel) and not has_linear_score(model):
        raise UserError(
            f"model {folder}: {type(model).__name__} has another head than a linear one on the "
            "last token, and how it wants its text is not known here: use its own code"
        )
    if info["missing_keys"]:
        raise UserError(
            f"model {folder}: the weights lack {min(info['missing_keys'])!r}, which would be "
            "random: it is no trained reward model"
        )
    tokenizer = load_tokenizer(folder)
    about = getattr(config, "embrm", None) or {}
    policy = token_policy(
        tokenizer,
        template=about.get("template", "auto"),
        max_length=about.get("max_length") or length_limit(config, None),
        truncation=about.get("truncation", "drop"),
        pad_token=tokenizer.convert_ids_to_tokens(text.pad_token_id),
        allow_pad_eos=True,
    )
    return ExportedModel(
        model, tokenizer, replace(policy, pad=text.pad_token_id), about.get("offset", 0.0)
    )
