"""The command line end to end on a tiny model: what works, and what bad input gets.

Every error is one line with the remedy and exit code 2, or a counted exclusion.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from command_line import Outcome, refused
from extract_models import save_model, tokenizer
from safetensors.torch import load_file, save_file

from embrm.cache.reader import open_cache

WORDS = [
    "river", "boat", "mud", "source", "year", "page", "answer", "question", "careful", "poor",
    "names", "repeats", "low",
]  # fmt: skip
SWEEP = """
baseline = "bt"
seeds = [0, 1]
validation = 0.25
[defaults]
epochs = 2
[[runs]]
name = "bt"
[[runs]]
name = "bsr"
grid = { bsr = [0.001, 0.1] }
"""


def write_pairs(path: Path, prompts: int, seed: int = 0) -> Path:
    rows = [
        {
            "prompt": f"{WORDS[i % 13]} {i} {seed}?",
            "chosen": " ".join(WORDS[(i + j) % 13] for j in range(3 + i % 5)) + f" {i}",
            "rejected": " ".join(WORDS[(2 * i + j) % 13] for j in range(2 + i % 4)),
        }
        for i in range(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama-tied", tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "train.jsonl", 40)
    write_pairs(folder / "id.jsonl", 20, seed=1)
    return folder


@pytest.fixture(scope="module")
def cache(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    subprocess.run([sys.executable, "-m", "embrm", *extract_words(model, data, folder)], check=True,
                   capture_output=True)  # fmt: skip
    return folder


def one_file(model: Path, data: Path, out: Path) -> list[str]:
    return [
        "extract", "--model", str(model), "--data", str(data), "--out", str(out),
        "--max-length", "128",
    ]  # fmt: skip


def extract_words(model: Path, data: Path, out: Path) -> list[str]:
    return [
        "extract", "--model", str(model), "--data", str(data / "train.jsonl"),
        "--data", f"id={data / 'id.jsonl'}", "--out", str(out), "--max-length", "128",
    ]  # fmt: skip


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


def test_from_data_to_a_ranking_in_three_commands(
    embrm: Callable[..., Outcome], cache: Path, spec: Path, tmp_path: Path
) -> None:
    assert embrm("cache", "verify", cache).code == 0
    assert "tiny" in embrm("cache", "ls", cache.parent).out
    shown = json.loads(embrm("cache", "show", cache, "--json").out)
    assert shown["data"]["splits"]["train"]["prompts"] == 40
    assert embrm("cache", "probe", cache, "--sample", 8).code == 0
    assert (
        json.loads(embrm("sweep", spec, "--cache", cache, "--dry-run", "--json").out)["runs"] == 6
    )
    assert embrm("sweep", spec, "--cache", cache, "--jobs", 1).code == 0
    results = tmp_path / "sweep"
    report = embrm("report", results)
    assert report.code == 0
    for name in ("bt", "bsr[bsr=0.001]", "bsr[bsr=0.1]"):
        assert name in report.out
    assert json.loads(embrm("report", results, "--json").out)
    run = pl.read_parquet(results / "ledger.parquet")["run_id"][0]
    scores = tmp_path / "scores.parquet"
    assert embrm("scores", results, run, "--out", scores).code == 0
    pairs = pl.read_parquet(scores)
    assert {"scores_chosen", "scores_rejected"} <= set(pairs.columns)
    assert pairs.height == open_cache(cache).pairs.height


def test_extract_from_a_toml_spec_equals_the_command_line(
    embrm: Callable[..., Outcome], model: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "extract.toml"
    spec.write_text(
        f'model = "{model}"\nmax_length = 128\nout = "{tmp_path / "out"}"\n'
        f'[[data]]\npath = "{data / "train.jsonl"}"\n'
        f'[[data]]\npath = "{data / "id.jsonl"}"\nsplit = "id"\n'
    )
    assert embrm("extract", spec).code == 0
    assert open_cache(tmp_path / "out").cache_id == open_cache(cache).cache_id


def test_dry_run_prints_rows_tokens_bytes_time_and_writes_nothing(
    embrm: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    outcome = embrm(*extract_words(model, data, tmp_path / "out"), "--dry-run", "--json")
    planned = json.loads(outcome.out)
    assert planned["splits"]["train"]["pairs"] == 40
    assert planned["tokens"] > 0
    assert planned["cache_bytes"]["states"] > 0
    assert planned["cache_bytes"].pop("total") == sum(planned["cache_bytes"].values())
    assert planned["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_first_row_of_every_exclusion_and_says_none(
    embrm: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "train.jsonl", 6)
    words = one_file(model, path, tmp_path / "out")
    lines = embrm(*words, "--dry-run").out.splitlines()
    assert "exclusions: none" in lines
    assert "leaks: none" in lines
    with path.open("a") as stream:
        for _ in range(2):
            stream.write(json.dumps({"prompt": "p?", "chosen": "a", "rejected": "a"}) + "\n")
    outcome = embrm(*words, "--dry-run")
    place = f"{tmp_path.name}/train.jsonl"
    assert f"  identical: 2, the first is {place}, row 6: 'a'" in outcome.out.splitlines()
    planned = json.loads(embrm(*words, "--dry-run", "--json").out)
    assert planned["exclusions"] == {"identical": 2}
    assert planned["first_exclusions"] == {"identical": f"{place}, row 6: 'a'"}


def test_the_list_of_caches_keeps_ids_whole_and_drops_empty_columns(
    embrm: Callable[..., Outcome], cache: Path, tmp_path: Path
) -> None:
    long = shutil.copytree(cache, tmp_path / "a-name-that-takes-more-than-its-share-of-the-line")
    out = embrm("cache", "ls", tmp_path).out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    assert open_cache(long).cache_id in out
    assert "tokens" not in out.splitlines()[0].split()  # it has none


def test_two_processes_and_a_merge_equal_one(
    embrm: Callable[..., Outcome], model: Path, data: Path, cache: Path, spec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = extract_words(model, data, out)
    parts = [tmp_path / f"out.{index}-of-2" for index in range(2)]
    for index, part in enumerate(parts):
        outcome = embrm(*words, "--shard", f"{index}/2")
        assert outcome.code == 0, outcome.err
        assert f"state: part {index}/2, " in outcome.out
        assert f"embrm cache merge {out}.*-of-2 --out {out}" in outcome.out
        assert embrm("cache", "verify", part).code == 0
        refused(embrm("sweep", spec, "--cache", part), f"part {index}/2", "embrm cache merge")
    refused(embrm("cache", "merge", parts[1], "--out", out), "missing part 0/2", "--shard 0/2")
    assert not out.exists()
    merged = embrm("cache", "merge", parts[1], parts[0], "--out", out)
    assert merged.code == 0
    assert "is complete" in merged.out
    assert embrm("cache", "verify", out).code == 0
    for name, entry in open_cache(cache).manifest.files().items():
        assert open_cache(out).manifest.files()[name] == entry
    assert json.loads(embrm(*words, "--shard", "0/2", "--json").out)["state"].startswith("part 0/2")


# Data


def test_missing_file(embrm: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    outcome = embrm(*one_file(model, tmp_path / "none.jsonl", tmp_path / "out"))
    refused(outcome, "none.jsonl")


def test_missing_column(embrm: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "worse": "c"}\n')
    outcome = embrm(*one_file(model, path, tmp_path / "out"))
    refused(outcome, "rejected", "columns")


def test_empty_dataset(embrm: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("")
    outcome = embrm(*one_file(model, path, tmp_path / "out"))
    refused(outcome, "no rows")


def test_all_rows_excluded(embrm: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 2)
    outcome = embrm(*one_file(model, path, tmp_path / "out"))
    refused(outcome, "identical")


def test_rows_left_out_are_counted_and_listed(
    embrm: Callable[..., Outcome], model: Path, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "data.jsonl", 5)
    with path.open("a") as stream:
        for row in (
            {"prompt": "a", "chosen": "same", "rejected": "same"},
            {"prompt": "a", "chosen": " ", "rejected": "b"},
            {"prompt": "a", "chosen": None, "rejected": "b"},
            {"prompt": "a", "chosen": "word " * 500, "rejected": "b"},
        ):
            stream.write(json.dumps(row) + "\n")
    out = tmp_path / "out"
    assert embrm(*one_file(model, path, out)).code == 0
    exclusions = open_cache(out).exclusions
    assert dict(exclusions.select("row", "reason").rows()) == {
        5: "identical", 6: "empty_response", 7: "missing_value", 8: "over_long",
    }  # fmt: skip


# Model and tokenizer


def test_model_without_lm_head(embrm: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama-untied", tokenizer())
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(embrm(*extract_words(folder, data, tmp_path / "out")), "LM head")


def test_no_model_there(embrm: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    refused(embrm(*extract_words(tmp_path / "none", data, tmp_path / "out")), "none")


def test_tokenizer_without_template_on_conversational_data(
    embrm: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "llama-tied", tokenizer(template=None))
    path = tmp_path / "data.jsonl"
    user, good, bad = (
        [{"role": role, "content": text}]
        for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
    )
    path.write_text(json.dumps({"prompt": user, "chosen": good, "rejected": bad}) + "\n")
    outcome = embrm(*one_file(folder, path, tmp_path / "out"))
    refused(outcome, "template")


def test_pad_is_eos(embrm: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama-tied", tokenizer(pad_token="</s>"))
    refused(embrm(*extract_words(folder, data, tmp_path / "out")), "--allow-pad-eos")


def test_nan_states(embrm: Callable[..., Outcome], data: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama-tied", tokenizer())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(embrm(*extract_words(folder, data, tmp_path / "out")), "NaN")


# Cache


@pytest.mark.parametrize("change", [("--template", "plain"), ("--dtype", "bfloat16")])
def test_cache_of_another_template_or_dtype(
    embrm: Callable[..., Outcome], model: Path, data: Path, own_cache: Path, change: tuple[str, str]
) -> None:
    outcome = embrm(*extract_words(model, data, own_cache), *change)
    refused(outcome, "was extracted with", change[0].removeprefix("--"), "--out")


def test_corrupt_shard(embrm: Callable[..., Outcome], own_cache: Path, spec: Path) -> None:
    shard = own_cache / "responses" / "part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(embrm("cache", "verify", own_cache), "part-00000.parquet is damaged")
    refused(embrm("sweep", spec, "--cache", own_cache, "--jobs", 1), "part-00000.parquet")


@pytest.mark.parametrize("share", ["2/2", "-1/2", "1", "x/y", ""])
def test_wrong_shares(
    embrm: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path, share: str
) -> None:
    outcome = embrm(*extract_words(model, data, tmp_path / "out"), "--shard", share)
    refused(outcome, f"shard (--shard) = '{share}'", "from 0 to n - 1")
    assert [*tmp_path.iterdir()] == []


def test_a_dry_run_is_of_the_whole(
    embrm: Callable[..., Outcome], model: Path, data: Path, tmp_path: Path
) -> None:
    words = extract_words(model, data, tmp_path / "out")
    refused(embrm(*words, "--dry-run", "--shard", "0/2"), "leave --shard out")


def test_merging_what_does_not_belong_together(
    embrm: Callable[..., Outcome], model: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    words = extract_words(model, data, tmp_path / "one")
    assert embrm(*words, "--shard", "0/2").code == 0
    words = extract_words(model, data, tmp_path / "two")
    assert embrm(*words, "--template", "plain", "--shard", "1/2").code == 0
    one, two, out = tmp_path / "one.0-of-2", tmp_path / "two.1-of-2", tmp_path / "out"
    refused(
        embrm("cache", "merge", one, two, "--out", out),
        "tokenizer.chat_template = '", "not None", str(one), str(two), "same settings",
    )  # fmt: skip
    refused(embrm("cache", "merge", one, cache, "--out", out), "is a whole cache, not a part")
    refused(embrm("cache", "merge", one, tmp_path / "none", "--out", out), "no cache at")
    assert embrm("cache", "merge", "--out", out).code == 2
    assert embrm("cache", "merge", one).code == 2
    assert not out.exists()


def test_truncated_manifest(embrm: Callable[..., Outcome], own_cache: Path, spec: Path) -> None:
    manifest = own_cache / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-50])
    refused(embrm("sweep", spec, "--cache", own_cache), "manifest.json")
    refused(embrm("cache", "show", own_cache), "manifest.json")


def test_no_cache_there(embrm: Callable[..., Outcome], tmp_path: Path, spec: Path) -> None:
    refused(embrm("sweep", spec, "--cache", tmp_path / "none"), "none")
    refused(embrm("cache", "show", tmp_path / "none"), "none")


def test_disk_full(
    embrm: Callable[..., Outcome],
    model: Path,
    data: Path,
    cache: Path,
    spec: Path,
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(48)
    refused(embrm(*extract_words(model, data, disk / "out")), "disk full", "free some space")
    shutil.rmtree(disk / "out")
    filler = disk / "filler"
    filler.write_bytes(bytes(40_000))
    results = disk / "results"
    refused(embrm("sweep", spec, "--cache", cache, "--out", results, "--jobs", 1), "disk full")
    filler.unlink()


# Sweep


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("bsr = [", "bsrr = [", ("'bsrr'", "did you mean 'bsr'?")),
        ("epochs = 2", 'epochs = 2\nloss = "bradley"', ("loss", "'bradley'")),
        ("[0.001, 0.1]", "[-0.001]", ("bsr = -0.001", "greater than or equal to 0")),
        ("seeds", "seed", ("unknown key 'seed'", "did you mean 'seeds'?")),
        ('baseline = "bt"', 'baseline = "bd"', ("baseline", "did you mean 'bt'?")),
        ("seeds", 'evaluate = ["idd"]\nseeds', ("'idd'", "did you mean 'id'?")),
        ("seeds", 'train = ["trian"]\nseeds', ("'trian'", "did you mean 'train'?")),
        ("epochs = 2", 'epochs = 2\nstate = "mean"', ("'mean'", "last")),
        ("baseline", "baseline baseline", ("not valid TOML",)),
    ],
)
def test_wrong_sweep_specs(
    embrm: Callable[..., Outcome],
    cache: Path,
    spec: Path,
    old: str,
    new: str,
    parts: tuple[str, ...],
) -> None:
    spec.write_text(SWEEP.replace(old, new, 1))
    refused(embrm("sweep", spec, "--cache", cache), "sweep.toml", *parts)


def test_a_cache_with_nothing_to_evaluate_on(
    embrm: Callable[..., Outcome], model: Path, data: Path, spec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert embrm(*one_file(model, data / "train.jsonl", out)).code == 0
    refused(embrm("sweep", spec, "--cache", out), "no split to evaluate on", "--data")
    spec.write_text("evaluate = []\n" + SWEEP)
    refused(embrm("sweep", spec, "--cache", out), "evaluate")


def test_runs_that_diverge_are_named(
    embrm: Callable[..., Outcome], cache: Path, spec: Path
) -> None:
    spec.write_text(SWEEP + '[[runs]]\nname = "wild"\nlr = 1e30\n')
    outcome = embrm("sweep", spec, "--cache", cache, "--jobs", 1)
    assert outcome.code == 0
    assert "2 of 8 runs diverged" in outcome.out
    spec.write_text(SWEEP.replace("epochs = 2", "epochs = 2\nlr = 1e30"))
    refused(embrm("sweep", spec, "--cache", cache, "--jobs", 1), "all 6 runs diverged")


def test_report_and_scores_of_nothing(embrm: Callable[..., Outcome], tmp_path: Path) -> None:
    refused(embrm("report", tmp_path), "no sweep results")
    refused(embrm("scores", tmp_path, "abc"), "no sweep results")
    refused(embrm("scores", tmp_path, "abc", "--out", "x.txt"), ".parquet")


def test_missing_options_and_unknown_commands(embrm: Callable[..., Outcome]) -> None:
    refused(embrm("extract", "--model", "m", "--data", "d.jsonl"), "--out")
    assert embrm("nonsense").code == 2
    assert embrm("extract", "--nonsense").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("cache", "show", "x" * 300),
        ("report", "x" * 300),
        ("sweep", "x" * 300),
        ("extract", "x" * 5000),
        ("cache", "show", "/proc"),
    ],
)
def test_paths_that_cannot_be(embrm: Callable[..., Outcome], words: tuple[str, ...]) -> None:
    refused(embrm(*words))


def test_an_extra_that_is_not_installed(
    embrm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, spec: Path
) -> None:
    for package, extra in {"accelerate": "finetune", "transformers": "extract"}.items():
        loaded = ("embrm.finetuning.", f"{package}.")  # not yet, as in a fresh process
        for name in [name for name in sys.modules if name.startswith(loaded)]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        refused(embrm("finetune", spec), f"{package}, which is not", f"'.[{extra}]'")
        monkeypatch.undo()


def test_results_that_cannot_be_read(
    embrm: Callable[..., Outcome], own_cache: Path, tmp_path: Path
) -> None:
    (own_cache / "manifest.json").unlink()
    (own_cache / "manifest.json").mkdir()
    refused(embrm("cache", "show", own_cache), "manifest.json", "cannot be read")
    assert "cannot be read" in embrm("cache", "ls", tmp_path, "--json").out
    refused(embrm("scores", tmp_path, "abc", "--out", tmp_path / "no" / "x.txt"), ".parquet")


def test_output_that_cannot_be_written(cache: Path) -> None:
    command = [sys.executable, "-m", "embrm", "cache", "show", str(cache)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


# Interruption


@pytest.mark.parametrize("seconds", [0.15, 0.3, 0.6, 1.0, 1.6])
def test_ctrl_c_while_libraries_load_is_one_line(cache: Path, spec: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "embrm", "sweep", str(spec), "--cache", str(cache)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    # Python itself was still starting, and dies of the signal or of what it was importing.
    starting = "KeyboardInterrupt" in err and "embrm" not in err
    if process.returncode != -signal.SIGINT and not starting:
        assert process.returncode == 130, err
        assert err.count("interrupted: ") == 1
        assert "Traceback" not in err


@pytest.mark.parametrize("stage", ["extract", "sweep"])
def test_ctrl_c_is_one_line_and_the_same_command_finishes(
    embrm: Callable[..., Outcome],
    model: Path,
    data: Path,
    cache: Path,
    spec: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    if stage == "extract":
        words = extract_words(model, data, tmp_path / "out")
        mark = tmp_path / "out" / "manifest.json"
    else:
        spec.write_text(SWEEP.replace("epochs = 2", "epochs = 4000\nbatch_pairs = 8"))
        words = ["sweep", str(spec), "--cache", str(cache), "--jobs", "1"]
        mark = tmp_path / "sweep" / ".lock"
    command = [sys.executable, "-m", "embrm", *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 300
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        # Workers are launched with interrupts ignored; the test is about what comes after.
        time.sleep(1.0 if stage == "sweep" else 0.0)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert mark.exists(), err
    if process.returncode:  # a fast machine may have finished before the signal
        assert process.returncode == 130, err
        assert err.count("interrupted: ") == 1
        assert "Traceback" not in err
    if stage == "sweep":
        spec.write_text(SWEEP)
    assert embrm(*words).code == 0


def test_listing_caches_needs_no_torch(cache: Path) -> None:
    code = """
import sys
from embrm.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    for words in (["cache", "ls", str(cache.parent)], ["cache", "show", str(cache)]):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "False", words
