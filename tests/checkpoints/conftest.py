"""No test of checkpoints touches the caches of the person who runs it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("evomerge-cache")
    monkeypatch.setenv("EVOMERGE_CACHE", str(folder))
    return folder
