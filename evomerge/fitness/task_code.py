"""Finds the Python code that a task file would run, without running it.

A task file is YAML, but lm-eval loads the functions that its `!function` tags name and the class that its
`class` names, and asks Hugging Face's `evaluate` for metrics it does not know, which downloads and runs them.
The file is parsed as lm-eval parses it, tags apart; looking for words in its text could be deceived.
Files that evomerge ships are known by their content, wherever they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import Fault, TaskError

KEYS = ("class", "unsafe_code")

SHIPPED = frozenset({"41202a79f8dc3b30e25807044a2c8c1d191aa657a012f23876f32ccba1b9b932"})
"""SHA-256 of the task files in `tasks/` that name functions. They name only functions of this package."""

PACKAGE = "evomerge"

PLAIN = "tag:yaml.org,2002:"
"""Start of the tags of YAML's own types."""


def refuse_code(name: str, file: Path, *, trusted: Path, metrics: Collection[str]) -> None:
    """Refuse a task file that runs Python code, itself or through a file it includes.

    A file that evomerge ships may run the functions of evomerge that it names.

    Args:
        name: The task.
        file: Its file.
        trusted: Folder whose files may run code: lm-eval's own.
        metrics: The metrics that lm-eval knows itself.

    Raises:
        TaskError: A file runs code, or cannot be read.
    """
    pending, seen = [file], set()
    while pending:
        current = pending.pop().resolve()
        if current in seen or current.is_relative_to(trusted.resolve()):
            continue
        seen.add(current)
        try:
            text = current.read_text(encoding="utf-8")
            nodes = yaml.compose(text, Loader=yaml.SafeLoader)
            tags = [tag for tag in _tags(nodes) if not tag.startswith(PLAIN) or ":python/" in tag]
            data = {} if tags else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TaskError(Fault(path=name, reason=f"cannot read {current}: {error}")) from error
        if not isinstance(data, dict):
            raise TaskError(Fault(path=name, reason=f"{current}: expected a mapping of settings"))
        if content_hash(text) in SHIPPED and not _is_shadowed(current):
            found = []
        else:
            found = [*tags, *(key for key in KEYS if data.get(key)), *_foreign_metrics(data, metrics)]
        if found:
            reason = f"{current} runs Python code ({found[0]}); read it, and pass --allow-task-code if you "
            raise TaskError(Fault(path=name, reason=f"{reason}trust it"))
        included = data.get("include") or []
        pending += [
            current.parent / str(item) for item in (included if isinstance(included, list) else [included])
        ]


def content_hash(text: str) -> str:
    """Hash that names a shipped task file."""
    return hashlib.sha256(text.encode()).hexdigest()


def _is_shadowed(file: Path) -> bool:
    """Whether lm-eval would take a function of this package from a folder beside the task file instead."""
    return (file.parent / PACKAGE).exists()


def _tags(node: yaml.Node | None) -> Iterator[str]:
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:  # an alias leads to a node that was seen
            continue
        seen.add(id(node))
        yield str(node.tag)
        if isinstance(node, yaml.MappingNode):
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _foreign_metrics(data: dict[str, Any], metrics: Collection[str]) -> Iterator[str]:
    """Metrics that lm-eval would look for elsewhere, at any depth, as `task_list` entries have their own."""
    pending: list[Any] = [data]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("metric"), str) and (
                value["metric"] not in metrics or value.get("hf_evaluate")
            ):
                yield f"metric: {value['metric']}"
            pending += value.values()
        elif isinstance(value, list):
            pending += value
