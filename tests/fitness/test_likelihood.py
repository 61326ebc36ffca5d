"""The likelihood of reference answers is the model's, of every document, and of nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import TaskError
from evomerge.experiment import EvaluationSettings, ObjectiveSettings
from evomerge.fitness.base import DocumentSet, NonFiniteLogitsError
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.fitness.likelihood import LikelihoodRequest, likelihood_requests, reference
from evomerge.fitness.metrics import LIKELIHOOD, OUTPUT_TOKENS, has_stock_metric
from tests.fitness.test_harness import as_loaded_by_lm_eval, change
from tests.tasks import write_tasks

KEY = "likelihood,evomerge"
METRICS = {"gen": (LIKELIHOOD,), "choose": (LIKELIHOOD,)}
COUNT = 10


def documents(task: str, *ids: int) -> DocumentSet:
    every = ids or tuple(range(COUNT))
    return DocumentSet(task=task, doc_ids=every, name=task, complete=not ids)


@pytest.fixture(scope="module")
def library(tasks: Path) -> TaskLibrary:
    return TaskLibrary(["gen", "choose"], [tasks], allow_code=False)


def evaluator(model: Any, tokenizer: Any, library: TaskLibrary, **settings: Any) -> HarnessEvaluator:
    return HarnessEvaluator(model, tokenizer, library, METRICS, EvaluationSettings(batch_size=4, **settings))


def rows(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def answers(folder: Path, task: str) -> list[str]:
    return [row["a"] if task == "gen" else row["options"][row["answer"]] for row in rows(folder, task)]


@pytest.mark.filterwarnings("ignore")  # lm-eval warns about its environment
@pytest.mark.parametrize("task", ["gen", "choose"])
def test_scores_are_those_of_lm_evals_loglikelihood_per_byte(
    models: dict[str, Any], tokenizer: Any, tasks: Path, library: TaskLibrary, task: str
) -> None:
    """The prompts come from lm-eval's own loader; the answers from the data file."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=models["A"], tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    with as_loaded_by_lm_eval(tasks) as manager:
        stock = manager.load([task])["tasks"][task]
        stock.set_fewshot_seed(seed=1234)
        stock.build_all_requests()
    prompts = {instance.doc_id: instance.args[0] for instance in stock.instances}
    assert prompts[0].count("=") == (3 if task == "gen" else 1)
    expected_answers = answers(tasks, task)
    requests = [
        Instance(
            request_type="loglikelihood", doc={}, arguments=(prompts[place], expected_answers[place]), idx=0
        )
        for place in range(COUNT)
    ]
    found = evaluator(models["A"], tokenizer, library).evaluate([documents(task)])
    expected = [
        logprob / len(answer.encode())
        for (logprob, _), answer in zip(
            lm.loglikelihood(requests, disable_tqdm=True), expected_answers, strict=True
        )
    ]
    assert found.samples[task].values[KEY] == tuple(expected)
    assert found.metrics[task][KEY] == pytest.approx(sum(expected) / COUNT, rel=1e-12)
    assert found.counts["generations"] == 0


