"""The user's own functions and judges in an experiment: whether a run may start with them, and what they are made of.

Nothing is run here but by `check_loads`, and that only with permission.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from evomerge.errors import ConfigurationError, Fault
from evomerge.experiment import Experiment
from evomerge.fitness.own import build_scorers
from evomerge.fitness.user_code import UserCode, module_file, survey
from evomerge.workers.base import WorkerSpec
from evomerge.yaml_file import Document, FieldPath


def code_folder(experiment: Experiment, folder: Path) -> Path:
    """Where the user's modules are looked for first.

    Args:
        experiment: The experiment.
        folder: Where its file lies.
    """
    return (folder / Path(experiment.evaluation.code_path or ".").expanduser()).resolve()


def refuse_code(experiment: Experiment, document: Document, folder: Path) -> None:
    """Refuse an experiment that names functions of the user's.

    Args:
        experiment: The experiment.
        document: Its file, for messages.
        folder: Where that lies.

    Raises:
        ConfigurationError: Names every such function, its file and its place.
    """
    where = code_folder(experiment, folder)
    faults = []
    for place, function in _functions(experiment):
        file = module_file(function, where) or function.partition(":")[0]
        reason = f"{file} is Python code that would be run; read it, and pass --allow-code if you trust it"
        faults.append(document.fault(place, reason))
    if faults:
        raise ConfigurationError(faults)


def survey_code(experiment: Experiment, document: Document, folder: Path) -> UserCode | None:
    """Find the functions of an experiment, and hash what they are made of.

    Args:
        experiment: The experiment.
        document: Its file, for messages.
        folder: Where that lies.

    Returns:
        None if it has none.

    Raises:
        ConfigurationError: Carries every fault found.
    """
    where = code_folder(experiment, folder)
    faults: list[Fault] = []
    if experiment.evaluation.code_path is not None and not where.is_dir():
        faults.append(document.fault(("evaluation", "code_path"), f"no such folder: {where}"))
    names = [function for _, function in _functions(experiment)]
    for place, function in _functions(experiment):
        try:
            survey([function], where)
        except ConfigurationError as error:
            faults.append(document.fault(place, str(error)))
    if faults:
        raise ConfigurationError(faults)
    return survey(names, where) if names else None


def warnings_of_own(experiment: Experiment, refused: UserCode | None) -> Iterator[str]:
    """What is not wrong, but should be known.

    Args:
        experiment: The experiment.
        refused: Its functions, where they may not run.
    """
    if refused is not None:
        yield f"a run of this needs --allow-code, as it runs {', '.join(refused.hashes)}"
    for judge in {item.judge: None for item in (*experiment.objectives, *experiment.constraints)}:
        if judge is None or judge.api_key_env is None:
            continue
        url = urlsplit(judge.url)
        if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            yield f"{judge.label}: its key goes over the network unencrypted; use https if {url.hostname} has it"


def check_loads(spec: WorkerSpec) -> None:
    """Load functions and read keys once, so that what is wrong with them shows before the workers start.

    Raises:
        FitnessError: A function cannot be loaded.
        ConfigurationError: A key is missing.
    """
    build_scorers(spec.own, spec.code)


def _functions(experiment: Experiment) -> Iterator[tuple[FieldPath, str]]:
    """Place and name of every function of the user's."""
    for key in ("objectives", "constraints"):
        for index, item in enumerate(getattr(experiment, key)):
            if item.fitness is not None:
                yield (key, index, "fitness"), item.fitness
