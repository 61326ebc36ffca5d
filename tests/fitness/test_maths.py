"""MGSM and GSM8K are read as their authors publish them, and what one searches on is not in the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.fitness import maths
from evomerge.fitness.maths import MGSM_LANGUAGES, documents, mgsm_items, process_results, question_hash

EXCERPT = Path(__file__).parents[1] / "maths_excerpt"


@pytest.fixture
def three_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take MGSM for its first three problems, with which the excerpt of the test set opens."""
    first = mgsm_items()[:3]
    monkeypatch.setattr(maths, "mgsm_items", lambda: first)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EXCERPT, tmp_path / "data")
    return tmp_path / "data"


def load(source: str, folder: Path, language: str = "en") -> list[dict[str, Any]]:
    # lm-eval passes a task's metadata too.
    found = documents(source=source, language=language, data_dir=str(folder), version=1.0, config_source="x")
    return list(found["test"])


# Documents


@pytest.mark.parametrize("language", MGSM_LANGUAGES)
def test_mgsm_is_read_from_its_authors_file(language: str) -> None:
    question = (EXCERPT / f"mgsm_{language}.tsv").read_text(encoding="utf-8").split("\t")[0]
    assert load("mgsm", EXCERPT, language) == [
        {"id": 0, "question": question, "answer": "3", "language": language}
    ]


def test_gsm8k_is_read_from_its_authors_file() -> None:
    found = load("gsm8k_train", EXCERPT)
    assert [(row["id"], row["answer"]) for row in found] == [(0, "72"), (1, "27")]
    assert found[0]["question"].startswith("Natalia sold clips to 48 of her friends")


def test_data_sets_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("mgsm", "gsm8k"):
        shutil.copytree(EXCERPT, tmp_path / name)
    assert load("mgsm", tmp_path, "ja") == load("mgsm", EXCERPT, "ja")
    assert load("gsm8k_train", tmp_path) == load("gsm8k_train", EXCERPT)


def test_thousands_and_signs_in_the_right_answers_are_plain_numbers(folder: Path) -> None:
    (folder / "mgsm_de.tsv").write_text("Was?\t114,200\r\nUnd?\t-7\n", encoding="utf-8")
    assert [row["answer"] for row in load("mgsm", folder, "de")] == ["114200", "-7"]
    rows = [{"question": "a", "answer": "x #### y\n#### 1,200"}, {"question": "b", "answer": "#### -47"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["answer"] for row in load("gsm8k_train", folder)] == ["1200", "-47"]


@pytest.mark.usefixtures("three_items")
def test_the_rest_of_the_test_set_begins_behind_mgsms_problems() -> None:
    found = load("gsm8k_test_rest", EXCERPT)
    assert [(row["id"], row["answer"]) for row in found] == [(3, "17"), (4, "70")]
    assert not {question_hash(row["question"]) for row in found} & set(mgsm_items())


def test_the_list_of_mgsms_problems_holds_the_250_by_content() -> None:
    items = mgsm_items()
    assert len(items) == len(set(items)) == 250
    test = [json.loads(line) for line in (EXCERPT / "test.jsonl").read_text().splitlines()]
    assert [question_hash(row["question"]) for row in test[:3]] == list(items[:3])
    english = (EXCERPT / "mgsm_en.tsv").read_text(encoding="utf-8").split("\t")[0]
    assert question_hash(english) == items[1]
    assert not {question_hash(row["question"]) for row in test[3:]} & set(items)


def test_a_problem_of_mgsm_is_found_wherever_it_stands(folder: Path) -> None:
    lines = [
        *(folder / "train.jsonl").read_text().splitlines(),
        (folder / "test.jsonl").read_text().splitlines()[2],
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(TaskError, match=r"evaluation\.data_dir: .*train set: problem 3 is one of MGSM's"):
        load("gsm8k_train", folder)


@pytest.mark.usefixtures("three_items")
@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1, 0, 2, 3, 4], "problem 1 is not the one that MGSM took"),
        ([0, 1, 3, 2, 4], "problem 3 is not the one that MGSM took"),
        ([0, 1, 2, 3, 1], "problem 5 is one of MGSM's"),
        ([0, 1, 2], "holds 3 problems, and the first 3 are MGSM's"),
        ([3, 4], "problem 1 is not the one that MGSM took"),
    ],
)
def test_a_test_set_in_another_order_is_refused(folder: Path, order: list[int], message: str) -> None:
    lines = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join(lines[index] for index in order))
    with pytest.raises(TaskError, match=f"{message}.*test.jsonl as OpenAI publishes it"):
        load("gsm8k_test_rest", folder)


# Files that are not what they should be


