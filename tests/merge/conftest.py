"""Zoos of tiny models for merges."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_zoo


@pytest.fixture(scope="session")
def float_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny zoo in float32: its task vectors are continuous, without two equal magnitudes."""
    return make_zoo(tmp_path_factory.mktemp("float-zoo"), dtype="float32")
