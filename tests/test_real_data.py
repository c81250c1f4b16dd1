"""On real preference data and a small real LM, where ../shared lies beside the checkout."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer

from embrm.cache.reader import Cache, open_cache
from embrm.cache.tensors import to_tensor
from embrm.extraction.probe import probe
from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec
from embrm.sweeps.material import to_pairs
from embrm.sweeps.selection import select
from embrm.sweeps.spec import RunSpec, Selection
from embrm.training.bank import train
from embrm.training.data import TrainingData
from embrm.training.row_store import RowStore


@pytest.fixture(scope="module")
def cache(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    data = shared / "data"
    spec = ExtractSpec.parse(
        {
            "model": str(shared / "models" / "lab-lm"),
            "data": [
                {"path": str(data / "hh_rlhf_test/pairs.parquet"), "split": "train", "limit": 150},
                {"path": str(data / "hhh_alignment/pairs.parquet"), "split": "ood", "limit": 30},
            ],
            "max_length": 512,
            "truncation": "left",
            "states": ["last", "mean"],
        },
        "test",
    )
    return open_cache(extract(spec, tmp_path_factory.mktemp("real") / "cache", device="cpu"))


def test_linear_bt_with_l2_is_scikit_learns_logistic_regression(cache: Cache) -> None:
    l2 = 0.01
    training, validation = select(cache, Selection(cache.cache_id, ("train",), 0.0))
    states = to_tensor(cache.stored_states("mean"))
    differences = (states[training["chosen"]] - states[training["rejected"]]).double().numpy()
    n = len(differences)
    sign = np.where(np.arange(n) % 2, 1, -1)  # scikit-learn wants both classes
    oracle = LogisticRegression(fit_intercept=False, C=1 / (l2 * n), tol=1e-10, max_iter=10_000)
    expected = oracle.fit(differences * sign[:, None], sign).coef_[0]
    run = RunSpec(l2=l2, lr=0.02, epochs=3000, batch_pairs=n, schedule="cosine")
    [trained] = train(
        [run], TrainingData(RowStore(states), to_pairs(training), to_pairs(validation))
    )
    [weight] = trained.parameters.values()
    found = weight.flatten().double().numpy()
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    assert ((differences @ found > 0) == (differences @ expected > 0)).all()


def test_states_and_s_are_those_of_a_plain_forward(cache: Cache, shared: Path) -> None:
    folder = shared / "models" / "lab-lm"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = pl.read_parquet(shared / "data/hhh_alignment/pairs.parquet")
    pair = cache.pairs.filter(pl.col("split") == "ood").row(0, named=True)
    row = data.row(pair["row"], named=True)
    for side in ("chosen", "rejected"):
        index = pair[side]
        prompt = [{"role": "user", "content": row["prompt"]}]
        turns = [*prompt, {"role": "assistant", "content": row[side]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        n_prompt = len(tokenizer(opening, add_special_tokens=False).input_ids)
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        logp = out.logits[0, :-1].double().log_softmax(-1)
        S = logp.gather(1, ids[0, 1:, None])[n_prompt - 1 :].sum().item()
        assert cache.responses["S"][index] == pytest.approx(S, rel=1e-4)
        state = out.hidden_states[-1][0, -1]
        torch.testing.assert_close(
            to_tensor(cache.stored_states("last"))[index], state, rtol=1e-4, atol=1e-4
        )


def test_batch_size_changes_nothing_beyond_the_tolerance(cache: Cache) -> None:
    result = probe(cache.folder, sample=32, device="cpu")
    assert result.within_tolerance
    assert all(entry.orders_changed == 0 for entry in result.deviations)
