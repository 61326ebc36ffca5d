"""The shipped tasks load offline and without permission, name their sources, and score as lm-eval does."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from evomerge.cli import evomerge
from evomerge.errors import ConfigurationError, TaskError
from evomerge.experiment import EvaluationSettings
from evomerge.fitness import maths
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.documents import split_documents
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.fitness.task_code import SHIPPED, content_hash
from tests.fitness.answer_tables import ROWS
from tests.tiny import make_model, make_tokenizer

TASKS = Path(__file__).parents[1] / "tasks"
EXCERPT = Path(__file__).parent / "maths_excerpt"
FILES = sorted(TASKS.rglob("*.yaml"))
NAMES = [path.stem for path in FILES if not path.name.startswith("_")]
MGSM = [f"mgsm_{language}_cot{chat}" for language in maths.MGSM_LANGUAGES for chat in ("", "_chat")]
METRICS = ["acc", "acc_lang", "no_answer", "wrong_language", "acc_sakana", "acc_lang_sakana"]


@pytest.fixture(scope="module")
def library() -> TaskLibrary:
    """Every shipped task over the excerpts, where three problems of the test set stand for MGSM's 250."""
    first = maths.mgsm_items()[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maths, "mgsm_items", lambda: first)
        return TaskLibrary(NAMES, [TASKS], allow_code=False, data_dir=str(EXCERPT))


def test_the_tasks_are_mgsm_in_11_languages_and_two_parts_of_gsm8k() -> None:
    gsm8k = [
        f"gsm8k_{part}_{prompt}"
        for part in ("train", "test_rest")
        for prompt in ("cot", "cot_chat", "ja_alpaca_cot")
    ]
    assert sorted(NAMES) == sorted([*MGSM, "mgsm_ja_alpaca_cot", *gsm8k])


