"""Scores with a Python function of the user's.

    given: generations     function(documents, generations) -> numbers
    given: model           function(model, tokenizer, documents) -> numbers

Documents are plain dictionaries, numbers one per document (or per generation, where a task asks several times) in
the same order. Whatever comes back is checked, and what the function is given are copies, but for the model, which
is held to be unchanged.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import FitnessError
from evomerge.fitness.base import NonFiniteLogitsError
from evomerge.fitness.own import Marks, Subject
from evomerge.fitness.unchanged import settled, unchanged
from evomerge.fitness.user_code import check_arguments, importable, line_of
from evomerge.measure_settings import FunctionSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARGUMENTS = {"generations": ("documents", "generations"), "model": ("model", "tokenizer", "documents")}


class FunctionScorer:
    """Calls a function.

    Args:
        settings: Its name and what it is given.
        function: The function.
        folder: Where the user's code lies.

    Raises:
        FitnessError: It does not take these arguments.
    """

    def __init__(self, settings: FunctionSettings, function: Callable[..., Any], folder: Path) -> None:
        check_arguments(settings.name, function, ARGUMENTS[settings.given])
        self._settings = settings
        self._function = function
        self._folder = folder
        self._tokenizers: tuple[Any, Any] = None, None
        self.reads_text = settings.given == "generations"

    def score(self, subject: Subject) -> Marks:
        """The function's numbers; see `OwnScorer.score`.

        Raises:
            FitnessError: It raised an error or gave something else than numbers.
            ChangedModelError: It changed the model.
        """
        if self.reads_text:
            said = subject.said()
            found = self._call(subject, [_copy(document) for document, _ in said], [text for _, text in said])
            return Marks(values=subject.per_document(self._checked(found, len(said))))
        documents = [_copy(document) for document in subject.documents]
        with unchanged(subject.model, self._settings.name):
            found = self._call(subject, subject.model, self._tokenizer(subject.tokenizer), documents)
        return Marks(values=self._checked(found, len(documents)))

    def _call(self, subject: Subject, *arguments: Any) -> Any:
        import torch

        try:
            with settled(subject.model), importable(self._folder):
                return self._function(*arguments)
        except (NonFiniteLogitsError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:  # a function of the user's raises whatever comes
            text = re.sub(r"\s+", " ", str(error))[:500]
            where = line_of(error, self._folder)
            raise FitnessError(
                f"{self._settings.name} raised {type(error).__name__}: {text} ({where})"
            ) from error

    def _checked(self, found: Any, count: int) -> list[float]:
        """Exactly one finite number for everything it was asked about."""
        each = "per generation" if self.reads_text else "per document"
        expected = (
            f"{self._settings.name}: expected a list of {count} finite numbers, one {each} in their order"
        )
        if hasattr(found, "tolist"):  # an array or a tensor
            found = found.tolist()
        if not isinstance(found, (list, tuple)):
            raise FitnessError(f"{expected}, got {type(found).__name__}")
        if len(found) != count:
            raise FitnessError(f"{expected}, got {len(found)}")
        values = []
        for place, item in enumerate(found):
            try:
                value = math.nan if isinstance(item, (str, bytes)) else float(item)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                value = math.nan
            if not math.isfinite(value):
                raise FitnessError(f"{expected}; number {place} is {item!r:.80}")
            values.append(value)
        return values

    def _tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """A copy, made once for each."""
        if self._tokenizers[0] is not tokenizer:
            self._tokenizers = tokenizer, copy.deepcopy(tokenizer)
        return self._tokenizers[1]


def _copy(document: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(dict(document))
