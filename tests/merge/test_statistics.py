"""Statistics are computed once, for tensors of certain content, by one of all processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evomerge.merge.statistics import Key, StatisticsStore

ARRAY = np.arange(12.0).reshape(3, 4)
ONE, TWO, BASE = ("one", "w"), ("two", "w"), ("base", "w")
HASHES = {"one": "1", "two": "2", "base": "b", "copy of one": "1"}


class Computation:
    """Counts how often it is asked."""

    def __init__(self, result: NDArray[Any] = ARRAY) -> None:
        self.result = result
        self.calls = 0

    def __call__(self) -> NDArray[Any]:
        self.calls += 1
        return self.result.copy()


def never() -> NDArray[Any]:
    raise AssertionError("computed again")


def store(folder: Path | None, **hashes: str) -> StatisticsStore:
    return StatisticsStore(folder, {**HASHES, **hashes}.__getitem__)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_known_is_not_computed_again(on_disk: bool, tmp_path: Path) -> None:
    statistics, compute = store(tmp_path if on_disk else None), Computation()
    found = [statistics.get("kind", [ONE, TWO], BASE, compute) for _ in range(3)]
    assert compute.calls == 1
    for array in found:
        np.testing.assert_array_equal(array, ARRAY)


def test_in_memory_no_hash_is_asked_for() -> None:
    def no_hash(model: str) -> str:
        raise AssertionError

    np.testing.assert_array_equal(
        StatisticsStore(None, no_hash).get("kind", [ONE], None, Computation()), ARRAY
    )


@pytest.mark.parametrize("dtype", [np.float64, np.uint16, np.int64])
@pytest.mark.parametrize("shape", [(3, 4), (5,), (3, 0), (0,), ()])
def test_a_second_run_reads_the_file_and_maps_it(dtype: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.ones(shape, dtype)
    for compute in (Computation(array), never):
        found = store(tmp_path).get("kind", [ONE], BASE, compute)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == dtype
        # The first process, too, gives back the memory it computed in.
        assert isinstance(found.base, np.memmap)
    (file,) = files(tmp_path)
    assert file.suffix == ".npy"


def test_writing_to_an_array_by_mistake_leaves_the_file_alone(tmp_path: Path) -> None:
    found = store(tmp_path).get("kind", [ONE], BASE, Computation())
    torch.from_numpy(found).fill_(7)  # torch warns of memory that it may not write to
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, never), ARRAY)


def test_models_are_known_by_content_not_by_name(tmp_path: Path) -> None:
    store(tmp_path).get("kind", [ONE], BASE, Computation())
    store(tmp_path).get("kind", [("copy of one", "w")], BASE, never)


@pytest.mark.parametrize(
    "changed",
    [
        lambda folder, compute: store(folder, one="new").get("kind", [ONE, TWO], BASE, compute),
        lambda folder, compute: store(folder, base="new").get("kind", [ONE, TWO], BASE, compute),
        lambda folder, compute: store(folder).get("another kind", [ONE, TWO], BASE, compute),
        lambda folder, compute: store(folder).get("kind", [TWO, ONE], BASE, compute),
        lambda folder, compute: store(folder).get("kind", [ONE], BASE, compute),
        lambda folder, compute: store(folder).get("kind", [ONE, TWO], None, compute),
        lambda folder, compute: store(folder).get("kind", [ONE, TWO, BASE], None, compute),
        lambda folder, compute: store(folder).get("kind", [ONE, ("two", "x")], BASE, compute),
        lambda folder, compute: store(folder).get("kind", [ONE, TWO], ("base", "x"), compute),
    ],
    ids=["source", "base", "kind", "order", "fewer", "no base", "base among them", "tensor", "base tensor"],
)
def test_anything_else_is_computed_anew(
    changed: Callable[[Path, Computation], NDArray[Any]], tmp_path: Path
) -> None:
    store(tmp_path).get("kind", [ONE, TWO], BASE, Computation(np.zeros(2)))
    compute = Computation()
    np.testing.assert_array_equal(changed(tmp_path, compute), ARRAY)
    assert compute.calls == 1
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE, TWO], BASE, never), np.zeros(2))


def test_another_format_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).get("kind", [ONE], BASE, Computation(np.zeros(2)))
    monkeypatch.setattr("evomerge.merge.statistics.FORMAT", -1)
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, Computation()), ARRAY)


def test_in_one_store_too_everything_has_its_own_entry() -> None:
    statistics = store(None)
    asked: list[tuple[str, list[Key], Key | None]] = [
        ("kind", [ONE, TWO], BASE),
        ("kind", [TWO, ONE], BASE),
        ("kind", [ONE, TWO], None),
        ("kind", [ONE, TWO, BASE], None),
        ("other", [ONE, TWO], BASE),
    ]
    for number, key in enumerate(asked):
        statistics.get(*key, Computation(np.full(2, number)))
    for number, key in enumerate(asked):
        np.testing.assert_array_equal(statistics.get(*key, never), np.full(2, number))


@pytest.mark.parametrize("length", [0, 1, 7, 9, 50, 127, 128, 129, 200, 223])
def test_a_truncated_file_is_written_again(length: int, tmp_path: Path) -> None:
    store(tmp_path).get("kind", [ONE], BASE, Computation())
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    assert len(whole) == 128 + 96
    file.write_bytes(whole[:length])
    compute = Computation()
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, compute), ARRAY)
    assert compute.calls == 1
    assert file.read_bytes() == whole
    assert files(tmp_path) == [file]


@pytest.mark.parametrize("place", [*range(12), 20, 40, 60, 75])
def test_a_damaged_header_is_no_crash(place: int, tmp_path: Path) -> None:
    store(tmp_path).get("kind", [ONE], BASE, Computation())
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, Computation()), ARRAY)


def test_pickled_objects_are_not_read(tmp_path: Path) -> None:
    store(tmp_path).get("kind", [ONE], BASE, Computation())
    (file,) = files(tmp_path)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, Computation()), ARRAY)


def test_a_failed_computation_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        store(tmp_path).get("kind", [ONE], BASE, never)
    assert files(tmp_path) == []
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, Computation()), ARRAY)


def test_where_nothing_can_be_written_statistics_are_computed_in_memory(tmp_path: Path) -> None:
    """A file where the folder should be: this holds for root too, whom permissions do not stop."""
    (tmp_path / "blocked").touch()
    for folder in (tmp_path / "blocked", tmp_path / "blocked" / "deeper"):
        compute = Computation()
        statistics = store(folder)
        for _ in range(2):
            np.testing.assert_array_equal(statistics.get("kind", [ONE], BASE, compute), ARRAY)
        assert compute.calls == 1


def test_without_room_for_the_file_the_array_is_still_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: Any, array: NDArray[Any], **options: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, Computation()), ARRAY)
    assert files(tmp_path) == []


def test_a_file_appears_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to a process on a file system without locks."""
    save, seen = np.save, []

    def watched(stream: Any, array: NDArray[Any], **options: Any) -> None:
        save(stream, array, **options)
        seen.extend(tmp_path.rglob("*.npy"))

    monkeypatch.setattr(np, "save", watched)
    store(tmp_path).get("kind", [ONE], BASE, Computation())
    assert seen == []
    assert [file.suffix for file in files(tmp_path)] == [".npy"]


def test_without_locks_the_array_is_still_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    np.testing.assert_array_equal(store(tmp_path).get("kind", [ONE], BASE, Computation()), ARRAY)
    store(tmp_path).get("kind", [ONE], BASE, never)


WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from evomerge.merge.statistics import StatisticsStore

folder, own = Path(sys.argv[1]), Path(sys.argv[2])
calls = 0

def compute():
    global calls
    calls += 1
    time.sleep(0.5)
    return np.full(5, float(own.name))

own.touch()
while not (own.parent / "go").exists():
    time.sleep(0.001)
found = StatisticsStore(folder, lambda model: "hash").get("kind", [("one", "w")], None, compute)
print(calls, *found.tolist())
"""


def test_of_several_processes_one_computes_and_the_others_wait(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "statistics"), str(marks / str(number))],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    deadline = time.monotonic() + 60
    while len(list(marks.iterdir())) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (marks / "go").touch()
    answers = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(answer[0] for answer in answers) == ["0", "0", "1"]
    assert len({tuple(answer[1:]) for answer in answers}) == 1
    assert [file.suffix for file in files(tmp_path / "statistics")] == [".npy"]
