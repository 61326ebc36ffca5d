"""The path of a trial through the layers of its source models, as people look at it.

Models get letters in the order of the run, A being the first source. Paths of files come from
`path_files.py`; drawing is left to `path_text.py` (terminal) and `figures.py` (pictures).
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

from evomerge.errors import ConfigurationError
from evomerge.journal import Journal
from evomerge.records import Genome, Trial
from evomerge.report.trials import choose_trial, open_stages
from evomerge.run_dir import RunDir
from evomerge.spaces.base import short_names
from evomerge.spaces.joint import JointSpace
from evomerge.spaces.path import Hop, Semantics
from evomerge.stages import Stage, best_trial

SCALE_MEANS: dict[Semantics, str] = {
    "branch": "factor on the MLP output of the hop before, as it joins the stream",
    "stream": "factor on the hidden state that enters the hop",
}
"""What the scale shown at a hop multiplies."""

MERGED = "merge of the source models"
"""What the hops of a joint space go through: layers that are merged of all models."""


@runtime_checkable
class PathSpace(Protocol):
    """A search space whose genomes stand for paths."""

    @property
    def semantics(self) -> Semantics:
        """What the scale of a hop multiplies."""
        ...

    def hops(self, genome: Genome) -> tuple[Hop, ...]:
        """The path a genome stands for."""
        ...


@dataclass(frozen=True, kw_only=True)
class PathMap:
    """A path ready to be drawn.

    Attributes:
        title: Whose path it is.
        hops: The path.
        depths: Model -> number of its layers, in the order of their letters; no hop lies outside.
        scale_means: What the scale shown at a hop multiplies.
    """

    title: str
    hops: tuple[Hop, ...]
    depths: Mapping[str, int]
    scale_means: str

    @property
    def letters(self) -> dict[str, str]:
        """Model -> its letter: A, B, ..., Z, A1, ..."""
        return model_letters(tuple(self.depths))

    @property
    def spread(self) -> float:
        """Largest distance of a scale from 1; 0 when nothing is scaled."""
        return max((abs(hop.scale - 1) for hop in self.hops), default=0.0)

    @property
    def summary(self) -> str:
        """Numbers of hops, layers and repetitions in one sentence."""
        visits: dict[tuple[str, int], int] = {}
        for hop in self.hops:
            visits[hop.model, hop.layer] = visits.get((hop.model, hop.layer), 0) + 1
        repeated = sum(count > 1 for count in visits.values())
        text = f"{len(self.hops)} hops over {len(visits)} of {sum(self.depths.values())} layers"
        return f"{text}, {repeated} of them more than once" if repeated else text

    @property
    def pieces(self) -> tuple[str, ...]:
        """The path in short, such as `A 0-7`, `B 5-12 x0.8`, `A 3`: consecutive layers of one scale in one."""
        starts = [0, *(i for i, (one, two) in enumerate(pairwise(self.hops), 1) if not _continues(one, two))]
        ends = [*starts[1:], len(self.hops)]
        return tuple(self._piece(self.hops[start:end]) for start, end in zip(starts, ends, strict=True))

    def _piece(self, hops: Sequence[Hop]) -> str:
        first, last = hops[0], hops[-1]
        layers = f"{first.layer}" if len(hops) == 1 else f"{first.layer}-{last.layer}"
        scale = "" if scale_text(first.scale) == "1" else f" x{scale_text(first.scale)}"
        return f"{self.letters[first.model]} {layers}{scale}"


def scale_text(scale: float) -> str:
    """A scale in three digits."""
    return f"{scale:.3g}"


def model_letters(models: Sequence[str]) -> dict[str, str]:
    """Model -> its letter: A, B, ..., Z, A1, ..."""
    alphabet = string.ascii_uppercase
    return {
        model: alphabet[index % 26] + (str(index // 26) if index >= 26 else "")
        for index, model in enumerate(models)
    }


def model_labels(models: Sequence[str]) -> dict[str, str]:
    """Model -> its letter and its short name."""
    names = short_names(models)
    return {model: f"{letter} {names[model]}" for model, letter in model_letters(models).items()}


def path_of_run(run_dir: Path, number: int | None) -> PathMap:
    """The path of a recorded trial; the run may be going on.

    Args:
        run_dir: The run directory.
        number: The trial's number; None for the best one that has a path.

    Raises:
        ConfigurationError: There is no such run or trial, or it has no path.
    """
    journal = Journal.load(RunDir(run_dir).journal)
    stage = path_stage(journal, run_dir)
    if number is None:
        best = best_trial([trial for trial in journal.trials if stage.has(trial)])
        number = None if best is None else best.number
    trial = choose_trial(journal, run_dir, number)
    if not stage.has(trial):
        raise ConfigurationError(
            f"{run_dir}: trial {trial.number} has no path, as its stage merges weights; those of the stage "
            f"{stage.name} have"
        )
    return path_of_trial(
        stage,
        trial,
        base=journal.header.settings["base_model"],
        title=f"trial {trial.number} of {run_dir}{_fitness(trial)}",
    )


def path_stage(journal: Journal, run_dir: Path) -> Stage:
    """The search of a run whose genomes stand for paths, always the last; of the models only headers are read.

    Raises:
        ConfigurationError: There is none, or a model cannot be opened.
    """
    last = open_stages(journal)[-1]
    if not isinstance(last.space, PathSpace):
        raise ConfigurationError(
            f"{run_dir}: this run has no paths: it merges weights and leaves the order of layers as it is; expected "
            "a run with a search space of type data_flow or joint"
        )
    return last


def path_of_trial(stage: Stage, trial: Trial, *, base: str | None, title: str) -> PathMap:
    """The path of a trial.

    Args:
        stage: The trial's search, over a space with paths.
        trial: The trial.
        base: The base model of the run, or None.
        title: What to write above it.
    """
    assert isinstance(stage.space, PathSpace)
    hops = trial_hops(stage, trial)
    return PathMap(
        title=title,
        hops=hops,
        depths=path_depths(stage, base, hops),
        scale_means=SCALE_MEANS[stage.space.semantics],
    )


def trial_hops(stage: Stage, trial: Trial) -> tuple[Hop, ...]:
    """The path of a trial; in a joint space every hop is one of `MERGED`."""
    assert isinstance(stage.space, PathSpace)
    hops = stage.space.hops(trial.genome)
    if isinstance(stage.space, JointSpace):
        return tuple(replace(hop, model=MERGED) for hop in hops)
    return hops


def path_depths(stage: Stage, base: str | None, hops: Iterable[Hop]) -> dict[str, int]:
    """Model -> number of its layers, for the models of a stage that paths may go through.

    Args:
        stage: The stage.
        base: The base model, which is left out if it is no source and no hop goes through it.
        hops: The hops of all paths that are looked at.
    """
    if isinstance(stage.space, JointSpace):
        return {MERGED: next(iter(stage.depths.values()))}
    used = {hop.model for hop in hops}
    # A base that is no source stands last, so the other letters stay.
    *_, last = stage.depths
    return {
        model: depth
        for model, depth in stage.depths.items()
        if model in used or model != base or model != last
    }


def write_path_map(file: Path, stage: Stage, trial: Trial, *, base: str | None) -> bool:
    """Write the picture of a trial's path; tell whether there is one, as not every space has paths.

    Args:
        file: The PNG file; replaced if it exists.
        stage: The trial's search.
        trial: The trial.
        base: The base model of the run, or None.

    Raises:
        OSError: The file cannot be written.
    """
    if not isinstance(stage.space, PathSpace):
        return False
    from evomerge.report.figures import path_figure, write_figure

    title = f"trial {trial.number}{_fitness(trial)}"
    write_figure(path_figure(path_of_trial(stage, trial, base=base, title=title)), file)
    return True


def _continues(one: Hop, two: Hop) -> bool:
    return (two.model, two.layer, scale_text(two.scale)) == (one.model, one.layer + 1, scale_text(one.scale))


def _fitness(trial: Trial) -> str:
    if trial.fitness is None:
        return ""
    # In words, as the map itself does with ASCII alone where a terminal has no more.
    error = "" if trial.standard_error is None else f" (standard error {trial.standard_error:.4f})"
    return f", fitness {trial.fitness:.4f}{error} on the search documents"
