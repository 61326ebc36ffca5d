"""Experiments with functions and judges of the user's own, from the command line to the holdout table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.journal import Journal
from evomerge.records import SampleScores
from evomerge.run_dir import RunDir
from tests.cli.conftest import Command, Result, call
from tests.judges import Answer, JudgeServer, Question, serving
from tests.tiny import make_experiment

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


@pytest.fixture
def functions(experiment: Path) -> Path:
    """An experiment with two functions in a file beside it."""
    ask_for(experiment, FUNCTIONS_ASKED)
    write_functions(experiment.parent)
    return experiment


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_TEST_KEY", CANARY)


Answers = Callable[[Question], Answer | str]


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
def server(study: Study, monkeypatch: pytest.MonkeyPatch, key: None) -> Iterator[JudgeServer]:
    """The study's judge, in the study's folder; it answers as before in the end."""
    monkeypatch.chdir(study.folder)
    yield study.server
    study.server.answer = marks


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


# A run in one piece


def test_a_run_searches_by_what_is_the_users_own(study: Study, server: JudgeServer) -> None:
    (header,) = [line for line in study.result.out.splitlines() if line.startswith("on held-out documents")]
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


# Judges that are away


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


# Functions


def test_candidates_race_by_functions(command: Command, functions: Path, tmp_path: Path) -> None:
    functions.write_text(functions.read_text().replace("  batch_size: 8", "  racing: {}"))
    result = command("run", functions, "--allow-code", *SHORT, "--set", "search.evaluations=4")
    assert result.code == 0, result.err
    blocks = Journal.load(tmp_path / "runs/tiny/journal.jsonl").blocks
    assert blocks
    assert {tuple(block.metrics["letters"]) for block in blocks.values()} == {
        ("own_score:letters,evomerge", "own_score:certainty,evomerge")
    }


def test_nothing_of_the_users_runs_without_permission(
    command: Command, functions: Path, tmp_path: Path
) -> None:
    checked = command("validate", functions)
    assert (checked.code, checked.out) == (0, f"{functions}: valid experiment\n")
    assert "needs --allow-code, as it runs own_helper.py, own_score.py" in checked.err
    planned = command("plan", functions)
    assert planned.code == 0, planned.err
    assert "the time that own_score:letters, own_score:certainty takes is not known" in planned.err
    for more in ((), ("--allow-task-code",)):
        refused = command("run", functions, *more)
        assert refused.code == 2
        for place in ("experiment.yml:12: objectives.0.fitness", "experiment.yml:13: objectives.1.fitness"):
            assert f"{place}: {tmp_path}/own_score.py is Python code" in refused.err
        assert "--allow-code" in refused.err
    evaluated = command(
        "evaluate", "x", "--tasks", "letters", "--include-path", "tasks", "--fitness", "own_score:letters"
    )
    assert evaluated.code == 2
    assert "own_score.py is Python code that would be run" in evaluated.err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "imported").exists()


def test_to_resume_needs_permission_again(study: Study, server: JudgeServer) -> None:
    (study.folder / "imported").unlink()
    resumed = call("resume", "whole", "--allow-task-code")
    assert resumed.code == 2
    assert f"objectives.0.fitness: {study.folder}/own_score.py is Python code" in resumed.err
    assert not (study.folder / "imported").exists()


def test_a_function_that_always_fails_stops_the_run_with_its_line(
    command: Command, functions: Path, tmp_path: Path
) -> None:
    text = functions.read_text().replace('"own_score:letters", normalize: sources', '"own_score:fussy"')
    functions.write_text(text)
    result = command("run", functions, "--allow-code")
    assert result.code == 4
    line = FUNCTIONS.splitlines().index('    raise ValueError("too fussy")') + 1
    assert f"own_score:fussy raised ValueError: too fussy (own_score.py:{line})" in result.err
    trials = Journal.load(tmp_path / "runs/tiny/journal.jsonl").trials
    assert {trial.status for trial in trials} == {"invalid"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            '"own_score:letters", n',
            '"own_scor:letters", n',
            ["experiment.yml:12: objectives.0.fitness", "no module"],
        ),
        (
            '"own_score:letters", n',
            '"own_score:leters", n',
            ["objectives.0.fitness", "did you mean 'letters'?"],
        ),
        (
            '"own_score:letters", n',
            '"own_score", n',
            ["objectives.0.fitness", "expected package.module:function"],
        ),
        (", given: model", "", ["own_score:certainty", "expected certainty(documents, generations)"]),
        (
            '"own_score:letters", n',
            '"own_score:letters", metric: x, n',
            ["objectives.0", "one of metric, fitness"],
        ),
        ('"own_score:letters", n', '"own_score:certainty", n', ["objectives", "named twice"]),
        (
            "  holdout: 0.25",
            "  holdout: 0.25\n  code_path: nowhere",
            ["evaluation.code_path", "no such folder"],
        ),
    ],
)
def test_a_fault_is_named_with_its_place(
    command: Command, functions: Path, tmp_path: Path, before: str, after: str, expected: list[str]
) -> None:
    text = functions.read_text()
    assert before in text
    functions.write_text(text.replace(before, after))
    result = command("run", functions, "--allow-code")
    assert result.code in (1, 2)
    for part in expected:
        assert part in result.err
    assert not (tmp_path / "runs").exists()


def test_evaluate_tries_a_function_on_one_model(
    command: Command, functions: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    common = ["evaluate", tiny_zoo / "one", "--tasks", "letters", "--include-path", "tasks", "--json"]
    found = command(*common, "--allow-code", "--fitness", "own_score:letters")
    assert found.code == 0, found.err
    said = [json.loads(line)[1] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == 16
    metrics = json.loads(found.out)["tasks"]["letters"]["metrics"]
    assert metrics["own_score:letters,evomerge"] == pytest.approx(np.mean([value(text) for text in said]))
    assert "exact_match,none" in metrics


# Judges


def assert_secret(folder: Path, *texts: str) -> None:
    """The key is in no output and in no file."""
    assert not any(CANARY in text for text in texts)
    for file in folder.rglob("*"):
        assert not (file.is_file() and CANARY.encode() in file.read_bytes()), file


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
    assert "replies of judges without a mark, counted as the worst: winner 1, " in result.out


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
