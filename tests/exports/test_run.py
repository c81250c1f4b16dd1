"""Run: exported folders score as the cache does, in stock transformers; all else is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from export_world import RUNS, write_cache, write_sweep
from extract_models import save_model, tokenizer
from tampering import set_column, tamper
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY
from embrm.core.specs import canonical_json
from embrm.data.scenarios import Scenarios
from embrm.exports import run as export_run
from embrm.exports.exported import load_exported
from embrm.exports.run import export, write_model
from embrm.exports.run_model import RunModel, open_run_model
from embrm.results.ledger import open_results
from embrm.results.rewards import scores
from embrm.sweeps.weights import MODEL_FORMAT
from embrm.training.heads import Preprocess

FAMILIES = ["llama-untied", "qwen2", "gpt2", "gemma2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("export") / "world", *RUNS)


def logits(model, prepared, *, side: str, size: int, position_ids: bool = False) -> torch.Tensor:
    """Logits of every response of a cache, by a stock model."""
    out = []
    for first in range(0, len(prepared.encoded), size):
        texts = [torch.from_numpy(e.ids).long() for e in prepared.encoded[first : first + size]]
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)  # the pad token's id is 0
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            own = slice(longest - len(text), longest) if side == "left" else slice(len(text))
            ids[row, own], mask[row, own] = text, 1
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if position_ids else {}
        with torch.no_grad():
            out.append(model(input_ids=ids, attention_mask=mask, **more).logits[:, 0])
    return torch.cat(out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def rewards_of_pairs(values: torch.Tensor, trained: RunModel) -> np.ndarray:
    return values.numpy()[trained.cache.pairs.select("chosen", "rejected").to_numpy()]


@pytest.mark.parametrize("run", ["bt", "standardized", "low-rank"])
def test_linear_heads_score_in_stock_transformers_as_the_sweep_does(
    swept: Path, tmp_path: Path, run: str
) -> None:
    made = export(swept, f"{run}@0", tmp_path / "rm", device="cpu")
    assert made.stock
    assert bool(made.offset) == (run == "standardized")
    assert not made.parity.position_ids
    assert made.parity.responses == len(open_run_model(swept, "bt@0").prepared(None).encoded)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    trained = open_run_model(swept, f"{run}@0")
    expected = scores(swept, f"{run}@0").select("scores_chosen", "scores_rejected").to_numpy()
    for side, size in (("right", 1), ("right", 16), ("left", 16)):
        found = logits(model.eval(), trained.prepared(None), side=side, size=size) - made.offset
        assert np.abs(rewards_of_pairs(found, trained) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_scores_as_its_cache_padded_on_either_side(
    swept: Path, tmp_path: Path, kind: str
) -> None:
    """Random heads on plain text with a BOS, and for one family on bfloat16 states too."""
    cache = open_cache(write_cache(tmp_path, kind, plain=True, prompts=5))
    torch.manual_seed(0)
    trained = replace(
        open_run_model(swept, "bt@0"),
        cache=cache,
        parameters={"output.weight": torch.randn(2, cache.width)},
        preprocess=Preprocess(torch.randn(cache.width), torch.rand(cache.width) + 0.5),
    )
    prepared = trained.prepared(None)
    rows = list(range(len(prepared.encoded)))
    expected = trained.cached_rewards(rows)
    made = write_model(trained, prepared, tmp_path / "rm", device="cpu")
    assert made.parity.position_ids == (kind == "gpt2")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert type(model).__module__.startswith("transformers.models.")
    limit = 1e-4 * max(1.0, float(expected.abs().max()))
    for side, size in (("right", 1), ("right", 16), ("left", 1), ("left", 16)):
        places = kind == "gpt2" and side == "left"
        found = logits(model, prepared, side=side, size=size, position_ids=places)
        assert (found - made.offset - expected).abs().max() < limit
    if kind == "gpt2":
        without = logits(model, prepared, side="left", size=16)
        assert (without - made.offset - expected).abs().max() > 100 * limit
        assert "pass position_ids" in (tmp_path / "rm/README.md").read_text()
    if kind == "gemma2":  # by default transformers takes a kernel that ignores the soft-cap
        assert model.config._attn_implementation == "eager"
        model.set_attn_implementation("sdpa")
        other = logits(model, prepared, side="right", size=1)
        assert (other - made.offset - expected).abs().max() > 100 * limit


def test_bfloat16_is_kept_and_has_its_own_tolerance(swept: Path, tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path, "llama-tied", dtype="bfloat16", prompts=5))
    trained = replace(open_run_model(swept, "bt@0"), cache=cache)
    made = write_model(trained, trained.prepared(None), tmp_path / "rm", device="cpu")
    assert made.parity.tolerance >= 5e-2
    assert max(made.parity.differences.values()) > 1e-4
    weights = safetensors.torch.load_file(tmp_path / "rm/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_with_custom_a_head_on_bfloat16_is_float32(swept: Path, tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path, "llama-tied", dtype="bfloat16", prompts=5))
    trained = replace(open_run_model(swept, "bt@0"), cache=cache)
    made = write_model(trained, trained.prepared(None), tmp_path / "rm", custom=True, device="cpu")
    assert not made.stock
    weights = safetensors.torch.load_file(tmp_path / "rm/model.safetensors")
    assert weights["head.output_weight"].dtype == torch.float32
    assert "| reordered |" in (tmp_path / "rm/README.md").read_text()


def test_tuned_weights_are_float32_whatever_the_cache_is(swept: Path, tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path, "llama-tied", dtype="bfloat16", prompts=3))
    norm = {"norm.weight": torch.rand(cache.width) + 1}
    trained = replace(open_run_model(swept, "bt@0"), cache=cache, backbone=norm)
    made = write_model(trained, trained.prepared(None), tmp_path / "rm", device="cpu")
    assert max(made.parity.differences.values()) < 1e-5
    weights = safetensors.torch.load_file(tmp_path / "rm/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["model.norm.weight"], norm["norm.weight"])


def test_a_fine_tuned_run_needs_no_view_of_its_cache(swept: Path, tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path, "llama-tied", prompts=3, states=["layer:1"]))
    norm = {"norm.weight": torch.rand(cache.width) + 1}
    trained = replace(open_run_model(swept, "bt@0"), cache=cache, backbone=norm)
    made = write_model(trained, trained.prepared(None), tmp_path / "rm", device="cpu")
    assert max(made.parity.differences.values()) < 1e-5


ALONE = """
import sys, json
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "embrm":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for folder, trust in zip(sys.argv[1:], (False, True)):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust)
    texts = json.load(sys.stdin) if not trust else texts
    for side in ("left", "right"):
        inputs = tokenizer(
            texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
        )
        print(json.dumps(model.eval()(**inputs).logits[:, 0].tolist()))
