"""Which configurations are fine-tuned, under which objective, and what is refused or left out."""

from pathlib import Path
from typing import Any

import pytest
from small_stage import small_stage

from embrm.core.errors import UserError
from embrm.finetuning.choice import Choice, choose, rank
from embrm.results.ledger import open_results

ADAPTER = {"kind": "linear", "adapter": {"kind": "low-rank", "width": 4}}
SPECS: dict[str, dict[str, Any]] = {
    "bt": {},
    "hinge": {"loss": "hinge"},
    "bsr[bsr=0.1,lr=0.1]": {"bsr": 0.1, "lr": 0.1, "batch_pairs": 64},
    "bt-lr": {"lr": 0.1, "epochs": 3},
    "std": {"preprocess": "standardize", "weight_decay": 0.5},
    "grm": {"head": ADAPTER, "regularizer": {"kind": "grm-sft", "alpha": 0.02, "token_rows": 4}},
    "grm-off": {"head": ADAPTER, "regularizer": {"kind": "grm-dpo", "alpha": 0.0}},
    "kl": {"head": ADAPTER, "regularizer": {"kind": "preserve-kl"}},
    "mean": {"state": "mean"},
    "three": {"members": 3},
    "mlp": {"head": {"kind": "mlp", "widths": [8], "dropout": 0.1}, "label_smoothing": 0.1},
    "noise": {"label_noise": 0.2, "pairs_limit": 500, "bsr": 0.1, "bsr_batch": 32},
    "gone": {},
}
SKILLS = {name: 0.9 - 0.03 * place for place, name in enumerate(SPECS)} | {"gone": None}
ORDER = tuple(name for name in SPECS if name != "gone")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_stage(tmp_path_factory.mktemp("choice") / "s", SKILLS, SPECS)


def chosen(folder: Path, wanted: str, rank_by: str | None = None) -> Choice:
    results = open_results(folder)
    return choose(results, rank(results, rank_by), wanted)


def names(choice: Choice) -> list[str]:
    return [match.name for match in choice.matches]


def test_ranks_as_the_report_does(sweep: Path) -> None:
    results = open_results(sweep)
    assert rank(results, None).names == ORDER
    assert rank(results, None).ranked_splits == ("id", "ood/far")
    assert rank(results, "ood").ranked_splits == ("ood/far",)
    with pytest.raises(UserError, match=r"rank_by \(--rank-by\) = \'odd\'"):
        rank(results, "odd")


def test_ranks_by_a_column_of_the_ledger_in_its_own_direction(sweep: Path) -> None:
    results = open_results(sweep)
    by_accuracy, by_nll = rank(results, "accuracy@id").names, rank(results, "nll@id").names
    assert by_accuracy == by_nll  # nll is 1.2 - accuracy there
    assert by_accuracy[0] == "bt"
    assert by_accuracy[-1] == "noise"
    with pytest.raises(UserError, match=r"did you mean 'nll@id'"):
        rank(results, "nlll@id")
    with pytest.raises(UserError, match="is no metric@split"):
        rank(results, "validation_accuracy@id")


def test_top_passes_over_what_cannot_be_tuned(sweep: Path) -> None:
    assert names(chosen(sweep, "top:4")) == list(ORDER[:4])
    able = [name for name in ORDER if name not in ("kl", "mean", "three")]
    assert names(chosen(sweep, "top:9")) == able
    assert [(entry.name, entry.rank) for entry in chosen(sweep, "top:4").excluded] == [
        ("kl", 8),
        ("mean", 9),
        ("three", 10),
    ]


def test_spread_is_even_in_rank_and_has_both_ends(sweep: Path) -> None:
    # of 9: bt hinge bsr bt-lr std grm grm-off mlp noise
    assert names(chosen(sweep, "spread:3")) == ["bt", "std", "noise"]
    assert names(chosen(sweep, "spread:9")) == names(chosen(sweep, "top:9"))


def test_random_ones_are_of_the_others_the_same_each_time_and_nest(sweep: Path) -> None:
    first = chosen(sweep, "random:2,top:3")
    assert names(first)[:3] == list(ORDER[:3])
    drawn = names(first)[3:]
    assert len(drawn) == 2
    assert set(drawn) < set(names(chosen(sweep, "top:3,random:4")))
    assert [match.by for match in first.matches] == ["top:3"] * 3 + ["random:2"] * 2


