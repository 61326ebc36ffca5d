"""Adapters as source models: in recipes, as in mergekit, and in a search from beginning to end."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.evaluate import evaluate_model
from evomerge.experiment import EvaluationSettings
from evomerge.journal import Journal
from evomerge.loop import StopFlag
from evomerge.merge.export import export_model
from evomerge.merge.load import load_recipe
from evomerge.report.trials import decode_trial
from evomerge.run import RunResult, resume_run, start_run
from tests.adapters import make_adapter
from tests.killed_runs import Silent
from tests.merge.zoo import tensors, ulps
from tests.tasks import write_tasks
from tests.tiny import make_model

EXPERIMENT = """\
name: adapters
base_model: models/base
models: [models/base+loras/one, models/base+loras/two]
search_space:
  type: parameter
  merge_method: task_arithmetic
  parameters: {weight: {low: -1, high: 2, start: 0.5}}
objectives:
  - {task: choose, metric: acc}
  - {task: choose, metric: acc_norm}
search: {algorithm: cma-es, evaluations: 8, seed: 3, population: 4}
evaluation: {holdout: 0.4, batch_size: 4, include_path: [tasks]}
workers: {backend: inline}
finish: {baseline_scales: [0.5]}
"""

RECIPE = """\
models:
- {model: $models/base+$loras/one, parameters: {weight: 0.7}}
- {model: $models/base+$loras/two, parameters: {weight: 0.4}}
merge_method: task_arithmetic
base_model: $models/base
dtype: float32
out_dtype: bfloat16
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models/base`, and the adapters `loras/one` and `loras/two` of it."""
    folder = tmp_path_factory.mktemp("zoo")
    base = make_model(folder / "models" / "base", seed=0)
    make_adapter(folder / "loras" / "one", base, seed=1)
    make_adapter(
        folder / "loras" / "two", base, seed=2, target_modules=["q_proj", "down_proj"], use_rslora=True
    )
    return folder


@pytest.fixture(scope="module")
def study(zoo: Path) -> tuple[Path, RunResult]:
    """The experiment's folder, and a run of it in `whole`."""
    write_tasks(zoo / "tasks", count=60)
    (zoo / "experiment.yml").write_text(EXPERIMENT)
    return zoo, start_run(zoo / "experiment.yml", zoo / "whole", observer=Silent(), stop=StopFlag())


def by_mergekit(text: str, out: Path) -> dict[str, torch.Tensor]:
    from tests.oracle import LoaderCache, MergeConfiguration, MergeOptions, run_merge

    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LoaderCache().flush_all()
        options = MergeOptions(
            quiet=True, copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(out / "loras")
        )
        run_merge(configuration, str(out / "merged"), options)
    return load_file(out / "merged" / "model.safetensors")


def test_a_recipe_over_adapters_gives_mergekits_tensors(zoo: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("$", f"{zoo}/")
    (tmp_path / "recipe.yml").write_text(text)
    loaded = load_recipe(tmp_path / "recipe.yml")
    assert loaded.warnings == ()
    export_model(loaded.recipe, loaded.checkpoints, tmp_path / "ours")
    ours, theirs = tensors(tmp_path / "ours"), by_mergekit(text, tmp_path)
    base = tensors(zoo / "models" / "base")
    assert set(ours) == set(theirs) == set(base)
    for name, tensor in ours.items():
        assert int(ulps(tensor, theirs[name]).max()) <= 1, name
        is_changed = "_proj" in name
        assert tensor.equal(base[name]) != is_changed, name


def test_a_search_over_adapters_runs_and_names_its_models_by_absolute_folders(
    study: tuple[Path, RunResult],
) -> None:
    folder, result = study
    names = [f"{folder}/models/base+{folder}/loras/{name}" for name in ("one", "two")]
    journal = Journal.load(result.run_dir / "journal.jsonl")
    assert journal.header.settings["models"] == names
    assert {f"model {name}" for name in names} < set(journal.header.inputs)
    assert len(set(journal.header.inputs.values())) == len(journal.header.inputs)
    assert {final.name for final in journal.finals} >= {"one", "two", "base"}
    assert len(journal.trials) == 8
    assert len({trial.fitness for trial in journal.trials}) > 1, "a flat fitness would prove nothing"


def test_the_best_recipe_of_a_run_can_be_merged_from_anywhere(
    study: tuple[Path, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = study
    best = Path(shutil.copy(result.run_dir / "best" / "recipe.yml", tmp_path / "recipe.yml"))
    monkeypatch.chdir(tmp_path)
    assert load_recipe(best).recipe == decode_trial(result.run_dir, None).recipe


def test_a_run_goes_on_after_its_merged_adapters_were_deleted(
    study: tuple[Path, RunResult], tmp_path: Path
) -> None:
    _, result = study
    run_dir = Path(shutil.copytree(result.run_dir, tmp_path / "run"))
    file = run_dir / "journal.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    shutil.rmtree(Path(os.environ["EVOMERGE_CACHE"]) / "adapters")
    resume_run(run_dir, observer=Silent(), stop=StopFlag())
    whole, resumed = (Journal.load(path / "journal.jsonl").trials for path in (result.run_dir, run_dir))
    assert [(trial.candidate, trial.fitness) for trial in resumed] == [
        (trial.candidate, trial.fitness) for trial in whole
    ]


def test_a_model_is_scored_with_its_adapter(study: tuple[Path, RunResult]) -> None:
    folder, _ = study

    def score(model: str) -> dict[str, float]:
        settings = EvaluationSettings(batch_size=4)
        found = evaluate_model(model, ["choose"], include_path=[folder / "tasks"], settings=settings)
        metrics: dict[str, float] = found["tasks"]["choose"]["metrics"]
        return metrics

    adapted = score(f"{folder}/models/base+{folder}/loras/one")
    assert adapted != score(f"{folder}/models/base")
