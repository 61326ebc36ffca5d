"""What is wrong with a judge, its key or its replies is named, or counted and shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evomerge.journal import Journal
from tests.cli.conftest import Command
from tests.cli.own import CANARY, JUDGE_ASKED, SHORT, ask_for, marks, scores
from tests.judges import Question, serving


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_TEST_KEY", CANARY)


def test_a_key_that_is_not_there_is_named_before_the_run(
    command: Command, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVOMERGE_TEST_KEY", raising=False)
    ask_for(experiment, JUDGE_ASKED)
    assert command("validate", experiment).code == 0
    result = command("run", experiment)
    assert result.code == 2
    assert "the environment variable EVOMERGE_TEST_KEY is not set" in result.err
    assert not (tmp_path / "runs").exists()


def test_replies_without_a_mark_are_counted_and_shown(
    command: Command, experiment: Path, tmp_path: Path, key: None
) -> None:
    def answer(question: Question) -> str:
        return "I would rather not." if question.prompt.startswith("h7=") else marks(question)

    with serving(answer) as server:
        ask_for(experiment, JUDGE_ASKED, url=server.url)
        result = command("run", experiment, *SHORT)
    assert result.code == 0, result.err
    journal = Journal.load(tmp_path / "runs/tiny/journal.jsonl")
    on_holdout = (
        7
        in scores(tmp_path / "runs/tiny")[
            next(Path(final.scores).stem for final in journal.finals if final.stage == "holdout")
        ].doc_ids
    )
    counts = [final.counts for final in journal.finals if final.stage == "holdout"]
    assert on_holdout
    assert {count["unreadable"] for count in counts} == {1}
    assert re.search(r"^winner .* 1 of \d+, .*%$", result.out, re.MULTILINE), result.out


def test_a_judge_that_never_marks_stops_the_run(command: Command, experiment: Path, key: None) -> None:
    with serving(lambda _: "I would rather not.") as server:
        ask_for(experiment, JUDGE_ASKED, url=server.url)
        result = command("run", experiment)
    assert result.code == 4
    assert "judge org/my-judge: none of 12 replies has a mark from 1 to 10" in result.err
    assert "'I would rather not.'" in result.err


BAD_JUDGES = {
    "no generation in the prompt": (
        "{{generation}}",
        "",
        ["objectives.0.judge.prompt", "put {{generation}} into"],
    ),
    "an unknown field": ("{{question}}", "{{questoin}}", ["judge.prompt", "did you mean 'question'?"]),
    "a key in the address": ("http://", f"http://me:{CANARY}@", ["judge.url", "api_key_env"]),
    "a key in the address's query": ("/v1", f"/v1?key={CANARY}", ["judge.url", "without '?'"]),
    "a key instead of its variable": ("EVOMERGE_TEST_KEY", CANARY, ["api_key_env", "never a key itself"]),
    "a whole endpoint": ("/v1", "/v1/chat/completions", ["judge.url", "write what comes before"]),
    "a scale upside down": ("[1, 10]", "[10, 1]", ["judge.scale", "lowest mark before the highest"]),
    "a misspelt key": ("retries", "retires", ["judge.retires", "did you mean 'retries'?"]),
    "no model": ("model: org/my-judge", "name: x", ["judge.model", "missing"]),
}


@pytest.mark.parametrize("case", BAD_JUDGES)
def test_a_fault_of_a_judge_is_named_with_its_place(command: Command, experiment: Path, case: str) -> None:
    before, after, expected = BAD_JUDGES[case]
    ask_for(experiment, JUDGE_ASKED)
    text = experiment.read_text()
    assert before in text
    experiment.write_text(text.replace(before, after))
    result = command("validate", experiment)
    assert result.code == 2
    for part in expected:
        assert part in result.err
    assert CANARY not in result.err


def test_two_judges_of_one_name_are_told_apart(command: Command, experiment: Path) -> None:
    two = JUDGE_ASKED.replace("Rate", "Be strict and rate")
    ask_for(experiment, JUDGE_ASKED, two)
    refused = command("validate", experiment)
    assert refused.code == 2
    assert "the same task and metric are named twice" in refused.err or "give one a name" in refused.err
    text = experiment.read_text()
    start = text.index("Be strict")
    experiment.write_text(text[:start] + text[start:].replace("      retries: 0", "      name: strict", 1))
    assert command("validate", experiment).code == 0


def test_a_judge_far_away_should_not_be_sent_its_key_in_the_clear(command: Command, experiment: Path) -> None:
    ask_for(experiment, JUDGE_ASKED, url="http://judge.example/v1")
    checked = command("validate", experiment)
    assert checked.code == 0
    assert "judge org/my-judge: its key goes over the network unencrypted" in checked.err
