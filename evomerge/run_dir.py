"""The files of a run: where they lie, and how the derived ones are written.

experiment.yml   the resolved experiment, with hashes of its inputs as comments
journal.jsonl    the truth; everything else can be rebuilt from it
scores/          per-document scores of every evaluation
best/recipe.yml  the best recipe so far
best/path.png    the winner's path through the layers, where a search chooses layers
best/model/      the winner as a checkpoint, when asked for
stages/          the winners of all stages but the last, as checkpoints, where an experiment has stages
statistics/      statistics of the sources; computed again when missing
status.json      state, progress, the holdout table and the audit
events.log       what happened to workers, and other news
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.checkpoints.durable import write_atomic
from evomerge.records import SampleScores
from evomerge.yaml_file import dump_yaml


class RunDir:
    """A run's folder.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def experiment(self) -> Path:
        """The resolved experiment."""
        return self.path / "experiment.yml"

    @property
    def journal(self) -> Path:
        """The journal."""
        return self.path / "journal.jsonl"

    @property
    def best_recipe(self) -> Path:
        """The best recipe so far."""
        return self.path / "best" / "recipe.yml"

    @property
    def best_model(self) -> Path:
        """The winner as a checkpoint."""
        return self.path / "best" / "model"

    @property
    def best_path(self) -> Path:
        """The picture of the winner's path through the layers."""
        return self.path / "best" / "path.png"

    def stage_model(self, name: str) -> Path:
        """The winner of a stage as a checkpoint, a source model of the next stage."""
        return self.path / "stages" / name

    @property
    def statistics(self) -> Path:
        """Statistics of the sources, shared by the workers."""
        return self.path / "statistics"

    @property
    def status(self) -> Path:
        """State, progress and the holdout table."""
        return self.path / "status.json"

    def create(self) -> None:
        """Make the folder and its subfolders."""
        for folder in (self.path, self.path / "scores", self.path / "best"):
            folder.mkdir(parents=True, exist_ok=True)

    def write_experiment(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Write the resolved experiment."""
        hashes = "".join(f"#   {name}: {value}\n" for name, value in inputs.items())
        write_atomic(self.experiment, f"# Resolved by evomerge. Inputs:\n{hashes}{dump_yaml(dict(settings))}")

    def write_scores(self, name: str, samples: Mapping[str, SampleScores]) -> str:
        """Write per-document scores durably.

        Args:
            name: File name without ending, such as `7-search`.
            samples: task -> scores.

        Returns:
            The file, relative to the run directory.
        """
        arrays: dict[str, np.ndarray] = {}
        for task, scores in samples.items():
            arrays[f"{task}/doc_ids"] = np.asarray(scores.doc_ids, dtype=np.int64)
            for metric, values in scores.values.items():
                arrays[f"{task}/{metric}"] = np.asarray(values, dtype=np.float64)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(self.path / "scores" / f"{name}.npz", buffer.getvalue())
        return f"scores/{name}.npz"

    def read_scores(self, file: str) -> dict[str, SampleScores]:
        """Read what `write_scores` wrote."""
        ids: dict[str, tuple[int, ...]] = {}
        values: dict[str, dict[str, tuple[float, ...]]] = {}
        with np.load(self.path / file, allow_pickle=False) as arrays:
            for key in arrays.files:
                task, _, metric = key.partition("/")
                if metric == "doc_ids":
                    ids[task] = tuple(int(item) for item in arrays[key])
                else:
                    values.setdefault(task, {})[metric] = tuple(float(item) for item in arrays[key])
        return {task: SampleScores(doc_ids=ids[task], values=values[task]) for task in ids}

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace `status.json`."""
        write_atomic(self.status, json.dumps(status, indent=2, ensure_ascii=False) + "\n")

    def log(self, text: str) -> None:
        """Add a line to `events.log`."""
        with (self.path / "events.log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
