"""States in memory and in a file; the order in which pairs are read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrm.training import order as order_module
from embrm.training import row_store
from embrm.training.order import Order
from embrm.training.row_store import RowStore

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _file(path: Path, values: torch.Tensor) -> Path:
    path.write_bytes(values.view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", [None, 1, 1 << 20])
def test_rows_are_the_same_from_memory_and_from_a_file(
    tmp_path: Path, dtype: torch.dtype, resident: int | None
) -> None:
    values = torch.randn(3000, 40).to(dtype)
    path = _file(tmp_path / "states", values)
    mapped = RowStore.of_file(path, (3000, 40), dtype, resident=resident)
    memory = RowStore(values)
    assert mapped.width == memory.width == 40
    assert mapped.block_rows == memory.block_rows == (8 << 20) // (40 * dtype.itemsize)
    for rows in (torch.randint(3000, (500,)), torch.tensor([2999, 0]), torch.arange(3000)):
        taken = mapped.take(rows)
        assert taken.dtype == torch.float32
        assert torch.equal(taken, values[rows].float())
        assert torch.equal(memory.take(rows), values[rows].float())
        mapped.release_pages()
    mapped.read_ahead([0])
    assert torch.equal(mapped.take(torch.tensor([7])), values[7:8].float())


def test_take_returns_a_buffer_and_leaves_the_states_unchanged() -> None:
    values = torch.randn(9, 4)
    states = RowStore(values.clone())
    first = states.take(torch.tensor([3, 4]))
    first.zero_()
    second = states.take(torch.tensor([3]))
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, values[3:4])
    assert torch.equal(states.values, values)


def _resident_kilobytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssFile:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_limit_on_resident_memory_is_kept(tmp_path: Path) -> None:
    values = torch.zeros(64 << 10, 256)  # 64 MB
    path = _file(tmp_path / "states", values)
    order = torch.randperm(64 << 10)
    # Once before, so that the code itself is in memory.
    warm = RowStore.of_file(path, (64 << 10, 256), torch.float32, resident=8 << 20)
    warm.take(order[:512].sort().values)
    warm.release_pages()
    before = _resident_kilobytes()
    streamed = RowStore.of_file(path, (64 << 10, 256), torch.float32, resident=8 << 20)
    peak = 0
    for rows in order.split(512):
        streamed.take(rows.sort().values)
        peak = max(peak, _resident_kilobytes() - before)
    assert peak <= (8 << 10) + 512
    whole = RowStore.of_file(path, (64 << 10, 256), torch.float32, resident=None)
    streamed.release_pages()
    whole.take(torch.arange(64 << 10))
    assert _resident_kilobytes() - before > 60 << 10


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows of width 4, windows of 3 blocks."""
    monkeypatch.setattr(row_store, "BLOCK_BYTES", 8 * 4 * 4)
    monkeypatch.setattr(order_module, "WINDOW_BLOCKS", 3)


@pytest.mark.usefixtures("small_blocks")
def test_every_pair_occurs_once_per_epoch_in_the_window_of_its_block() -> None:
    states = RowStore(torch.zeros(200, 4))
    chosen = torch.from_numpy(np.random.default_rng(0).integers(0, 200, 333))
    found = Order(chosen, states, seed=3)
    epochs = [torch.cat([*found.minibatches(epoch, 32)]) for epoch in (1, 2)]
    for pairs in epochs:
        assert sorted(pairs.tolist()) == list(range(333))
        blocks = (chosen[pairs] // states.block_rows).tolist()
        seen: list[set[int]] = [set()]
        for block in blocks:  # a window ends where a fourth block begins, and none comes back
            if block not in seen[-1] and len(seen[-1]) == 3:
                seen.append(set())
            seen[-1].add(block)
        assert len(seen) == -(-len(set(blocks)) // 3)
        assert sum(map(len, seen)) == len(set(blocks))
    assert not torch.equal(*epochs)
    again = Order(chosen, states, seed=3)
    assert torch.equal(torch.cat([*again.minibatches(1, 7)]), epochs[0])
    other = Order(chosen, states, seed=4)
    assert not torch.equal(torch.cat([*other.minibatches(1, 32)]), epochs[0])


def test_one_window_is_a_plain_shuffle() -> None:
    """Every pair is as likely in every place: a chi-squared test on 2,000 epochs."""
    found = Order(torch.arange(5), RowStore(torch.zeros(5, 4)), seed=0)
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), torch.cat([*found.minibatches(epoch, 2)]).numpy()] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 39.3  # 16 degrees of freedom, p = 0.001


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 80),
    rows=st.integers(1, 400),
    batch=st.integers(1, 90),
    block=st.integers(1, 60),
)
def test_minibatches_cover_any_data(pairs: int, rows: int, batch: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_store, "BLOCK_BYTES", block * 16)
        patch.setattr(order_module, "WINDOW_BLOCKS", 2)
        chosen = torch.from_numpy(np.random.default_rng(pairs).integers(0, rows, pairs))
        found = [*Order(chosen, RowStore(torch.zeros(rows, 4)), seed=0).minibatches(1, batch)]
    assert [len(some) for some in found[:-1]] == [batch] * (len(found) - 1)
    assert sorted(torch.cat(found).tolist()) == list(range(pairs))