def test_names_hold_commas_and_two_reasons_are_both_told(sweep: Path) -> None:
    choice = chosen(sweep, " bsr[bsr=0.1,lr=0.1], baseline,top:1")
    assert names(choice) == ["bt", "bsr[bsr=0.1,lr=0.1]"]
    assert choice.matches[0].by == "baseline, top:1"


def test_the_objective_is_taken_over_and_the_optimisation_is_not(sweep: Path) -> None:
    choice = chosen(sweep, "baseline,hinge,bsr[bsr=0.1,lr=0.1],grm,mlp,noise")
    assert {run["name"]: {k: v for k, v in run.items() if k != "name"} for run in choice.runs} == {
        "bt": {},
        "hinge": {"loss": "hinge"},
        "bsr[bsr=0.1,lr=0.1]": {"bsr": 0.1, "bsr_batch": 64},  # λ·B_ref at any minibatch
        "grm": {"regularizer": {"kind": "grm-sft", "alpha": 0.02, "beta": 0.1}},
        "mlp": {
            "head": {"kind": "mlp", "widths": [8], "dropout": 0.1},
            "label_smoothing": 0.1,
        },
        "noise": {"label_noise": 0.2, "pairs_limit": 500, "bsr": 0.1, "bsr_batch": 32},
    }


def test_a_minibatch_larger_than_the_data_was_the_data(tmp_path: Path) -> None:
    folder = small_stage(
        tmp_path / "s", {"bt": 0.6, "bsr": 0.7}, {"bsr": {"bsr": 0.1}}, train_pairs=100
    )
    assert chosen(folder, "top:2").runs[0]["bsr_batch"] == 100


def test_equal_objectives_are_tuned_once_under_the_baselines_or_the_better_name(
    sweep: Path,
) -> None:
    choice = chosen(sweep, "bt-lr,std,grm-off,hinge,baseline")
    assert {match.name: match.full for match in choice.matches} == {
        "bt": "bt",
        "hinge": "hinge",
        "bt-lr": "bt",
        "std": "bt",
        "grm-off": "bt",
    }
    assert [run["name"] for run in choice.runs] == ["bt", "hinge"]
    left = {match.name: match.left for match in choice.matches}
    assert left["std"] == ("preprocess = standardize", "weight_decay = 0.5")
    assert left["grm-off"] == ("adapter low-rank 4",)
    assert left["bt"] == ()


def test_the_baselines_name_wins_over_a_better_copy(tmp_path: Path) -> None:
    folder = small_stage(
        tmp_path / "s",
        {"better": 0.8, "bt": 0.6, "hinge": 0.5},
        {"better": {"lr": 0.1}, "hinge": {"loss": "hinge"}},
    )
    choice = chosen(folder, "top:3")
    assert [match.full for match in choice.matches] == ["bt", "bt", "hinge"]
    assert choice.baseline == "bt"


def test_what_was_named_and_cannot_be_tuned_is_listed(sweep: Path) -> None:
    choice = chosen(sweep, "top:2,mean")
    assert names(choice) == ["bt", "hinge"]
    reasons = {entry.name: entry.reason for entry in choice.excluded}
    assert reasons == {
        "kl": "regularizer 'preserve-kl' is of frozen states",
        "mean": "state = 'mean': a fine-tune reads the last position",
        "three": "members = 3: a fine-tune is of one model",
    }


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("top:4,hinje", "'hinje' is no configuration of .*: did you mean 'hinge'"),
        ("top:4,", "'' is no configuration"),
        ("top:0", "'top:0': write a number of at least 1, such as top:4"),
        ("random:x,top:1", "'random:x': write a number"),
        ("top:10", "'top:10', and 9 can be fine-tuned: lower it"),
        ("random:9,baseline", "'random:9', and 8 can be fine-tuned: lower it"),
        ("gone,baseline", "'gone' has no run that ended well"),
        ("hinge,grm", "leaves out 'bt', which gains are measured from: add baseline"),
        ("baseline", "comes to one objective to fine-tune"),
        ("baseline,bt-lr,mean", "one objective .*; mean: state = 'mean'"),
    ],
)
def test_wrong_choices_are_one_line(sweep: Path, wanted: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        chosen(sweep, wanted)
    assert "\n" not in str(error.value)


def test_a_baseline_that_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    folder = small_stage(
        tmp_path / "s", {"mean": 0.6, "bt": 0.7}, {"mean": {"state": "mean"}}, baseline="mean"
    )
    with pytest.raises(UserError, match="baseline 'mean' cannot be fine-tuned: state = 'mean'"):
        chosen(folder, "top:1,baseline")
