"""The stock `lm_eval` command for what a run measures, so that anyone can check it without this package."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet

AUTO_BATCH_SIZE = 32
"""Batch size behind `auto` outside a run, which finds its own (`plan.batch_size`), and of models whose memory cannot
be told. It is no probe: scores in bfloat16 move with the batching, and a probe may come out differently on another
worker or day."""


def batch_size(settings: EvaluationSettings) -> int:
    """The batch size that the settings mean."""
    return AUTO_BATCH_SIZE if settings.batch_size == "auto" else settings.batch_size


def stock_command(
    documents: DocumentSet,
    model: Path,
    task_folder: Path,
    settings: EvaluationSettings,
    *,
    dtype: str,
    device: str,
    threads: int,
) -> str:
    """The stock `lm_eval` command that scores an exported model on the same documents."""
    arguments = {"pretrained": str(model), "dtype": dtype, "softmax_dtype": settings.softmax_dtype}
    if settings.max_length is not None:
        arguments["max_length"] = str(settings.max_length)
    if settings.attention is not None:
        arguments["attn_implementation"] = settings.attention
    parts = [
        f"cd {shlex.quote(str(task_folder))} &&",
        f"OMP_NUM_THREADS={threads} lm_eval run --model hf",
        f"--model_args {shlex.quote(_model_arguments(arguments))}",
        f"--tasks {documents.task} --include_path .",
        f"--device {device} --batch_size {batch_size(settings)}",
    ]
    if settings.data_dir is not None:
        metadata = json.dumps({"data_dir": settings.data_dir}, ensure_ascii=False)
        parts.append(f"--metadata {shlex.quote(metadata)}")
    if settings.num_fewshot is not None:
        parts.append(f"--num_fewshot {settings.num_fewshot}")
    if settings.apply_chat_template:
        parts.append("--apply_chat_template")
    if settings.system_instruction is not None:
        parts.append(f"--system_instruction {shlex.quote(settings.system_instruction)}")
    if not documents.complete:
        samples = json.dumps({documents.task: list(documents.doc_ids)}, separators=(",", ":"))
        parts.append(f"--samples '{samples}'")
    return " ".join(parts)


def _model_arguments(arguments: Mapping[str, str]) -> str:
    """The form people write, or JSON where lm-eval would take a value apart."""
    if any(re.search(r"[^\w@%+:./-]", value) for value in arguments.values()):
        return json.dumps(arguments, ensure_ascii=False)
    return ",".join(f"{key}={value}" for key, value in arguments.items())
