"""`evomerge evaluate`: score one model with the run's own evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click


@click.command()
@click.argument("model")
@click.option("--tasks", required=True, metavar="A,B", help="lm-eval tasks, separated by commas.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder with task files, beside those that lm-eval ships. May be repeated.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder with data sets as their authors publish them, instead of the Hugging Face hub.",
)
@click.option("--apply-chat-template", is_flag=True, help="Wrap prompts in the model's chat template.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Requests per batch.  [default: 32]")
@click.option("--limit", type=click.IntRange(min=1), help="Most documents per task, drawn by a fixed hash.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--device", default="auto", show_default=True, help="Torch device.")
@click.option("--max-length", type=click.IntRange(min=1), help="Context length in tokens.")
@click.option(
    "--fitness",
    metavar="MODULE:FUNCTION",
    multiple=True,
    help="Own function to score by as well, looked for in the working directory first. May be repeated.",
)
@click.option(
    "--given",
    type=click.Choice(["generations", "model"]),
    default="generations",
    show_default=True,
    help="What own functions are called with.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
@click.option(
    "--allow-task-code", is_flag=True, help="Let task files outside lm-eval run the Python code they name."
)
@click.option("--allow-code", is_flag=True, help="Let them, and the functions of --fitness run.")
def evaluate(
    model: str,
    tasks: str,
    include_path: tuple[Path, ...],
    data_dir: Path | None,
    apply_chat_template: bool,
    batch_size: int | None,
    limit: int | None,
    dtype: str,
    device: str,
    max_length: int | None,
    fitness: tuple[str, ...],
    given: Literal["generations", "model"],
    as_json: bool,
    allow_task_code: bool,
    allow_code: bool,
) -> None:
    """Score MODEL, a checkpoint or a recipe file, on lm-eval tasks."""
    from evomerge.evaluate import evaluate_model
    from evomerge.experiment import EvaluationSettings
    from evomerge.measured import with_error
    from evomerge.report.audit import texts_of
    from evomerge.report.audit_text import texts_table

    settings = EvaluationSettings.model_validate(
        {
            "batch_size": batch_size or "auto",
            "dtype": dtype,
            "device": device,
            "max_length": max_length,
            "limit": limit,
            "data_dir": None if data_dir is None else str(data_dir),
            "apply_chat_template": apply_chat_template,
        }
    )
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    results = evaluate_model(
        model,
        names,
        include_path=include_path,
        settings=settings,
        fitness=fitness,
        given=given,
        allow_task_code=allow_task_code,
        allow_code=allow_code,
    )
    if as_json:
        click.echo(json.dumps(results, indent=2, ensure_ascii=False))
        return
    for task, found in results["tasks"].items():
        for metric, value in found["metrics"].items():
            reached = with_error(value, found["standard_errors"][metric])
            click.echo(f"{task:<24} {metric:<28} {reached}   {found['num_documents']} documents")
    table = texts_table({model: texts_of(results["counts"])})
    click.echo("".join(f"\n{line}" for line in table), nl=bool(table))
