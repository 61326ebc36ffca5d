"""A function of the user's is given copies, and what it gives back is checked."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import ChangedModelError, FitnessError, TaskError
from evomerge.experiment import ConstraintSettings, EvaluationSettings, ObjectiveSettings
from evomerge.fitness.base import DocumentSet, NonFiniteLogitsError
from evomerge.fitness.constraints import as_constraint, as_settings, resolve_constraints
from evomerge.fitness.function import FunctionScorer
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.fitness.metrics import has_stock_metric
from evomerge.measure_settings import FunctionSettings
from tests.tiny import make_tokenizer

COUNT = 10
KEY = "own:f,evomerge"


@pytest.fixture(scope="module")
def library(tasks: Path) -> TaskLibrary:
    return TaskLibrary(["gen", "choose"], [tasks], allow_code=False)


@pytest.fixture
def live(models: dict[str, Any]) -> Any:
    """A model that may be spoilt."""
    return copy.deepcopy(models["A"])


Score = Callable[..., tuple[float, ...]]


@pytest.fixture
def score(live: Any, tokenizer: Any, library: TaskLibrary) -> Score:
    """Score the documents of a task by a function alone."""

    def run(function: Any, given: Any = "generations", task: str = "gen", ids: tuple[int, ...] = ()) -> Any:
        settings = FunctionSettings(name="own:f", given=given)
        scorer = HarnessEvaluator(
            live,
            tokenizer,
            library,
            {task: (("own:f", "evomerge"),)},
            EvaluationSettings(batch_size=4),
            {(task, "own:f"): FunctionScorer(settings, function, Path(__file__).parent)},
        )
        every = DocumentSet(task=task, doc_ids=ids or tuple(range(COUNT)), name=task, complete=not ids)
        found = scorer.evaluate([every])
        assert found.metrics[task][KEY] == pytest.approx(np.mean(found.samples[task].values[KEY]))
        return found.samples[task].values[KEY]

    return run


def test_it_sees_every_document_with_what_the_model_said(score: Score, library: TaskLibrary) -> None:
    seen: list[Any] = []

    def function(documents: list[dict[str, Any]], generations: list[str]) -> list[float]:
        seen.append((documents, generations))
        return [
            len(text) + 10 * (text == document["a"])
            for document, text in zip(documents, generations, strict=True)
        ]

    found = score(function, ids=(0, 3, 4, 7))
    task = library.tasks["gen"]
    ((documents, generations),) = seen
    assert documents == [task.eval_docs[place] for place in (0, 3, 4, 7)]
    assert generations == [instance.resps[0] for instance in task.instances]
    assert found == tuple(
        float(len(text) + 10 * (text == task.eval_docs[place]["a"]))
        for place, text in zip((0, 3, 4, 7), generations, strict=True)
    )
    assert max(found) > 10, "the model answers document 0 right"


def test_documents_are_copies(score: Score, library: TaskLibrary) -> None:
    before = [dict(document) for document in library.tasks["choose"].eval_docs]

    def spoil(model: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> list[float]:
        for document in documents:
            document["options"].clear()
            document["q"] = ""
        documents.reverse()
        return [0.0] * len(documents)

    score(spoil, "model", "choose")
    assert [dict(document) for document in library.tasks["choose"].eval_docs] == before


def test_the_model_may_be_called_in_any_way(score: Score, live: Any, library: TaskLibrary) -> None:
    def function(model: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> torch.Tensor:
        tokenizer.padding_side = "left"
        inputs = tokenizer([document["q"] for document in documents], return_tensors="pt", padding=True)
        model(**inputs, return_dict=False)
        model.generate(**inputs, max_new_tokens=2)
        model.generation_config.max_length = 3
        model.train()
        return model(**inputs).logits[:, -1].logsumexp(-1)

    found = score(function, "model", "choose")
    assert not live.training
    assert live.generation_config.max_length != 3
    questions = [document["q"] for document in library.tasks["choose"].eval_docs]
    with torch.no_grad():
        expected = [
            float(live(torch.tensor([make_tokenizer().encode(text)])).logits[0, -1].logsumexp(-1))
            for text in questions
        ]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([0.5] * 9, "got 9$"),
        (None, "got NoneType$"),
        (0.5, "got float$"),
        ("0.5", "got str$"),
        ({0: 0.5}, "got dict$"),
        (set(range(10)), "got set$"),
        ([0.0] * 9 + [float("nan")], "number 9 is nan$"),
        ([0.0, float("inf")] + [0.0] * 8, "number 1 is inf$"),
        ([None] * 10, "number 0 is None$"),
        (["1"] * 10, "number 0 is '1'$"),
        (np.zeros((10, 2)), r"number 0 is \[0.0, 0.0\]$"),
        ([10**400] * 10, "number 0 is 1000"),
        (torch.tensor(0.5), "got float$"),
    ],
)
def test_anything_but_a_number_for_everyone_is_refused(score: Score, result: Any, reason: str) -> None:
    expected = "own:f: expected a list of 10 finite numbers, one per generation in their order"
    with pytest.raises(FitnessError, match=f"{expected}.*{reason}"):
        score(lambda documents, generations: result)


@pytest.mark.parametrize(
    "result", [np.arange(10), torch.arange(10), tuple(range(10)), [np.float32(i) for i in range(10)]]
)
def test_arrays_and_tensors_are_numbers(score: Score, result: Any) -> None:
    assert score(lambda documents, generations: result) == tuple(map(float, range(10)))


@pytest.mark.parametrize("error", [KeyError("no\nsuch field"), SystemExit(3)])
def test_an_error_is_named_with_its_line(score: Score, error: BaseException) -> None:
    def function(documents: Any, generations: Any) -> Any:
        raise error

    line = function.__code__.co_firstlineno + 1
    with pytest.raises(
        FitnessError, match=rf"own:f raised {type(error).__name__}: .* \(test_function\.py:{line}\)"
    ):
        score(function)


def test_memory_that_runs_out_is_not_the_functions_fault(score: Score) -> None:
    def function(documents: Any, generations: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        score(function)


def test_logits_that_are_not_finite_are_no_score_inside_a_function_either(score: Score, live: Any) -> None:
    def function(model: Any, tokenizer: Any, documents: Any) -> list[float]:
        return [float(model(torch.tensor([[5]])).logits.argmax()) for _ in documents]

    with torch.no_grad():
        live.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        score(function, "model", "choose")


# What it may leave behind


def draw() -> tuple[float, float, float]:
    """One number from each generator that code may use."""
    return random.random(), float(np.random.random()), float(torch.rand(1))  # noqa: NPY002


def seed() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)


def test_chance_is_the_same_at_every_call_and_changes_nothing_outside(score: Score) -> None:
    def function(documents: Any, generations: Any) -> list[float]:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        return [sum(draw()) for _ in documents]

    seed()
    expected = draw()
    seed()
    path = list(sys.path)
    with torch.no_grad():
        first = score(function)
        assert not torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert draw() == expected
    assert sys.path == path
    assert len(set(first)) == COUNT
    assert score(function) == first


def _scale(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def _swap(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def _one_number(model: Any) -> None:
    model.lm_head.weight[3, 3] += 1e-3


def _config(model: Any) -> None:
    model.config.rms_norm_eps = 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_scale, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        (_swap, r"lm_head\.weight"),
        (_one_number, r"lm_head\.weight"),
        (_config, "its config"),
    ],
)
@pytest.mark.parametrize("raises", [False, True])
def test_a_function_that_changes_the_model_is_found_out(
    score: Score, change: Callable[[Any], None], named: str, raises: bool
) -> None:
    def function(model: Any, tokenizer: Any, documents: Any) -> list[float]:
        change(model)
        if raises:
            raise ValueError
        return [0.0] * len(documents)

    with pytest.raises(ChangedModelError, match=rf"own:f changed the model \({named}\)"):
        score(function, "model", "choose")


def test_a_change_taken_back_is_none(score: Score) -> None:
    def function(model: Any, tokenizer: Any, documents: Any) -> list[float]:
        before = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
        found = float(model(torch.tensor([[5]])).logits.abs().sum())
        model.lm_head.weight.copy_(before)
        return [found] * len(documents)

    with torch.no_grad():
        assert score(function, "model", "choose") == (0.0,) * COUNT


# In experiments


def test_it_is_an_objective_like_any_other(library: TaskLibrary) -> None:
    own = library.objective(ObjectiveSettings(task="gen", fitness="own:f", weight=2, normalize="sources"), 0)
    assert (own.metric, own.filter, own.maximize, own.weight, own.normalize) == (
        "own:f",
        "evomerge",
        True,
        2,
        True,
    )
    assert own.label == "gen own:f"
    least = library.objective(ObjectiveSettings(task="gen", fitness="own:f", direction="minimize"), 0)
    assert not least.maximize
    assert not has_stock_metric("gen", [own])
    library.objective(ObjectiveSettings(task="choose", fitness="own:f", given="model"), 0)
    for settings, reason in (
        (
            ObjectiveSettings(task="choose", fitness="own:f"),
            r"objectives\.0\.fitness: choose generates no text",
        ),
        (
            ObjectiveSettings(task="gen", fitness="own:f", filter="whole"),
            r"objectives\.0\.filter: fitness is about",
        ),
    ):
        with pytest.raises(TaskError, match=reason):
            library.objective(settings, 0)


def test_a_constraint_may_name_the_function_or_judge_of_an_objective(library: TaskLibrary) -> None:
    judge = {"url": "http://h/v1", "model": "m", "prompt": "{{generation}}", "scale": [0, 1]}
    objectives = [
        library.objective(ObjectiveSettings(task="gen", fitness="own:f", direction="minimize"), 0),
        library.objective(ObjectiveSettings.model_validate({"task": "gen", "judge": judge}), 1),
    ]
    entries = [
        ConstraintSettings(task="gen", metric="own:f", max=3),
        ConstraintSettings(metric="judge m", min=0.5),
        ConstraintSettings(task="choose", fitness="own:g", given="model", min=1),
        ConstraintSettings(retention=0.9),
    ]
    found = resolve_constraints(entries, objectives, library.measure)
    assert [item.label for item in found] == [
        "gen own:f <= 3",
        "gen judge m >= 0.5",
        "choose own:g >= 1",
        "gen own:f retains 0.9 of the best source",
        "gen judge m retains 0.9 of the best source",
    ]
    assert [item.maximize for item in found] == [False, True, True, False, True]
    assert [item.own for item in found[:2]] == [item.own for item in objectives]
    for item in found:
        again = ConstraintSettings.model_validate(as_settings(item).model_dump())
        assert as_constraint(again) == item
