"""Policies against exported reward models, shrunken: the proxy rises, what is logged is true, work
is kept; and what is said about policies, against closed forms."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.demo.overoptimisation import PolicyCurves, curves, outcomes, verdict
from embrm.demo.policy import MARKER, PolicyRecipe, PromptSets, train_policy
from embrm.demo.responses import gold
from embrm.demo.rlhf import rlhf
from embrm.demo.tiny_lm import Recipe
from embrm.demo.world import World, prompts

WORLD = World(train_prompts=60, evaluation_prompts=24, group_prompts=12)
LM = Recipe(width=32, layers=1, heads=2, steps=60, batch=16, lr=0.01, warmup=5, held_out=16)
POLICY = PolicyRecipe(steps=6, every=3, prompts=6, answers=4, lr=0.01, beta=0.0, most_tokens=24)
DEMO = """
baseline = "bt"
seeds = [0]
[defaults]
epochs = 1
[[runs]]
name = "bt"
"""
HEADS = """
baseline = "bt"
seeds = [0, 1]
[defaults]
epochs = 5
[[runs]]
name = "bt"
[[runs]]
name = "l2"
l2 = 0.1
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rlhf") / "out"
    (out / "rlhf").mkdir(parents=True)
    (out / "demo.toml").write_text(DEMO)
    (out / "rlhf" / "heads.toml").write_text(HEADS)
    rlhf(out, WORLD, LM, POLICY)
    return out


@pytest.fixture(scope="module")
def answers(finished: Path) -> pl.DataFrame:
    return pl.read_parquet(finished / "rlhf" / "answers.parquet")


@pytest.mark.slow
def test_every_policy_raises_its_proxy(answers: pl.DataFrame) -> None:
    """On prompts it was not trained on: by half a standard deviation in six steps."""
    policies = answers.partition_by("name", "seed")
    assert len(policies) == 4
    for rows in policies:
        start, end = (rows.filter(pl.col("step") == step)["proxy"] for step in (0, POLICY.steps))
        assert end.mean() - start.mean() > 0.5 * start.std()  # type: ignore[operator]


@pytest.mark.slow
def test_gold_is_the_world_s_and_is_defined_for_any_text(answers: pl.DataFrame) -> None:
    assert answers["gold"].to_list() == [
        gold(prompt, text) for prompt, text in answers.select("prompt", "text").iter_rows()
    ]
    assert gold("sort c a b", "") == 0.0
    assert gold("sort c a b", "tick . pig pig . .") == pytest.approx(-0.03 * 6)
    # A mark is no part of an answer: the sentence then states another one.
    assert gold("sort c a b", "the answer is a b c .") == pytest.approx(1.5 + 0.75 - 0.21)
    assert gold("sort c a b", "the answer is a b c tick .") == pytest.approx(0.75 - 0.24)