"""


@pytest.mark.slow
def test_folders_load_where_embrm_is_not_installed(swept: Path, tmp_path: Path) -> None:
    for run, custom in (("bt", False), ("mlp", True)):
        made = export(swept, f"{run}@0", tmp_path / run, custom=custom, device="cpu")
        assert made.stock != custom
        assert (tmp_path / run / "modeling_embrm.py").exists() == custom
    trained = [open_run_model(swept, f"{run}@0") for run in ("bt", "mlp")]
    prepared = trained[0].prepared(None)
    rows = range(0, len(prepared.encoded), 7)
    words = load_exported(tmp_path / "bt", device="cpu").tokenizer
    texts = [words.decode(prepared.encoded[row].ids) for row in rows]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "bt"), str(tmp_path / "mlp")],
        input=json.dumps(texts),
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for values, own in zip(found, [trained[0]] * 2 + [trained[1]] * 2, strict=True):
        assert values == pytest.approx(own.cached_rewards(rows).tolist(), abs=1e-4)


@pytest.mark.parametrize("run", ["mlp", "adapter", "worst", "timid", "bagged"])
def test_other_heads_need_the_flag_and_then_score_as_the_sweep_does(
    swept: Path, tmp_path: Path, run: str
) -> None:
    with pytest.raises(UserError, match=r"no stock form: .* with custom \(--custom\) it is"):
        export(swept, f"{run}@0", tmp_path / "rm", device="cpu")
    assert [*tmp_path.iterdir()] == []
    made = export(swept, f"{run}@0", tmp_path / "rm", custom=True, device="cpu")
    assert max(made.parity.differences.values()) < 1e-5
    trained = open_run_model(swept, f"{run}@0")
    prepared = trained.prepared(None)
    exported = load_exported(tmp_path / "rm", device="cpu")
    rows = range(len(prepared.encoded))
    found = exported.rewards(prepared.encoded, [rows], side="left")
    assert (found - trained.cached_rewards(rows)).abs().max() < 1e-5
    expected = scores(swept, f"{run}@0").select("scores_chosen", "scores_rejected").to_numpy()
    assert np.abs(rewards_of_pairs(found, trained) - expected).max() < 1e-4


def test_no_code_of_a_folder_is_run(swept: Path, tmp_path: Path) -> None:
    export(swept, "mlp@0", tmp_path / "rm", custom=True, device="cpu")
    (tmp_path / "rm/modeling_embrm.py").write_text("raise SystemExit('run')")
    load_exported(tmp_path / "rm", device="cpu")


def tuned(swept: Path, folder: Path, model: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of the sweep whose run "bt" has fine-tuned weights, and the whole tuned backbone."""
    results = Path(shutil.copytree(swept, folder))
    header = json.loads((results / "sweep.json").read_text()) | {"finetune": {}}
    (results / "sweep.json").write_text(json.dumps(header))
    run_id = open_results(results).find("bt@0")["run_id"]
    trained = open_run_model(swept, "bt@0")
    base = AutoModelForCausalLM.from_pretrained(model).base_model.state_dict()
    torch.manual_seed(1)
    moved = {
        f"backbone.{name}": tensor + 0.1 * torch.randn_like(tensor)
        for name, tensor in base.items()
        if "q_proj" in name or name == "norm.weight"
    }
    assert len(moved) == 4
    header = {
        "format": MODEL_FORMAT,
        "cache_id": trained.cache.cache_id,
        "run": trained.run | {"state": "last"},
        "tune": "full",
        "model": {},
    }
    safetensors.torch.save_file(
        {"head.output.weight": trained.parameters["output.weight"], **moved},
        results / "weights" / f"{run_id}.safetensors",
        metadata={"embrm": canonical_json(header)},
    )
    return results, base | {name.removeprefix("backbone."): t for name, t in moved.items()}


