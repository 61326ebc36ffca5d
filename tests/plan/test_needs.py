"""Memory and disk: as the pool decides, as torch allocates, as the run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.reader import Checkpoint
from evomerge.loop import StopFlag
from evomerge.plan import needs
from evomerge.plan.experiment import plan_experiment
from evomerge.plan.needs import (
    cache_bytes,
    free_disk,
    multiplied_parameters,
    pool_bytes,
    read_config,
    scoring_bytes,
)
from evomerge.plan.records import Span
from evomerge.plan.tokens import Batch, TaskLoad
from evomerge.run import start_run
from tests.architectures import make_family, tiny
from tests.killed_runs import Silent
from tests.plan.conftest import SEARCH, Prepare, measured


class PoolWantedError(Exception):
    """A pool was asked for."""


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_workers_are_counted_by_the_memory_the_run_counts_with(
    dtype: str, prepared: Prepare, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def build(*_: Any, worker_bytes: int, **__: Any) -> Any:
        asked.append(worker_bytes)
        raise PoolWantedError

    monkeypatch.setattr("evomerge.run.build_pool", build)
    run = prepared(SEARCH, f"evaluation.dtype={dtype}")
    with pytest.raises(PoolWantedError):
        start_run(
            task_folder.parent / "experiment.yml",
            tmp_path / "run",
            overrides=[f"evaluation.dtype={dtype}"],
            observer=Silent(),
            stop=StopFlag(),
        )
    assert asked == [pool_bytes(run)]


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX", "GPT2", "Qwen3"])
def test_keys_and_values_are_as_large_as_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny(name).eval()
    model.save_pretrained(tmp_path)
    config = read_config(Checkpoint.open(tmp_path))
    with torch.no_grad():
        cache = model(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(config, layers=3, itemsize=4) * 3 == kept


def test_of_judged_prompts_all_logits_are_kept_and_contexts_beside_their_answers(tiny_zoo: Path) -> None:
    donor = Checkpoint.open(tiny_zoo / "base")

    def needed(length: int, new: int) -> int:
        batch = Batch(rows=8, length=length, new=Span(low=new, high=new))
        load = TaskLoad(requests=8, prompt_tokens=0, new_tokens=Span(low=0, high=0), batches=(batch,))
        found = scoring_bytes(donor, load, itemsize=2, layers=4)
        assert found is not None
        return found

    passing = (2 * 32 + 3 * 48) * 2
    per_token = 2 * 4 * 2 * 8 * 2
    assert needed(10, 0) == 8 * 10 * (passing + 1.25 * per_token + 64 * (2 + 4))
    assert needed(10, 5) == 8 * (10 * passing + 15 * per_token + 64 * (2 + 4))


@pytest.mark.parametrize(("tied", "looked_up"), [(True, 0), (False, 48 * 16)])
def test_an_embedding_that_is_no_head_is_not_multiplied(tied: bool, looked_up: int, tmp_path: Path) -> None:
    make_family(tmp_path, "Llama", tie_word_embeddings=tied)
    assert multiplied_parameters(Checkpoint.open(tmp_path / "base"), 10_000.0) == 10_000 - looked_up


def test_a_run_takes_no_more_disk_than_planned(prepared: Prepare, task_folder: Path, tmp_path: Path) -> None:
    plan = plan_experiment(prepared(SEARCH, "finish.export_model=true"), measured=measured)
    start_run(
        task_folder.parent / "experiment.yml",
        tmp_path / "run",
        overrides=["finish.export_model=true"],
        observer=Silent(),
        stop=StopFlag(),
    )

    def taken(*names: str) -> int:
        return sum(
            file.stat().st_size for name in names for file in (tmp_path / "run").rglob(name) if file.is_file()
        )

    assert taken("*.npy") <= plan.disk.statistics <= 100 * taken("*.npy")
    assert taken("*.npz", "journal.jsonl") <= plan.disk.scores
    header = 8 * 1024
    assert plan.disk.winner <= taken("*.safetensors") <= plan.disk.winner + header
    scored = [file.stem.rsplit("-")[-1] for file in (tmp_path / "run" / "scores").iterdir()]
    count = plan.evaluations
    assert scored.count("search") == count.search + count.baselines
    assert scored.count("confirm") == 2 * count.confirm
    assert scored.count("holdout") == count.holdout


def test_free_disk_is_that_of_the_folder_to_come(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "runs" / "to come") == pytest.approx(free_disk(tmp_path), rel=0.05)


def test_the_winners_checkpoint_counts_only_if_one_is_written(prepared: Prepare) -> None:
    none = plan_experiment(prepared(SEARCH, "evaluation.holdout=0"), measured=measured)
    assert none.disk.winner == 0
    assert none.evaluations.holdout == none.evaluations.baselines == 0
    kept = plan_experiment(
        prepared(SEARCH, "evaluation.holdout=0", "finish.export_model=true"), measured=measured
    )
    assert kept.disk.winner == kept.memory.live_model > 0


def test_what_the_config_does_not_tell_is_left_out(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "read_config", lambda _: None)
    load = TaskLoad(requests=0, prompt_tokens=0, new_tokens=Span(low=0, high=0), batches=())
    assert scoring_bytes(Checkpoint.open(tiny_zoo / "base"), load, itemsize=2, layers=4) is None
