"""A policy optimised against a reward model: TRL's RLOO on the demo's language model, on the CPU.

At step 0 and every few steps the policy answers held-out prompts. Every answer is recorded with:

    gold    the world's gold reward of the text, without its end token
    proxy   the reward model's reward of it
    kl      Σ_t KL(π(·|prompt, answer before t) ‖ π_ref(·|the same)), exact over the vocabulary; its
            mean over sampled answers is an unbiased estimate of the KL between whole answers

`world.gold` is defined for any text: an answer without a well-formed sentence earns nothing for
being right, for form or for work, and pays for its words; the empty answer has gold 0. An answer
that is cut off at `most_tokens` is graded as it is, and the reward model sees it with an end token,
because TRL renders it so.

RLOO: arXiv 2402.14740. The reward is proxy/sd - beta·KL. Dividing by sd, the proxy's standard
deviation over the reference policy's answers, optimises reward models of different scale alike.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from embrm.core.errors import UserError
from embrm.core.files import disk_errors, sha256, write_atomic, write_bytes
from embrm.core.progress import Progress
from embrm.core.specs import content_id
from embrm.demo.responses import grade

MARKER = "embrm-policy.json"
"""Written last, so a folder that has this file has a finished policy of the settings in it."""

OPTIMISATION_VERSION = "0.3.0"
"""The release since which the same settings give the same policy. Raise it when that changes."""


@dataclass(frozen=True)
class PolicyRecipe:
    """How a policy is optimised and evaluated. The defaults are the demo's."""

    steps: int = 24
    every: int = 4
    """Steps between evaluations on the held-out prompts."""
    prompts: int = 16
    """Prompts a step."""
    answers: int = 4
    """Answers sampled for each prompt; the others are the baseline of each."""
    lr: float = 1e-3
    beta: float = 0.03
    """Penalty for a nat of KL, in standard deviations of the proxy over the reference's answers."""
    most_tokens: int = 48
    """Largest number of tokens of an answer."""
    held_out_answers: int = 2
    """Answers sampled for each held-out prompt."""


@dataclass(frozen=True)
class PromptSets:
    """Prompts of the world that policies are trained on, and those that they are evaluated on."""

    train: Sequence[str]
    held_out: Sequence[str]


def train_policy(
    out: Path,
    lm: Path,
    reward: Path,
    prompts: PromptSets,
    recipe: PolicyRecipe,
    seed: int,
    bar: Progress,
) -> pl.DataFrame:
    """Optimise the model in `lm` against the reward model in `reward` and save it in `out`.

    All three are folders that transformers can load. A finished `out` is kept as it is. `bar`
    advances by one a step.

    Returns one row for each evaluated step and answer: step, prompt, sample, tokens (with the end
    token, unless the answer was cut off), text, gold, its parts (right, work, form, polite,
    words), proxy, kl.
    Raises UserError if `out` holds a policy of other settings.
    """
    identity = content_id(
        {
            "embrm": OPTIMISATION_VERSION,
            "recipe": asdict(recipe),
            "seed": seed,
            "asked": asdict(prompts),
            "lm": sha256(lm / "model.safetensors"),
            "reward": sha256(reward / "model.safetensors"),
        }
    )
    marker, table = out / MARKER, out / "answers.parquet"
    if marker.exists():
        if json.loads(marker.read_text())["identity"] != identity:
            raise UserError(f"{out} holds a policy of other settings: delete the folder")
        bar.advance(recipe.steps)
        return pl.read_parquet(table)
    policy, answers = _optimise(out, lm, reward, prompts, recipe, seed, bar)
    with disk_errors(out):
        policy.save_pretrained(out)
        write_atomic(table, answers.write_parquet)
    write_bytes(marker, json.dumps({"identity": identity}).encode())
    return answers


