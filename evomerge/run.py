"""Starting and continuing runs: the functions behind `evomerge run` and `evomerge resume`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.confirm import confirm
from evomerge.errors import InputsChangedError, RunExistsError, RunStoppedError
from evomerge.finish import finish
from evomerge.fitness.blocks import difficulty, split_blocks
from evomerge.fitness.constraints import needs_sources, with_sources
from evomerge.fitness.metrics import has_stock_metric
from evomerge.fitness.stock import stock_command
from evomerge.journal import Journal, file_error
from evomerge.lock import RunLock
from evomerge.loop import Observer, Run, StopFlag, write_recipe
from evomerge.measured import with_error
from evomerge.merge.export import export_model
from evomerge.own_code import check_loads
from evomerge.plan.batch_size import with_batch_size
from evomerge.prepare import PreparedRun, prepare, settings_hash, settings_of
from evomerge.race import Course
from evomerge.recipe import Recipe
from evomerge.records import Header, Trial
from evomerge.report.audit import Audit, audit_run
from evomerge.report.holdout import HoldoutTable, holdout_table
from evomerge.rivals import score_entries, source_entries
from evomerge.run_dir import RunDir
from evomerge.stages import Decoded, Stage, best_trial, decoded, merges_before
from evomerge.versions import library_versions
from evomerge.workers import DeferredPool, WorkerPool, build_pool, worker_memory


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run found.

    Attributes:
        run_dir: Its folder.
        best: The winning trial.
        recipe: The winner.
        holdout: The comparison on held-out documents, or None when none were kept.
        audit: What the numbers are worth.
        commands: Stock `lm_eval` commands that score the exported winner on the same documents.
    """

    run_dir: Path
    best: Trial
    recipe: Recipe
    holdout: HoldoutTable | None
    audit: Audit
    commands: tuple[str, ...]


def start_run(
    experiment: Path,
    run_dir: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    allow_task_code: bool = False,
    allow_code: bool = False,
    observer: Observer,
    stop: StopFlag,
) -> RunResult:
    """Search for the best merge of an experiment.

    Args:
        experiment: The experiment file.
        run_dir: Folder of the run; `runs/<name>` by default.
        overrides: `path=value` texts that change the experiment.
        allow_task_code: Whether task files outside lm-eval may run Python code.
        allow_code: Whether they may, and the experiment's own functions.
        observer: Hears of progress.
        stop: Set it to stop the run between evaluations.

    Raises:
        ConfigurationError: The experiment cannot be run as it is.
        RunExistsError: The folder already holds a run.
        RunLockedError: Another controller works in the folder.
        NoValidCandidateError: A generation brought no valid candidate.
        RunStoppedError: A stop was asked for.
        WorkerError: The workers cannot be started, or keep dying.
    """
    observer.phase("checking the experiment, its models and tasks")
    if run_dir is not None:
        _refuse_existing(run_dir)
    prepared = prepare(
        experiment,
        overrides=overrides,
        allow_task_code=allow_task_code,
        allow_code=allow_code,
        starts=True,
    )
    folder = RunDir(Path(run_dir or Path("runs") / prepared.experiment.name))
    _refuse_existing(folder.path)
    prepared = with_batch_size(prepared)
    settings = settings_of(prepared.experiment)
    header = Header(
        experiment=settings_hash(settings),
        settings=settings,
        inputs=prepared.inputs,
        versions=library_versions(),
        seed=prepared.experiment.searches[0].search.seed,
    )
    # The folder comes after the workers, so that a run that cannot start leaves nothing behind. In it the
    # journal comes first: whatever stops the process before leaves a folder that still counts as empty.
    with closing(_start_pool(prepared, prepared.stages[0], folder, observer)) as pool:
        folder.path.mkdir(parents=True, exist_ok=True)
        with RunLock(folder.path), Journal.create(folder.journal, header) as journal:
            folder.create()
            folder.write_experiment(settings, prepared.inputs)
            return _carry_out(prepared, folder, journal, pool, observer, stop)