@pytest.mark.parametrize(
    "file", [path for path in FILES if not path.name.startswith("_")], ids=lambda path: path.stem
)
def test_a_task_file_opens_with_source_and_licence_and_is_named_like_its_task(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    opening = text[: text.index("\ninclude")]
    assert all(line.startswith("# ") for line in opening.splitlines())
    assert re.search(r"arXiv \d{4}\.\d{5}", opening)
    assert "https://github.com/" in opening
    assert re.search(r"Licence: (CC BY 4\.0|MIT)\.", opening)
    assert f"\ntask: {file.stem}\n" in text
    assert len(text.splitlines()) <= 10


def test_every_task_asks_greedily_without_examples_and_long_enough(library: TaskLibrary) -> None:
    assert set(library.tasks) == set(NAMES)
    for name, task in library.tasks.items():
        generation = task.config.generation_kwargs
        assert task.config.num_fewshot == 0
        assert (generation["do_sample"], generation["max_gen_toks"]) == (False, 1024), name
        assert generation["until"]
        assert library.metrics(name) == [(metric, "none") for metric in METRICS]
        assert [metric for metric, higher in task.higher_is_better().items() if not higher] == [
            "no_answer",
            "wrong_language",
        ]


def test_prompts_hold_the_question_and_nothing_of_the_answer(library: TaskLibrary) -> None:
    for name, task in library.tasks.items():
        document = task.eval_docs[0]
        prompt = task.doc_to_text(document)
        assert document["question"] in prompt
        assert task.doc_to_target(document) == document["answer"]
        kind = "alpaca" if "alpaca" in name else "chat" if name.endswith("chat") else "plain"
        instruction = prompt.replace(document["question"], "")
        assert not re.search(r"\d", instruction)
        if kind == "alpaca":
            assert prompt.startswith("以下に、あるタスクを説明する指示があります。")
            assert prompt.endswith("\n\n### 応答:")
        else:
            assert prompt.startswith(document["question"]) == (kind == "chat")
            # What a base model writes when it goes on to the next problem stops it.
            assert (kind == "chat") or any(
                instruction.startswith(stop) for stop in task.config.generation_kwargs["until"]
            )


def test_the_prompts_of_a_language_are_written_in_it(library: TaskLibrary) -> None:
    from evomerge.fitness.language import language_of

    for name in MGSM:
        document = library.tasks[name].eval_docs[0]
        instruction = library.tasks[name].doc_to_text(document).replace(document["question"], "")
        assert document["language"] == name.split("_")[1]
        assert language_of(instruction, "xx") in (document["language"], None), name


def test_the_paper_prompt_has_the_papers_stop_texts(library: TaskLibrary) -> None:
    for name in ("mgsm_ja_alpaca_cot", "gsm8k_test_rest_ja_alpaca_cot"):
        assert library.tasks[name].config.generation_kwargs["until"] == [
            "Instruction:",
            "Instruction",
            "Response:",
            "Response",
        ]
        assert library.tasks[name].eval_docs[0]["language"] == "ja"


# Documents apart


def test_tasks_over_the_same_problems_share_their_split(library: TaskLibrary) -> None:
    assert {library.split_name(name) for name in NAMES if name.startswith("mgsm")} == {"mgsm"}
    assert {library.split_name(name) for name in NAMES if name.startswith("gsm8k_train")} == {"gsm8k_train"}
    assert {library.split_name(name) for name in NAMES if name.startswith("gsm8k_test")} == {
        "gsm8k_test_rest"
    }


def test_search_documents_of_gsm8k_are_none_of_mgsms(library: TaskLibrary) -> None:
    taken = set(maths.mgsm_items())
    for name in NAMES:
        questions = {maths.question_hash(row["question"]) for row in library.tasks[name].eval_docs}
        if name.startswith("gsm8k"):
            assert not questions & taken
        elif name.startswith("mgsm_en"):
            assert questions <= taken


# Code


def test_the_shipped_task_files_with_code_are_known_by_their_content() -> None:
    with_code = [
        path
        for path in TASKS.rglob("*")
        if path.is_file() and "!function" in path.read_text(encoding="utf-8") and path.suffix != ".md"
    ]
    assert {content_hash(path.read_text(encoding="utf-8")) for path in with_code} == SHIPPED
    assert not list(TASKS.rglob("*.py"))
    for path in with_code:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"!function ([\w.]+)\.\w+", text)) == {"evomerge.fitness.maths"}
        # The check of code does not follow the includes of a file with functions.
        assert "include:" not in text


