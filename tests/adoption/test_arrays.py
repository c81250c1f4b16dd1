"""Tests of arrays: every file type gives the same values, and no object is ever unpickled."""

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from embrm.adoption import arrays
from embrm.adoption.arrays import open_array, open_states, read_numbers, scan
from embrm.core.errors import UserError

VALUES = torch.arange(24, dtype=torch.float32).view(4, 2, 3) / 7


def write_npy(path: Path, values: torch.Tensor) -> Path:
    np.save(path.with_suffix(".npy"), values.numpy())
    return path.with_suffix(".npy")


def write_pt(path: Path, values: torch.Tensor) -> Path:
    torch.save(values, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def write_safetensors(path: Path, values: torch.Tensor) -> Path:
    safetensors.torch.save_file({"states": values}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


WRITERS = [write_npy, write_pt, write_safetensors]


class _Opened:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("write", WRITERS)
def test_rows_are_those_of_the_file(
    tmp_path: Path, write: Callable[[Path, torch.Tensor], Path], dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and write is write_npy:
        pytest.skip("a .npy file holds no bfloat16")
    values = VALUES.to(dtype)
    found = open_states(write(tmp_path / "states", values))
    assert (found.rows, found.width) == (8, 3)
    assert found.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    taken = found.take(np.array([6, 1, 1]))
    assert taken.dtype == found.dtype
    assert torch.equal(taken, values.view(8, 3)[[6, 1, 1]].to(found.dtype))
    for rows in ([7], [2, 3, 4], [4, 3, 2], [0, 2, 4]):
        taken = found.take(np.array(rows, np.int64))
        assert taken.dtype == found.dtype
        assert torch.equal(taken, values.view(8, 3)[rows].to(found.dtype))


def test_a_scan_in_blocks_equals_one_of_the_whole_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    values[7], values[8], values[9, 2], values[10] = 0, -2.5, torch.nan, 1e30
    values[11] = torch.tensor([1.0, 0, 0, 0, 0, 1])  # equal first and last value, but not constant
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 100)  # four rows
    for write in WRITERS:
        found = scan(open_states(write(tmp_path / "states", values)))
        assert found.sha256 == hashlib.sha256(values.numpy().tobytes()).hexdigest()
        assert np.flatnonzero(found.constant).tolist() == [7, 8, 10]
        assert np.flatnonzero(~np.isfinite(found.norms)).tolist() == [9, 10]
        fine = np.isfinite(found.norms)
        np.testing.assert_allclose(found.norms[fine], values.norm(dim=1).numpy()[fine], rtol=1e-6)
        assert np.array_equal(found.marks, values[:, 3].numpy(), equal_nan=True)


def test_equal_rows_are_found_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 12)
    values = VALUES.view(8, 3).clone()
    values[5] = values[2]
    found = open_states(write_npy(tmp_path / "states", values))
    left, right = np.array([5, 5, 0, 3]), np.array([2, 3, 0, 4])
    assert found.equal_rows(left, right).tolist() == [True, False, True, False]


def test_a_key_chooses_one_of_several_arrays(tmp_path: Path) -> None:
    tensors = {"states": VALUES.clone(), "gold": VALUES[..., 0].clone()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    torch.save({**tensors, "note": "not an array"}, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        assert open_array(path, "states").shape == (4, 2, 3)
        numbers, digest = read_numbers(path, "gold")
        assert np.array_equal(numbers, VALUES[..., 0].double().numpy())
        assert digest == hashlib.sha256(tensors["gold"].numpy().tobytes()).hexdigest()
        with pytest.raises(UserError, match=r"'gold', 'states'|'states', 'gold'"):
            open_array(path)
        with pytest.raises(UserError, match="contains no array 'state': did you mean 'states'"):
            open_array(path, "state")
    with pytest.raises(UserError, match="contains a single array: leave its name 'states' out"):
        open_array(write_npy(tmp_path / "b", VALUES), "states")


def test_integers_are_accepted_as_gold_but_not_as_states(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "ratings", torch.tensor([[1, 5], [3, 3]]))
    assert read_numbers(path, None)[0].tolist() == [[1.0, 5.0], [3.0, 3.0]]
    with pytest.raises(
        UserError, match="has dtype int64: convert it to one of float16, bfloat16, float32"
    ):
        open_states(path)


def _object_npy(path: Path, bait: _Opened) -> None:
    np.save(path, np.array([bait, None], dtype=object), allow_pickle=True)


def _pickled_npy(path: Path, bait: _Opened) -> None:
    path.write_bytes(pickle.dumps(bait))


def _pickled_pt(path: Path, bait: _Opened) -> None:
    torch.save({"states": VALUES, "note": bait}, path)


def _old_pt(path: Path, bait: _Opened) -> None:
    torch.save(bait, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", _object_npy),
        ("a.npy", _pickled_npy),
        ("a.pt", _pickled_pt),
        ("a.pt", _old_pt),
        ("a.pt", _pickled_npy),
    ],
)
def test_pickles_are_refused_and_never_executed(
    tmp_path: Path, name: str, write: Callable[[Path, _Opened], None]
) -> None:
    path, trap = tmp_path / name, tmp_path / "was-run"
    write(path, _Opened(trap))
    with pytest.raises(UserError, match="is not a complete array of numbers") as caught:
        open_states(path, "states" if write is _pickled_pt else None)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(
    tmp_path: Path, write: Callable[[Path, torch.Tensor], Path], kept: int
) -> None:
    path = write(tmp_path / "states", VALUES)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="is not a complete array of numbers") as caught:
        open_states(path)
    assert "\n" not in str(caught.value)


def test_arrays_that_cannot_be_states_are_refused(tmp_path: Path) -> None:
    for shape in [(3,), (2, 2, 2, 2), (0, 3), (2, 0, 3)]:
        with pytest.raises(UserError, match="states have"):
            open_states(write_pt(tmp_path / "a", torch.zeros(shape)))
    np.save(tmp_path / "big.npy", np.zeros((2, 2), ">f4"))
    with pytest.raises(
        UserError, match=r"has dtype >f4: convert it to numbers in this machine's byte"
    ):
        open_states(tmp_path / "big.npy")
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    with pytest.raises(UserError, match="has dtype <U1"):
        open_states(tmp_path / "text.npy")
    np.save(tmp_path / "fortran.npy", np.zeros((4, 3), order="F"))
    with pytest.raises(UserError, match="is not contiguous in C order"):
        open_states(tmp_path / "fortran.npy")
    torch.save(torch.zeros(4, 3).T, tmp_path / "transposed.pt")
    with pytest.raises(UserError, match="C order"):
        open_states(tmp_path / "transposed.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(UserError, match="contains no array"):
        open_states(tmp_path / "none.pt")
    with pytest.raises(UserError, match="no array at"):
        open_states(tmp_path / "absent.npy")
    (tmp_path / "a.csv").write_text("1,2\n")
    with pytest.raises(UserError, match=r"unknown file type '\.csv'"):
        open_states(tmp_path / "a.csv")


def test_memory_does_not_grow_with_the_array(tmp_path: Path) -> None:
    """Measured in a process of its own, whose peak memory nothing else affects."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    size, before, *peaks = map(int, done.stdout.split())
    assert len(peaks) == len(WRITERS)
    assert all(peak - before < size / 4 for peak in peaks), (size, before, peaks)


def _measure_memory(folder: Path) -> None:
    """Print an array's size and the peak memory after reading, first of a small array, then of the
    large one in each file type (scanned as a whole, and copied in pieces)."""
    arrays.BLOCK_BYTES = 1 << 20
    values = torch.ones(12_000, 2048)
    print(values.nbytes)
    paths = [write_npy(folder / "small", values[:1000])]
    paths += [write(folder / "big", values) for write in WRITERS]
    del values
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for path in paths:
        states = open_states(path)
        scan(states)
        for first in range(0, states.rows, 100):
            states.take(np.arange(first, first + 100)[::-1])  # reversed, so that rows are copied
        lines = Path("/proc/self/status").read_text().splitlines()
        [peak] = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        print(1024 * peak)


if __name__ == "__main__":
    _measure_memory(Path(sys.argv[1]))
