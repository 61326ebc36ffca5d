"""Plans of experiments: made of what the run will do, on headers alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import ConfigurationError
from evomerge.plan import as_dict, experiment, plan_file
from evomerge.plan.experiment import plan_experiment
from evomerge.plan.machine import Load
from evomerge.plan.records import ExperimentPlan, Machine, Span
from evomerge.plan.text import plan_text
from evomerge.plan.times import RAY_SECONDS
from evomerge.report.validate import validate_file
from tests.plan.conftest import ROUND_MACHINE, SEARCH, Prepare, measured
from tests.standins import MISTRAL_7B, make_standin, weights_read
from tests.tiny import make_task

STAGES = """\
stages:
  - name: weights
    search_space: {type: parameter, merge_method: linear, parameters: {weight: {low: 0, high: 1}}}
    search: {algorithm: cma-es, evaluations: 12, population: 6}
  - name: layers
    search_space: {type: data_flow, genome: {type: path}}
    search: {algorithm: catcma, evaluations: 20, population: 10}"""

LARGE = """\
name: large
base_model: base
models: [ja]
search_space: {type: parameter, merge_method: task_arithmetic, parameters: {weight: {low: 0, high: 1}}}
objectives: [{task: letters, metric: exact_match}]
search: {algorithm: cma-es, evaluations: 100, population: 10}
evaluation: {include_path: [tasks], batch_size: 8, device: cpu}
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment over models of 7 billion parameters."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("base", "ja"):
        make_standin(folder / name, **MISTRAL_7B)
    make_task(folder / "tasks")
    (folder / "experiment.yml").write_text(LARGE)
    return folder


def planned(make: Prepare, search: str = SEARCH, *overrides: str) -> ExperimentPlan:
    return plan_experiment(make(search, *overrides), measured=measured)


def with_cores(monkeypatch: pytest.MonkeyPatch, cores: int, memory: int) -> None:
    monkeypatch.setattr("evomerge.plan.experiment.os.cpu_count", lambda: cores)
    monkeypatch.setattr("evomerge.plan.needs.available_memory", lambda: memory)


def test_a_plan_counts_what_a_run_scores(prepared: Prepare) -> None:
    plan = planned(prepared)
    assert dataclasses.astuple(plan.evaluations) == (14, 3, 6, 6)
    assert [(task.task, task.search_documents, task.holdout_documents) for task in plan.tasks] == [
        ("choose", 6, 4),
        ("gen", 6, 4),
    ]
    assert [model.name for model in plan.models] == ["one", "two", "base"]
    assert {(model.layers, model.dtype) for model in plan.models} == {(4, "bfloat16")}
    assert plan.candidate.requests == 6 * 3 + 6
    assert plan.candidate.new_tokens == Span(low=12, high=24)
    assert plan.seconds.total == plan.seconds.start + plan.seconds.search + plan.seconds.finish


def test_models_of_7_billion_parameters_are_planned_without_reading_them(large: Path) -> None:
    before = [weights_read(large / name) for name in ("base", "ja")]
    file = large / "experiment.yml"
    plan = plan_file(file, measured=measured)
    assert validate_file(file)[0] == "experiment"
    assert [weights_read(large / name) for name in ("base", "ja")] == before
    assert max(before) < 2**20
    assert isinstance(plan, ExperimentPlan)
    assert {model.parameters for model in plan.models} == {7_241_732_096}
    assert {model.bytes for model in plan.models} == {14_483_464_192}
    assert plan.memory.live_model == plan.disk.winner == 14_483_464_192
    assert plan.memory.sources == 2 * 14_483_464_192
    # Eight prompts of 3 + 2 tokens: keys and values of 32 layers, 8 heads of 128; activations; last logits.
    kept, passing, logits = 5 * 2 * 32 * 8 * 128 * 2, 3 * (2 * 4096 + 3 * 14_336) * 2, 32_000 * (2 + 4)
    assert plan.memory.scoring == 8 * (kept + passing + logits)
    # A 7B model takes 2 * 7.1e9 operations per token, the embedding looked up only.
    operations = 2 * (7_241_732_096 - 32_000 * 4096)
    prompts = operations * (8 + 3) * 3 / ROUND_MACHINE.prompt_flops
    assert plan.candidate.seconds.low == pytest.approx(
        3 * 14.483464192 + prompts + operations * (8 + 3) * 2 / ROUND_MACHINE.decode_flops, rel=0.01
    )


def test_reading_a_weight_would_be_noticed(large: Path) -> None:
    before = weights_read(large / "ja")
    assert Checkpoint.open(large / "ja").tensor("lm_head.weight").sum() == 0
    assert weights_read(large / "ja") >= before + 32_000 * 4096 * 2


