"""The bank: agreement with torch.optim and scikit-learn, and runs independent of other slots."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from strict_process import strict_process

from embrm.core.errors import UserError
from embrm.training import order as order_module
from embrm.training import row_store
from embrm.training.adamw import AdamW, rate
from embrm.training.bank import train
from embrm.training.curve import TrainedRun
from embrm.training.data import TrainingData
from embrm.training.heads import HeadSpec, score_states
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore
from embrm.training.spec import TrainSpec

MLP = HeadSpec(kind="mlp", widths=(9, 5), dropout=0.2)


@pytest.fixture(scope="module")
def strict() -> Iterator[Callable[..., Any]]:
    with strict_process() as call:
        yield call


def _data(
    n: int = 200, width: int = 6, validation: int = 50, seed: int = 0, dtype: Any = torch.float32
) -> TrainingData:
    random = np.random.default_rng(seed)
    responses = n + validation
    states = random.standard_normal((responses, width)).astype(np.float32)
    gold = states @ random.standard_normal(width)

    def pairs(count: int) -> Pairs:
        a, b = random.integers(0, responses, (2, count))
        wins = random.random(count) < 1 / (1 + np.exp(gold[b] - gold[a]))
        return Pairs(
            chosen=torch.from_numpy(np.where(wins, a, b)),
            rejected=torch.from_numpy(np.where(wins, b, a)),
            label=torch.ones(count),
            weight=torch.ones(count),
            margin=torch.from_numpy(random.random(count, np.float32)),
        )

    return TrainingData(RowStore(torch.from_numpy(states).to(dtype)), pairs(n), pairs(validation))


def _rewards(result: TrainedRun, data: TrainingData) -> torch.Tensor:
    rows = torch.arange(len(data.states.values))
    return score_states(result.parameters, result.preprocess, data.states, rows)[0]


def _bits(result: TrainedRun) -> Any:
    weights = {name: t.numpy().tobytes() for name, t in result.parameters.items()}
    return weights, result.curve, result.best_epoch, result.diverged


def test_adamw_is_torch_optim_step_by_step() -> None:
    rates, decays = (1e-2, 3e-4, 0.5), (0.0, 0.1, 0.01)
    betas = ((0.9, 0.999), (0.5, 0.9), (0.0, 0.99))
    start = [torch.randn(3, 4, 5), torch.randn(3, 7)]
    bank = [tensor.clone() for tensor in start]
    optimizer = AdamW(bank)
    references = []
    for slot in range(3):
        own = [tensor[slot].clone().requires_grad_() for tensor in start]
        references.append(
            (own, torch.optim.AdamW(own, lr=1.0, betas=betas[slot], weight_decay=decays[slot]))
        )
    for step in range(50):
        factor = 1 / (1 + step)
        gradients = [torch.randn_like(tensor) * 10.0 ** (step % 7 - 3) for tensor in bank]
        optimizer.step(
            gradients, rates=[rate * factor for rate in rates], betas=betas, decays=decays
        )
        for slot, (own, reference) in enumerate(references):
            reference.param_groups[0]["lr"] = rates[slot] * factor
            for tensor, gradient in zip(own, gradients, strict=True):
                tensor.grad = gradient[slot].clone()
            reference.step()
            for tensor, together in zip(own, bank, strict=True):
                torch.testing.assert_close(together[slot], tensor.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("l2", [0.003, 0.1])
def test_linear_bt_with_l2_is_sklearn_logistic_regression(l2: float) -> None:
    data = _data(n=800, width=8)
    spec = TrainSpec(l2=l2, lr=0.05, epochs=800, batch_pairs=10_000, schedule="cosine")
    [result] = train([spec], replace(data, validation=_none()))
    weights = result.parameters["output.weight"][0].double().numpy()
    differences = (
        data.states.values[data.train.chosen] - data.states.values[data.train.rejected]
    ).numpy()
    signs = np.where(np.arange(len(differences)) % 2, 1, -1)  # mirrored, so both classes occur
    reference = LogisticRegression(
        C=1 / (l2 * len(differences)), fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(differences * signs[:, None], signs)
    expected = reference.coef_[0]
    assert np.linalg.norm(weights - expected) <= 1e-3 * np.linalg.norm(expected)
    assert ((differences @ weights > 0) == (differences @ expected > 0)).all()


def _none() -> Pairs:
    empty = torch.empty(0, dtype=torch.int64)
    return Pairs(empty, empty, torch.empty(0), torch.empty(0), None)


_objectives = st.one_of(
    st.fixed_dictionaries({"loss": st.sampled_from(["bt", "hinge"]), "margin": st.floats(0, 2)}),
    st.fixed_dictionaries({"loss": st.just("bt"), "margin_scale": st.floats(0.1, 2)}),
    st.fixed_dictionaries(
        {
            "loss": st.sampled_from(["bt", "logitnorm", "bt_dr", "classifier"]),
            "label_smoothing": st.sampled_from([0.0, 0.1, 0.3]),
        }
    ),
)
_runs = st.builds(
    dict,
    objective=_objectives,
    bsr=st.sampled_from([0.0, 0.001, 0.1]),
    centering=st.sampled_from([0.0, 0.01]),
    l2=st.sampled_from([0.0, 0.01]),
    lr=st.floats(1e-4, 0.3),
    weight_decay=st.sampled_from([0.0, 0.1]),
    epochs=st.integers(1, 5),
    patience=st.none() | st.integers(1, 2),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.sampled_from([0.0, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.8, 0.95)]),
)


def _spec(run: dict[str, Any], **shared: Any) -> TrainSpec:
    fields = {key: value for key, value in run.items() if key != "objective"}
    return TrainSpec.parse({**fields, **run["objective"], **shared}, "test")


def _packs_bits(packs: Sequence[Sequence[TrainSpec]], data: TrainingData) -> list[list[Any]]:
    return [[_bits(result) for result in train(pack, data)] for pack in packs]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(_runs, min_size=2, max_size=9),
    order=st.permutations(range(9)),
    head=st.sampled_from([HeadSpec(), MLP]),
    preprocess=st.sampled_from(["none", "center", "standardize"]),
    batch=st.sampled_from([16, 33, 64, 500]),
    width=st.integers(2, 40),
    seed=st.integers(0, 5),
    soft=st.booleans(),
)
def test_a_run_has_the_same_bits_alone_and_in_any_pack(
    strict: Callable[..., Any],
    runs: list[dict[str, Any]],
    order: list[int],
    head: HeadSpec,
    preprocess: str,
    batch: int,
    width: int,
    seed: int,
    soft: bool,
) -> None:
    data = _data(n=130, width=width, validation=23, seed=seed, dtype=torch.bfloat16)
    if soft:
        label = torch.linspace(0, 1, len(data.train))
        data = replace(data, train=replace(data.train, label=label))
    shared = {"head": head, "preprocess": preprocess, "batch_pairs": batch, "seed": seed}
    pack = [_spec(run, **shared) for run in runs]
    some = [slot for slot in order if slot < len(pack)][:-1]
    packs = [pack, [pack[0]], [pack[slot] for slot in some]]
    together, alone, shuffled = strict(_packs_bits, packs, data)
    assert alone == together[:1]
    assert shuffled == [together[slot] for slot in some]


def _streamed_bits(
    pack: Sequence[TrainSpec], data: TrainingData, path: Path, residents: Sequence[int | None]
) -> list[list[Any]]:
    """Bits with states in memory, then from files with these limits on the bytes kept in memory."""
    row_store.BLOCK_BYTES, order_module.WINDOW_BLOCKS = 1024, 3
    values = data.states.values
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    shape = (values.shape[0], values.shape[1])
    states = [RowStore.of_file(path, shape, values.dtype, resident=size) for size in residents]
    return _packs_bits([pack], data) + [
        _packs_bits([pack], replace(data, states=own))[0] for own in states
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(_runs, min_size=1, max_size=4),
    head=st.sampled_from([HeadSpec(), MLP]),
    preprocess=st.sampled_from(["none", "center", "standardize"]),
    batch=st.sampled_from([16, 33, 500]),
    width=st.integers(2, 40),
    resident=st.sampled_from([1, 200_000, 1 << 30]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_streamed_or_in_memory_a_run_has_the_same_bits(
    strict: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[dict[str, Any]],
    head: HeadSpec,
    preprocess: str,
    batch: int,
    width: int,
    resident: int,
    dtype: torch.dtype,
) -> None:
    data = _data(n=130, width=width, validation=23, dtype=dtype)
    pack = [_spec(run, head=head, preprocess=preprocess, batch_pairs=batch) for run in runs]
    path = tmp_path_factory.mktemp("streamed") / "states"
    memory, *streamed = strict(_streamed_bits, pack, data, path, [None, resident])
    assert streamed == [memory, memory]


def test_a_bank_may_have_more_slots_than_are_measured_at_a_time(strict: Callable[..., Any]) -> None:
    pack = [TrainSpec(lr=0.001 * (1 + index), epochs=2, batch_pairs=64) for index in range(40)]
    chosen = (0, 5, 31, 32, 39)
    together, *alone = strict(_packs_bits, [pack, *([pack[i]] for i in chosen)], _data())
    assert alone == [[together[index]] for index in chosen]


def test_preprocessing_is_fitted_again_for_other_pairs() -> None:
    data = _data()
    first = data.preprocess("center")
    assert data.preprocess("center") is first
    fewer = replace(data, train=_data(n=20).train).preprocess("center")
    assert first.mean is not None
    assert fewer.mean is not None
    assert not torch.equal(first.mean, fewer.mean)


def test_without_strict_numerics_a_pack_agrees_within_rounding() -> None:
    data = _data()
    pack = [
        TrainSpec(lr=0.003, epochs=3, batch_pairs=33, loss=loss)
        for loss in ("bt", "hinge", "logitnorm", "bt_dr", "classifier")
    ]
    for spec, together in zip(pack, train(pack, data), strict=True):
        [alone] = train([spec], data)
        torch.testing.assert_close(
            together.parameters["output.weight"],
            alone.parameters["output.weight"],
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_best_epoch_is_kept_and_patience_stops() -> None:
    data = _data(n=40, width=30, validation=200)  # overfits at once
    spec = TrainSpec(lr=0.1, epochs=40, batch_pairs=10)
    [full] = train([spec], data)
    nlls = [row["validation_nll"] for row in full.curve]
    assert full.best_epoch == 1 + int(np.argmin(nlls))
    assert full.best_epoch < 40 == len(full.curve)
    [stopped] = train([spec.model_copy(update={"patience": 3})], data)
    worse = next(
        epoch
        for epoch in range(3, 40)
        if min(nlls[: epoch - 3 + 1]) <= min(nlls[epoch - 3 + 1 : epoch + 1])
    )
    assert len(stopped.curve) == worse + 1
    assert stopped.curve == full.curve[: worse + 1]
    # The weights kept are those of the best epoch: a run that ends there has them.
    shorter = spec.model_copy(update={"epochs": full.best_epoch})
    [ended] = train([shorter], data)
    assert _bits(ended)[0] == _bits(full)[0]
    r = _rewards(full, data).double()
    delta = r[data.validation.chosen] - r[data.validation.rejected]
    assert torch.nn.functional.softplus(-delta).mean() == pytest.approx(min(nlls), rel=1e-5)


def test_without_validation_the_last_epoch_is_kept() -> None:
    data = _data()
    [result] = train([TrainSpec(epochs=3)], replace(data, validation=_none()))
    assert result.best_epoch == 3
    assert [row["validation_nll"] for row in result.curve] == [None] * 3


def test_validation_pairs_never_train() -> None:
    data = _data()
    other = replace(data, validation=_data(seed=9).validation)
    spec = TrainSpec(epochs=3, batch_pairs=32)
    first, second = (train([spec], d)[0].curve for d in (data, other))
    assert [row["train_loss"] for row in first] == [row["train_loss"] for row in second]
    assert [row["validation_nll"] for row in first] != [row["validation_nll"] for row in second]


def test_a_diverged_run_is_reported_and_does_not_affect_other_slots(
    strict: Callable[..., Any],
) -> None:
    calm, wild = TrainSpec(epochs=3), TrainSpec(epochs=3, lr=1e38)
    together, alone = strict(_packs_bits, [[wild, calm, wild], [calm]], _data())
    weights, curve, best_epoch, diverged = together[0]
    assert (weights, len(curve), best_epoch, diverged) == ({}, 1, 0, 1)
    assert together[1] == alone[0]


def _full_batch(data: TrainingData, **fields: Any) -> torch.Tensor:
    spec = TrainSpec(epochs=5, batch_pairs=10_000, lr=0.05, **fields)
    [result] = train([spec], replace(data, validation=_none()))
    return result.parameters["output.weight"]


def test_a_weight_of_two_equals_giving_the_pair_twice() -> None:
    data = _data(n=30)
    weight = torch.ones(30)
    weight[:10] = 2
    weighted = replace(data, train=replace(data.train, weight=weight))
    rows = torch.cat([torch.arange(30), torch.arange(10)])
    names = ("chosen", "rejected", "label", "weight", "margin")
    twice = replace(data, train=Pairs(**{n: getattr(data.train, n)[rows] for n in names}))
    torch.testing.assert_close(_full_batch(weighted), _full_batch(twice), rtol=1e-4, atol=1e-5)
    # and the scale of all weights does not matter
    scaled = replace(data, train=replace(data.train, weight=7 * weight))
    torch.testing.assert_close(_full_batch(weighted), _full_batch(scaled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["bt", "hinge", "logitnorm", "bt_dr", "classifier"])
def test_a_label_of_zero_equals_swapping_the_pair(loss: str) -> None:
    data = _data(n=30)
    swapped = replace(
        data.train,
        chosen=data.train.rejected,
        rejected=data.train.chosen,
        label=torch.zeros(30),
    )
    torch.testing.assert_close(
        _full_batch(data, loss=loss),
        _full_batch(replace(data, train=swapped), loss=loss),
        rtol=1e-4,
        atol=1e-5,
    )


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not() -> None:
    data = _data()
    first, again, other = (
        train([TrainSpec(epochs=2, batch_pairs=32, seed=seed)], data)[0] for seed in (0, 0, 1)
    )
    assert _bits(first) == _bits(again)
    assert _bits(first)[0] != _bits(other)[0]


def test_weight_decay_and_l2_shrink() -> None:
    data = _data()
    norms = [
        float(_full_batch(data, **extra).norm())
        for extra in ({}, {"weight_decay": 1.0}, {"l2": 1.0})
    ]
    assert norms[1] < norms[0]
    assert norms[2] < norms[0]


def test_schedules_in_closed_form() -> None:
    constant = TrainSpec(lr=0.5)
    cosine = TrainSpec(lr=0.5, schedule="cosine")
    linear = TrainSpec(lr=0.5, schedule="linear", warmup=0.2)
    assert [rate(constant, step, 10) for step in (0, 9)] == [0.5, 0.5]
    assert [rate(cosine, step, 10) for step in (0, 5, 10)] == pytest.approx([0.5, 0.25, 0.0])
    assert [rate(linear, step, 10) for step in (0, 1, 2, 6)] == pytest.approx(
        [0.25, 0.5, 0.5, 0.25]
    )
    assert rate(cosine, 99, 10) == pytest.approx(0.0)  # whatever is asked after the end


def test_the_curve_records_steps_and_validation_metrics() -> None:
    data = _data(n=100)
    [result] = train([TrainSpec(epochs=2, batch_pairs=30)], data)
    assert [row["step"] for row in result.curve] == [4, 8]
    last = result.curve[-1]
    r = _rewards(result, data)
    pairs = data.validation
    right = (r[pairs.chosen] > r[pairs.rejected]).double().mean()
    seen = r[torch.cat([pairs.chosen, pairs.rejected]).unique()].double()
    assert result.best_epoch == 2
    assert last["validation_accuracy"] == pytest.approx(float(right))
    assert last["reward_mean"] == pytest.approx(float(seen.mean()), rel=1e-5)
    assert last["reward_sd"] == pytest.approx(float(seen.std(correction=0)), rel=1e-5)
    assert last["weight_norm"] == pytest.approx(float(result.parameters["output.weight"].norm()))
    assert last.pop("regularizer") is None
    assert all(math.isfinite(value) for value in last.values())


def test_missing_margins_and_pairs_are_refused() -> None:
    data = _data()
    without = replace(data, train=replace(data.train, margin=None))
    with pytest.raises(UserError, match="some training pairs have no margin"):
        train([TrainSpec(margin_scale=1.0)], without)
    with pytest.raises(UserError, match="no pair is kept for validation"):
        train([TrainSpec(patience=2)], replace(data, validation=_none()))
    with pytest.raises(UserError, match="no training pairs"):
        train([TrainSpec()], replace(data, train=_none()))
    with pytest.raises(ValueError, match="share"):
        train([TrainSpec(seed=0), TrainSpec(seed=1)], data)


def test_smoothed_labels_in_closed_form() -> None:
    """If the head hardly changes, Δ is constant, and labels approach sigmoid(Δ) geometrically."""
    data, beta = _data(), 0.3
    runs = [TrainSpec(lr=1e-12, epochs=4, data_smoothing=b, seed=1) for b in (beta, 0.9)]
    pairs = data.train
    for spec, result in zip(runs, train(runs, data), strict=True):
        rewards = _rewards(result, data).double()
        delta = rewards[pairs.chosen] - rewards[pairs.rejected]
        said, y = delta.sigmoid(), torch.ones(len(pairs), dtype=torch.float64)
        for point in result.curve:
            loss = -(y * said.log() + (1 - y) * (1 - said).log()).mean()
            assert point["train_loss"] == pytest.approx(float(loss), rel=1e-5)
            y = (1 - spec.data_smoothing) * y + spec.data_smoothing * said


def test_smoothed_labels_depend_on_each_runs_own_head() -> None:
    """After training, wrong labels have moved more than right ones."""
    data = _data(n=400)
    flipped = torch.arange(400) % 4 == 0
    noisy = replace(data, train=replace(data.train, label=1 - flipped.float()))
    plain, smoothed = (
        train([TrainSpec(lr=0.02, epochs=20, batch_pairs=64, data_smoothing=b)], noisy)[0]
        for b in (0.0, 0.3)
    )
    assert smoothed.curve[0]["train_loss"] == plain.curve[0]["train_loss"]
    assert smoothed.curve[-1]["train_loss"] != plain.curve[-1]["train_loss"]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(_runs, min_size=2, max_size=9),
    betas=st.lists(st.sampled_from([0.05, 0.5, 0.9]), min_size=9, max_size=9),
    head=st.sampled_from([HeadSpec(), MLP]),
    batch=st.sampled_from([16, 33, 500]),
)
def test_smoothed_runs_have_the_same_bits_alone_and_in_a_pack(
    strict: Callable[..., Any],
    runs: list[dict[str, Any]],
    betas: list[float],
    head: HeadSpec,
    batch: int,
) -> None:
    shared = {"head": head, "batch_pairs": batch, "seed": 1}
    pack = [
        _spec(run, data_smoothing=beta, **shared) for run, beta in zip(runs, betas, strict=False)
    ]
    together, first, turned = strict(_packs_bits, [pack, pack[:1], pack[::-1]], _data())
    assert first == together[:1]
    assert turned == together[::-1]


def test_smoothed_runs_have_packs_of_their_own_and_take_no_regularizer() -> None:
    assert TrainSpec().pack_key() != TrainSpec(data_smoothing=0.1).pack_key()
    assert "data_smoothing" not in TrainSpec().model_dump()
    adapted = {"kind": "linear", "adapter": {"kind": "low-rank"}}
    with pytest.raises(UserError, match="data_smoothing with a regularizer"):
        TrainSpec.parse(
            {"data_smoothing": 0.1, "head": adapted, "regularizer": {"kind": "grm-sft"}}, "test"
        )
