"""From the searches of an experiment to its stages: search spaces fitted to their models, searchers with options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import ConfigurationError
from evomerge.experiment import Experiment
from evomerge.merge.anatomy import anatomy_of
from evomerge.merge.check import check_recipe
from evomerge.merge.plan import TORCH_DTYPES, plan_merge
from evomerge.search import SearcherOptions, build_searcher
from evomerge.spaces import SPACES, SourceModels, build_space, chooses_layers, needs_anatomies
from evomerge.spaces.limits import size_of
from evomerge.stages import Stage
from evomerge.yaml_file import Document


def build_stages(
    experiment: Experiment,
    spaces: Sequence[Document],
    options: Sequence[SearcherOptions],
    checkpoints: Mapping[str, Checkpoint],
    sources: tuple[str, ...],
    base: str | None,
) -> tuple[Stage, ...]:
    """Fit every search space to its models, and plan its start, which every candidate resembles.

    The winner of a search has the architecture of the model that gives it its config, which stands in for it
    here, as nothing but architecture matters yet.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    stages: list[Stage] = []
    winner: tuple[str, ...] = ()
    known = dict(checkpoints)
    for settings, document, its_options in zip(experiment.searches, spaces, options, strict=True):
        models = (*winner, *(sources if settings.models is None else settings.models))
        fitted = source_models(known, models, base, anatomies=needs_anatomies(document))
        space = build_space(document, fitted)
        if chooses_layers(document) and settings.name != experiment.searches[-1].name:
            reason = (
                "only the last stage may choose layers: what is merged after it would have to be fitted to a model "
                "whose layers are not known yet; put this stage last"
            )
            raise ConfigurationError(document.fault(("type",), reason))
        recipe = space.decode(tuple(dimension.start for dimension in space.dimensions))
        check_recipe(recipe)
        donor = plan_merge(recipe, known).donor
        known[settings.name] = known[donor]
        winner = (settings.name,)
        search = settings.search
        stages.append(
            Stage(
                name=settings.name,
                space=space,
                new_searcher=partial(
                    build_searcher, search.algorithm, space.dimensions, search.seed, its_options
                ),
                evaluations=search.evaluations,
                donor=donor,
                first=sum(stage.evaluations for stage in stages),
                depths=fitted.depths,
            )
        )
    return tuple(stages)


def source_models(
    checkpoints: Mapping[str, Checkpoint], sources: tuple[str, ...], base: str | None, *, anatomies: bool
) -> SourceModels:
    """What a search space has to know of the models."""
    donor = checkpoints[base or sources[0]]
    found = {TORCH_DTYPES[info.dtype] for info in donor.tensors.values() if info.dtype in TORCH_DTYPES}
    models = dict.fromkeys([*sources, *([base] if base else [])])
    return SourceModels(
        models=sources,
        base=base,
        num_layers=num_layers(donor.tensors),
        dtype=found.pop() if len(found) == 1 else "float32",
        depths={model: num_layers(checkpoints[model].tensors) for model in models},
        anatomies={model: anatomy_of(checkpoints[model]) for model in sources} if anatomies else {},
        sizes={model: size_of(checkpoints[model]) for model in sources},
    )


def moves_layers(space: Document) -> bool:
    """Whether candidates put layers in another order instead of merging them."""
    kind = space.data.get("type") if isinstance(space.data, dict) else None
    return kind in SPACES and SPACES[kind].moves_layers
