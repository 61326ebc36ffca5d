"""Says in a person's words why a task cannot be loaded: which field of its file, which line of its data.

lm-eval and datasets stop at whatever Python error comes first, such as `StopIteration` for a file without
documents. What is most often behind it is looked for here, and only once loading has failed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import nearest

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
FORMATS = ("json", "csv", "text", "parquet", "arrow")
"""Values of `dataset_path` that stand for data in files."""


def unreadable_file(name: str, folders: Sequence[Path]) -> str | None:
    """Why the file of a task is passed over by lm-eval, which keeps silent about files that are not valid YAML.

    Args:
        name: The task.
        folders: Where to look.
    """
    for file in (found for folder in folders for found in sorted(folder.rglob("*.yaml"))):
        text = file.read_text(encoding="utf-8", errors="replace")
        if not re.search(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*$", text, re.MULTILINE):
            continue
        try:
            yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f":{mark.line + 1}"
            return f"{file}{line}: not valid YAML: {getattr(error, 'problem', error)}"
    return None


def why_not_loaded(file: Path, config: Mapping[str, Any], error: Exception) -> str:
    """Say why a task cannot be loaded.

    Args:
        file: Its file.
        config: What stands in it and in the files it includes.
        error: What loading it raised.
    """
    for found in (
        *_data_faults(config, file.parent),
        *_split_faults(config, error),
        *_template_faults(config, file.parent, error),
    ):
        return f"{file}: {found}"
    return f"cannot be loaded from {file}: {type(error).__name__}: {error}"


def _data_faults(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    for field, path in _data_files(config, folder):
        if not path.is_file():
            others = [other.name for other in path.parent.glob(f"*{path.suffix}")]
            yield f"{field}: no such file: {path}{nearest(path.name, others)}"
        elif not path.read_bytes().strip():
            yield f"{field}: {path}: holds no documents"
        elif config.get("dataset_path") == "json":
            yield from (f"{field}: {reason}" for reason in _json_faults(path, config))


def _data_files(config: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    """Field and path of the data files that can be looked at."""
    given = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") not in FORMATS or given is None:
        return
    field = "dataset_kwargs.data_files"
    by_field = (
        {f"{field}.{split}": files for split, files in given.items()} if isinstance(given, dict) else {}
    )
    for place, files in (by_field or {field: given}).items():
        for name in files if isinstance(files, list) else [files]:
            if not re.search(r"://|[*?\[]", str(name)):
                yield place, folder / str(name)


def _json_faults(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """The first line that is no document, unless the file is one JSON value as a whole."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield f"{path}: expected text in UTF-8: {error}"
        return
    if (config.get("dataset_kwargs") or {}).get("field") is not None:
        return
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, list) and whole and all(isinstance(row, dict) for row in whole):
        return
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, dict):
            hint = ""
            if "\t" in line and not line.startswith("{"):
                hint = (
                    '; a table with tabs is read with `dataset_path: csv` and `sep: "\\t"` in dataset_kwargs'
                )
            yield f"{path}:{number}: expected a JSON object on each line, got {line!r:.120}{hint}"
            return


def _split_faults(config: Mapping[str, Any], error: Exception) -> Iterator[str]:
    fields = [key for key in ("test_split", "validation_split") if config.get(key)]
    if not fields and "class" in config:
        return  # it has splits of its own
    if not fields:
        yield "test_split: missing; expected the name of the split to score, such as test"
        return
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    known = list(files) if isinstance(files, dict) else []
    for field in (*fields, "training_split", "fewshot_split"):
        split = config.get(field)
        if split and isinstance(error, KeyError) and error.args == (split,):
            has = f"; it has {', '.join(known)}" if known else ""
            yield f"{field}: the data has no split {split!r}{nearest(split, known)}{has}"
    if fields and isinstance(error, (IndexError, StopIteration)):
        yield f"{fields[0]}: the split {config[fields[0]]!r} holds no documents"


def _template_faults(config: Mapping[str, Any], folder: Path, error: Exception) -> Iterator[str]:
    if config.get("doc_to_target") is None and "class" not in config:
        yield "doc_to_target: missing; expected the field or the template of the right answer"
    name = re.search(r"'([^']+)' is undefined", str(error))
    if name is None:
        return
    for field in TEMPLATES:
        if re.search(rf"\b{re.escape(name[1])}\b", str(config.get(field))):
            known = _document_fields(config, folder)
            has = f"; documents have {', '.join(known)}" if known else ""
            yield f"{field}: documents have no field {name[1]!r}{nearest(name[1], known)}{has}"


def _document_fields(config: Mapping[str, Any], folder: Path) -> list[str]:
    """The fields of the first document, where it is easily read."""
    for _, path in _data_files(config, folder):
        try:
            row = json.loads(path.read_text(encoding="utf-8-sig").split("\n", 1)[0])
        except ValueError:
            continue
        if isinstance(row, dict):
            return list(row)
    return []
