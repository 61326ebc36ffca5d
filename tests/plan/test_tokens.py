"""Tokens and batches are those that lm-eval sends through the model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.reader import Checkpoint
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.plan.records import Span
from evomerge.plan.tokens import SHORTEST_ANSWER, TaskLoad, total_load

METRICS = {"gen": [("exact_match", "whole")], "choose": [("acc", "none")]}
CHAT = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


def every(task: str, count: int = 10) -> DocumentSet:
    return DocumentSet(task=task, doc_ids=tuple(range(count)), name=task, complete=count == 10)


def planned(task_folder: Path, zoo: Path, *documents: DocumentSet, **settings: Any) -> TaskLoad:
    names = [item.task for item in documents]
    library = TaskLibrary(names, [task_folder], allow_code=False)
    options = EvaluationSettings(**{"batch_size": 4, **settings})
    return total_load(documents, library, METRICS, options, Checkpoint.open(zoo / "base"))


def seen(task_folder: Path, zoo: Path, documents: DocumentSet, **settings: Any) -> list[tuple[int, int]]:
    """Rows and length of the prompts of every batch that lm-eval makes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(zoo / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    library = TaskLibrary([documents.task], [task_folder], allow_code=False)
    options = EvaluationSettings(**{"batch_size": 4, **settings})
    evaluator = HarnessEvaluator(model, tokenizer, library, METRICS, options)
    shapes: list[tuple[int, int]] = []
    generate, call = evaluator._lm._model_generate, evaluator._lm._model_call

    def on_generate(context: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(context.shape))
        return generate(context=context, **kwargs)

    def on_call(inputs: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inputs.shape))
        return call(inputs, **kwargs)

    evaluator._lm._model_generate, evaluator._lm._model_call = on_generate, on_call
    with torch.no_grad():
        evaluator.evaluate([documents])
    return shapes


@pytest.mark.parametrize("task", ["gen", "choose"])
@pytest.mark.parametrize("count", [10, 7])
def test_batches_are_those_of_lm_eval(task: str, count: int, task_folder: Path, tiny_zoo: Path) -> None:
    load = planned(task_folder, tiny_zoo, every(task, count))
    found = [(batch.rows, batch.length) for batch in load.batches]
    assert found == seen(task_folder, tiny_zoo, every(task, count))


@pytest.mark.parametrize("task", ["gen", "choose"])
@pytest.mark.parametrize("alone", [True, False])
def test_likelihoods_are_batches_of_their_own(
    task: str, alone: bool, task_folder: Path, tiny_zoo: Path
) -> None:
    metrics = (("likelihood", "evomerge"), *(() if alone else METRICS[task]))
    documents = dataclasses.replace(every(task), metrics=metrics)
    load = planned(task_folder, tiny_zoo, documents)
    found = [(batch.rows, batch.length) for batch in load.batches]
    assert found == seen(task_folder, tiny_zoo, documents)


def test_answers_take_what_the_task_says_and_at_most_its_limit(task_folder: Path, tiny_zoo: Path) -> None:
    load = planned(task_folder, tiny_zoo, every("gen"))
    # Answers of one character, and the token that ends them; four tokens at most.
    assert load.new_tokens == Span(low=20, high=40)
    assert {batch.new for batch in load.batches} == {Span(low=max(2, 4 * SHORTEST_ANSWER), high=4)}
    assert load.requests == 10


def test_judged_prompts_generate_nothing(task_folder: Path, tiny_zoo: Path) -> None:
    load = planned(task_folder, tiny_zoo, every("choose"))
    assert load.new_tokens == Span(low=0, high=0)
    assert load.prompt_tokens == sum(len(f"wxyz={'a' * size}") - 1 for size in (1, 2, 3)) * 10


def test_tasks_add_up(task_folder: Path, tiny_zoo: Path) -> None:
    both = planned(task_folder, tiny_zoo, every("gen"), every("choose"))
    alone = [planned(task_folder, tiny_zoo, every(task)) for task in ("gen", "choose")]
    assert both.prompt_tokens == sum(load.prompt_tokens for load in alone)
    assert both.batches == alone[0].batches + alone[1].batches


def test_the_chat_template_counts(task_folder: Path, tiny_zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_zoo / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(CHAT)
    plain = planned(task_folder, tmp_path, every("gen"), num_fewshot=0)
    chat = planned(task_folder, tmp_path, every("gen"), num_fewshot=0, apply_chat_template=True)
    assert chat.prompt_tokens == plain.prompt_tokens + 2 * 10
