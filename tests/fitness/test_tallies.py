"""Texts without an answer or in another language are counted where this can be known, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.fitness.metrics import judged
from evomerge.fitness.tallies import audit_metrics, tally
from tests.tasks import GENERATE, write_tasks

JAPANESE, ENGLISH = "答えは十八です。ステップごとに考えます。", "The answer is eighteen, step by step."


def task_with(folder: Path, before: str = "task: gen", after: str = "task: gen") -> Any:
    write_tasks(folder, count=4)
    assert before in GENERATE
    (folder / "gen.yaml").write_text(GENERATE.replace(before, after))
    return TaskLibrary(["gen"], [folder], allow_code=False).tasks["gen"]


def counted(task: Any, texts: list[list[str]], *wanted: tuple[str, str]) -> dict[str, int]:
    """The tally of a task's documents for which these texts were generated."""
    from lm_eval.api.instance import Instance

    documents = []
    for place, responses in enumerate(texts):
        document = task.eval_docs[place % len(task.eval_docs)]
        item = Instance(request_type="generate_until", doc=document, arguments=("", {}), idx=0)
        item.resps = responses
        documents.append((document, [item]))
    pairs = list(dict.fromkeys([*wanted, *audit_metrics(task, wanted)]))
    return tally(task, documents, judged(task, documents, pairs), wanted)


def test_a_filter_that_finds_nothing_leaves_no_answer(tmp_path: Path) -> None:
    task = task_with(tmp_path, 'regex_pattern: "^(.)"', 'regex_pattern: "([0-9]+)"')
    texts = [["it is 7"], ["no idea"], [""], ["[invalid]"]]
    assert counted(task, texts, ("exact_match", "first")) == {"empty": 1, "no_answer": 3, "answers_judged": 4}


def test_the_filter_that_is_scored_by_decides(tmp_path: Path) -> None:
    """`whole` takes every text as it is, so nothing is known of answers; `first` looks for one."""
    task = task_with(tmp_path)
    texts = [["a"], [""]]
    assert counted(task, texts, ("exact_match", "whole")) == {"empty": 1}
    assert counted(task, texts, ("exact_match", "first"))["no_answer"] == 1
    assert counted(task, texts) == {"empty": 1}, "only lengths are asked for: the first filter counts"


@pytest.mark.parametrize(
    ("filters", "missing"),
    [
        ("{function: regex, regex_pattern: '([0-9])'}, {function: uppercase}, {function: take_first}", 2),
        ("{function: regex, regex_pattern: '([0-9])'}", 2),
        ("{function: regex, regex_pattern: '([0-9])'}, {function: majority_vote}, {function: take_first}", 2),
        ("{function: regex, regex_pattern: '([0-9])', fallback: ''}, {function: take_first}", 2),
        ("{function: regex, regex_pattern: '([0-9])', fallback: '0'}, {function: take_first}", None),
        ("{function: remove_whitespace}, {function: take_first}", None),
    ],
)
def test_marks_are_followed_through_the_filters_behind(
    tmp_path: Path, filters: str, missing: int | None
) -> None:
    """A fallback that the task chose itself may be an answer, so it says nothing."""
    task = task_with(tmp_path, '{function: regex, regex_pattern: "^(.)"}, {function: take_first}', filters)
    texts = [["1"], ["none", "none"], ["2", "2"], [" "]]
    if "take_first" not in filters:
        metrics: tuple[tuple[str, str], ...] = ()
        task._filters = [each for each in task._filters if each.name == "first"]
    else:
        metrics = (("exact_match", "first"),)
    assert counted(task, texts, *metrics).get("no_answer") == missing


def test_the_language_that_the_task_names_is_judged(tmp_path: Path) -> None:
    task = task_with(tmp_path, "metadata: {", "metadata: {language: ja, ")
    found = counted(task, [[JAPANESE], [ENGLISH], ["18"]], ("exact_match", "whole"))
    assert found == {"empty": 0, "wrong_language": 1, "languages_judged": 3}


def test_a_language_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gen: metadata.language: .*; got 'jp'"):
        task_with(tmp_path, "metadata: {", "metadata: {language: jp, ")


def test_the_worked_answers_know_both_by_their_own_metrics() -> None:
    folder = Path(__file__).parents[2] / "tasks"
    library = TaskLibrary(
        ["mgsm_ja_cot"], [folder], allow_code=False, data_dir=str(Path(__file__).parents[1] / "maths_excerpt")
    )
    task = library.tasks["mgsm_ja_cot"]
    found = counted(task, [[JAPANESE + "18"], [ENGLISH + " 18"], [JAPANESE]], ("acc", "none"))
    assert found == {
        "empty": 0,
        "no_answer": 1,
        "answers_judged": 3,
        "wrong_language": 1,
        "languages_judged": 3,
    }


def test_every_evaluation_counts_whatever_it_scores_by(
    tmp_path: Path, models: dict[str, Any], tokenizer: Any
) -> None:
    write_tasks(tmp_path, count=4)
    text = GENERATE.replace("metadata: {", "metadata: {language: ja, ").replace('"^(.)"', '"(never)"')
    (tmp_path / "gen.yaml").write_text(text)
    library = TaskLibrary(["gen", "choose"], [tmp_path], allow_code=False)
    metrics = {"gen": [("exact_match", "first")], "choose": [("acc", "none")]}
    scorer = HarnessEvaluator(models["A"], tokenizer, library, metrics, EvaluationSettings(batch_size=4))
    sets = [
        DocumentSet(task=task, doc_ids=(0, 1, 2, 3), name=task, complete=True) for task in ("choose", "gen")
    ]
    counts = scorer.evaluate(sets).counts
    assert (counts["no_answer"], counts["answers_judged"], counts["languages_judged"]) == (4, 4, 4)
    assert counts["generations"] == 4
    assert scorer.evaluate(sets).counts == counts, "counted anew at every evaluation"
    assert "answers_judged" not in scorer.evaluate(sets[:1]).counts, "choices have no texts"
    assert list(scorer.evaluate(sets).samples["gen"].values) == ["exact_match,first"]
