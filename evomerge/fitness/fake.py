"""A stand-in for lm-eval: scores that are a smooth function of the model's weights, at next to no cost.

For tests and for trying out a search; the scores say nothing about what a model can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evomerge.fitness.base import DocumentSet, NonFiniteLogitsError, Scores
from evomerge.records import SampleScores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SIZE = 64
"""Numbers to which all weights of a model are added up."""


class FakeEvaluator:
    """Scores every document between 0 and 1 by a direction of its own in the space of the weights.

    Args:
        model: The model; its present weights are scored at every call.
        metrics: Task as the objectives name it -> the (metric, filter) pairs wanted; all get the same scores.
    """

    def __init__(self, model: PreTrainedModel, metrics: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        self._model = model
        self._metrics = metrics

    def evaluate(self, documents: Sequence[DocumentSet]) -> Scores:
        """Score the model's present weights; see `Evaluator.evaluate`."""
        import torch

        signature = self._signature()
        if not signature.isfinite().all():
            raise NonFiniteLogitsError("the model's weights hold NaN or infinity")
        samples = {}
        for subset in documents:
            values = []
            for document in subset.doc_ids:
                direction = torch.randn(
                    SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(document)
                )
                values.append(float(torch.sigmoid(direction @ signature)))
            wanted = subset.metrics or self._metrics[subset.name]
            columns = {f"{metric},{name}": tuple(values) for metric, name in wanted}
            samples[subset.name] = SampleScores(doc_ids=subset.doc_ids, values=columns)
        return Scores(
            metrics={
                task: {key: sum(column) / len(column) for key, column in scores.values.items()}
                for task, scores in samples.items()
            },
            samples=samples,
        )

    def _signature(self) -> Tensor:
        """All weights folded into `SIZE` float64 numbers of order 1, each tensor with a factor of its own."""
        import torch

        total = torch.zeros(SIZE, dtype=torch.float64)
        count = 0
        for index, tensor in enumerate(self._model.parameters()):
            flat = tensor.detach().to("cpu", torch.float64).flatten()
            padded = torch.nn.functional.pad(flat, (0, -len(flat) % SIZE))
            total += (1 + 0.5 * (-1) ** index) * padded.view(-1, SIZE).sum(0)
            count += len(flat)
        return total.div((count / SIZE) ** 0.5)
