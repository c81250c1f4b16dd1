"""vLLM serves an exported folder, and its rewards are the run's: no sigmoid, no other position."""

import gc
from pathlib import Path

import pytest
from export_world import write_sweep
from extract_models import save_config, tokenizer
from lm_families import FAMILIES

from embrm.exports.run import export
from embrm.exports.run_model import open_run_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_classify_path_gives_the_rewards_of_the_run(tmp_path: Path, family: str) -> None:
    from vllm import LLM, TokensPrompt

    world = tmp_path / "world"
    save_config(world / "model", FAMILIES[family], tokenizer())
    results = write_sweep(world, "standardized")
    made = export(results, "standardized@0", tmp_path / "rm", device="cpu")
    trained = open_run_model(results, "standardized@0")
    texts = trained.prepared(None).encoded[::5]
    llm = LLM(
        model=str(tmp_path / "rm"),
        runner="pooling",
        dtype="float32",
        max_model_len=200,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True,
    )
    prompts = [TokensPrompt(prompt_token_ids=text.ids.tolist()) for text in texts]
    found = [output.outputs.probs for output in llm.classify(prompts, use_tqdm=False)]
    del llm
    gc.collect()
    rows = range(0, len(trained.prepared(None).encoded), 5)
    expected = trained.cached_rewards(rows) + made.offset
    assert [len(values) for values in found] == [1] * len(texts)
    assert [value for [value] in found] == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.min() < 0 or expected.max() > 1  # a sigmoid could not say so
