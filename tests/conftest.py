"""Fixtures shared by all tests: tiny random models, made once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of file hashes, and lm-eval's data sets, out of the home directory."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["EVOMERGE_CACHE"] = str(folder / "evomerge")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `one`, `two` and `three`: random Llama checkpoints with a shared tokenizer.

    4 layers of width 32, a vocabulary of 64, bfloat16, an output head of its own. The others are the base
    plus small random changes, like fine-tuned models.
    """
    from tests.tiny import make_zoo

    return make_zoo(tmp_path_factory.mktemp("zoo"))
