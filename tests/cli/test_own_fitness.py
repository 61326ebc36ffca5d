"""A search by functions and a judge of the user's own: whole, cut off while the judge is away, on Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from evomerge.journal import Journal
from tests.cli.conftest import Result, call
from tests.cli.own import (
    CANARY,
    CONSTRAINTS,
    FUNCTIONS_ASKED,
    JUDGE_ASKED,
    ask_for,
    assert_secret,
    mark,
    marks,
    recorded,
    scores,
    value,
    write_functions,
)
from tests.judges import Answer, JudgeServer, Question, serving
from tests.tiny import make_experiment


@dataclass(frozen=True, kw_only=True)
class Study:
    """A finished run by two functions and a judge, with constraints on them."""

    folder: Path
    server: JudgeServer
    result: Result
    num_questions: int

    @property
    def run_dir(self) -> Path:
        return self.folder / "whole"


@pytest.fixture(scope="module")
def study(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder = tmp_path_factory.mktemp("own")
    experiment = make_experiment(folder, tiny_zoo)
    write_functions(folder)
    with serving(marks) as server, pytest.MonkeyPatch.context() as patch:
        ask_for(experiment, FUNCTIONS_ASKED, JUDGE_ASKED, CONSTRAINTS, url=server.url)
        patch.setenv("EVOMERGE_TEST_KEY", CANARY)
        patch.chdir(folder)
        result = call("run", experiment, "--allow-code", "--run-dir", "whole")
        assert result.code == 0, result.err
        yield Study(folder=folder, server=server, result=result, num_questions=len(server.questions))


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_TEST_KEY", CANARY)


@pytest.fixture
def server(study: Study, monkeypatch: pytest.MonkeyPatch, key: None) -> Iterator[JudgeServer]:
    """The study's judge, in the study's folder; it answers as before in the end."""
    monkeypatch.chdir(study.folder)
    yield study.server
    study.server.answer = marks


def test_a_run_searches_by_what_is_the_users_own(study: Study, server: JudgeServer) -> None:
    (header,) = [line for line in study.result.out.splitlines() if line.startswith("on held-out documents  ")]
    for label in ("letters own_score:letters", "letters own_score:certainty", "letters judge org/my-judge"):
        assert label in header
    assert "lm_eval" not in study.result.out
    said = {tuple(json.loads(line)) for line in (study.folder / "said.jsonl").read_text().splitlines()}
    possible: dict[str, set[tuple[float, float]]] = {}
    for question, text in said:
        right = question[0]
        prompt = f"{question} {text} (right: {right}). Rate from 1 to 10."
        possible.setdefault(question, set()).add((value(text), (mark(prompt) - 1) / 9))
    questions = [f"{'abcdefghijklmnop'[place]}{place % 10}=" for place in range(16)]
    found = scores(study.run_dir)
    assert {len(each.doc_ids) for name, each in found.items() if name.endswith("-search")} == {12}
    assert {len(each.doc_ids) for name, each in found.items() if name.endswith("-holdout")} == {4}
    for each in found.values():
        columns = (each.values[f"{name},evomerge"] for name in ("own_score:letters", "judge org/my-judge"))
        for place, *numbers in zip(each.doc_ids, *columns, strict=True):
            assert any(numbers == pytest.approx(pair) for pair in possible[questions[place]])
        assert all(number < 0 for number in each.values["own_score:certainty,evomerge"])


def test_the_fitness_is_made_of_them(study: Study, server: JudgeServer) -> None:
    best = max(Journal.load(study.run_dir / "journal.jsonl").trials, key=lambda trial: trial.fitness or -9)
    means = {
        name: float(np.mean(each.values["own_score:letters,evomerge"]))
        for name, each in scores(study.run_dir).items()
    }
    reference = max(
        mean for name, mean in means.items() if name.startswith(("one", "two", "base")) and "search" in name
    )
    letters, certainty, judged = (
        best.metrics["letters"][f"{name},evomerge"]
        for name in ("own_score:letters", "own_score:certainty", "judge org/my-judge")
    )
    assert best.fitness == pytest.approx((letters / reference + certainty + judged) / 3)
    assert best.counts["judged"] == 12
    status = json.loads(call("status", "whole", "--json").out)
    assert set(status["front"][0]["metrics"]) == {
        "letters own_score:letters",
        "letters own_score:certainty",
        "letters judge org/my-judge",
    }
    assert status["holdout"]["rows"][0]["name"] == "winner"


def test_a_finished_run_is_shown_again_without_asking_anyone(study: Study, server: JudgeServer) -> None:
    assert call("resume", "whole", "--allow-code").out == study.result.out
    assert len(server.questions) >= study.num_questions
    prompts = [question.prompt for question in server.questions[: study.num_questions]]
    assert len(set(prompts)) == len(prompts), "the same question is asked once"
    assert {question.headers["Authorization"] for question in server.questions} == {f"Bearer {CANARY}"}
    assert not (study.folder / "__pycache__").exists()
    settings = Journal.load(study.run_dir / "journal.jsonl").header.settings["objectives"][2]["judge"]
    assert settings["url"] == server.url
    assert settings["prompt"].startswith("{{question}} {{generation}}")


def test_a_changed_function_is_refused_with_what_changed(study: Study, server: JudgeServer) -> None:
    for name in ("own_score.py", "own_helper.py"):
        file = study.folder / name
        before = file.read_text()
        file.write_text(before + "# a remark\n")
        try:
            refused = call("resume", "whole", "--allow-code")
        finally:
            file.write_text(before)
        assert refused.code == 3
        assert re.search(rf"code {name}: \w{{16}} -> \w{{16}}", refused.err)


def test_a_run_stops_while_its_judge_is_away_and_ends_as_if_nothing_had_happened(
    study: Study, server: JudgeServer
) -> None:
    journal = study.folder / "stopped" / "journal.jsonl"

    def fail(question: Question) -> Answer | str:
        if not journal.exists() or journal.read_text().count('"kind":"trial"') < 2:
            return marks(question)
        return Answer(status=500, body=f"out of memory, {question.headers['Authorization']}".encode())

    server.answer = fail
    cut = call("run", "experiment.yml", "--allow-code", "--run-dir", "stopped")
    assert cut.code == 75
    address = f"{server.url}/chat/completions"
    assert f"the judge org/my-judge at {address} cannot be asked: it answers 500" in cut.err
    assert "`evomerge resume stopped` continues when that is put right" in cut.err
    assert json.loads(call("status", "stopped", "--json").out)["state"] == "stopped"
    before = Journal.load(journal).trials
    assert 0 < len(before) < 6
    assert {trial.status for trial in before} == {"ok"}
    assert call("resume", "stopped", "--allow-code").code == 75
    assert Journal.load(journal).trials == before

    server.answer = marks
    resumed = call("resume", "stopped", "--allow-code")
    assert resumed.code == 0, resumed.err
    assert recorded(study.folder / "stopped") == recorded(study.run_dir)
    assert resumed.out.replace("stopped", "whole") == study.result.out
    assert_secret(study.folder, study.result.err, cut.out, cut.err, resumed.out, resumed.err)


def test_a_rejected_key_stops_the_run_and_names_its_variable(study: Study, server: JudgeServer) -> None:
    server.answer = lambda _: Answer(status=401, body=f"invalid key {CANARY}".encode())
    result = call("run", "experiment.yml", "--allow-code", "--run-dir", "rejected")
    assert result.code == 75, result.err
    assert "check the key in the environment variable EVOMERGE_TEST_KEY" in result.err
    assert Journal.load(study.folder / "rejected/journal.jsonl").finals == []
    assert_secret(study.folder / "rejected", result.out, result.err)


def test_on_ray_the_journal_is_the_same(study: Study, server: JudgeServer) -> None:
    workers = ("--set", "workers={backend: ray, count: 1}")
    before = len(server.questions)
    result = call("run", "experiment.yml", "--allow-code", "--run-dir", "ray", *workers)
    assert result.code == 0, result.err
    assert recorded(study.folder / "ray") == recorded(study.run_dir)
    keys = [question.headers["Authorization"] for question in server.questions[before:]]
    assert keys == [f"Bearer {CANARY}"] * study.num_questions
    assert_secret(study.folder / "ray", result.out, result.err)


def test_to_resume_needs_permission_again(study: Study, server: JudgeServer) -> None:
    (study.folder / "imported").unlink()
    resumed = call("resume", "whole", "--allow-task-code")
    assert resumed.code == 2
    assert f"objectives.0.fitness: {study.folder}/own_score.py is Python code" in resumed.err
    assert not (study.folder / "imported").exists()