@pytest.mark.parametrize(
    ("source", "file", "content", "message"),
    [
        ("mgsm", "mgsm_ja.tsv", None, "no such file"),
        ("mgsm", "mgsm_ja.tsv", "", "holds no problems"),
        (
            "mgsm",
            "mgsm_ja.tsv",
            "問題\t3\n問題だけ\n",
            r"mgsm_ja\.tsv:2: expected a question, a tab and a number",
        ),
        ("mgsm", "mgsm_ja.tsv", "問題\t三\n", "problem 1: expected a question and its number"),
        ("mgsm", "mgsm_ja.tsv", "\t3\n", "problem 1: expected a question and its number"),
        ("gsm8k_train", "train.jsonl", None, "no such file"),
        ("gsm8k_train", "train.jsonl", "\n", "holds no problems"),
        ("gsm8k_train", "train.jsonl", "question,answer\n", r"train\.jsonl:1: expected a JSON object"),
        ("gsm8k_train", "train.jsonl", '["a", "b"]\n', r"train\.jsonl:1: expected a JSON object"),
        (
            "gsm8k_train",
            "train.jsonl",
            '{"question": "a"}\n',
            "problem 1: expected a question and its number",
        ),
        ("gsm8k_train", "train.jsonl", '{"question": "a", "answer": "7 apples"}\n', "problem 1: expected"),
    ],
)
def test_a_missing_or_malformed_file_is_named(
    folder: Path, source: str, file: str, content: str | None, message: str
) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=message) as caught:
        load(source, folder, "ja")
    assert caught.value.faults[0].path == "evaluation.data_dir"
    assert file in caught.value.faults[0].reason


def test_bytes_that_are_no_text_and_an_unknown_language_are_named(folder: Path) -> None:
    (folder / "mgsm_ja.tsv").write_bytes("問題\t3".encode("shift_jis"))
    with pytest.raises(TaskError, match=r"cannot read .*mgsm_ja\.tsv"):
        load("mgsm", folder, "ja")
    with pytest.raises(TaskError, match="MGSM has no language 'ko'"):
        load("mgsm", folder, "ko")


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Stand in for the hub's data sets; gives the list of what was asked for."""
    import datasets

    def serve(answer: Any) -> list[Any]:
        asked: list[Any] = []

        def load_dataset(path: str, name: str, *, split: str) -> Any:
            asked.append((path, name, split))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def test_without_a_folder_mgsm_comes_from_the_hub(hub: Callable[[Any], list[Any]]) -> None:
    asked = hub([{"question": "問題", "answer": None, "answer_number": 18, "equation_solution": None}])
    found = documents(source="mgsm", language="ja")["test"]
    assert asked == [("juletxara/mgsm", "ja", "test")]
    assert list(found) == [{"id": 0, "question": "問題", "answer": "18", "language": "ja"}]


@pytest.mark.usefixtures("three_items")
def test_without_a_folder_gsm8k_comes_from_the_hub(hub: Callable[[Any], list[Any]]) -> None:
    rows = [json.loads(line) for line in (EXCERPT / "test.jsonl").read_text().splitlines()]
    asked = hub(rows)
    found = documents(source="gsm8k_test_rest")["test"]
    assert asked == [("openai/gsm8k", "main", "test")]
    assert list(found) == load("gsm8k_test_rest", EXCERPT)


def test_a_hub_out_of_reach_is_said_with_the_file_that_would_do(hub: Callable[[Any], list[Any]]) -> None:
    hub(ConnectionError("offline"))
    with pytest.raises(TaskError, match=r"evaluation\.data_dir: .*juletxara/mgsm.*offline.*mgsm_ja\.tsv"):
        documents(source="mgsm", language="ja")


# Judgement


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("答えは18ドルです。", [1, 1, 0, 0, 1, 1]),
        ("The answer is 18.", [1, 0, 0, 1, 1, 0]),
        ("18", [1, 0, 0, 0, 1, 0]),
        ("答えは16ドルです。", [0, 0, 0, 0, 0, 0]),
        ("わかりません。", [0, 0, 1, 0, 0, 0]),
        ("I do not know the answer.", [0, 0, 1, 1, 0, 0]),
        ("", [0, 0, 1, 0, 0, 0]),
        ("毎日\\boxed{18}ドル、週に126ドルです。", [1, 1, 0, 0, 0, 0]),
        ("答えは-18ドルです。", [0, 0, 0, 0, 1, 1]),
    ],
)
def test_an_answer_is_judged_by_number_and_language(text: str, expected: list[int]) -> None:
    document = {"id": 0, "question": "問題", "answer": "18", "language": "ja"}
    assert process_results(document, [text]) == dict(
        zip(
            ["acc", "acc_lang", "no_answer", "wrong_language", "acc_sakana", "acc_lang_sakana"],
            map(float, expected),
            strict=True,
        )
    )