@pytest.mark.parametrize(
    ("workers", "cores", "memory", "count", "limit"),
    [
        ("{}", 4, 100 * 10**9, 4, "cores"),
        ("{threads: 2}", 5, 100 * 10**9, 2, "cores"),
        ("{}", 64, 5 * 10**9, 4, "memory"),
        ("{}", 64, 10**8, 1, "memory"),
        ("{count: 7}", 2, 10**9, 7, "workers.count"),
        ("{backend: inline}", 8, 100 * 10**9, 1, "workers.backend"),
    ],
)
def test_workers_are_as_many_as_a_pool_would_start(
    workers: str,
    cores: int,
    memory: int,
    count: int,
    limit: str,
    prepared: Prepare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_cores(monkeypatch, cores, memory)
    found = planned(prepared, SEARCH, f"workers={workers}").workers
    assert (found.count, found.limit) == (count, limit)


def test_gpus_limit_the_workers_and_hold_the_sources(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 64, 10**12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("evomerge.plan.needs.free_gpu_memory", lambda: 10**5)
    options = ["evaluation.device=cuda", "workers={gpus_per_worker: 0.5}"]
    plan = planned(prepared, SEARCH, *options)
    assert (plan.workers.count, plan.workers.limit, plan.workers.device) == (4, "GPUs", "cuda")
    memory = plan.memory
    assert memory.scoring is not None
    assert memory.sources == sum(model.bytes for model in plan.models)
    assert memory.device == memory.live_model + memory.working + memory.scoring + memory.sources
    assert memory.host == memory.process + memory.live_model
    assert any("GPU memory" in warning for warning in plan.warnings)
    assert "free on each GPU" in plan_text(plan)
    budget = planned(prepared, SEARCH, *options, "workers.memory_budget=1000")
    assert budget.memory.sources == 1000


def test_a_gpu_that_is_not_there_is_a_fault(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError, match=r"evaluation.device: .* --set evaluation.device=cpu"):
        planned(prepared, SEARCH, "evaluation.device=cuda")


def test_what_is_measured_is_what_workers_do(prepared: Prepare) -> None:
    seen: list[Load] = []

    def note(load: Load) -> Machine:
        seen.append(load)
        return ROUND_MACHINE

    run = prepared(SEARCH, "evaluation.dtype=float32", "workers.threads=3")
    plan = plan_experiment(run, measured=note)
    assert seen == [
        Load(
            device="cpu",
            dtype="float32",
            width=32,
            weight_bytes=plan.memory.live_model,
            rows=4,
            workers=1,
            threads=3,
        )
    ]


def test_racing_may_save_most_of_what_comes_after_the_first_block(prepared: Prepare) -> None:
    whole, racing = (
        planned(prepared, SEARCH, f"evaluation.racing={racing}").seconds.search
        for racing in ("null", "{blocks: [0.2, 0.5]}")
    )
    assert racing == Span(low=pytest.approx(0.36 * whole.low), high=whole.high)


def test_the_sources_are_scored_where_a_search_refers_to_them(prepared: Prepare) -> None:
    plan = planned(prepared, SEARCH, "evaluation.racing={}")
    assert plan.evaluations.baselines == 6 + 3


def test_own_functions_ask_for_answers_or_for_what_nobody_knows(prepared: Prepare, task_folder: Path) -> None:
    (task_folder.parent / "own.py").write_text("def f(*_):\n    raise SystemExit\n")
    metric = planned(prepared, SEARCH, "objectives=[{task: gen, metric: exact_match}]")
    texts = planned(prepared, SEARCH, 'objectives=[{task: gen, fitness: "own:f"}]')
    model = planned(prepared, SEARCH, 'objectives=[{task: gen, fitness: "own:f", given: model}]')
    assert (texts.candidate.requests, texts.candidate.new_tokens) == (
        metric.candidate.requests,
        metric.candidate.new_tokens,
    )
    assert model.candidate.requests == 0
    for plan in (texts, model):
        assert "the time that own:f takes is not known, so it is not counted" in plan.warnings
    assert not any("not counted" in warning for warning in metric.warnings)


def test_stages_add_up(prepared: Prepare) -> None:
    plan = planned(prepared, STAGES)
    assert [stage.name for stage in plan.stages] == ["weights", "layers"]
    assert [stage.space for stage in plan.stages] == ["parameter", "data_flow"]
    assert [stage.generations for stage in plan.stages] == [2, 2]
    assert plan.evaluations.search == 32
    assert plan.evaluations.holdout == 7, "the winner of the other stage is scored, too"
    assert plan.disk.stages == plan.memory.live_model
    assert "stage weights" in plan_text(plan)


def test_more_workers_search_faster(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 6, 10**12)
    one, six = (planned(prepared, SEARCH, f"workers={{count: {count}}}") for count in (1, 6))
    # 14 candidates in generations of 6: 14 rounds, or 3.
    assert six.seconds.search.high == pytest.approx(one.seconds.search.high * 3 / 14)
    assert six.seconds.start.low >= RAY_SECONDS.low


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["the last generation has 2 of its 6 candidates; 12 or 18 fit"]),
        (["search.evaluations=12"], []),
        (["search.evaluations=5"], ["search.evaluations: 5 are fewer than the 6 candidates"]),
        (["search.evaluations=12", "workers={count: 8}"], ["2 of them have nothing to do"]),
        (["search.evaluations=12", "evaluation.holdout=0"], ["no documents are held out"]),
        (
            ["search.evaluations=12", "workers={count: 1, timeout: 0.001}"],
            ["workers.timeout: a candidate may take", "given up after 0.001 s"],
        ),
    ],
)
def test_what_hardly_is_meant_is_warned_of(overrides: list[str], words: list[str], prepared: Prepare) -> None:
    found = planned(prepared, SEARCH, *overrides).warnings
    assert len(found) == min(1, len(words))
    for text in words:
        assert text in found[0]