def test_a_score_is_the_sum_of_the_answers_log_softmax(
    models: dict[str, Any], tokenizer: Any, tasks: Path, library: TaskLibrary
) -> None:
    row = rows(tasks, "choose")[3]
    answer = row["options"][row["answer"]]
    prompt = tokenizer.encode(f"{row['q']}=")
    ids = prompt + tokenizer.encode(answer)
    logits = models["A"](torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
    total = sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
    found = evaluator(models["A"], tokenizer, library).evaluate([documents("choose", 3)])
    assert found.samples["choose"].values[KEY] == pytest.approx([total / len(answer)], rel=1e-5)


def test_the_scores_are_of_the_present_weights_and_of_the_documents_asked_for(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    live = copy.deepcopy(models["A"])
    scorer = evaluator(live, tokenizer, library)
    found = []
    for name in "ABA":
        live.load_state_dict(models[name].state_dict())
        found.append(scorer.evaluate([documents("choose")]).samples["choose"].values[KEY])
    assert found[0] == found[2] != found[1]
    some = scorer.evaluate([documents("choose", 1, 4, 8)]).samples["choose"]
    assert some.doc_ids == (1, 4, 8)
    assert some.values[KEY] == pytest.approx([found[0][place] for place in (1, 4, 8)], rel=1e-5)


def test_a_document_set_chooses_what_is_scored(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    """As a screening does; the requests are those that the full scoring uses as well."""
    both = {"gen": (("exact_match", "whole"), OUTPUT_TOKENS, LIKELIHOOD)}
    scorer = HarnessEvaluator(models["A"], tokenizer, library, both, EvaluationSettings(batch_size=4))
    whole = scorer.evaluate([documents("gen")])
    assert list(whole.metrics["gen"]) == ["exact_match,whole", "output_tokens,evomerge", KEY]
    screened = scorer.evaluate(
        [
            DocumentSet(
                task="gen", doc_ids=tuple(range(COUNT)), name="gen", complete=True, metrics=(LIKELIHOOD,)
            )
        ]
    )
    assert list(screened.metrics["gen"]) == [KEY]
    assert screened.metrics["gen"][KEY] == whole.metrics["gen"][KEY]
    assert (screened.counts["generations"], whole.counts["generations"]) == (0, COUNT)
    assert len(scorer._prepared) == 1


def test_output_tokens_are_the_length_of_what_was_said(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary
) -> None:
    metrics = {"gen": (OUTPUT_TOKENS,)}
    scorer = HarnessEvaluator(models["A"], tokenizer, library, metrics, EvaluationSettings(batch_size=4))
    found = scorer.evaluate([documents("gen")])
    said = [instance.resps[0] for instance in library.tasks["gen"].instances]
    expected = [len(tokenizer.encode(text, add_special_tokens=False)) for text in said]
    assert len(set(expected)) > 1
    assert found.samples["gen"].values["output_tokens,evomerge"] == tuple(map(float, expected))
    assert found.metrics["gen"]["output_tokens,evomerge"] == sum(expected) / COUNT
    assert found.counts["output_tokens"] == sum(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_score(
    models: dict[str, Any], tokenizer: Any, library: TaskLibrary, value: float
) -> None:
    live = copy.deepcopy(models["A"])
    scorer = evaluator(live, tokenizer, library)
    with torch.no_grad():
        live.lm_head.weight[5, 5] = value
    with pytest.raises(NonFiniteLogitsError):
        scorer.evaluate([documents("gen")])
    with pytest.raises(NonFiniteLogitsError, match="-inf"):
        LikelihoodRequest(instance=None, num_bytes=1).score(float("-inf"))


def test_an_answer_longer_than_the_context_is_named(
    models: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path / "tasks")
    lines = [json.dumps({"q": "a", "a": "b" * length}) for length in (1, 40)]
    (folder / "gen.jsonl").write_text("\n".join(lines))
    scorer = evaluator(
        models["A"], tokenizer, TaskLibrary(["gen"], [folder], allow_code=False), max_length=32
    )
    with pytest.raises(TaskError, match="gen: document 1: the answer has 40 tokens, the model reads 32"):
        scorer.evaluate([documents("gen", 0, 1)])


# References and prompts


def change_row(folder: Path, task: str, place: int, **values: Any) -> None:
    found = rows(folder, task)
    found[place].update(values)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def loaded(folder: Path, task: str) -> Any:
    return TaskLibrary([task], [folder], allow_code=False).tasks[task]


def requests(task: Any, *, chat: bool = False) -> list[tuple[tuple[str, str], int]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests()
    groups: dict[int, list[Any]] = {}
    for instance in task.instances:
        groups.setdefault(instance.doc_id, []).append(instance)
    found = likelihood_requests(task, [(group[0].doc, group) for group in groups.values()], chat=chat)
    return [(request.instance.args, request.num_bytes) for request in found]


def test_the_delimiter_counts_in_the_probability_but_not_in_the_length(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", count=1)
    change_row(folder, "gen", 0, q="ab", a="答え")
    change(folder / "gen.yaml", 'target_delimiter: ""', 'target_delimiter: " "')
    task = loaded(folder, "gen")
    assert requests(task) == [(("ab=", " 答え"), 6)]
    assert requests(task, chat=True) == [(("ab=", "答え"), 6)]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("7", "7"),
        (7, "7"),
        (["first", "second"], "first"),
        ("None", "None"),
    ],
)
def test_the_reference_is_the_first_answer_as_text(tmp_path: Path, field: Any, expected: str) -> None:
    folder = write_tasks(tmp_path / "tasks", count=2)
    for place in range(2):
        change_row(folder, "gen", place, a=field)
    change(folder / "gen.yaml", ", train: examples.jsonl", "")
    change(folder / "gen.yaml", "training_split: train\n", "")
    change(folder / "gen.yaml", "fewshot_split: train\nnum_fewshot: 2", "num_fewshot: 0")
    task = loaded(folder, "gen")
    assert reference(task, task.eval_docs[0]).text == expected


@pytest.mark.parametrize("target", ["{{answer}}", "{{options[answer]}}"])
def test_the_right_choice_may_be_given_by_position_or_by_its_text(tmp_path: Path, target: str) -> None:
    folder = write_tasks(tmp_path / "tasks", count=4)
    for place in range(4):  # a choice that is a number would be taken for its position, as lm-eval does
        change_row(folder, "choose", place, options=["a", "bc", "def"])
    change(folder / "choose.yaml", 'doc_to_target: "{{answer}}"', f'doc_to_target: "{target}"')
    expected = [(row["q"] + "=", row["options"][row["answer"]]) for row in rows(folder, "choose")]
    assert [pair for pair, _ in requests(loaded(folder, "choose"))] == expected


def test_where_the_choices_are_prompts_the_right_prompt_is_asked(tmp_path: Path) -> None:
    """As in Winogrande: the text says which of the contexts is right, the target is the same for all."""
    folder = write_tasks(tmp_path / "tasks", count=4)
    change(folder / "choose.yaml", 'doc_to_text: "{{q}}="', 'doc_to_text: "{{answer}}"')
    change(folder / "choose.yaml", 'doc_to_target: "{{answer}}"', 'doc_to_target: "{{q}}"')
    expected = [((row["options"][row["answer"]], row["q"]), 4) for row in rows(folder, "choose")]
    assert requests(loaded(folder, "choose")) == expected


BAD = {
    "an empty answer": ("gen", {"a": " "}, r"document 2 of gen has none: its doc_to_target is empty"),
    "a missing answer": ("gen", {"a": None}, r"document 2 of gen has none: its doc_to_target is empty"),
    "no choice": ("choose", {"answer": 3}, r"document 2 of choose .* is 3, .* none of its 3 choices"),
    "an empty choice": ("choose", {"answer": 0, "options": ["", "b"]}, r"document 2 of choose .* is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_document_without_an_answer_is_named_before_anything_is_scored(tmp_path: Path, case: str) -> None:
    task, values, message = BAD[case]
    folder = write_tasks(tmp_path / "tasks")
    change_row(folder, task, 2, **values)
    library = TaskLibrary([task], [folder], allow_code=False)
    with pytest.raises(TaskError, match=rf"objectives\.4\.metric: .*{message}"):
        library.objective(ObjectiveSettings(task=task, metric="likelihood"), 4)
    with pytest.raises(TaskError, match=rf"evaluation\.screen\.metric: .*{message}"):
        library.check_references(task, "evaluation.screen.metric")


def test_an_answer_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    change_row(folder, "gen", 0, q="abcdefg")
    change(folder / "gen.yaml", 'doc_to_target: "{{a}}"', 'doc_to_target: "{{q[5]}}"')
    change(folder / "gen.yaml", "num_fewshot: 2", "num_fewshot: 0")
    library = TaskLibrary(["gen"], [folder], allow_code=False)
    with pytest.raises(TaskError, match=r"document 1 of gen .* cannot be made \(UndefinedError"):
        library.objective(ObjectiveSettings(task="gen", metric="likelihood"), 0)


# Names


def test_the_added_metrics_know_their_direction_and_where_they_cannot_be(library: TaskLibrary) -> None:
    found = library.objective(ObjectiveSettings(task="gen", metric="likelihood"), 0)
    assert (found.key, found.maximize, found.label) == (KEY, True, "gen likelihood")
    again = ObjectiveSettings(task="gen", metric="likelihood", filter="evomerge", direction="maximize")
    assert library.objective(again, 0) == found
    assert not library.objective(ObjectiveSettings(task="gen", metric="output_tokens"), 0).maximize
    with pytest.raises(TaskError, match=r"objectives\.0\.metric: choose generates no text"):
        library.objective(ObjectiveSettings(task="choose", metric="output_tokens"), 0)
    with pytest.raises(TaskError, match=r"objectives\.0\.metric: .*did you mean 'likelihood'"):
        library.objective(ObjectiveSettings(task="gen", metric="liklihood"), 0)
    with pytest.raises(TaskError, match=r"objectives\.0\.metric: .* has no metric 'likelihood'"):
        library.objective(ObjectiveSettings(task="gen", metric="likelihood", filter="whole"), 0)


def test_the_stock_command_shows_nothing_of_a_task_scored_by_likelihood_alone(library: TaskLibrary) -> None:
    likelihood = library.objective(ObjectiveSettings(task="gen", metric="likelihood"), 0)
    own = library.objective(ObjectiveSettings(task="gen", metric="exact_match"), 1)
    assert not has_stock_metric("gen", [likelihood])
    assert has_stock_metric("gen", [likelihood, own])
    assert not has_stock_metric("choose", [likelihood, own])
