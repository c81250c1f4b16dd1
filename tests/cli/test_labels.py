"""The label commands end to end: members, strengths, remedies, and a sweep that uses them."""

import json
from collections.abc import Callable
from pathlib import Path

from command_line import Outcome
from toy_groups import toy_groups

from embrm.data.label_tables import read_label_table
from embrm.sweeps.prepare import prepare_sweep

SPEC = """
baseline = "bt"
seeds = [0, 1]
scenarios = { splits = ["train", "more"], models = 0.4 }
defaults = { epochs = 5, batch_pairs = 64, lr = 0.03, label_noise = 0.2 }
[[runs]]
name = "bt"
"""

REMEDIED = """
[[runs]]
name = "remedied"
label_noise = 0.0
margin_scale = 1.0
"""


def test_from_members_to_a_sweep_with_remedied_labels(
    embrm: Callable[..., Outcome], tmp_path: Path
) -> None:
    cache, spec = toy_groups(tmp_path / "cache"), tmp_path / "s.toml"
    spec.write_text(SPEC)
    assert embrm("sweep", spec, "--cache", cache, "--jobs", 1)[0] == 0
    strength, remedy = tmp_path / "strength.parquet", tmp_path / "remedy.parquet"
    code, said, _ = embrm("labels", "strength", tmp_path / "s", "bt", "--out", strength)
    assert code == 0
    assert "rule: strength in sample" in said
    assert "decile" in said
    # What was flipped is what the heads find weak: the lowest fifth is mostly wrong, the top right.
    shown = json.loads(embrm("labels", "show", strength, "--json")[1])
    right = [tenth["right"] for tenth in shown["deciles"]]
    assert right[0] < 0.2 < 0.9 < right[9]
    code, said, _ = embrm("labels", "show", strength, "--out", tmp_path / "page")
    assert code == 0
    assert f"wrote {tmp_path / 'page' / 'strength.md'}" in said
    assert f"# {strength.stem}\n" in (tmp_path / "page" / "strength.md").read_text()
    code, said, _ = embrm(
        "labels", "remedy", strength, "--flip", "0:0.2", "--margin", "0:1", "--out", remedy
    )
    assert code == 0
    assert "flip: 0.0, 0.2" in said
    # The better response is always chosen: a label of 1 is right.
    before, after = (
        read_label_table(strength, "strengths").rows,
        read_label_table(remedy, "labels").rows,
    )
    assert (after["label"] == 1).sum() > (before["label"] == 1).sum()
    spec.write_text(SPEC + REMEDIED + f'labels = "{remedy}"')
    assert len(prepare_sweep(spec, cache, None).runs) == 4

    made = tmp_path / "annotated.parquet"
    code, said, _ = embrm(
        "labels", "annotate", spec, "--cache", cache, "--quality", 1, "--out", made
    )
    assert code == 0
    assert "of the labels wrong" in said
    assert f'"quality": {1.0}' in embrm("labels", "show", made, "--json")[1]

    wrong = {
        ("remedy", strength, "--flip", "0.1", "--out", remedy): "--flip '0.1': write LOW:HIGH",
        ("remedy", strength, "--flip", "1:0", "--out", remedy): "a range is [from, to]",
        ("remedy", strength, "--out", remedy): "a remedy needs an operation: give flip",
        ("remedy", remedy, "--drop", "0:1", "--out", remedy): "holds labels, not strengths",
        ("remedy", strength, "--drop", "0:1", "--out", tmp_path / "x.csv"): "is a Parquet file",
        ("strength", tmp_path / "s", "bsr", "--out", strength): "no 'bsr' in",
        ("strength", tmp_path / "none", "bt", "--out", strength): "no sweep results in",
        ("show", tmp_path / "none.parquet"): "no label table at",
        ("show", remedy, "--out", tmp_path / "page"): "holds labels, not strengths",
        ("annotate", spec, "--quality", "-1", "--cache", cache, "--out", made): "at least 0",
    }
    for words, line in wrong.items():
        code, _, error = embrm("labels", *words)
        assert code == 2, words
        assert line in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
