"""The harness gives lm-eval's own scores for the present weights, and refuses what cannot be scored."""

from __future__ import annotations

import contextlib
import copy
import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import TaskError
from evomerge.experiment import EvaluationSettings, ObjectiveSettings
from evomerge.fitness.base import DocumentSet, NonFiniteLogitsError, Scores
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from tests.tasks import GENERATE, write_tasks

METRICS = {
    "gen": (("exact_match", "whole"), ("exact_match", "first")),
    "choose": (("acc", "none"), ("acc_norm", "none")),
}
COUNT = 10


def every(task: str) -> DocumentSet:
    return DocumentSet(task=task, doc_ids=tuple(range(COUNT)), name=task, complete=True)


def some(task: str, *ids: int) -> DocumentSet:
    return DocumentSet(task=task, doc_ids=ids, name=task)


@pytest.fixture(scope="module")
def library(tasks: Path) -> TaskLibrary:
    return TaskLibrary(["gen", "choose"], [tasks], allow_code=False)


def evaluator(model: Any, tokenizer: Any, library: TaskLibrary, **settings: Any) -> HarnessEvaluator:
    return HarnessEvaluator(model, tokenizer, library, METRICS, EvaluationSettings(batch_size=4, **settings))


@contextlib.contextmanager
def as_loaded_by_lm_eval(tasks: Path) -> Iterator[Any]:
    from lm_eval.tasks import TaskManager

    with contextlib.chdir(tasks):
        yield TaskManager(include_path=["."], include_defaults=False)


