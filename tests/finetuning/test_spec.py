"""The spec of a fine-tune: the ids of its runs."""

from typing import Any

from embrm.finetuning.spec import FinetuneRun, FinetuneSpec
from embrm.sweeps.spec import RunSpec, Selection, configurations, identified


def ids(**fields: Any) -> str:
    values = {"baseline": "bt", "runs": [{"name": "bt"}], "micro_pairs": 4} | fields
    spec = FinetuneSpec.parse(values, "test")
    found = configurations(spec, "test")
    selection = Selection("c", ("train",), 0.1)
    identity = spec.identity(found[0].spec)
    return identified(found, (0,), selection, identity)[0].run_id


def test_runs_have_the_ids_that_0_3_0_gave_them() -> None:
    """Or a fine-tune that it began would be trained again."""
    bsr = [{"name": "bt", "bsr": 0.1}]
    assert ids() == "ac683fe528d9baad"
    assert ids(tune="lora", runs=bsr, bsr_scope="micro") == "5a2b151bb1279ca6"
    assert ids(runs=[{"name": "bt", "simcse": {}}]) == "0d2e18a90206d228"


def test_ids_depend_on_what_changes_the_result() -> None:
    same = ids()
    for fields in ({"gradient_checkpointing": True}, {"save_steps": 7}, {"micro_pairs": 2}):
        assert ids(**fields) == same
    bsr = [{"name": "bt", "bsr": 0.1}]
    others = [
        ids(tune="lora"),
        ids(tune="lora", lora={"rank": 4}),
        ids(tune="frozen"),
        ids(dtype="bfloat16"),
        ids(max_grad_norm=0.5),
        ids(runs=bsr),
        ids(runs=bsr, bsr_scope="micro"),
        ids(runs=bsr, bsr_scope="micro", micro_pairs=2),
    ]
    assert len({same, *others}) == 9


def test_a_run_with_a_table_is_another_and_without_the_same() -> None:
    assert FinetuneRun().model_dump(mode="json") == RunSpec().model_dump(mode="json")
    assert "simcse" in FinetuneRun.parse({"simcse": {}}, "test").model_dump(mode="json")
