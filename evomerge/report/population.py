"""Which layers the candidates of a search keep, generation by generation, from the journal.

The candidates of a generation are the trials that were asked for at the same time, valid or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.text import Text

from evomerge.errors import ConfigurationError
from evomerge.journal import Journal
from evomerge.report.layer_grid import Cell, layer_grid
from evomerge.report.path_map import model_labels, path_depths, path_stage, trial_hops
from evomerge.report.path_text import wrapped
from evomerge.run_dir import RunDir

_SHADES, _PLAIN_SHADES = "░▒▓█", ".-+#"
_WORDS = ("below 25 %", "25 to 50 %", "50 to 75 %", "75 % and more")


@dataclass(frozen=True, kw_only=True)
class Population:
    """The layers that candidates keep.

    Attributes:
        title: Whose candidates they are.
        sizes: Number of candidates per generation.
        depths: Model -> number of its layers, in the order of their letters.
        counts: Model -> how often its layers are on paths, of shape (candidates, layers), one row per candidate
            in the order of the generations.
    """

    title: str
    sizes: tuple[int, ...]
    depths: Mapping[str, int]
    counts: Mapping[str, np.ndarray]

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """Model -> share of the candidates that keep a layer, of shape (layers, generations), 0 to 1."""
        return {model: self._per_generation(counts > 0) for model, counts in self.counts.items()}

    @property
    def repeats(self) -> dict[str, np.ndarray]:
        """Model -> how often paths that keep a layer pass it in the mean, as `shares`; 0 where none keeps it."""
        return {
            model: self._per_generation(counts) / np.maximum(self._per_generation(counts > 0), 1e-9)
            for model, counts in self.counts.items()
        }

    def _per_generation(self, values: np.ndarray) -> np.ndarray:
        ends = np.cumsum(self.sizes)
        parts = np.split(values.astype(np.float64), ends[:-1])
        return np.stack([part.mean(axis=0) for part in parts], axis=1)


def population_of_run(run_dir: Path) -> Population:
    """The candidates of a run's search over paths; it may be going on.

    Raises:
        ConfigurationError: There is no such run, or no trial of it has a path.
    """
    journal = Journal.load(RunDir(run_dir).journal)
    stage = path_stage(journal, run_dir)
    trials = sorted((trial for trial in journal.trials if stage.has(trial)), key=lambda trial: trial.number)
    trials.sort(key=lambda trial: trial.asked_after)
    if not trials:
        raise ConfigurationError(f"{run_dir}: no trial with a path is recorded yet")
    paths = [trial_hops(stage, trial) for trial in trials]
    every_hop = (hop for path in paths for hop in path)
    depths = path_depths(stage, journal.header.settings["base_model"], every_hop)
    visits = [Counter((hop.model, hop.layer) for hop in path) for path in paths]
    return Population(
        title=f"{len(trials)} candidates of {run_dir}",
        sizes=tuple(len(list(group)) for _, group in groupby(trials, key=lambda trial: trial.asked_after)),
        depths=depths,
        counts={
            model: np.array([[visit[model, layer] for layer in range(depth)] for visit in visits])
            for model, depth in depths.items()
        },
    )


def population_text(population: Population, *, width: int, plain: bool) -> list[Text]:
    """Draw a population: the shares, and where layers are repeated how often.

    Args:
        population: The population.
        width: Characters of a line.
        plain: Whether to do with ASCII alone.
    """
    shades = _PLAIN_SHADES if plain else _SHADES
    shares = {
        place: Cell(symbol=shades[min(int(share * 4), 3)]) for place, share in _places(population.shares)
    }
    lines = [
        *wrapped(population.title, width),
        *wrapped("share of the candidates that keep a layer, by generation", width),
        Text(),
        *_grid(population, shares, width),
        Text(),
        *wrapped("   ".join(f"{shade} {words}" for shade, words in zip(shades, _WORDS, strict=True)), width),
    ]
    repeated = {
        place: Cell(symbol=f"{min(round(mean), 9)}")
        for place, mean in _places(population.repeats)
        if round(mean) > 1
    }
    if repeated:
        heading = "passes of a layer by paths that keep it, where more than one in the mean"
        lines += [Text(), *wrapped(heading, width), Text(), *_grid(population, repeated, width)]
    return lines


def _places(values: Mapping[str, np.ndarray]) -> list[tuple[tuple[str, int, int], float]]:
    return [
        ((model, int(layer), int(column)), float(array[layer, column]))
        for model, array in values.items()
        for layer, column in np.argwhere(array > 0)
    ]


def _grid(population: Population, cells: Mapping[tuple[str, int, int], Cell], width: int) -> list[Text]:
    return layer_grid(
        cells,
        labels=model_labels(tuple(population.depths)),
        depths=population.depths,
        num_columns=len(population.sizes),
        axis="gen.",
        width=width,
    )
