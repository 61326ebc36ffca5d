"""Whatever is wrong is named by file, line and field, with what to do, before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.tiny import make_model

BAD_EXPERIMENTS = {
    "a missing model": (
        "{zoo}/one",
        "{zoo}/onee",
        ["experiment.yml:4", "models.0", "no such folder", "did you mean 'one'?"],
    ),
    "a task that does not exist": (
        "task: letters",
        "task: leters",
        ["experiment.yml:12", "objectives.0.task", "no such task", "did you mean 'letters'?"],
    ),
    "a metric that the task does not have": (
        "metric: exact_match",
        "metric: exact_matc",
        ["experiment.yml:12", "objectives.0.metric", "did you mean 'exact_match'?"],
    ),
    "bounds upside down": (
        "low: 0.0, high: 1.0",
        "low: 2.0, high: 1.0",
        ["experiment.yml:10", "search_space.parameters.weight", "low <= high", "swap them"],
    ),
    "a misspelt required key": (
        "evaluations: 6",
        "evaluatons: 6",
        ["experiment.yml:13", "search.evaluations", "missing", "'evaluatons'"],
    ),
    "a misspelt option of the searcher": (
        "population: 4",
        "popultion: 4",
        ["experiment.yml:13", "search.popultion", "did you mean 'population'?"],
    ),
    "a searcher that does not exist": (
        "algorithm: cma-es",
        "algorithm: cmaes",
        ["experiment.yml:13", "search.algorithm", "did you mean 'cma-es'?"],
    ),
    "a method that does not exist": (
        "merge_method: task_arithmetic",
        "merge_method: task_arithmetics",
        ["experiment.yml:8", "merge_method", "did you mean 'task_arithmetic'?"],
    ),
    "a parameter that the method does not have": (
        "weight: {{",
        "wieght: {{",
        ["experiment.yml:10", "search_space.parameters.wieght", "did you mean 'weight'?"],
    ),
    "a number written in a way YAML takes for text": (
        "evaluations: 6",
        "evaluations: 1e1",
        ["experiment.yml:13", "search.evaluations", "YAML reads this as text"],
    ),
    "a share beyond one": (
        "holdout: 0.25",
        "holdout: 1.25",
        ["experiment.yml:16", "evaluation.holdout", "less than 1", "1.25"],
    ),
    "a task folder that does not exist": (
        "include_path: [tasks]",
        "include_path: [task]",
        ["experiment.yml:17", "evaluation.include_path", "no such folder"],
    ),
    "a missing search space file": (
        "search_space:\n  type: parameter\n  merge_method: task_arithmetic\n  parameters:\n"
        "    weight: {{low: 0.0, high: 1.0}}",
        "search_space: space.yml",
        ["experiment.yml:6", "search_space", "no such file"],
    ),
    "a constraint on a task that does not exist": (
        "search: {{",
        "constraints:\n  - {{task: leters, metric: exact_match, min: 0.1}}\nsearch: {{",
        ["experiment.yml:14", "constraints.0.task", "no such task", "did you mean 'letters'?"],
    ),
    "a constraint on a metric that the task does not have": (
        "search: {{",
        "constraints:\n  - {{task: letters, metric: exact_matc, min: 0.1}}\nsearch: {{",
        ["experiment.yml:14", "constraints.0.metric", "did you mean 'exact_match'?"],
    ),
    "a constraint whose bounds exclude each other": (
        "search: {{",
        "constraints:\n  - {{task: letters, metric: exact_match, min: 0.9, max: 0.5}}\nsearch: {{",
        ["experiment.yml:14", "constraints.0", "min: 0.9 is above max, 0.5"],
    ),
    "constraints that exclude each other": (
        "search: {{",
        "constraints:\n  - {{task: letters, metric: exact_match, min: 0.9}}\n"
        "  - {{metric: exact_match, max: 0.5}}\nsearch: {{",
        ["experiment.yml:15", "constraints.1", "letters exact_match >= 0.9", "constraints.0", "nothing can"],
    ),
    "a screening by a metric that there is not": (
        "  batch_size: 8",
        "  batch_size: 8\n  screen: {{metric: perplexity}}",
        ["experiment.yml:16", "evaluation.screen.metric", "likelihood"],
    ),
    "a function that a constraint on no task gives something else": (
        "search: {{",
        "  - {{task: letters, fitness: 'mine:f'}}\nconstraints:\n"
        "  - {{fitness: 'mine:f', given: model, min: 0.1}}\nsearch: {{",
        ["experiment.yml", "mine:f is given different things"],
    ),
    "a base model that a method needs": (
        "base_model: {zoo}/base",
        "",
        ["experiment.yml:8", "merge_method", "base_model"],
    ),
}


@pytest.mark.parametrize("case", BAD_EXPERIMENTS)
@pytest.mark.parametrize("verb", ["validate", "run"])
def test_a_fault_in_an_experiment_is_named_with_its_place(
    command: Command, experiment: Path, tiny_zoo: Path, tmp_path: Path, case: str, verb: str
) -> None:
    before, after, expected = BAD_EXPERIMENTS[case]
    text = experiment.read_text()
    before, after = before.format(zoo=tiny_zoo), after.format(zoo=tiny_zoo)
    assert before in text
    experiment.write_text(text.replace(before, after))
    result = command(verb, experiment)
    assert result.code == 2
    for part in expected:
        assert part in result.err
    assert not (tmp_path / "runs").exists()


def test_every_fault_is_reported_at_once(command: Command, experiment: Path, tiny_zoo: Path) -> None:
    text = experiment.read_text()
    text = text.replace(f"{tiny_zoo}/one", f"{tiny_zoo}/onee").replace("exact_match", "exact_matc")
    text = text.replace("population: 4", "popultion: 4")
    experiment.write_text(text)
    result = command("validate", experiment)
    assert result.code == 2
    for field in ("models.0", "objectives.0.metric", "search.popultion"):
        assert field in result.err


def test_a_file_that_is_not_safetensors_is_named(
    command: Command, experiment: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_zoo / "one", broken)
    (broken / "model.safetensors").write_text("<html>not found</html>")
    experiment.write_text(experiment.read_text().replace(f"{tiny_zoo}/one", str(broken)))
    result = command("validate", experiment)
    assert result.code == 2
    assert "experiment.yml:4: models.0" in result.err
    assert "model.safetensors: this is a web page, not a safetensors file" in result.err


def test_models_of_different_shapes_are_named_with_both_shapes(
    command: Command, experiment: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "wide", seed=1, hidden_size=16)
    experiment.write_text(experiment.read_text().replace(f"{tiny_zoo}/one", str(tmp_path / "wide")))
    result = command("validate", experiment)
    assert result.code == 2
    assert "models.0" in result.err
    assert "[64, 16]" in result.err
    assert "[64, 32]" in result.err


def test_models_of_different_vocabularies_are_named_with_the_tokens(
    command: Command, experiment: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_zoo / "one", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["zz"] = vocabulary.pop("a")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    experiment.write_text(experiment.read_text().replace(f"{tiny_zoo}/one", str(other)))
    result = command("validate", experiment)
    assert result.code == 2
    assert "'zz'" in result.err
    assert "models must share one vocabulary" in result.err


def test_task_code_needs_permission(command: Command, experiment: Path, tmp_path: Path) -> None:
    task = tmp_path / "tasks" / "letters.yaml"
    task.write_text(task.read_text() + "process_results: !function scoring.score\n")
    (tmp_path / "tasks" / "scoring.py").write_text(
        "def score(document, results):\n    return {'exact_match': float(results[0] == document['answer'])}\n"
    )
    refused = command("validate", experiment)
    assert refused.code == 2
    assert "objectives.0.task" in refused.err
    assert "--allow-task-code" in refused.err
    assert command("validate", experiment, "--allow-task-code").code == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.evaluations", "expected path=value"),
        ("search.evaluations=many", "search.evaluations"),
        ("models.7=x", "expected an index below 2"),
        ("name.x=1", "name holds a value"),
        ("serch.seed=1", "did you mean 'search'?"),
    ],
)
def test_a_bad_override_is_named(command: Command, experiment: Path, override: str, expected: str) -> None:
    result = command("run", experiment, "--set", override)
    assert result.code == 2
    assert expected in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "missing.yml", "out"],
        ["evaluate", "missing", "--tasks", "letters", "--include-path", "tasks"],
        ["resume", "missing"],
        ["status", "missing"],
        ["export", "missing", "out"],
        ["validate", "missing.yml"],
        ["run", "missing.yml"],
        ["merge"],
        ["unknown-verb"],
        ["methods", "--unknown-option"],
    ],
    ids=" ".join,
)
def test_what_is_missing_or_unknown_ends_with_code_2(
    command: Command, experiment: Path, arguments: list[str]
) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "missing" in result.err or "No such" in result.err or "Missing" in result.err


def test_a_recipe_for_the_wrong_kind_of_file_is_explained(command: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.yml").write_text("hello: world\n")
    result = command("validate", "notes.yml")
    assert result.code == 2
    assert "neither an experiment" in result.err


def test_a_tied_model_among_untied_ones_is_named(
    command: Command, experiment: Path, tiny_zoo: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "tied", seed=1, tie_word_embeddings=True)
    experiment.write_text(experiment.read_text().replace(f"{tiny_zoo}/one", str(tmp_path / "tied")))
    result = command("validate", experiment)
    assert result.code == 2
    assert "experiment.yml:4: models.0: lm_head.weight" in result.err


@pytest.mark.parametrize("asked", ["metric: likelihood", "metric: exact_match"])
def test_a_document_without_an_answer_is_named_where_answers_are_needed(
    command: Command, experiment: Path, tmp_path: Path, asked: str
) -> None:
    data = tmp_path / "tasks" / "letters.jsonl"
    data.write_text(data.read_text().replace('"answer": "c"', '"answer": ""'))
    text = experiment.read_text().replace("metric: exact_match", asked)
    if "exact" in asked:
        text = text.replace("  batch_size: 8", "  batch_size: 8\n  screen: {keep: 0.5}")
    experiment.write_text(text)
    result = command("validate", experiment)
    assert result.code == 2
    field = "evaluation.screen.metric" if "exact" in asked else "objectives.0.metric"
    for part in (field, "document 2 of letters", "doc_to_target is empty"):
        assert part in result.err


YAML, DATA = "letters.yaml", "letters.jsonl"
BAD_TASKS = {
    "a missing data file": (
        YAML,
        "letters.jsonl",
        "leters.jsonl",
        ["data_files.test: no such file", "leters"],
    ),
    "data that is no JSON": (
        DATA,
        '{"question": "b1=", "answer": "b"}',
        "b1=, b",
        ["data_files.test", "letters.jsonl:2: expected a JSON object on each line, got 'b1=, b'"],
    ),
    "a table with tabs": (
        DATA,
        '{"question": "a0=", "answer": "a"}',
        "a0=\ta",
        ["letters.jsonl:1: expected a JSON object", "a table with tabs is read with `dataset_path: csv`"],
    ),
    "a split that there is not": (
        YAML,
        "test_split: test",
        "test_split: tset",
        ["test_split: the data has no split 'tset' (did you mean 'test'?)"],
    ),
    "no split at all": (YAML, "test_split: test\n", "", ["test_split: missing"]),
    "no target": (YAML, 'doc_to_target: "{{answer}}"\n', "", ["doc_to_target: missing"]),
    "a template with a field that documents lack": (
        YAML,
        "{{question}}",
        "{{qestion}}",
        ["doc_to_text: documents have no field 'qestion' (did you mean 'question'?)"],
    ),
    "a task file that is no YAML": (
        YAML,
        "test_split: test",
        "test_split: [test",
        ["letters.yaml:5: not valid YAML"],
    ),
    "a document that does not fit the context": (
        DATA,
        '{"question": "c2=",',
        '{"question": "' + "c" * 70 + '",',
        [
            "document 2 of letters does not fit the context, 64 tokens: document 2 has a prompt of 70, and up to 2",
            "lower generation_kwargs.max_gen_toks in",
        ],
    ),
}


@pytest.mark.parametrize("case", BAD_TASKS)
@pytest.mark.parametrize("verb", ["validate", "run"])
@pytest.mark.parametrize("metric", ["exact_match", "likelihood"])
def test_a_fault_in_a_task_is_named_with_its_file_and_field(
    command: Command, experiment: Path, tmp_path: Path, case: str, verb: str, metric: str
) -> None:
    name, before, after, expected = BAD_TASKS[case]
    file = tmp_path / "tasks" / name
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    experiment.write_text(experiment.read_text().replace("exact_match", metric))
    result = command(verb, experiment)
    assert result.code == 2
    if metric == "likelihood":
        expected = [part.partition("document 2 has")[0] for part in expected if "max_gen" not in part]
    for part in ["experiment.yml:12: objectives.0.task", "tasks/letters.yaml", *expected]:
        assert part in result.err
    assert len(result.err.splitlines()) == (1 if verb == "validate" else 2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_data_file_without_documents_is_named(
    command: Command, experiment: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "tasks" / "letters.jsonl").write_text(text)
    result = command("validate", experiment)
    assert result.code == 2
    assert "dataset_kwargs.data_files.test: " in result.err
    assert "letters.jsonl: holds no documents" in result.err


def test_a_split_without_documents_is_named(command: Command, experiment: Path, tmp_path: Path) -> None:
    task = tmp_path / "tasks" / "letters.yaml"
    task.write_text(task.read_text() + "process_docs: !function choosing.none\n")
    (tmp_path / "tasks" / "choosing.py").write_text("def none(docs):\n    return docs.select([])\n")
    result = command("validate", experiment, "--allow-task-code")
    assert result.code == 2
    assert "test_split: the split 'test' holds no documents" in result.err


def test_a_document_that_does_not_fit_is_named_when_a_model_is_scored(
    command: Command, experiment: Path, tiny_zoo: Path
) -> None:
    options = ("--tasks", "letters", "--include-path", "tasks", "--max-length")
    assert command("evaluate", tiny_zoo / "one", *options, 5).code == 0
    result = command("evaluate", tiny_zoo / "one", *options, 4)
    assert result.code == 2
    assert "16 of 16 documents of letters do not fit the context, 4 tokens" in result.err
    assert "raise evaluation.max_length (the model reads 64)" in result.err
