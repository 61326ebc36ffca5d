"""Counts what is wrong with generated texts beside their scores: empty, no answer to read, another language.

A model can lose points, and its rival win, by how it writes instead of what it knows. So whatever a task is scored
by, its texts are looked at for this, where it can be known:

- no answer: by the task's own metric `no_answer`; else by lm-eval's filters that extract the answer, which put
  `[invalid]` in its place where they find none;
- another language than asked for: by the task's own metric `wrong_language`; else in tasks whose metadata name the
  `language` to answer in, by `fitness.language`.

What cannot be known is not counted, which is something else than 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import Fault, TaskError, nearest
from evomerge.fitness.language import SCRIPTS, language_of
from evomerge.fitness.metrics import mean_metrics

NO_ANSWER, WRONG_LANGUAGE = "no_answer", "wrong_language"
FALLBACKS = ("[invalid]", ["invalid"], "")
"""What lm-eval's filters put in place of an answer that they do not find. One that a task sets itself may be an
answer, too."""

Columns = Mapping[tuple[str, str], Sequence[float]]


def check_language(name: str, task: Any) -> None:
    """Make sure that the language that a task's metadata ask for can be told.

    Raises:
        TaskError: It cannot.
    """
    language = _language(task)
    known = sorted({code for codes in SCRIPTS.values() for code in codes})
    if language is not None and language not in known:
        reason = (
            f"metadata.language: expected the code of a language, one of {', '.join(known)}; got {language!r}"
        )
        raise TaskError(Fault(path=name, reason=f"{reason}{nearest(str(language), known)}"))


def audit_metrics(task: Any, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (metric, filter) pairs of a task by which its texts are audited.

    Args:
        task: lm-eval's task.
        wanted: The pairs of its own that it is scored by; the audit looks at the filter of the first.
    """
    name = wanted[0][1] if wanted else str(task._filters[0].name)
    if task.OUTPUT_TYPE != "generate_until":
        return []
    own = mean_metrics(task)
    return [(metric, name) for metric in (NO_ANSWER, WRONG_LANGUAGE) if metric in own]


def tally(
    task: Any,
    documents: Sequence[tuple[Any, Sequence[Any]]],
    columns: Columns,
    wanted: Sequence[tuple[str, str]],
) -> dict[str, int]:
    """Count what is wrong with the texts of a task.

    Args:
        task: lm-eval's task, which generates.
        documents: Every document with its answered instances.
        columns: Scores by pair, those of `audit_metrics` among them.
        wanted: As for `audit_metrics`.

    Returns:
        `empty`: number of texts of nothing but spaces; and as far as they can be known: `no_answer` of the
        `answers_judged` documents, `wrong_language` of the `languages_judged` texts. A text too short to tell its
        language is not in a wrong one.
    """
    texts = [str(text) for _, group in documents for item in group for text in item.resps]
    found = {"empty": sum(not text.strip() for text in texts)}
    own = {metric: columns[metric, name] for metric, name in audit_metrics(task, wanted)}
    if NO_ANSWER in own:
        found |= {"no_answer": _number(own[NO_ANSWER]), "answers_judged": len(documents)}
    else:
        found |= _extracted(task, documents, wanted)
    language = _language(task)
    if WRONG_LANGUAGE in own:
        found |= {"wrong_language": _number(own[WRONG_LANGUAGE]), "languages_judged": len(documents)}
    elif language is not None:
        wrong = sum(language_of(text, language) not in (None, language) for text in texts)
        found |= {"wrong_language": wrong, "languages_judged": len(texts)}
    return found


def _number(column: Sequence[float]) -> int:
    return sum(value > 0 for value in column)


def _language(task: Any) -> str | None:
    language: str | None = (task.config.metadata or {}).get("language")
    return language


def _extracted(
    task: Any, documents: Sequence[tuple[Any, Sequence[Any]]], wanted: Sequence[tuple[str, str]]
) -> dict[str, int]:
    """What a task's filter makes of texts without an answer tells them from the others."""
    chosen = wanted[0][1] if wanted else str(task._filters[0].name)
    pipeline = next(each for each in task._filters if each.name == chosen)
    if not any(getattr(make(), "fallback", None) in FALLBACKS for make in pipeline.filters):
        return {}
    if not wanted:  # else they are applied already
        pipeline.apply([item for _, group in documents for item in group])
    missing = 0
    for document, group in documents:
        marks = _marks(pipeline, document, len(group[0].resps))
        missing += all(_is_missing(item.filtered_resps[chosen], marks) for item in group)
    return {"no_answer": missing, "answers_judged": len(documents)}


def _marks(pipeline: Any, document: Any, repeats: int) -> list[Any]:
    """What comes out of a pipeline where a filter of it finds no answer."""
    marks = []
    for place, make in enumerate(pipeline.filters):
        fallback = getattr(make(), "fallback", None)
        if fallback in FALLBACKS:
            responses = [[fallback] * repeats]
            for later in pipeline.filters[place + 1 :]:
                responses = list(later().apply(responses, [document]))
            marks += [responses[0], *(responses[0] if isinstance(responses[0], list) else ())]
    return marks


def _is_missing(value: Any, marks: Sequence[Any]) -> bool:
    if value in marks or (isinstance(value, str) and not value.strip()):
        return True
    return isinstance(value, list) and bool(value) and all(_is_missing(each, marks) for each in value)
