"""Experiments with a function and a judge of the user's own, for the tests of the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from evomerge.journal import Journal
from evomerge.records import SampleScores
from evomerge.run_dir import RunDir
from tests.judges import Question

FUNCTIONS = """\
import json
from pathlib import Path

from own_helper import value

Path(__file__).with_name("imported").touch()


def letters(documents, generations):
    with Path(__file__).with_name("said.jsonl").open("a") as file:
        for document, text in zip(documents, generations):
            file.write(json.dumps([document["question"], text]) + "\\n")
    return [value(text) for text in generations]


def certainty(model, tokenizer, documents):
    found = []
    for document in documents:
        ids = tokenizer(document["question"], return_tensors="pt").input_ids
        found.append(model(ids).logits[0, -1].float().log_softmax(-1).max())
    return found


def fussy(documents, generations):
    raise ValueError("too fussy")
"""

HELPER = """\
def value(text):
    return sum(map(ord, text)) % 17
"""

CANARY = "sk-canary-91c4"

FUNCTIONS_ASKED = """\
  - {{task: letters, fitness: "own_score:letters", normalize: sources}}
  - {{task: letters, fitness: "own_score:certainty", given: model}}
"""

JUDGE_ASKED = """\
  - task: letters
    judge:
      url: {url}
      model: org/my-judge
      prompt: "{{{{question}}}} {{{{generation}}}} (right: {{{{target}}}}). Rate from 1 to 10."
      scale: [1, 10]
      api_key_env: EVOMERGE_TEST_KEY
      retries: 0
"""

CONSTRAINTS = """\
constraints:
  - {{task: letters, metric: "own_score:letters", max: 100}}
  - {{task: letters, metric: judge org/my-judge, min: 0.01}}
"""

NOWHERE = "http://127.0.0.1:9/v1"

SHORT = ("--set", "search.evaluations=2", "--set", "finish={confirm: 0, baseline_scales: []}")


def value(text: str) -> float:
    return sum(map(ord, text)) % 17


def mark(prompt: str) -> int:
    """A mark that depends on the question alone."""
    return 1 + int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10


def marks(question: Question) -> str:
    return f"{mark(question.prompt)}/10"


def ask_for(experiment: Path, *parts: str, url: str = NOWHERE) -> None:
    """Replace the objectives of an experiment."""
    before = experiment.read_text()
    old = "objectives:\n  - {task: letters, metric: exact_match}\n"
    assert old in before
    experiment.write_text(before.replace(old, "objectives:\n" + "".join(parts).format(url=url)))


def write_functions(folder: Path) -> None:
    (folder / "own_score.py").write_text(FUNCTIONS)
    (folder / "own_helper.py").write_text(HELPER)


def recorded(run_dir: Path) -> list[tuple[Any, ...]]:
    journal = Journal.load(run_dir / "journal.jsonl")
    trials = [
        (trial.number, trial.genome, trial.status, trial.fitness, trial.metrics, trial.counts)
        for trial in sorted(journal.trials, key=lambda trial: trial.number)
    ]
    finals = sorted((final.stage, final.name, final.metrics) for final in journal.finals)
    return [*trials, *finals]


def scores(run_dir: Path) -> dict[str, SampleScores]:
    """File of scores -> those of the task."""
    folder = RunDir(run_dir)
    return {
        file.stem: folder.read_scores(f"scores/{file.name}")["letters"]
        for file in (run_dir / "scores").iterdir()
    }


def assert_secret(folder: Path, *texts: str) -> None:
    """The key is in no output and in no file."""
    assert not any(CANARY in text for text in texts)
    for file in folder.rglob("*"):
        assert not (file.is_file() and CANARY.encode() in file.read_bytes()), file
