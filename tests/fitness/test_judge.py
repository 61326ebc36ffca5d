"""A judge's marks become scores, and what it cannot mark is counted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigurationError, FitnessError, TaskError
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet, UnavailableError
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.fitness.judge import Judge, check_prompt, make_client, read_key, read_mark, render
from evomerge.fitness.own import Subject
from evomerge.measure_settings import JudgeSettings
from tests.fitness.test_chat_client import in_turn
from tests.judges import Answer, Question, serving
from tests.tasks import write_tasks


def settings(url: str = "http://localhost:1/v1", **more: Any) -> JudgeSettings:
    given: dict[str, Any] = {
        "model": "m",
        "prompt": "{{q}} {{generation}}",
        "scale": [1, 10],
        "retries": 0,
        **more,
    }
    return JudgeSettings(url=url, **given)


def judge(asked: JudgeSettings, *, maximize: bool = True) -> Judge:
    return Judge(asked, make_client(asked), maximize=maximize)


def subject(*texts: list[str]) -> Subject:
    """One document for every list of what was said on it."""
    documents = [{"q": f"q{place}"} for place in range(len(texts))]
    unused: Any = None
    return Subject(task=None, documents=documents, texts=texts, model=unused, tokenizer=unused)


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("8", 8),
        (" 8.5\n", 8.5),
        ("8,5", 8.5),
        ("**8**", 8),
        ("Rating: [[7]]", 7),
        ("8/10", 8),
        ("8 / 10.", 8),
        ("I give it 8 out of 10.", 8),
        ("10/10", 10),
        ("I would rate this 7 on a scale of 1-10.", 7),
        ("On a scale from 1 to 10, this is a 3", 3),
        ("It has 2 mistakes and 1 omission. Rating: 4", 4),
        ("評価は８点です", 8),
        ("8点（10点満点）", 8),
        ("Ten points", None),
        ("", None),
        ("11", None),
        ("0", None),
        ("-5", None),
        ("I cannot rate v2 of this.", None),
        ("4 (out of 10)", 4),
        ("I give 7, between 1 and 10", 7),
        (".5", None),
    ],
)
def test_the_mark_is_the_last_number_that_does_not_name_the_scale(reply: str, mark: float | None) -> None:
    assert read_mark(reply, (1.0, 10.0)) == mark


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ("-3", -3),
        ("−3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("-3 of 5", -3),
        ("-5 to 5: 2", 2),
        ("0 on a scale from -5 to 5", 0),
    ],
)
def test_a_scale_may_begin_below_0(reply: str, mark: float) -> None:
    assert read_mark(reply, (-5.0, 5.0)) == mark


def test_scores_are_shares_of_the_scale_in_the_order_of_the_documents() -> None:
    """However the replies come in."""
    marks = {"q0 a": "1", "q1 b": "10", "q2 c": "5.5", "q3 d": "Mark: 4/10"}

    with serving(lambda question: marks[question.prompt]) as server:
        found = judge(settings(server.url)).score(subject(["a"], ["b"], ["c"], ["d"]))
        assert len(server.questions) == 4
    assert found.values == [0.0, 1.0, 0.5, pytest.approx(3 / 9)]
    assert found.counts == {"judged": 4, "unreadable": 0}


def test_several_generations_of_a_document_count_by_their_mean() -> None:
    with serving(lambda question: question.prompt[-1]) as server:
        found = judge(settings(server.url)).score(subject(["1", "4"], ["7", "7"]))
        assert sorted(question.prompt for question in server.questions) == ["q0 1", "q0 4", "q1 7"]
    assert found.values == [pytest.approx(1.5 / 9), pytest.approx(6 / 9)]
    assert found.counts["judged"] == 4


def test_the_same_question_is_asked_once() -> None:
    with serving(in_turn("3")) as server:
        asked = judge(settings(server.url))
        first = asked.score(subject(["a"], ["b"]))
        again = asked.score(subject(["a"], ["c"]))
        assert sorted(question.prompt for question in server.questions) == ["q0 a", "q1 b", "q1 c"]
    assert first == again


@pytest.mark.parametrize("worthless", ["I like it.", "99", Answer(status=400, body=b"too long")])
@pytest.mark.parametrize("maximize", [True, False])
def test_a_reply_without_a_mark_is_counted_and_the_worst(worthless: Answer | str, maximize: bool) -> None:
    def answer(question: Question) -> Answer | str:
        return worthless if question.prompt.endswith("b") else "4"

    with serving(answer) as server:
        asked = judge(settings(server.url), maximize=maximize)
        for _ in range(2):  # counted again where it is remembered
            found = asked.score(subject(["a"], ["b"], ["c"], ["d"]))
            assert found.values[1] == (0.0 if maximize else 1.0)
            assert found.counts == {"judged": 4, "unreadable": 1}
        assert len(server.questions) == 4


def test_a_judge_that_marks_nothing_scores_nothing() -> None:
    """Else every candidate would be equally bad, and the search go nowhere in silence."""
    with serving(in_turn("As a language model I\ncannot.")) as server:
        with pytest.raises(
            FitnessError,
            match=r"judge m: none of 4 replies has a mark from 1 to 10; the first: 'As a language model I cannot.'",
        ):
            judge(settings(server.url)).score(subject(["a"], ["b"], ["c"], ["d"]))
        few = judge(settings(server.url)).score(subject(["a"], ["b"]))
    assert few.values == [0.0, 0.0]


def test_a_judge_that_takes_no_question_stops_the_run() -> None:
    """A model that the server does not have, for instance: no candidate is to blame."""
    with serving(in_turn(Answer(status=400, body=b"no such model"))) as server:
        with pytest.raises(UnavailableError, match="it answers 400 no such model, to each of 4 questions"):
            judge(settings(server.url)).score(subject(["a"], ["b"], ["c"], ["d"]))
        few = judge(settings(server.url)).score(subject(["a"], ["b"]))
    assert few.counts == {"judged": 2, "unreadable": 2}


def test_one_that_has_marked_before_and_refuses_these_questions_is_not_away() -> None:
    def answer(question: Question) -> Answer | str:
        return Answer(status=400, body=b"too long") if "long" in question.prompt else "4"

    with serving(answer) as server:
        asked = judge(settings(server.url))
        asked.score(subject(["a"], ["b"], ["c"], ["d"], ["e"]))
        found = asked.score(subject(["long"], ["long"], ["long"], ["long"], ["e"]))
    assert found.values[:4] == [0.0] * 4
    assert found.counts == {"judged": 5, "unreadable": 4}


def test_no_more_questions_are_on_their_way_than_allowed() -> None:
    lock = threading.Lock()
    running = [0, 0]

    def answer(question: Question) -> str:
        with lock:
            running[0] += 1
            running[1] = max(running)
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return "5"

    with serving(answer) as server:
        judge(settings(server.url, concurrency=3)).score(subject(*([str(place)] for place in range(12))))
    assert running[1] == 3


def test_a_question_that_cannot_be_asked_ends_it_for_all() -> None:
    def answer(question: Question) -> Answer | str:
        return Answer(status=404, body=b"no such model") if question.prompt == "q0 a" else "5"

    with (
        serving(answer) as server,
        pytest.raises(UnavailableError, match="it answers 404 no such model"),
    ):
        judge(settings(server.url)).score(subject(*(["a"] for _ in range(4))))


# Prompts


@pytest.fixture(scope="module")
def library(tasks: Path) -> TaskLibrary:
    return TaskLibrary(["gen", "choose"], [tasks], allow_code=False)


def test_a_prompt_sees_the_document_the_generation_and_the_target(library: TaskLibrary) -> None:
    task = library.tasks["gen"]
    document = {"q": "2+2", "a": "4", "generation": "a field of this name"}
    prompt = "{{q}}: {{generation}}, right: {{target}}; {{document.generation}} {{a|length}}\n"
    assert render(prompt, task, document, "{{5}}") == "2+2: {{5}}, right: 4; a field of this name 1\n"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("{{q", r"not a valid template \(line 1\)"),
        ("{{q}} {{target}}", r"has to see what the model said; put \{\{generation\}\} into the prompt"),
        ("{{generaton}}", "has to see what the model said"),
        (
            "{{qq}} {{generation}}",
            "cannot be filled in for document 0 of gen: 'qq' is undefined .*there are .*q, a",
        ),
        ("{{taget}} {{generation}}", r"'taget' is undefined \(did you mean 'target'\?\)"),
        ("{{generation.__class__.__mro__}}", "cannot be filled in .*unsafe"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_named(library: TaskLibrary, prompt: str, reason: str) -> None:
    with pytest.raises(TaskError, match=reason) as caught:
        check_prompt("gen", library.tasks["gen"], settings(prompt=prompt), "objectives.0.judge.prompt")
    assert caught.value.faults[0].path == "objectives.0.judge.prompt"


def test_a_prompt_that_needs_what_one_document_lacks_is_named(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", count=3)
    lines = (folder / "gen.jsonl").read_text().splitlines()
    (folder / "gen.jsonl").write_text("\n".join([*lines, '{"q": "x", "a": ""}']))
    task = TaskLibrary(["gen"], [folder], allow_code=False).tasks["gen"]
    with pytest.raises(TaskError, match="document 3 of gen: is empty"):
        check_prompt("gen", task, settings(prompt="{{generation}} {{target}}"), "p")
    check_prompt("gen", task, settings(prompt="{{generation}} {{a}}"), "p")


# The harness


def test_the_judge_marks_what_the_live_model_says(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    with serving(in_turn("10")) as server:
        own = {("gen", "judge m"): judge(settings(server.url))}
        metrics = {"gen": (("exact_match", "whole"), ("judge m", "evomerge"))}
        scorer = HarnessEvaluator(
            models["A"], tokenizer, library, metrics, EvaluationSettings(batch_size=4), own
        )
        found = scorer.evaluate([DocumentSet(task="gen", doc_ids=(1, 4, 6), name="gen")])
        said = {instance.doc["q"]: instance.resps[0] for instance in library.tasks["gen"].instances}
        prompts = {question.prompt for question in server.questions}
    assert prompts == {f"{asked} {text}" for asked, text in said.items()}
    assert len(prompts) == 3
    assert found.samples["gen"].values["judge m,evomerge"] == (1.0, 1.0, 1.0)
    assert found.metrics["gen"]["judge m,evomerge"] == 1.0
    assert (found.counts["judged"], found.counts["unreadable"], found.counts["generations"]) == (3, 0, 3)


# The key


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_key(settings()) is None
    asked = settings(api_key_env="MY_JUDGE_KEY")
    for value, reason in (
        ("  ", "is not set"),
        ("sk-1\n2", "cannot be a key"),
        ("schlüssel", "cannot be a key"),
    ):
        monkeypatch.setenv("MY_JUDGE_KEY", value)
        with pytest.raises(
            ConfigurationError, match=f"MY_JUDGE_KEY .*{reason}|MY_JUDGE_KEY {reason}"
        ) as caught:
            read_key(asked)
        assert value.strip() == "" or value.strip() not in str(caught.value)
    monkeypatch.setenv("MY_JUDGE_KEY", " sk-1\n")
    assert read_key(asked) == "sk-1"
