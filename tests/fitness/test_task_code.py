"""Task files that run Python code are found by what they are, not by how they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import TaskError
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.task_code import refuse_code
from tests.tasks import GENERATE, write_tasks

FUNCTIONS = """
from pathlib import Path

(Path(__file__).parent / "was-run").touch()


def text(doc):
    return doc["q"]
"""

DISGUISES = {
    "plain": "process_results: !function code.text\n",
    "nested": "generation_kwargs: {until: [!function code.text]}\n",
    "behind a quoted hash": 'extra: {a: "x # y", b: !function code.text}\n',
    "verbatim tag": "extra: !<!function> code.text\n",
    "escaped tag": "extra: !f%75nction code.text\n",
    "python tag": "extra: !!python/name:os.system\n",
    "class": "class: code.Task\n",
    "merged class": "extra: &e {class: code.Task}\n<<: *e\n",
    "unsafe": "unsafe_code: true\n",
    "metric from elsewhere": "metric_list: [{metric: somebody/metric}]\n",
    "metric asked for elsewhere": "metric_list: [{metric: exact_match, hf_evaluate: true}]\n",
}


def refuse(file: Path) -> None:
    refuse_code("t", file, trusted=file.parent / "trusted", metrics=["exact_match", "acc"])


@pytest.mark.parametrize("text", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("way", ["itself", "include", "include list", "include of include"])
def test_code_is_found_in_a_file_and_in_what_it_includes(tmp_path: Path, text: str, way: str) -> None:
    (tmp_path / "harmless.yaml").write_text("output_type: generate_until\n")
    (tmp_path / "code.yaml").write_text(text)
    (tmp_path / "middle.yaml").write_text("include: [harmless.yaml, code.yaml]\n")
    file = tmp_path / "task.yaml"
    file.write_text(
        {
            "itself": text,
            "include": "include: code.yaml\n",
            "include list": "include:\n  - harmless.yaml\n  - code.yaml\n",
            "include of include": f"include: {tmp_path}/middle.yaml # not here\n",
        }[way]
    )
    with pytest.raises(TaskError, match=r"t: .* runs Python code .*--allow-task-code"):
        refuse(file)


def test_a_tag_handle_does_not_hide_a_function(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("%TAG !e! !func\n---\nextra: !e!tion code.text\n")
    with pytest.raises(TaskError, match="runs Python code"):
        refuse(tmp_path / "task.yaml")


def test_words_in_texts_and_comments_are_no_code(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("# !function\ndoc_to_text: 'class: !function {{q}}'\nmetric_list: [{metric: acc}]\n")
    refuse(file)


def test_including_a_file_of_lm_eval_itself_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "stock.yaml").write_text(DISGUISES["plain"])
    (tmp_path / "task.yaml").write_text("include: trusted/stock.yaml\ntask: mine\n")
    refuse(tmp_path / "task.yaml")


def test_a_cycle_of_includes_and_a_missing_one_end(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("include: task.yaml\n")
    refuse(file)
    file.write_text("include: nowhere.yaml\n")
    with pytest.raises(TaskError, match=r"cannot read .*nowhere\.yaml"):
        refuse(file)


def test_a_task_with_code_runs_only_when_allowed(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "code.py").write_text(FUNCTIONS)
    text = GENERATE.replace('doc_to_text: "{{q}}="', "doc_to_text: !function code.text")
    (folder / "gen.yaml").write_text(text)
    with pytest.raises(TaskError, match="--allow-task-code"):
        TaskLibrary(["gen"], [folder], allow_code=False)
    assert not (folder / "was-run").exists()
    first = TaskLibrary(["gen"], [folder], allow_code=True).fingerprint("gen")
    assert (folder / "was-run").exists()
    (folder / "code.py").write_text(FUNCTIONS.replace('doc["q"]', 'doc["q"] + "="'))
    assert TaskLibrary(["gen"], [folder], allow_code=True).fingerprint("gen") != first


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    from jinja2.exceptions import SecurityError

    folder = write_tasks(tmp_path / "tasks")
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "gen.yaml").write_text(GENERATE.replace("{{q}}=", reach))

    def render() -> None:
        library = TaskLibrary(["gen"], [folder], allow_code=False)
        library.tasks["gen"].doc_to_text({"q": "a"})

    with pytest.raises((SecurityError, TaskError), match="unsafe"):
        render()


def test_tasks_of_lm_eval_itself_may_run_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """gsm8k-like tasks are theirs; checked on the file alone, as their data is not at hand here."""
    import lm_eval.tasks

    package = Path(lm_eval.__file__).parent
    file = package / "tasks" / "mgsm" / "native_cot" / "mgsm_native_cot_ja.yaml"
    assert file.is_file()
    refuse_code("mgsm_native_cot_ja", file, trusted=package, metrics=[])