@pytest.mark.slow
def test_proxy_and_kl_are_those_of_the_saved_models(finished: Path, answers: pl.DataFrame) -> None:
    """One answer at a time, by stock transformers, from the folders and the texts alone."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    ledger = pl.read_parquet(finished / "rlhf" / "heads" / "ledger.parquet")
    run_id, name, seed = ledger.select("run_id", "config", "seed").row(0)
    reward = finished / "rlhf" / "rewards" / run_id
    tokenizer = AutoTokenizer.from_pretrained(reward)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward)
    policy = AutoModelForCausalLM.from_pretrained(finished / "rlhf" / "policies" / run_id)
    reference = AutoModelForCausalLM.from_pretrained(finished / "lm")
    own = answers.filter(pl.col("name") == name, pl.col("seed") == seed)
    assert own.filter(pl.col("step") == 0)["kl"].abs().max() < 1e-9  # type: ignore[operator]
    last = own.filter(pl.col("step") == POLICY.steps)
    proxies, divergences = [], []
    for prompt, text, tokens in last.select("prompt", "text", "tokens").iter_rows():
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        asked = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )
        with torch.inference_mode():
            proxies.append(scorer(input_ids=whole).logits.item())
            ours, theirs = (
                model(input_ids=torch.tensor([asked + tokens]))
                .logits[0, len(asked) - 1 : -1]
                .log_softmax(-1)
                for model in (policy, reference)
            )
        divergences.append(float((ours.exp() * (ours - theirs)).sum()))
        ended = tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in tokens[:-1]
        assert ended or len(tokens) == POLICY.most_tokens
    assert last["proxy"].to_numpy() == pytest.approx(np.array(proxies), abs=1e-4)
    assert last["kl"].to_numpy() == pytest.approx(np.array(divergences), rel=1e-3)
    assert min(divergences) > 0.01


@pytest.mark.slow
def test_tables_and_figure_are_written(finished: Path) -> None:
    folder = finished / "rlhf"
    watched = pl.read_parquet(folder / "curves.parquet")
    assert watched["step"].unique().sort().to_list() == [0, 3, 6]
    assert watched.drop_nulls("low").height == 3 * 3 * 2  # steps, measures, heads
    for suffix in ("png", "svg"):
        assert (folder / "figures" / f"overoptimisation.{suffix}").stat().st_size > 5000


@pytest.mark.slow
def test_the_same_command_again_keeps_everything(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("embrm.demo.policy._optimise", None)  # optimising again would fail
    monkeypatch.setattr("embrm.demo.rlhf.write_model", None)
    before = {
        path: path.read_bytes()
        for path in (finished / "rlhf").rglob("*")
        if path.is_file() and path.name != "timings.parquet"
    }
    rlhf(finished, WORLD, LM, POLICY)
    assert {path: path.read_bytes() for path in before} == before
    assert "overoptimisation.png" in capsys.readouterr().out


def _train(out: Path, recipe: PolicyRecipe) -> tuple[Path, pl.DataFrame]:
    """The first policy of the finished demo once more, by itself."""
    ledger = pl.read_parquet(out / "rlhf" / "heads" / "ledger.parquet")
    run_id, seed = ledger.select("run_id", "seed").row(0)
    texts = {split: [text for _, text in asked] for split, asked in prompts(WORLD).items()}
    policy, reward = (out / "rlhf" / name / run_id for name in ("policies", "rewards"))
    with progress("policy", recipe.steps, "steps") as bar:
        sets = PromptSets(train=texts["train"], held_out=texts["id"])
        return policy, train_policy(policy, out / "lm", reward, sets, recipe, seed, bar)


@pytest.mark.slow
def test_an_unfinished_policy_is_made_again_and_alike(finished: Path) -> None:
    """A kill before the marker leaves a folder that nothing vouches for."""
    policy, before = _train(finished, POLICY)
    weights = policy / "model.safetensors"
    content = weights.read_bytes()
    (policy / MARKER).unlink()
    weights.write_bytes(b"half a file")
    assert _train(finished, POLICY)[1].equals(before)
    assert weights.read_bytes() == content


@pytest.mark.slow
def test_a_policy_of_other_settings_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="other settings: delete the folder"):
        _train(finished, replace(POLICY, beta=0.5))


def test_without_trl_one_line_and_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"needs TRL: pip install '\.\[finetune\]'"):
        rlhf(tmp_path / "out", WORLD, LM, POLICY)
    assert not (tmp_path / "out").exists()


def _answers(gold: np.ndarray, kl: np.ndarray) -> PolicyCurves:
    """gold, kl: float64 [steps, prompts, policies]; policies in pairs of seeds, bt first."""
    steps, prompts, policies = gold.shape
    names = [("bt", 0), ("bt", 1), ("robust", 0), ("robust", 1)][:policies]
    names += [(f"more {index}", 0) for index in range(4, policies)]
    return PolicyCurves(
        steps=[*range(steps)],
        prompts=[f"prompt {index}" for index in range(prompts)],
        policies=pl.DataFrame(names, schema=["name", "seed"], orient="row"),
        values={"gold": gold, "kl": kl, **dict.fromkeys(("proxy", "right", "words"), kl)},
    )


def _found(answers: PolicyCurves, measure: str) -> pl.DataFrame:
    return outcomes(answers, "bt").filter(pl.col("measure") == measure)


def test_outcomes_of_known_curves() -> None:
    """bt rises to 1 and falls to 0.4; robust rises half as fast per nat, and goes half as far."""
    bt, robust = [0.0, 1.0, 0.4], [0.0, 0.25, 0.5]
    ones = np.ones((3, 30, 2))
    curve = [np.array(values)[:, None, None] * ones for values in (bt, robust)]
    nats = [np.array(values)[:, None, None] * ones for values in ([0, 2, 4], [0, 1, 2])]
    made = _answers(np.concatenate(curve, axis=2), np.concatenate(nats, axis=2))
    assert _found(made, "gold")["estimate"].to_list() == pytest.approx([0.4, 0.5])
    assert _found(made, "fall")["estimate"].to_list() == pytest.approx([0.6, 0.0])
    # The least final KL is 2: there bt is at its best.
    assert _found(made, "gold_at_kl")["estimate"].to_list() == pytest.approx([1.0, 0.5])
    assert _found(made, "gold_at_kl")["difference"].to_list()[1] == pytest.approx(-0.5)
    said = verdict(outcomes(made, "bt"), "bt")
    assert "- bt: over-optimisation seen: gold falls by +0.60" in said
    assert "- robust: over-optimisation not seen" in said
    assert "- robust: above bt in gold at the last step: +0.10" in said
    assert "- robust: below bt in gold at the same KL: -0.50" in said
    assert curves(made, "bt").height == 3 * 3 * 2


def test_noise_alone_does_not_fall() -> None:
    """Best step and fall of the same prompts would differ by the best of five draws: about 0.18."""
    noise = np.random.default_rng(0).normal(size=(5, 40, 100))
    falls = _found(_answers(noise, np.ones_like(noise)), "fall")["estimate"].to_numpy()
    assert abs(falls.mean()) < 0.07
