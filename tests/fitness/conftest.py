"""Tiny models in float32 and tasks on which they score neither 0 nor 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import write_tasks
from tests.tiny import make_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`A` and `B`: live models that answer differently."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate("AB"):
        make_model(folder / name, seed=seed, dtype="float32", max_position_embeddings=96)
        found[name] = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    return found


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tests.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any], tokenizer: Any) -> Path:
    """A folder with the tasks; the right answers of `gen` are in part what model A says."""
    from evomerge.experiment import EvaluationSettings
    from evomerge.fitness.base import DocumentSet
    from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary

    folder = write_tasks(tmp_path_factory.mktemp("tasks"), count=10)
    library = TaskLibrary(["gen"], [folder], allow_code=False)
    scorer = HarnessEvaluator(
        models["A"], tokenizer, library, {"gen": [("exact_match", "whole")]}, EvaluationSettings()
    )
    scorer.evaluate([DocumentSet(task="gen", doc_ids=tuple(range(10)), name="gen", complete=True)])
    said = iter([instance.resps[0] for instance in library.tasks["gen"].instances])
    rows = [json.loads(line) for line in (folder / "gen.jsonl").read_text().splitlines()]
    for position, (row, text) in enumerate(zip(rows, said, strict=True)):
        row["a"] = (text, text[:1], "zz")[position % 3]
    (folder / "gen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