def stock_scores(
    model: Any, tokenizer: Any, tasks: Path, sets: list[DocumentSet], **options: Any
) -> dict[str, Any]:
    """What lm-eval's own entry point says."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    samples = {item.task: list(item.doc_ids) for item in sets if not item.complete}
    with as_loaded_by_lm_eval(tasks) as manager:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=lm,
            tasks=[item.task for item in sets],
            task_manager=manager,
            samples=samples or None,
            log_samples=True,
            bootstrap_iters=0,
            **options,
        )
    return found


def assert_equal(mine: Scores, stock: dict[str, Any]) -> None:
    for task, metrics in mine.metrics.items():
        for key, value in metrics.items():
            assert value == stock["results"][task][key]
    for task, scores in mine.samples.items():
        for key, column in scores.values.items():
            metric, _, name = key.partition(",")
            theirs = [entry for entry in stock["samples"][task] if entry["filter"] == name]
            assert [entry["doc_id"] for entry in theirs] == list(scores.doc_ids)
            assert [float(entry[metric]) for entry in theirs] == list(column)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own entry point warns about its environment
@pytest.mark.parametrize(
    ("sets", "options"),
    [
        ([every("gen"), every("choose")], {}),
        ([some("gen", 1, 4, 7, 8), some("choose", 0, 3, 9)], {}),
        ([every("gen")], {"num_fewshot": 1}),
    ],
    ids=["all documents", "some documents", "another number of examples"],
)
def test_scores_equal_those_of_lm_eval_itself(
    models: dict[str, Any],
    tokenizer: Any,
    tasks: Path,
    library: TaskLibrary,
    sets: list[DocumentSet],
    options: dict[str, Any],
) -> None:
    fresh = TaskLibrary(["gen", "choose"], [tasks], allow_code=False)
    mine = evaluator(models["A"], tokenizer, fresh, **options).evaluate(sets)
    assert_equal(mine, stock_scores(models["A"], tokenizer, tasks, sets, **options))
    assert mine.forward_seconds > 0


def test_the_fastest_way_gives_the_same_scores_in_float32(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    scorer = evaluator(models["A"], tokenizer, library)
    sets = [every("gen"), some("choose", 0, 3, 4, 5, 9)]
    fast = scorer.evaluate([replace(subset, exact=False) for subset in sets])
    exact = scorer.evaluate(sets)
    assert (fast.metrics, fast.samples, fast.counts) == (exact.metrics, exact.samples, exact.counts)


def test_the_documents_tell_the_models_apart(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    """Otherwise equality of scores would prove nothing."""
    first, second = (
        evaluator(models[name], tokenizer, library).evaluate([every("gen"), every("choose")]) for name in "AB"
    )
    assert 0 < first.metrics["gen"]["exact_match,first"] < 1
    assert 0 < first.metrics["choose"]["acc,none"] < 1
    assert first.samples != second.samples


def test_a_then_b_then_a_gives_as_scores_twice(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    live = copy.deepcopy(models["A"])
    scorer = evaluator(live, tokenizer, library)
    sets = [every("gen"), every("choose")]
    found = []
    for name in "ABA":
        live.load_state_dict(models[name].state_dict())
        found.append(scorer.evaluate(sets))
    assert found[0].samples == found[2].samples
    assert found[0].metrics == found[2].metrics
    assert found[1].samples == evaluator(models["B"], tokenizer, library).evaluate(sets).samples
    assert found[0].samples != found[1].samples


def test_prompts_are_built_once_per_document_set(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = library.tasks["gen"]
    calls = []
    build = type(task).fewshot_context

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return build(*arguments, **named)

    monkeypatch.setattr(type(task), "fewshot_context", counted)
    scorer = evaluator(models["A"], tokenizer, library)
    first = scorer.evaluate([some("gen", 0, 1, 2)])
    assert len(calls) == 3
    assert scorer.evaluate([some("gen", 0, 1, 2)]).samples == first.samples
    assert len(calls) == 3
    whole = scorer.evaluate([every("gen")])
    assert len(calls) == 3 + COUNT
    assert scorer.evaluate([some("gen", 0, 1, 2)]).samples == first.samples
    assert len(calls) == 3 + COUNT
    assert (
        whole.samples["gen"].values["exact_match,first"][:3]
        == (first.samples["gen"].values["exact_match,first"])
    )


def test_every_evaluator_draws_the_same_examples(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    prompts = []
    for _ in range(2):
        scorer = evaluator(models["A"], tokenizer, library)
        scorer.evaluate([some("gen", 2, 5)])
        prompts.append([instance.args[0] for instance in library.tasks["gen"].instances])
    assert prompts[0] == prompts[1]
    assert prompts[0][0].count("=") == 3


@pytest.mark.parametrize("task", ["gen", "choose"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_give_logits_that_are_not_finite_are_no_score(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary, task: str, value: float
) -> None:
    live = copy.deepcopy(models["A"])
    scorer = evaluator(live, tokenizer, library)
    with torch.no_grad():
        live.lm_head.weight[5, 5] = value
    with pytest.raises(NonFiniteLogitsError):
        scorer.evaluate([every(task)])
    live.load_state_dict(models["A"].state_dict())
    assert scorer.evaluate([every(task)]).metrics
    assert not live._forward_hooks


def test_cut_off_generations_are_counted(models: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """Only those that end neither with a stop text nor with the token that ends a text."""
    folder = write_tasks(tmp_path / "tasks")

    def texts_and_counts() -> tuple[list[str], Any]:
        library = TaskLibrary(["gen"], [folder], allow_code=False)
        documents = DocumentSet(task="gen", doc_ids=tuple(range(8)), name="gen", complete=True)
        counts = evaluator(models["A"], tokenizer, library).evaluate([documents]).counts
        return [instance.resps[0] for instance in library.tasks["gen"].instances], counts

    texts, counts = texts_and_counts()
    stop = next(text[1] for text in texts if "\n" not in text[:2])
    assert counts == {
        "generations": 8,
        "truncated": sum("\n" not in text for text in texts),
        "output_tokens": sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts),
        "empty": sum(not text.strip() for text in texts),
    }
    change(folder / "gen.yaml", 'until: ["\\n"]', f"until: [{stop!r}]")
    stopped, counts = texts_and_counts()
    assert counts["truncated"] == sum(stop not in text for text in texts)
    assert 0 <= counts["truncated"] < 8
    assert stopped == [text.split(stop)[0] for text in texts]


# Names


def objective(library: TaskLibrary, task: str, metric: str, **more: Any) -> Any:
    return library.objective(ObjectiveSettings(task=task, metric=metric, **more), 0)


def test_what_an_objective_leaves_open_is_filled_in_from_the_task(library: TaskLibrary) -> None:
    found = objective(library, "gen", "exact_match")
    assert (found.filter, found.maximize, found.key) == ("whole", True, "exact_match,whole")
    assert not objective(library, "choose", "acc", direction="minimize").maximize


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gen", "exact_mach"), r"objectives\.0\.metric: .*did you mean 'exact_match'"),
        (("gen", "exact_match", "frist"), r"objectives\.0\.filter: .*did you mean 'first'"),
    ],
)
def test_an_unknown_metric_or_filter_names_the_nearest(
    library: TaskLibrary, arguments: tuple[str, ...], message: str
) -> None:
    task, metric, *rest = arguments
    with pytest.raises(TaskError, match=message):
        objective(library, task, metric, filter=rest[0] if rest else None)


def test_unknown_tasks_and_groups_are_named_all_at_once(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # Reading lm-eval's own tasks as well takes 20 s.
    without_defaults = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, **_: without_defaults(include_path=include_path)
    )
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    (folder / "both.yaml").write_text("group: both\ntask: [gen, choose]\n")
    (folder / "tagged.yaml").write_text(GENERATE.replace("task: gen", "task: gen2\ntag: letters"))
    with pytest.raises(TaskError) as caught:
        TaskLibrary(["gen", "chose", "both", "letters"], [folder], allow_code=False)
    assert [fault.path for fault in caught.value.faults] == ["chose", "both", "letters"]
    assert "did you mean 'choose'" in caught.value.faults[0].reason
    assert "group" in caught.value.faults[1].reason
    assert "gen2" in str(caught.value.faults[2].reason) or "group" in caught.value.faults[2].reason


def test_a_missing_folder_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"evaluation\.include_path: no such folder"):
        TaskLibrary(["gen"], [tmp_path / "nowhere"], allow_code=False)
    folder = write_tasks(tmp_path / "tasks")
    (folder / "gen.jsonl").unlink()
    with pytest.raises(TaskError, match=r"gen: .*gen\.yaml: .*no such file"):
        TaskLibrary(["gen"], [folder], allow_code=False)


def test_a_metric_that_is_no_mean_over_documents_is_refused(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    text = (folder / "choose.yaml").read_text().replace("metric: acc_norm, aggregation: mean", "metric: f1")
    (folder / "choose.yaml").write_text(text)
    library = TaskLibrary(["choose"], [folder], allow_code=False)
    with pytest.raises(TaskError, match=r"objectives\.0\.metric: .*not the mean"):
        objective(library, "choose", "f1")
    assert objective(library, "choose", "acc").metric == "acc"


# Fingerprints


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("gen.jsonl", '"a": "', '"a": "x'),
        ("examples.jsonl", '"a": "', '"a": "x'),
        ("gen.yaml", "max_gen_toks: 4", "max_gen_toks: 5"),
        ("gen.yaml", "num_fewshot: 2", "num_fewshot: 1"),
        ("gen.yaml", "{{q}}=", "{{q}} ="),
    ],
)
def test_the_fingerprint_moves_with_whatever_moves_scores(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    folder = write_tasks(tmp_path / "one" / "tasks")
    before = TaskLibrary(["gen"], [folder], allow_code=False).fingerprint("gen")
    elsewhere = tmp_path / "another" / "place"
    shutil.copytree(folder, elsewhere)
    assert TaskLibrary(["gen"], [elsewhere], allow_code=False).fingerprint("gen") == before
    change(elsewhere / file, old, new)
    assert TaskLibrary(["gen"], [elsewhere], allow_code=False).fingerprint("gen") != before