def _optimise(
    out: Path,
    lm: Path,
    reward: Path,
    prompts: PromptSets,
    recipe: PolicyRecipe,
    seed: int,
    bar: Progress,
) -> tuple[Any, pl.DataFrame]:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from transformers.utils import logging
    from trl import RLOOConfig, RLOOTrainer

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    policy = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(lm, padding_side="left")
    evaluator = _Evaluator(
        tokenizer=tokenizer,
        reference=AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval(),
        reward=AutoModelForSequenceClassification.from_pretrained(reward).eval(),
        prompts=prompts.held_out,
        recipe=recipe,
        seed=seed,
    )
    evaluations = [evaluator.evaluate(policy, 0)]

    class Evaluate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            bar.advance()
            if state.global_step % recipe.every == 0:
                evaluations.append(evaluator.evaluate(policy, state.global_step))

    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=str(reward),
        args=RLOOConfig(
            output_dir=str(out),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.prompts * recipe.answers,
            num_generations=recipe.answers,
            max_completion_length=recipe.most_tokens,
            learning_rate=recipe.lr,
            lr_scheduler_type="constant",
            beta=recipe.beta,
            reward_weights=[1.0 / float(np.std(evaluations[0]["proxy"].to_numpy()))],
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [[_user(text)] for text in prompts.train]}),
        processing_class=tokenizer,
        callbacks=[Evaluate()],
    )
    with contextlib.redirect_stdout(None):  # hides the trainer's summary
        trainer.train()
    return policy, pl.concat(evaluations)


@dataclass(frozen=True)
class _Evaluator:
    """Samples a policy's answers to the held-out prompts, always with the same random numbers."""

    tokenizer: Any
    reference: Any
    reward: Any
    prompts: Sequence[str]
    recipe: PolicyRecipe
    seed: int

    @torch.inference_mode()
    def evaluate(self, policy: Any, step: int) -> pl.DataFrame:
        """The rows of `train_policy` for one step. The trainer's random state is not changed."""
        was_training = policy.training
        policy.eval()
        prompts = [text for text in self.prompts for _ in range(self.recipe.held_out_answers)]
        asked = self._tokens(
            [self._chat([_user(text)], add_generation_prompt=True) for text in prompts], "left"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            ids = policy.generate(
                **asked,
                max_new_tokens=self.recipe.most_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        answers = ids[:, asked["input_ids"].shape[1] :]
        ended = (answers == self.tokenizer.eos_token_id).long()
        kept = ended.cumsum(1) - ended == 0  # up to and including the first end token
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        grades = [grade(*pair) for pair in zip(prompts, texts, strict=True)]
        rows = pl.DataFrame(
            {
                "step": [step] * len(prompts),
                "prompt": prompts,
                "sample": [*range(self.recipe.held_out_answers)] * len(self.prompts),
                "tokens": [row[mask].tolist() for row, mask in zip(answers, kept, strict=True)],
                "text": texts,
                "gold": [each.gold for each in grades],
                **{
                    part: [float(getattr(each, part)) for each in grades]
                    for part in ("right", "work", "form", "polite", "words")
                },
                "proxy": self._proxy(prompts, texts).tolist(),
                "kl": self._kl(policy, ids, asked["attention_mask"], kept).tolist(),
            }
        )
        policy.train(was_training)
        return rows

    def _proxy(self, prompts: Sequence[str], texts: Sequence[str]) -> Tensor:
        """Rewards, float64 [answers], of texts rendered and padded (right) as TRL does it."""
        rendered = [
            self._chat([_user(prompt), {"role": "assistant", "content": text}])
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        logits: Tensor = self.reward(**self._tokens(rendered, "right")).logits
        return logits[:, 0].double()

    def _kl(self, policy: Any, ids: Tensor, asked: Tensor, kept: Tensor) -> Tensor:
        """KL of each answer, float64 [answers].

        ids: int64 [answers, prompt + answer]. asked: attention mask of the prompts, [answers,
        prompt]. kept: which tokens belong to the answer, bool [answers, answer].
        """
        mask = torch.cat([asked, kept.long()], dim=1)
        places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        ours, theirs = (
            model(input_ids=ids, **places).logits[:, asked.shape[1] - 1 : -1].log_softmax(-1)
            for model in (policy, self.reference)
        )
        return ((ours.exp() * (ours - theirs)).sum(-1).double() * kept).sum(1)

    def _chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _tokens(self, texts: list[str], side: str) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            texts,
            padding=True,
            padding_side=side,
            add_special_tokens=False,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return dict(tokens)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