def resume_run(
    run_dir: Path,
    *,
    allow_task_code: bool = False,
    allow_code: bool = False,
    observer: Observer,
    stop: StopFlag,
) -> RunResult:
    """Continue a run exactly where it was, or show the result of a finished one.

    Raises:
        InputsChangedError: The experiment, a model, the documents or an own function changed since the run started.
        JournalDamagedError: The journal is damaged before its last line.
        ReplayMismatchError: The searcher proposes other genomes than recorded.
        Otherwise as `start_run`.
    """
    folder = RunDir(run_dir)
    Journal.load(folder.journal).close()
    with RunLock(run_dir), Journal.open(folder.journal) as journal:
        folder.create()
        for note in journal.notes:
            folder.log(note)
            observer.event(note)
        observer.phase("checking that the experiment, its models and tasks are unchanged")
        if not folder.experiment.is_file():
            folder.write_experiment(journal.header.settings, journal.header.inputs)
        prepared = prepare(
            folder.experiment, allow_task_code=allow_task_code, allow_code=allow_code, starts=True
        )
        _refuse_changes(folder, journal.header, prepared)
        # A finished run needs no workers, and a replay that fails should not have to wait for them.
        with closing(
            DeferredPool(lambda: _start_pool(prepared, prepared.stages[0], folder, observer))
        ) as pool:
            return _carry_out(prepared, folder, journal, pool, observer, stop)


def _refuse_existing(run_dir: Path) -> None:
    journal = RunDir(run_dir).journal
    if journal.exists() and journal.stat().st_size:
        raise RunExistsError(
            f"{run_dir}: this folder already holds a run; continue it with `evomerge resume {run_dir}`, or "
            "choose another folder with --run-dir"
        )
    is_empty = not run_dir.exists() or (
        run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= {"lock", journal.name}
    )
    if not is_empty:
        raise RunExistsError(f"{run_dir}: exists and is not an empty folder; choose another with --run-dir")


def _refuse_changes(folder: RunDir, header: Header, prepared: PreparedRun) -> None:
    changes = [
        *_differences(header.settings, settings_of(prepared.experiment)),
        *_differences(header.inputs, prepared.inputs),
    ]
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise InputsChangedError(
            f"{folder.path}: changed since the run started:\n{listed}\nrestore what changed to continue this "
            "run, or start a new one"
        )


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{path}.{index}")
    elif before != now:
        yield f"{path}: {before} -> {now}"


def _start_pool(prepared: PreparedRun, stage: Stage, folder: RunDir, observer: Observer) -> WorkerPool:
    observer.phase("starting workers")
    check_loads(prepared.spec)
    donor = prepared.checkpoints[stage.donor]
    sizes = [math.prod(info.shape) for info in donor.tensors.values()]
    itemsize = {"auto": donor.nbytes / max(1, sum(sizes)), "float32": 4}.get(
        prepared.experiment.evaluation.dtype, 2
    )
    return build_pool(
        replace(prepared.spec, donor=stage.donor, statistics=folder.statistics.resolve()),
        prepared.experiment.workers,
        worker_bytes=worker_memory(sizes, itemsize=itemsize, num_models=len(prepared.checkpoints)),
    )


def _carry_out(
    prepared: PreparedRun,
    folder: RunDir,
    journal: Journal,
    pool: WorkerPool,
    observer: Observer,
    stop: StopFlag,
) -> RunResult:
    for warning in prepared.warnings:
        folder.log(warning)
        observer.event(warning)
    first, *others = prepared.stages
    run = _search(prepared, first, folder, journal, pool, observer, stop)
    state = "failed"
    try:
        observer.phase(
            f"searching on {pool.size} worker{'s' if pool.size > 1 else ''}" if pool.size else "replaying"
        )
        _get_ready(run, prepared)
        run.search()
        for stage in others:
            prepared = _with_winner(prepared, run)
            pool.close()
            pool = DeferredPool(partial(_start_pool, prepared, stage, folder, observer))
            run = _search(prepared, stage, folder, journal, pool, observer, stop)
            _get_ready(run, prepared)
            observer.phase(f"searching stage {stage.name}")
            run.search()
        winner = _name_winner(run, prepared)
        finish(run, prepared, winner)
        table = holdout_table(folder, journal.finals, run.objectives, run.constraints)
        audit = audit_run(folder, journal, run.objectives, table)
        run.write_status(
            "finished", holdout=None if table is None else table.to_dict(), audit=audit.to_dict()
        )
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except RunStoppedError:
        state = "stopped"
        raise
    except OSError as error:
        raise file_error(folder.journal, error) from error
    finally:
        if state != "finished":
            with suppress(OSError):  # a full disk must not hide the error that is on its way
                folder.log(f"{state}: {sys.exception()}")
                run.write_status(state)
        pool.close()
    return RunResult(
        run_dir=folder.path,
        best=winner.trial,
        recipe=winner.recipe,
        holdout=table,
        audit=audit,
        commands=tuple(stock_commands(prepared, folder)),
    )


