"""Makes sure that every document fits the context of every model, before anything is scored.

lm-eval cuts off the beginning of a prompt that is too long, and goes on: what a model is then asked is not what
the task asks. So such documents are refused. A prompt has to leave room for all tokens that may be generated
after it, as that is the length lm-eval cuts it to; a prompt with an answer to be judged has to fit with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import Fault, TaskError
from evomerge.experiment import EvaluationSettings
from evomerge.fitness.base import DocumentSet
from evomerge.fitness.harness import TaskLibrary
from evomerge.fitness.likelihood import likelihood_requests
from evomerge.fitness.metrics import LIKELIHOOD
from evomerge.fitness.reading import Reader, new_tokens, open_reader, per_document

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class _Need:
    """What a request needs: tokens of the prompt, with an answer to be judged, and those generated after it."""

    length: int
    new: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.length + self.new


def check_context(
    documents: Sequence[DocumentSet],
    library: TaskLibrary,
    metrics: Mapping[str, Sequence[tuple[str, str]]],
    settings: EvaluationSettings,
    models: Mapping[str, Path],
) -> None:
    """Make sure that documents fit the context of models.

    Args:
        documents: The documents.
        library: Their tasks.
        metrics: Task as the objectives name it -> the (metric, filter) pairs wanted.
        settings: How they are prompted.
        models: Model as messages name it -> its checkpoint.

    Raises:
        TaskError: Some do not; carries a fault for every task, whose path is the task.
    """
    readers = {name: open_reader(folder, settings) for name, folder in _different(models, settings)}
    faults: dict[str, Fault] = {}
    built: dict[DocumentSet, list[Any]] = {}
    for name, reader in readers.items():
        for subset in documents:
            if settings.apply_chat_template or subset not in built:
                render = reader.render if settings.apply_chat_template else None
                built[subset] = library.requests(subset, settings, chat_template=render)
            wanted = subset.metrics or metrics[subset.name]
            groups = _groups(library.tasks[subset.task], built[subset], wanted, settings)
            found = _too_long(subset, groups, reader)
            if found:
                model = name if len(readers) > 1 else ""
                reason = _reason(found, subset, library, reader, settings, model=model)
                faults.setdefault(subset.task, Fault(path=subset.task, reason=reason))
    if faults:
        raise TaskError(list(faults.values()))


def _different(models: Mapping[str, Path], settings: EvaluationSettings) -> Iterator[tuple[str, Path]]:
    """The models that read differently, each with the first that reads so."""
    seen = set()
    for name, folder in models.items():
        files = [(folder / file) for file in TOKENIZER_FILES]
        config = b"" if settings.max_length else (folder / "config.json").read_bytes()
        key = (config, *(file.read_bytes() if file.is_file() else b"" for file in files))
        if key not in seen:
            seen.add(key)
            yield name, folder


def _groups(
    task: Any, requests: Sequence[Any], wanted: Sequence[tuple[str, str]], settings: EvaluationSettings
) -> list[list[Any]]:
    """The requests of every document, those for the likelihood of its answer among them."""
    documents = per_document(requests)
    groups: list[list[Any]] = [[] for _ in documents]
    if any(pair != LIKELIHOOD for pair in wanted):
        groups = [list(found) for _, found in documents]
    if LIKELIHOOD in wanted:
        references = likelihood_requests(task, documents, chat=settings.apply_chat_template)
        for group, reference in zip(groups, references, strict=True):
            group.append(reference.instance)
    return groups


def _too_long(subset: DocumentSet, groups: Sequence[Sequence[Any]], reader: Reader) -> dict[int, _Need]:
    """Document -> what its largest request needs, for those that do not fit."""
    texts, places = [], []
    starts_bare = not reader.tokenizer.num_special_tokens_to_add()
    for doc_id, group in zip(subset.doc_ids, groups, strict=True):
        for request in group:
            # Texts that are rolled over are taken in windows as long as the model reads.
            if request.request_type != "loglikelihood_rolling":
                is_judged = request.request_type == "loglikelihood"
                texts.append("".join(request.args) if is_judged else request.args[0])
                # Of a judged answer the last token is predicted, not read; one without a prompt gets a start token.
                read_less = is_judged and not (starts_bare and request.args[0] == "")
                places.append((doc_id, 0 if is_judged else new_tokens(request.args[1]), read_less))
    found: dict[int, _Need] = {}
    for (doc_id, new, read_less), ids in zip(places, reader.ids(texts), strict=True):
        need = _Need(length=len(ids) - read_less, new=new)
        if need.total > max(reader.max_length, found[doc_id].total if doc_id in found else 0):
            found[doc_id] = need
    return found


def _reason(
    found: Mapping[int, _Need],
    subset: DocumentSet,
    library: TaskLibrary,
    reader: Reader,
    settings: EvaluationSettings,
    *,
    model: str,
) -> str:
    doc_id, need = next(iter(found.items()))
    count = len(found)
    of = f" of {model}" if model else ""
    who = f"document {doc_id}" if count == 1 else f"{count} of {len(subset.doc_ids)} documents"
    reason = f"{who} of {subset.task} {'does' if count == 1 else 'do'} not fit the context{of}, "
    reason += f"{reader.max_length} tokens: document {doc_id} has a prompt of {need.length}"
    if need.new:
        reason += f", and up to {need.new} are to be generated (max_gen_toks)"
    if count > 1:
        reason += f"; the longest needs {max(each.total for each in found.values())}"
    remedies = []
    if reader.max_length < reader.own_length:
        remedies.append(f"raise evaluation.max_length (the model reads {reader.own_length})")
    file = library.files[subset.task]
    if need.new:
        remedies.append(f"lower generation_kwargs.max_gen_toks in {file}")
    if _num_examples(library.tasks[subset.task], settings):
        remedies.append("ask for fewer examples (evaluation.num_fewshot)")
    remedies.append(
        "drop such documents (process_docs)" if need.new else f"drop them (process_docs in {file})"
    )
    return f"{reason}; lm-eval would cut off the prompt's beginning; {' or '.join(remedies)}"


def _num_examples(task: Any, settings: EvaluationSettings) -> int:
    own = task.get_config("num_fewshot")
    return int(own or 0) if own == 0 or settings.num_fewshot is None else settings.num_fewshot
