"""What one worker does: hold the sources and a live model, and score one job at a time.

A path of layers is scored by views of the sources' layers, any other merge in a model with weights of its own;
each of the two live models is made when the first recipe needs it. A worker knows nothing of Ray or of
processes; pools decide where it lives.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import ChangedModelError, EvomergeError
from evomerge.fitness.base import DocumentSet, Evaluator, NonFiniteLogitsError, Scores, UnavailableError
from evomerge.merge.bank import Bank
from evomerge.merge.live import LiveModel, NonFiniteWeightsError
from evomerge.merge.plan import plan_merge
from evomerge.merge.views import PathModel
from evomerge.records import Outcome, Status
from evomerge.workers.base import Job, WorkerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BuildEvaluator = Callable[["PreTrainedModel", "PreTrainedTokenizerBase"], Evaluator]


class Worker:
    """Holds memory-mapped sources, and a live model with its evaluator.

    Args:
        spec: What to hold and how to score.
        build_evaluator: Makes the evaluator of a model; lm-eval's by default.
    """

    def __init__(self, spec: WorkerSpec, build_evaluator: BuildEvaluator | None = None) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self._spec = spec
        self._build_evaluator = build_evaluator or _harness(spec)
        self._open()

    def _open(self) -> None:
        """Map the sources, and forget the live models, which may share their memory."""
        spec = self._spec
        for made in ("_merged", "_path"):
            self.__dict__.pop(made, None)
        self._sources = {name: Checkpoint.open(folder) for name, folder in spec.models.items()}
        self._bank = Bank(
            self._sources, device=spec.device, statistics=spec.statistics, budget=spec.memory_budget
        )

    @property
    def live(self) -> LiveModel:
        """The resident model whose weights are written."""
        return self._merged[0]

    @cached_property
    def _merged(self) -> tuple[LiveModel, Evaluator]:
        model, tokenizer = load_model(self._spec.models[self._spec.donor], self._spec)
        return LiveModel(model, self._sources), self._build_evaluator(model, tokenizer)

    @cached_property
    def _path(self) -> tuple[PathModel, Evaluator]:
        model, tokenizer = load_model(self._spec.models[self._spec.donor], self._spec)
        return PathModel(model, self._sources), self._build_evaluator(model, tokenizer)

    def run(self, job: Job) -> Outcome:
        """Score a job; what is wrong with the candidate or the machine becomes the outcome's status."""
        started = time.perf_counter()
        try:
            if job.checkpoint is not None:
                materialised, scores = self._score_checkpoint(job.checkpoint, job.documents)
            else:
                assert job.recipe is not None
                plan = plan_merge(job.recipe, self._sources)
                model, evaluator = self._path if plan.is_path else self._merged
                model.write(plan, self._bank)
                materialised = time.perf_counter()
                scores = evaluator.evaluate(job.documents)
        except UnavailableError as error:
            return Outcome(status=Status.UNAVAILABLE, reason=str(error), seconds=_since(started))
        except (NonFiniteWeightsError, NonFiniteLogitsError, EvomergeError) as error:
            if isinstance(error, ChangedModelError):
                self._open()
            return Outcome(status=Status.INVALID, reason=str(error), seconds=_since(started))
        except Exception as error:  # torch alone reports exhausted memory in several ways
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return Outcome(status=Status.FAILED, reason=reason, seconds=_since(started))
        finally:
            if job.checkpoint is not None:
                gc.collect()  # its model is in reference cycles, and there may be no room for another one
        return _outcome(scores, started, materialised)

    def _score_checkpoint(self, folder: Path, documents: Sequence[DocumentSet]) -> tuple[float, Scores]:
        model, tokenizer = load_model(folder, self._spec)
        evaluator = self._build_evaluator(model, tokenizer)
        return time.perf_counter(), evaluator.evaluate(documents)


def load_model(folder: Path, spec: WorkerSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint for scoring, the way the stock `lm_eval --model hf` does."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    evaluation = spec.evaluation
    options = {} if evaluation.attention is None else {"attn_implementation": evaluation.attention}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=evaluation.dtype, local_files_only=True, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(spec.device).eval(), tokenizer


def _harness(spec: WorkerSpec) -> BuildEvaluator:
    from evomerge.fitness.harness import HarnessEvaluator, TaskLibrary
    from evomerge.fitness.own import build_scorers

    own = build_scorers(spec.own, spec.code)
    library = TaskLibrary(
        spec.tasks,
        spec.include_path,
        allow_code=spec.allow_task_code,
        data_dir=spec.evaluation.data_dir,
    )

    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluator:
        return HarnessEvaluator(model, tokenizer, library, spec.metrics, spec.evaluation, own)

    return build


def _since(started: float) -> dict[str, float]:
    return {"total": time.perf_counter() - started}


def _outcome(scores: Scores, started: float, materialised: float) -> Outcome:
    ended = time.perf_counter()
    materialise, total = materialised - started, ended - started
    return Outcome(
        status=Status.OK,
        metrics=scores.metrics,
        samples=scores.samples,
        counts=scores.counts,
        seconds={
            "materialise": materialise,
            "forward": scores.forward_seconds,
            "other": total - materialise - scores.forward_seconds,
            "total": total,
        },
    )
