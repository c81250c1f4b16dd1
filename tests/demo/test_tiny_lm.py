"""The demo's language model: its text is what extraction feeds it, it learns, it can be resumed."""

import json
from pathlib import Path

import pytest
import torch

from embrm.core.errors import UserError
from embrm.demo.tiny_lm import MARKER, Recipe, _encode, make_tokenizer, train_lm
from embrm.demo.world import Conversation, World, corpus

WORLD = World()
TINY = Recipe(width=32, layers=1, heads=2, steps=60, batch=16, lr=0.01, warmup=5, held_out=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("demo") / "lm"
    return folder, train_lm(folder, WORLD, TINY)


def test_training_text_is_the_template_s() -> None:
    """The model is trained on the very tokens that extraction makes of a prompt and response."""
    tokenizer = make_tokenizer()
    messages = [
        {"role": "user", "content": "sort h c q"},
        {"role": "assistant", "content": "the answer is c h q ."},
    ]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    document = Conversation("sort h c q", "the answer is c h q .", "tick")
    bos, tick = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("tick")
    assert _encode(document, tokenizer) == [*ids, tick, bos]
    prompt = tokenizer.apply_chat_template(
        messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt


def test_every_word_is_a_token_and_pad_is_no_other() -> None:
    tokenizer = make_tokenizer()
    specials = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    assert len(specials) == 3
    assert tokenizer.pad_token_id == 0  # what the loss and the padding rely on
    for document in corpus(WORLD, 300):
        assert tokenizer.unk_token_id not in _encode(document, tokenizer)


def test_a_few_steps_learn_and_the_model_reloads(trained: tuple[Path, dict[str, float]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, losses = trained
    assert losses["loss"] < losses["unigram_entropy"] - 0.3
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    rows = [_encode(document, tokenizer) for document in corpus(WORLD, TINY.held_out)]
    with torch.inference_mode():
        total = sum(
            float(model(input_ids=(ids := torch.tensor([row])), labels=ids).loss) * (len(row) - 1)
            for row in rows
        )
    # transformers' own loss, one row at a time without padding, is the oracle.
    assert losses["loss"] == pytest.approx(total / sum(len(row) - 1 for row in rows), rel=1e-4)


def test_a_finished_model_is_kept(
    trained: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, losses = trained
    monkeypatch.setattr("embrm.demo.tiny_lm._optimise", None)  # training again would fail
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_lm(folder, WORLD, TINY) == losses
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_model_of_other_settings_is_refused(trained: tuple[Path, dict[str, float]]) -> None:
    folder, _ = trained
    with pytest.raises(UserError, match="other settings: delete the folder"):
        train_lm(folder, World(seed=1), TINY)


def test_an_unfinished_folder_is_trained_again(tmp_path: Path) -> None:
    """A kill between weights and marker leaves weights that nothing vouches for."""
    recipe = Recipe(width=16, layers=1, heads=1, steps=2, batch=4, warmup=1, held_out=8)
    first = train_lm(tmp_path, WORLD, recipe)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / MARKER).unlink()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert train_lm(tmp_path, WORLD, recipe) == first
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / MARKER).read_text())["loss"] == first["loss"]


@pytest.mark.parametrize(("chosen", "used"), [(None, 1), ("2", 2)])
def test_it_trains_with_one_thread_unless_the_user_chose_a_number(
    chosen: str | None, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "embrm.demo.tiny_lm._optimise", lambda *_: seen.append(torch.get_num_threads())
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_lm(tmp_path, WORLD, Recipe(width=16, layers=1, heads=1, steps=1, batch=2, held_out=4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [used]
