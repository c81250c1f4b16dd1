"""MetaRM: the gradient of a step is that at θ', taken by hand; what is drawn and refused."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from small_finetune import BT, with_groups, written
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.core.errors import UserError
from embrm.finetuning.batches import pad_texts
from embrm.finetuning.inputs import FinetuneInputs, read_inputs
from embrm.finetuning.meta import MetaSpec, UnlabelledGroups, discrimination, group_rows
from embrm.finetuning.model import RewardModel, new_model
from embrm.finetuning.run import finetune
from embrm.finetuning.spec import FinetuneSpec
from embrm.finetuning.trainer import RewardTrainer
from embrm.lm.loading import load_model
from embrm.sweeps.material import to_pairs
from embrm.sweeps.selection import select

ETA = 0.5
STEPS = """
[defaults]
epochs = 2
batch_pairs = 8
pairs_limit = 8
lr = 0.01
[[runs]]
name = "bt"
metarm = { split = "far", eta = 0.5, responses = 3, prompts = 4 }
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_groups(tmp_path_factory.mktemp("world"))


def test_discrimination_is_the_formula() -> None:
    r = torch.tensor([[1.0, -0.5, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    k = 4
    for row, found in zip(r.numpy(), discrimination(r).tolist(), strict=True):
        expected = 0.0
        for i in range(k):
            for j in range(i + 1, k):
                expected += 2 / k**2 / (1 + np.exp(-abs(row[i] - row[j])))
        assert found == pytest.approx(expected, rel=1e-12)
    assert float(discrimination(r)[1]) == pytest.approx((k - 1) / (2 * k))


def _by_hand(model: RewardModel, inputs: FinetuneInputs, step: int) -> list[Tensor]:
    """∇L at θ' of what is trained of `model`, whose weights are θ, and become θ'."""
    encoded, members = inputs.texts.encoded, inputs.cache.members
    far = members.filter(pl.col("split") == "far")
    rows = [
        np.sort(group["response"].to_numpy().astype(np.int64))
        for _, group in sorted(far.group_by("prompt_id"))
        if len(group) >= 3
    ]
    assert len(rows) == 5
    asked = MetaSpec(split="far", eta=ETA, responses=3)
    theta = [own for own in model.parameters() if own.requires_grad]
    J = torch.zeros(())
    for drawn in UnlabelledGroups(asked, rows, 0).draw(step):
        r = [model(**pad_texts([encoded[row]]))[0][0] for row in drawn]
        for i in range(3):
            for j in range(i + 1, 3):
                J = J + 2 / 9 * torch.sigmoid(torch.abs(r[i] - r[j])) / 4
    ahead = torch.autograd.grad(J, theta, allow_unused=True)
    with torch.no_grad():
        for weight, up in zip(theta, ahead, strict=True):
            if up is not None:
                assert up.norm() > 0 or model.tune == "lora"
                weight += ETA * up
    pairs = to_pairs(select(inputs.cache, inputs.selection)[0].head(8))
    won, lost = (
        model(**pad_texts([encoded[row] for row in rows.tolist()]))[0]
        for rows in (pairs.chosen, pairs.rejected)
    )
    delta = won - lost
    loss = -(pairs.label * logsigmoid(delta) + (1 - pairs.label) * logsigmoid(-delta))
    (pairs.weight / pairs.weight.mean() * loss).mean().backward()
    return [torch.zeros_like(own) if own.grad is None else own.grad for own in theta]


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
def test_a_step_is_the_one_by_hand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str
) -> None:
    seen: list[tuple[dict[str, Tensor], list[Tensor]]] = []
    end_step = RewardTrainer.end_step

    def noted(self: RewardTrainer) -> None:
        end_step(self)
        model: Any = self.model
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = [own for own in model.parameters() if own.requires_grad]
        grads = [torch.zeros_like(own) if own.grad is None else own.grad for own in trained]
        seen.append((state, [gradient.clone() for gradient in grads]))

    monkeypatch.setattr(RewardTrainer, "end_step", noted)
    spec = written(tmp_path / "meta.toml", STEPS, tune=tune, micro_pairs=4, max_grad_norm=0)
    finetune(spec, cache, device="cpu")
    assert len(seen) == 2
    asked = FinetuneSpec.parse({"baseline": "bt", "runs": [{"name": "bt"}]}, "test")
    causal = load_model(cache.parent / "model", dtype="float32", device="cpu")
    inputs = read_inputs(spec, cache)
    head = inputs.runs[0].spec.head
    model = new_model(causal, head, 0, tune, asked.lora, with_S=False).train()
    start = model.state_dict()
    # θ itself is where it was before the first step.
    assert all(torch.equal(seen[0][0][name], start[name]) for name in start)
    for step, (state, gradients) in enumerate(seen):
        model.load_state_dict(state)
        model.zero_grad()
        expected = _by_hand(model, inputs, step)
        whole = torch.cat([gradient.flatten() for gradient in expected]).norm()
        for found, gradient in zip(gradients, expected, strict=True):
            assert (found - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * whole


def test_what_is_drawn_depends_on_seed_and_step_alone() -> None:
    asked = MetaSpec(split="far", eta=1.0, responses=3, prompts=4)
    rows = [np.arange(10 * n, 10 * n + 3 + n) for n in range(6)]
    groups = UnlabelledGroups(asked, rows, 0)
    drawn = [groups.draw(step) for step in range(50)]
    for one in drawn:
        assert one.shape == (4, 3)
        assert len(set((one // 10)[:, 0])) == 4
        assert all(len(set(group)) == 3 and len(set(group // 10)) == 1 for group in one.tolist()
                   for group in [np.array(group)])  # fmt: skip
    assert {*np.concatenate(drawn).ravel().tolist()} == {*np.concatenate(rows).tolist()}
    assert np.array_equal(UnlabelledGroups(asked, rows, 0).draw(7), drawn[7])
    assert not np.array_equal(UnlabelledGroups(asked, rows, 1).draw(7), drawn[7])


def test_groups_are_of_distinct_responses_and_without_gold() -> None:
    members = pl.DataFrame(
        {
            "split": ["far"] * 6 + ["other"] * 2,
            "prompt_id": ["b", "b", "b", "a", "a", "b", "a", "b"],
            "response": [5, 3, 5, 1, 0, 4, 7, 8],
        }
    )
    asked = MetaSpec(split="far", eta=1.0, responses=2, prompts=2)
    assert [rows.tolist() for rows in group_rows(members, asked, ["train"])] == [[0, 1], [3, 4, 5]]


def test_what_is_wrong_is_said_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = BT + 'metarm = {{ split = "{}", eta = 0.1{} }}\n'
    for text, message in (
        (table.format("train", ""), "run 'bt': metarm.split = 'train' is trained on: name another"),
        (table.format("id", ""), "metarm.split = 'id' has no groups, .*valid: far"),
        (table.format("fra", ""), "metarm.split = 'fra' has no groups, .*did you mean 'far'"),
        (table.format("far", ", responses = 5"), r"0 of 6 prompts of 'far' have .*\(at most 4\)"),
        (table.format("far", ", prompts = 6"), "metarm.prompts = 6, and 5 of 6 prompts of 'far'"),
        (table.format("far", ", responses = 1"), "metarm.responses"),
        (BT + 'metarm = { split = "far" }\n', "metarm.eta"),
        (table.format("far", "").replace("0.1", "0.0"), "metarm.eta"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            read_inputs(written(tmp_path / "wrong.toml", text), cache)
        assert "\n" not in str(raised.value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"run 'bt': metarm with FSDP: .*launch it without"):
        read_inputs(written(tmp_path / "sharded.toml", table.format("far", "")), cache)
