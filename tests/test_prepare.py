"""From an experiment file to what a run is made of: measures, documents, and the same again when resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evomerge.prepare import PreparedRun, prepare, settings_of
from tests.tiny import EXPERIMENT, make_experiment, make_task

MORE = """\
constraints:
  - {{task: others, metric: exact_match, retention: 0.9}}
  - {{metric: output_tokens, max: 3}}
  - {{retention: 0.95}}
"""


@pytest.fixture
def prepared(tmp_path: Path, tiny_zoo: Path) -> PreparedRun:
    make_task(tmp_path / "tasks", "others")
    text = EXPERIMENT.replace("search: {{", f"{MORE}search: {{{{").replace(
        "metric: exact_match}}\nconstr",
        "metric: likelihood, normalize: sources}}\n  - {{task: letters, metric: exact_match}}\nconstr",
    )
    return prepare(make_experiment(tmp_path, tiny_zoo, text))


def test_what_constrains_is_scored_beside_what_is_optimised(prepared: PreparedRun) -> None:
    assert [item.label for item in prepared.objectives] == ["letters likelihood", "letters exact_match"]
    assert [item.normalize for item in prepared.objectives] == [True, False]
    assert [item.label for item in prepared.constraints] == [
        "others exact_match retains 0.9 of the best source",
        "letters output_tokens <= 3",
        "letters likelihood retains 0.95 of the best source",
        "letters exact_match retains 0.95 of the best source",
    ]
    assert prepared.spec.metrics == {
        "letters": (("likelihood", "evomerge"), ("exact_match", "none"), ("output_tokens", "evomerge")),
        "others": (("exact_match", "none"),),
    }
    assert prepared.spec.tasks == ("letters", "others")


def test_a_task_that_only_constrains_has_search_and_holdout_documents_of_its_own(
    prepared: PreparedRun,
) -> None:
    searched = {item.name: item.doc_ids for item in prepared.search_documents}
    held_out = {item.name: item.doc_ids for item in prepared.holdout_documents}
    assert list(searched) == list(held_out) == ["letters", "others"]
    for task in searched:
        assert sorted(searched[task] + held_out[task]) == list(range(16))


def test_a_resumed_run_reads_the_same_experiment(prepared: PreparedRun, tmp_path: Path) -> None:
    settings = settings_of(prepared.experiment)
    file = tmp_path / "resolved.yml"
    file.write_text(yaml.safe_dump(settings))
    again = prepare(file)
    assert settings_of(again.experiment) == settings
    assert again.constraints == prepared.constraints
    assert again.objectives == prepared.objectives