def load_copy(folder: Path, name: str = "mgsm_ja_cot") -> TaskLibrary:
    return TaskLibrary([name], [folder], allow_code=False, data_dir=str(EXCERPT))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(TASKS / "maths", tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_shipped_files_are_known_elsewhere_under_other_names_and_line_endings(copied: Path) -> None:
    (copied / "_base.yaml").rename(copied / "renamed.yml")
    text = (copied / "mgsm_ja_cot.yaml").read_text(encoding="utf-8").replace("_base.yaml", "renamed.yml")
    (copied / "mgsm_ja_cot.yaml").write_text(text, encoding="utf-8")
    (copied / "renamed.yml").write_bytes((copied / "renamed.yml").read_bytes().replace(b"\n", b"\r\n"))
    assert load_copy(copied).num_documents("mgsm_ja_cot") == 1


def test_a_shipped_file_that_was_changed_needs_permission(copied: Path) -> None:
    base = copied / "_base.yaml"
    base.write_text(base.read_text(encoding="utf-8") + "description: ''\n", encoding="utf-8")
    with pytest.raises(TaskError, match=r"_base\.yaml runs Python code .*--allow-task-code"):
        load_copy(copied)


def test_a_module_beside_a_shipped_file_that_would_be_run_instead_is_refused(copied: Path) -> None:
    fake = copied / "evomerge" / "fitness"
    fake.mkdir(parents=True)
    (fake / "maths.py").write_text(f"open({str(copied / 'was-run')!r}, 'w')\n")
    with pytest.raises(TaskError, match="runs Python code"):
        load_copy(copied)
    assert not (copied / "was-run").exists()


def test_a_task_of_ones_own_may_build_on_a_shipped_one_but_not_add_code(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    text = f"include: {TASKS}/maths/mgsm_ja_cot.yaml\ntask: own\ndoc_to_text: '{{{{question}}}}'\n"
    own.write_text(text)
    assert load_copy(tmp_path, "own").num_documents("own") == 1
    own.write_text(text + "process_docs: !function evomerge.fitness.maths.documents\n")
    with pytest.raises(TaskError, match=r"own\.yaml runs Python code"):
        load_copy(tmp_path, "own")


# Scores

LIMITS = "generation_kwargs: {do_sample: false, max_gen_toks: 12, until: ['\\n']}\n"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shipped tasks cut to 12 tokens, a model, and data of which it solves some."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("short")
    make_model(folder / "model", seed=1, dtype="float32", max_position_embeddings=96)
    for language in ("en", "de"):
        text = f"include: {TASKS}/maths/mgsm_{language}_cot.yaml\ntask: short_{language}\n{LIMITS}"
        (folder / f"short_{language}.yaml").write_text(text)
    questions = [f"what is {one} + {other}" for one in range(3) for other in range(4)]
    data = folder / "data"
    data.mkdir()
    for answers in (["1"] * len(questions), None):
        if answers is None:
            model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
            said = {language: read_aloud(model, folder, language) for language in ("en", "de")}
            answers = [str(number if index % 2 else 7) for index, number in enumerate(said["en"])]
        for language in ("en", "de"):
            lines = [f"{question}\t{answer}\n" for question, answer in zip(questions, answers, strict=True)]
            (data / f"mgsm_{language}.tsv").write_text("".join(lines))
    return folder


def read_aloud(model: Any, folder: Path, language: str) -> list[Any]:
    """The numbers that the model's answers end on; 0 for none."""
    task = f"short_{language}"
    library = TaskLibrary([task], [folder], allow_code=False, data_dir=str(folder / "data"))
    evaluate(model, folder, library, [task])
    texts = [instance.resps[0] for instance in library.tasks[task].instances]
    numbers = [maths.final_number(text, language) for text in texts]
    return [0 if number is None or number.denominator != 1 else number for number in numbers]


def evaluate(model: Any, folder: Path, library: TaskLibrary, tasks: list[str]) -> Any:
    settings = EvaluationSettings(batch_size=4, data_dir=str(folder / "data"))
    metrics = {task: library.metrics(task) for task in tasks}
    documents = [
        DocumentSet(task=task, name=task, doc_ids=tuple(range(library.num_documents(task))), complete=True)
        for task in tasks
    ]
    return HarnessEvaluator(model, make_tokenizer(), library, metrics, settings).evaluate(documents)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own entry point warns about its environment
def test_shipped_tasks_score_as_lm_eval_itself_scores_them(short: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    tasks = ["short_en", "short_de"]
    model = AutoModelForCausalLM.from_pretrained(short / "model").eval()
    library = TaskLibrary(tasks, [short], allow_code=False, data_dir=str(short / "data"))
    mine = evaluate(model, short, library, tasks)
    with contextlib.chdir(short):
        stock = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4, softmax_dtype="float32"),
            tasks=tasks,
            # What the printed command passes as --metadata.
            task_manager=TaskManager(
                include_path=["."], include_defaults=False, metadata={"data_dir": str(short / "data")}
            ),
            bootstrap_iters=0,
        )
    for task in tasks:
        assert set(mine.metrics[task]) == {f"{metric},none" for metric in METRICS}
        for key, value in mine.metrics[task].items():
            assert value == stock["results"][task][key]
    assert any(0 < value < 1 for value in mine.metrics["short_en"].values())


def test_evaluate_reads_local_data(short: Path) -> None:
    arguments = [
        "evaluate",
        str(short / "model"),
        "--tasks",
        "short_en,short_de",
        "--include-path",
        str(short),
    ]
    arguments += ["--data-dir", str(short / "data"), "--limit", "5", "--device", "cpu", "--json"]
    result = CliRunner().invoke(evomerge, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["tasks"]
    assert {task: found[task]["num_documents"] for task in found} == {"short_en": 5, "short_de": 5}
    assert set(found["short_en"]["metrics"]) == {f"{metric},none" for metric in METRICS}


# In an experiment

EXPERIMENT = """\
name: maths
base_model: {zoo}/base
models: ["{zoo}/one", "{zoo}/two"]
search_space: {{type: parameter, merge_method: task_arithmetic, parameters: {{weight: {{low: 0, high: 1}}}}}}
objectives:
  - {{task: gsm8k_train_cot, metric: acc, holdout_task: mgsm_en_cot}}
  - {{task: short_de, metric: acc_lang}}
  - {{task: short_en, metric: acc}}
search: {{algorithm: cma-es, evaluations: 6, seed: 1}}
evaluation: {{include_path: [{tasks}, {short}], data_dir: {data}, holdout: 0.3, max_length: 4096}}
workers: {{backend: inline}}
"""


def test_an_experiment_finds_its_data_and_holds_out_the_same_problems_in_every_language(
    tiny_zoo: Path, short: Path, tmp_path: Path
) -> None:
    from evomerge.prepare import prepare

    data = tmp_path / "data"
    shutil.copytree(short / "data", data / "mgsm")
    shutil.copytree(EXCERPT, data / "gsm8k")
    file = tmp_path / "experiment.yml"
    file.write_text(EXPERIMENT.format(zoo=tiny_zoo, tasks=TASKS, short=short, data="data"))
    run = prepare(file)
    assert run.experiment.evaluation.data_dir == run.spec.evaluation.data_dir == str(data)
    held_out = {item.name: item for item in run.holdout_documents}
    searched = {item.name: item for item in run.search_documents}
    assert held_out["gsm8k_train_cot"].task == "mgsm_en_cot"
    assert held_out["short_de"].doc_ids == held_out["short_en"].doc_ids
    assert searched["short_de"].doc_ids == searched["short_en"].doc_ids
    assert searched["short_de"].doc_ids == split_documents("mgsm", 12, holdout=0.3, limit=None)[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "no such folder"),
        ("empty", r"no such file: .*train\.jsonl"),
        ("torn", r"train\.jsonl:1: expected a JSON"),
    ],
)
def test_data_that_are_not_there_stop_an_experiment_before_it_starts(
    tiny_zoo: Path, short: Path, tmp_path: Path, data: str, message: str
) -> None:
    from evomerge.prepare import prepare

    (tmp_path / "empty").mkdir()
    shutil.copytree(EXCERPT, tmp_path / "torn")
    (tmp_path / "torn" / "train.jsonl").write_text('{"question": ')
    file = tmp_path / "experiment.yml"
    file.write_text(EXPERIMENT.format(zoo=tiny_zoo, tasks=TASKS, short=short, data=data))
    with pytest.raises(ConfigurationError, match=message) as caught:
        prepare(file)
    line = 1 + next(index for index, text in enumerate(file.read_text().splitlines()) if "data_dir" in text)
    assert (str(caught.value.faults[0].file), caught.value.faults[0].line) == (str(file), line)


def test_the_pages_name_every_task(library: TaskLibrary) -> None:
    page = (TASKS.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name in NAMES:
        pattern = re.sub(r"mgsm_\w\w_cot", "mgsm_LANG_cot", name)
        assert f"`{pattern}`" in page or f"`{name}`" in page, name
    judged = [
        maths.process_results({"answer": str(row["gold"]), "language": row["in"]}, [row["out"]])
        for _, row in ROWS
    ]
    right = [row for row in judged if row["acc"]]
    missed = sum(not row["acc_sakana"] for row in right)
    counts = f"holds {len(judged)} written outputs .* of the {len(right)} right answers it misses {missed}\\."
    assert re.search(counts, " ".join(page.split()))
    for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        assert yaml.safe_load(text)
