"""The printed `lm_eval` command is one that a shell hands over unharmed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.stock import AUTO_BATCH_SIZE, stock_command


def arguments(
    documents: DocumentSet, settings: EvaluationSettings, model: str = "/runs/mine/best/model"
) -> list[str]:
    text = stock_command(
        documents,
        Path(model),
        Path("/my tasks"),
        settings,
        dtype="bfloat16",
        device="cpu",
        threads=2,
    )
    return shlex.split(text)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_every_setting_that_moves_scores_is_in_the_command() -> None:
    settings = EvaluationSettings(
        max_length=512,
        num_fewshot=3,
        apply_chat_template=True,
        system_instruction='Say "$HOME"\nand `date`.',
        attention="eager",
        data_dir="/my data",
    )
    words = arguments(DocumentSet(task="gen", doc_ids=(1, 4, 9), name="gen"), settings)
    assert words[:3] == ["cd", "/my tasks", "&&"]
    assert "OMP_NUM_THREADS=2" in words
    assert after(words, "--model_args").split(",") == [
        "pretrained=/runs/mine/best/model",
        "dtype=bfloat16",
        "softmax_dtype=float32",
        "max_length=512",
        "attn_implementation=eager",
    ]
    assert json.loads(after(words, "--samples")) == {"gen": [1, 4, 9]}
    assert after(words, "--system_instruction") == 'Say "$HOME"\nand `date`.'
    assert after(words, "--num_fewshot") == "3"
    assert after(words, "--batch_size") == str(AUTO_BATCH_SIZE)
    assert "--apply_chat_template" in words
    assert json.loads(after(words, "--metadata")) == {"data_dir": "/my data"}


def test_what_is_left_to_the_task_is_not_in_the_command() -> None:
    documents = DocumentSet(task="gen", doc_ids=(0, 1), name="gen", complete=True)
    words = arguments(documents, EvaluationSettings(batch_size=4))
    assert not {"--samples", "--num_fewshot", "--system_instruction", "--apply_chat_template"} & set(words)
    assert after(words, "--batch_size") == "4"


def test_a_path_that_lm_eval_would_take_apart_is_written_as_json() -> None:
    documents = DocumentSet(task="gen", doc_ids=(0, 1), name="gen", complete=True)
    for model in ("/runs/it's mine/model", "/runs/a,b/model", "/runs/a=b/model"):
        words = arguments(documents, EvaluationSettings(), model)
        assert json.loads(after(words, "--model_args"))["pretrained"] == model