def _search(
    prepared: PreparedRun,
    stage: Stage,
    folder: RunDir,
    journal: Journal,
    pool: WorkerPool,
    observer: Observer,
    stop: StopFlag,
) -> Run:
    return Run(
        run_dir=folder,
        journal=journal,
        stage=stage,
        objectives=prepared.objectives,
        constraints=prepared.constraints,
        documents=prepared.search_documents,
        evaluations=prepared.experiment.evaluations,
        merges=merges_before(prepared.stages, stage, journal.trials),
        pool=pool,
        observer=observer,
        stop=stop,
    )


def _get_ready(run: Run, prepared: PreparedRun) -> None:
    """Let a search know what the source models reach, where its objectives, constraints or races need it."""
    run.screen = prepared.experiment.evaluation.screen
    racing = prepared.experiment.evaluation.racing
    if racing is None and not needs_sources(prepared.objectives, prepared.constraints):
        return
    run.observer.phase("scoring the source models on the search documents")
    scored = score_entries(run, source_entries(prepared), prepared.search_documents, "search")
    run.objectives, run.constraints = with_sources(
        prepared.objectives, prepared.constraints, [final.metrics for final in scored]
    )
    if racing is not None:
        samples = [run.run_dir.read_scores(final.scores) for final in scored if final.scores]
        blocks = split_blocks(
            prepared.search_documents,
            racing.blocks,
            difficulty(samples, run.objectives, run.constraints),
            seed=run.journal.header.seed,
        )
        run.course = Course(blocks=blocks, error_rate=racing.error_rate, front=racing.front)


def _name_winner(run: Run, prepared: PreparedRun) -> Decoded:
    """Score the best candidates again, and take the best of them."""
    best = best_trial(run.journal.trials)
    assert best is not None, "a search without a valid candidate ends with an error"
    if prepared.experiment.finish.confirm:
        run.observer.phase("scoring the best candidates again")
        confirmed = confirm(
            run, prepared.stages, prepared.search_documents, count=prepared.experiment.finish.confirm
        )
        if confirmed and confirmed[0].trial.number != best.number:
            run.news(
                f"scored again, trial {confirmed[0].trial.number} comes out best "
                f"({with_error(confirmed[0].fitness, confirmed[0].standard_error)}), not trial {best.number}"
            )
            best = confirmed[0].trial
        if confirmed and confirmed[0].violated:
            run.news("no candidate holds all constraints; the winner is the one that violates them least")
        noise = [each.noise for each in confirmed if each.noise is not None]
        if noise:
            run.news(
                f"noise floor: the fitness of a candidate scored twice differs by up to {max(noise):.4f}"
            )
    winner = decoded(best, prepared.stages, run.journal.trials)
    write_recipe(run.run_dir, winner.recipe, best, winner.merges)
    return winner


def _with_winner(prepared: PreparedRun, run: Run) -> PreparedRun:
    """Make the winner of a search, as a checkpoint, a model of the searches after it."""
    best = run.best
    assert best is not None
    folder = run.run_dir.stage_model(run.stage.name)
    if not folder.exists():
        run.observer.phase(f"writing the winner of stage {run.stage.name}")
        export_model(run.stage.space.decode(best.genome), prepared.checkpoints, folder, merges=run.merges)
    return prepared.with_winner(run.stage, folder.resolve())


def stock_commands(prepared: PreparedRun, folder: RunDir) -> Iterator[str]:
    """Stock `lm_eval` commands that score the exported winner on the holdout documents."""
    for documents in prepared.holdout_documents:
        if not has_stock_metric(documents.name, prepared.objectives):
            continue  # lm-eval has no likelihood of answers
        yield stock_command(
            documents,
            folder.best_model.resolve(),
            prepared.library.files[documents.task].parent,
            prepared.experiment.evaluation,
            dtype=prepared.experiment.evaluation.dtype,
            device=prepared.spec.device,
            threads=prepared.spec.threads,
        )