def test_a_fine_tuned_run_is_exported_with_its_backbone(swept: Path, tmp_path: Path) -> None:
    model = swept.parent / "model"
    results, backbone = tuned(swept, tmp_path / "tuned", model)
    made = export(results, "bt@0", tmp_path / "rm", device="cpu")
    assert made.stock
    trained = open_run_model(results, "bt@0")
    prepared = trained.prepared(None)
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.base_model.load_state_dict(backbone)
    with torch.no_grad():
        expected = [
            lm.base_model(torch.from_numpy(entry.ids)[None].long()).last_hidden_state[0, -1]
            @ trained.parameters["output.weight"][0]
            for entry in prepared.encoded
        ]
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    found = logits(stock, prepared, side="right", size=16)
    assert found.tolist() == pytest.approx([float(value) for value in expected], abs=1e-4)
    rows = range(len(prepared.encoded))
    frozen = open_run_model(swept, "bt@0").cached_rewards(rows)
    assert (found - frozen).abs().max() > 0.01
    assert "fine-tuned" in (tmp_path / "rm/README.md").read_text()


def test_a_backbone_of_another_model_is_refused(swept: Path, tmp_path: Path) -> None:
    results, _ = tuned(swept, tmp_path / "tuned", swept.parent / "model")
    [path] = (results / "weights").glob(f"{open_results(results).find('bt@0')['run_id']}*")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["backbone.layers.9.weight"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=r"layers\.9\.weight.*no such tensor"):
        export(results, "bt@0", tmp_path / "rm", device="cpu")
    assert not (tmp_path / "rm").exists()


def test_the_same_run_gives_the_same_bytes_and_no_place_on_this_machine(
    swept: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        export(swept, "mlp@0", tmp_path / name, custom=True, device="cpu")
    first = files(tmp_path / "first")
    assert first == files(tmp_path / "second")
    assert len(first) == 7
    assert not [name for name, content in first.items() if str(swept.parent).encode() in content]


def test_the_card_names_labels_by_digest_and_scenarios_in_full(swept: Path, tmp_path: Path) -> None:
    trained = open_run_model(swept, "bt@0")
    spec = trained.results.spec.model_copy(update={"scenarios": Scenarios(prompts=0.3)})
    named = replace(
        trained,
        run=trained.run | {"labels": f"{tmp_path}/a#b/labels.parquet#0123abcd"},
        results=replace(trained.results, spec=spec),
    )
    write_model(named, named.prepared(None), tmp_path / "rm", device="cpu")
    for content in files(tmp_path / "rm").values():
        assert str(tmp_path).encode() not in content
    text = (tmp_path / "rm/README.md").read_text()
    assert '"labels": "0123abcd"' in text
    assert re.search(r'\| trained on \| train \|\n\| scenarios \| .*"prompts":0\.3', text)


def test_the_card_says_how_good_the_run_is_and_its_code_runs(swept: Path, tmp_path: Path) -> None:
    export(swept, "bt@0", tmp_path / "rm", device="cpu")
    text = (tmp_path / "rm/README.md").read_text()
    row = open_results(swept).find("bt@0")
    assert re.search(rf"\| id \| 16 \| 12 \| {100 * row['accuracy@id']:.1f} % \\\[\d", text)
    for word in (row["run_id"], row["cache_id"], row["loss"]):
        assert word in text
    trained = open_run_model(swept, "bt@0")
    prepared = trained.prepared(None)
    responses = prepared.dataset.responses
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"."', repr(str(tmp_path / "rm")))
    for name in ("prompt", "response"):
        assert '"..."' in code
        code = code.replace('"..."', repr(responses[name][3]), 1)
    scope: dict[str, torch.Tensor] = {}
    exec(code, scope)
    assert float(scope["reward"].detach()[0]) == pytest.approx(
        float(trained.cached_rewards([3])), abs=1e-4
    )


def test_what_the_user_names_is_escaped_in_the_card(swept: Path, tmp_path: Path) -> None:
    trained = open_run_model(swept, "bt@0")
    named = replace(trained, row=trained.row | {"config": "<b>|x|\n[a](b)"})
    write_model(named, named.prepared(None), tmp_path / "rm", device="cpu")
    text = (tmp_path / "rm/README.md").read_text()
    assert "# \\<b\\>\\|x\\|�\\[a\\](b)@0" in text


def _refused(swept: Path, out: Path, match: str, run: str = "bt@0", **options) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as error:
        export(swept, run, out, device="cpu", **options)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.rglob("*")) == before


