"""Documents fit exactly when lm-eval would send their prompts whole."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.context import check_context
from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
from evomerge.fitness.reading import open_reader
from tests.tasks import CHOOSE, write_tasks
from tests.tiny import make_model

METRICS = {"gen": [("exact_match", "whole")], "choose": [("acc", "none")], "bare": [("acc", "none")]}
LIKELIHOOD = ("likelihood", "evomerge")
CHAT = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks, `choose` with an answer in document 3 that is longer than all others."""
    found = write_tasks(tmp_path_factory.mktemp("tasks"))
    rows = [json.loads(line) for line in (found / "choose.jsonl").read_text().splitlines()]
    rows[3]["options"][1] = "abcdefgh"
    (found / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = CHOOSE.replace("task: choose", "task: bare").replace('doc_to_text: "{{q}}="', 'doc_to_text: ""')
    (found / "bare.yaml").write_text(bare)
    return found


@pytest.fixture(scope="module")
def library(folder: Path) -> TaskLibrary:
    return TaskLibrary(["gen", "choose", "bare"], [folder], allow_code=False)


def every(task: str, *metrics: tuple[str, str]) -> DocumentSet:
    return DocumentSet(task=task, doc_ids=tuple(range(8)), name=task, complete=True, metrics=metrics or None)


def check(
    library: TaskLibrary, models: Path, documents: DocumentSet, *names: str, **settings: Any
) -> list[str]:
    """What is wrong."""
    folders = {name: models / name for name in names or ("base",)}
    try:
        check_context([documents], library, METRICS, EvaluationSettings(**settings), folders)
    except TaskError as error:
        return [fault.reason for fault in error.faults]
    return []


@contextlib.contextmanager
def warnings_of_lm_eval() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("documents", "longest"),
    [
        (every("gen"), 16 + 4),
        (every("gen", LIKELIHOOD), 16),
        (every("choose"), 5 + 8 - 1),
        (every("bare"), 1 + 8 - 1),
    ],
    ids=["generated", "likelihood", "choices", "choices without a prompt"],
)
def test_the_shortest_context_that_is_accepted_is_the_shortest_in_which_lm_eval_cuts_nothing(
    library: TaskLibrary, tiny_zoo: Path, documents: DocumentSet, longest: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_zoo / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / "base")
    for length in (longest - 1, longest):
        settings = EvaluationSettings(batch_size=4, max_length=length)
        scorer = HarnessEvaluator(model, tokenizer, library, METRICS, settings)
        with warnings_of_lm_eval() as cuts:
            try:
                scorer.evaluate([documents])
            except AssertionError:  # nothing is left of the prompt of an answer that fills the context
                cuts.append("Truncating")
        cut = [text for text in cuts if "runcat" in text]
        refused = check(library, tiny_zoo, documents, max_length=length)
        assert bool(cut) == bool(refused) == (length < longest), (length, cuts, refused)


def test_the_first_document_is_named_with_what_can_be_done(library: TaskLibrary, tiny_zoo: Path) -> None:
    [reason] = check(library, tiny_zoo, every("choose"), max_length=11)
    assert reason.startswith(
        "document 3 of choose does not fit the context, 11 tokens: document 3 has a prompt of 12; "
    )
    assert "raise evaluation.max_length (the model reads 64)" in reason
    assert "max_gen_toks" not in reason
    assert "num_fewshot" not in reason, "there are no examples"
    [reason] = check(library, tiny_zoo, every("gen"), max_length=19)
    assert "8 of 8 documents of gen do not fit" in reason
    assert "a prompt of 16, and up to 4 are to be generated" in reason
    assert "ask for fewer examples (evaluation.num_fewshot)" in reason
    assert check(library, tiny_zoo, every("gen"), max_length=19, num_fewshot=1) == []


def test_every_model_is_asked_and_the_one_that_reads_less_is_named(
    library: TaskLibrary, tmp_path: Path
) -> None:
    for seed, (name, length) in enumerate({"base": 64, "same": 64, "short": 19}.items()):
        make_model(tmp_path / name, seed=seed, max_position_embeddings=length)
    assert check(library, tmp_path, every("gen"), "base", "same") == []
    [reason] = check(library, tmp_path, every("gen"), "base", "same", "short")
    assert "do not fit the context of short, 19 tokens" in reason
    assert "evaluation.max_length" not in reason, "it reads no more"


def test_the_chat_template_counts(library: TaskLibrary, tmp_path: Path) -> None:
    make_model(tmp_path / "base", seed=0)
    (tmp_path / "base" / "chat_template.jinja").write_text(CHAT)
    options: dict[str, Any] = {"apply_chat_template": True, "num_fewshot": 0}
    # A prompt of 4 characters, 2 for the template, 4 for the answer.
    assert check(library, tmp_path, every("gen"), max_length=10, **options) == []
    assert check(library, tmp_path, every("gen"), max_length=9, **options)


def test_asking_leaves_the_tasks_as_they_are(folder: Path, tiny_zoo: Path) -> None:
    library = TaskLibrary(["gen", "choose"], [folder], allow_code=False)
    before = [library.fingerprint(task) for task in ("gen", "choose")]
    for task in ("gen", "choose"):
        check(library, tiny_zoo, every(task), num_fewshot=1)
    assert [library.fingerprint(task) for task in ("gen", "choose")] == before


@pytest.mark.parametrize(
    "config", [{"max_position_embeddings": 48}, {"n_positions": 32, "model_type": "gpt2"}, {}], ids=str
)
def test_a_model_reads_what_lm_eval_finds(tmp_path: Path, config: dict[str, Any]) -> None:
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer

    make_model(tmp_path / "base", seed=0)
    file = tmp_path / "base" / "config.json"
    own = json.loads(file.read_text())
    del own["max_position_embeddings"]
    file.write_text(json.dumps({**own, **config}))
    expected = resolve_max_length(
        AutoConfig.from_pretrained(file.parent), AutoTokenizer.from_pretrained(file.parent)
    )
    assert open_reader(file.parent, EvaluationSettings()).max_length == expected
    assert open_reader(file.parent, EvaluationSettings(max_length=7)).max_length == 7