def test_a_lack_of_memory_is_warned_of(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    def warnings(free: int) -> tuple[str, ...]:
        with_cores(monkeypatch, 2, free)
        return planned(prepared, SEARCH, "search.evaluations=12").warnings

    memory = planned(prepared).memory
    assert warnings(memory.host + memory.sources) == ()
    (tight,) = warnings(memory.host + memory.sources - 1)
    assert tight.startswith(f"memory: the sources, {memory.sources / 1000:.0f} kB, do not fit beside")
    (little,) = warnings(memory.host - 1)
    assert little.startswith("memory: a worker needs 1 GB, 1 GB is free")


def test_a_lack_of_disk_is_warned_of(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.plan.needs.free_disk", lambda _: 1000)
    assert any("disk: the run needs" in text for text in planned(prepared).warnings)


def test_the_largest_path_is_warned_of_where_it_does_not_fit(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = """\
search_space: {type: data_flow, genome: {type: indicator, repeats: 3}}
search: {algorithm: cma-es, evaluations: 6, population: 6}"""
    with_cores(monkeypatch, 2, 10**12)
    plan = planned(prepared, flow)
    most, expected = plan.stages[0].parameters.most, plan.stages[0].parameters.first_generation_most
    assert most > expected
    assert plan.memory.working == 2 * expected, "a winner of that size in bfloat16"
    assert not plan.warnings
    with_cores(monkeypatch, 2, plan.memory.host + 2 * (most - expected) - 1)
    assert any("max_hops" in text for text in planned(prepared, flow).warnings)
    with_cores(monkeypatch, 2, plan.memory.host + 2 * (most - expected))
    assert not any("max_hops" in text for text in planned(prepared, flow).warnings)


def test_the_text_fits_a_screen(prepared: Prepare, large: Path) -> None:
    plans = [
        planned(prepared),
        planned(prepared, STAGES),
        plan_file(large / "experiment.yml", measured=measured),
    ]
    for plan in plans:
        lines = plan_text(plan).splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) <= 28
        assert "candidates in" in lines[0]


def test_many_models_and_tasks_are_summed_up(prepared: Prepare) -> None:
    plan = planned(prepared)
    many = dataclasses.replace(plan, models=plan.models * 4, tasks=plan.tasks * 10)
    text = plan_text(many)
    assert "and 7 more" in text
    assert "and 15 more: 90 documents to search on, 60 held out" in text


def test_json_has_the_documented_keys(prepared: Prepare) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    found: dict[str, Any] = json.loads(json.dumps(as_dict(planned(prepared, STAGES))))

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    assert found["kind"] == "experiment"
    for key in keys(found):
        assert f"`{key}`" in page, key


def test_a_slow_machine_takes_longer(prepared: Prepare) -> None:
    slow = dataclasses.replace(ROUND_MACHINE, prompt_flops=1e6, decode_flops=1e5)
    found = experiment.plan_experiment(prepared(), measured=lambda _: slow)
    assert found.candidate.seconds.high > 100 * planned(prepared).candidate.seconds.high


def test_other_files_are_refused_by_what_they_are(tmp_path: Path, large: Path) -> None:
    space = tmp_path / "space.yml"
    space.write_text("type: parameter\nmerge_method: linear\nparameters: {weight: {low: 0, high: 1}}\n")
    with pytest.raises(ConfigurationError, match="a search space; expected an experiment or a single recipe"):
        plan_file(space, measured=measured)
    with pytest.raises(ConfigurationError, match="--set a=1: changes values of experiments"):
        plan_file(space, overrides=["a=1"], measured=measured)
