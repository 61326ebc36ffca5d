"""Models get short names that tell them apart."""

from __future__ import annotations

import pytest

from evomerge.spaces.base import short_names


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([], []),
        (["/m/math"], ["math"]),
        (["/m/math", "org/code@v1"], ["math", "code@v1"]),
        (["/a/model", "/b/model/"], ["a/model", "b/model"]),
        (["a/b", "c/a/b"], ["a/b", "c/a/b"]),
        (["x", "x"], ["x", "x"]),
    ],
)
def test_names_are_the_shortest_tails_that_differ(models: list[str], names: list[str]) -> None:
    assert list(short_names(models).values()) == names[: len(set(models))]