def test_runs_that_cannot_be_exported_are_refused(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "rm"
    _refused(swept, out, r"\(diverged\) has no weights", run="wild@0")
    _refused(swept, out, "no run 'none'", run="none")
    for run in ("deep", "with S", "pooled"):
        _refused(swept, out, "cannot be exported: take a run", run=f"{run}@0", custom=True)
        _refused(swept, out, "cannot be exported: take a run", run=f"{run}@0")


def test_a_folder_with_something_in_it_is_left_alone(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "rm"
    out.mkdir()
    export(swept, "bt@0", out, device="cpu")
    _refused(swept, out, "is not empty: name a new folder")


def test_another_model_is_refused_and_a_moved_one_is_named(swept: Path, tmp_path: Path) -> None:
    world = Path(shutil.copytree(swept.parent, tmp_path / "world"))
    out = tmp_path / "rm"
    save_model(world / "model", "llama-tied", tokenizer(), seed=1)
    _refused(swept, out, "the model named in its spec has changed", model=str(world / "model"))
    _refused(swept, out, "no such folder", model=str(world / "gone/away"))
    moved = Path(shutil.copytree(swept.parent / "model", tmp_path / "moved"))
    export(swept, "bt@0", out, model=str(moved), cache=world / "cache", device="cpu")


def _swapped(table: pa.Table) -> pa.Table:
    order = np.arange(table.num_rows)
    order[:2] = 1, 0
    return set_column(table, "state.last", table["state.last"].take(order))


def test_rewards_that_are_not_the_runs_are_refused(swept: Path, tmp_path: Path) -> None:
    """Two cached states have changed places, and every checksum says that all is well."""
    cache = Path(shutil.copytree(swept.parent / "cache", tmp_path / "cache"))
    tamper(cache, _swapped)
    _refused(swept, tmp_path / "rm", "rewards differ by .* from the run's", cache=cache)


def test_weights_that_are_saved_wrong_are_refused(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, **options):
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["score.weight"][0, 0] += 0.1
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        return load_exported(folder, **options)

    monkeypatch.setattr(export_run, "load_exported", broken)
    _refused(swept, tmp_path / "rm", "rewards differ by .* from the run's")


def test_what_a_kill_left_behind_is_in_nobodys_way(swept: Path, tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY}rm"
    left.mkdir()
    (left / "half").write_text("x")
    export(swept, "bt@0", tmp_path / "rm", device="cpu")
    assert not left.exists()
    assert not (tmp_path / "rm/half").exists()


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(
    swept: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(64)
    with pytest.raises(UserError, match=r"disk full while writing .*rm"):
        export(swept, "bt@0", disk / "rm", device="cpu")
    assert [*disk.iterdir()] == []


def test_push_uploads_the_finished_folder(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Hub:
        def create_repo(self, name: str, **options) -> None:
            calls.append((name, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            if repo_id == "me/refused":
                raise OSError("401: no token")
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(export_run, "HfApi", Hub)
    export(swept, "bt@0", tmp_path / "rm", push="me/rm", device="cpu")
    assert calls[0] == ("me/rm", {"private": True, "exist_ok": True})
    assert calls[1] == ("me/rm", sorted(path.name for path in (tmp_path / "rm").iterdir()))
    with pytest.raises(UserError, match="is exported, but the hub gave '401"):
        export_run.upload(tmp_path / "rm", "me/refused")
