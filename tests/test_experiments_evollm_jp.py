"""The paper's own runs: files that validate, plan and state the published settings, with stand-ins for the models."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.tokenizer import same_vocabulary
from evomerge.cli import evomerge
from evomerge.errors import CheckpointError
from evomerge.experiment import Experiment, read_experiment
from evomerge.fitness import maths
from evomerge.fitness.harness import TaskLibrary
from evomerge.merge.compatible import check_compatible
from evomerge.plan import ExperimentPlan, plan_file
from evomerge.plan.machine import Load
from evomerge.plan.records import Machine
from evomerge.prepare import PreparedRun, prepare
from tests.standins import MISTRAL_7B, make_standin
from tests.tiny import WORDS, make_tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "evollm-jp"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.glob("*.yml"))
MODELS = (
    "mistralai/Mistral-7B-v0.1",
    "augmxnt/shisa-gamma-7b-v1",
    "models/WizardMath-7B-V1.1",
    "models/Abel-7B-002",
)
WINNER = "runs/evollm-jp-ps-7b/best/model"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The experiments in a repository where all models lie beside them and the data in `data`, for work offline."""
    root = tmp_path_factory.mktemp("repository")
    folder = root / "experiments" / "evollm-jp"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("models"))
    for file in folder.glob("*.yml"):
        text, count = re.subn(r"# (data_dir: \S+) .*", r"\1", file.read_text(encoding="utf-8"))
        assert count == 1
        file.write_text(text, encoding="utf-8")
    for name in ("tasks", "search_spaces"):
        (root / name).symlink_to(ROOT / name)
    (root / "data").symlink_to(ROOT / "tests" / "maths_excerpt")
    standin = make_standin(root / "standin", **MISTRAL_7B)
    for link in (*(folder / name for name in MODELS), root / WINNER):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(standin)
    first = maths.mgsm_items()[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maths, "mgsm_items", lambda: first)
        yield folder


def planned(file: Path, *overrides: str) -> ExperimentPlan:
    def measured(_: Load) -> Machine:
        return Machine(prompt_flops=4e14, decode_flops=2e14, bytes_per_second=3e12, call_seconds=1e-5)

    plan = plan_file(file, overrides=overrides, measured=measured)
    assert isinstance(plan, ExperimentPlan)
    return plan


def settings(file: str) -> Experiment:
    return read_experiment(FOLDER / file)[0]


# The files


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_opens_with_its_command_and_its_source_and_marks_its_choices(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    head = text[: text.index("\nname: ")].splitlines()
    assert head[0] == f"# evomerge run experiments/evollm-jp/{file.name}"
    assert all(line.startswith("#") for line in head)
    assert "https://arxiv.org/abs/2403.13187" in "\n".join(head)
    body = text.partition("\nname: ")[2]
    for choice in ("seed: 0", "task: gsm8k", "batch_size:", "metric:"):
        lines = [line for line in body.splitlines() if choice in line]
        assert lines, choice
        assert all(re.search(r"# (open|differs)\b", line) for line in lines), choice


def test_all_files_validate_without_warnings(place: Path) -> None:
    files = [str(place / file.name) for file in FILES]
    result = CliRunner().invoke(evomerge, ["validate", *files])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [f"{file}: valid experiment" for file in files]


def test_all_runs_search_on_the_rest_of_gsm8k_and_judge_on_mgsm_in_japanese() -> None:
    for file in FILES:
        (objective,) = settings(file.name).objectives
        assert (objective.task, objective.metric, objective.holdout_task) == (
            "gsm8k_test_rest_ja_alpaca_cot",
            "acc_lang",
            "mgsm_ja_alpaca_cot",
        )


# Published settings


def test_the_weights_are_six_numbers_from_one_half_in_generations_of_nine(place: Path) -> None:
    (stage,) = planned(place / "ps_7b.yml").stages
    assert stage.dimensions == {"continuous": 6, "integer": 0, "categorical": 0}
    assert (stage.algorithm, stage.population, stage.generations, stage.evaluations) == (
        "cma-es",
        9,
        112,
        1000,
    )
    (prepared,) = prepare(place / "ps_7b.yml").stages
    assert [item.name for item in prepared.space.dimensions] == [
        f"{parameter}[{name}]"
        for parameter in ("weight", "density")
        for name in ("shisa-gamma-7b-v1", "WizardMath-7B-V1.1", "Abel-7B-002")
    ]
    assert {(item.start, item.high) for item in prepared.space.dimensions} == {(0.5, 1.0)}
    recipe = prepared.space.decode(tuple(item.start for item in prepared.space.dimensions))
    assert recipe.merge_method == "dare_ties"
    run = settings("ps_7b.yml")
    assert run.search is not None
    assert run.search.options["sigma"] == pytest.approx(1 / 6)
    assert run.evaluation.limit is None


def test_the_layers_are_190_indicators_and_a_network_in_100_generations_of_128(place: Path) -> None:
    plan = planned(place / "dfs_10b.yml")
    (stage,) = plan.stages
    assert stage.dimensions["continuous"] == (3 * 64 - 2) + (5 * 4 + 1)
    assert (stage.population, stage.generations, stage.evaluations) == (128, 100, 12_800)
    assert stage.hops is not None
    assert (stage.hops.start, stage.hops.most) == (32, 192)
    # Every layer that the start leaves out is on half of the first paths: 31 + 1 fixed or likely, 160 on a coin.
    assert 105 < stage.hops.first_generation < 118
    assert [model.name for model in plan.models] == ["Abel-7B-002", "shisa-gamma-7b-v1"]


def test_the_layers_start_at_model_a_two_standard_deviations_from_leaving_it(place: Path) -> None:
    run = prepare(place / "dfs_10b.yml")
    (stage,) = run.stages
    indicators = [item for item in stage.space.dimensions if item.name.startswith("use")]
    assert run.experiment.search is not None
    sigma = run.experiment.search.options["sigma"] * (indicators[0].high - indicators[0].low)
    assert sigma == pytest.approx(0.1)
    assert [item.start for item in indicators] == [2 * sigma] * 30 + [0.0] * 160
    assert run.experiment.evaluation.limit == 200
    start = stage.space.decode(tuple(item.start for item in stage.space.dimensions))
    assert start.model_names == (str(place / "models" / "Abel-7B-002"),)


@pytest.mark.parametrize(
    ("file", "preset"), [("ps_7b", "dare_ties"), ("dfs_10b", "data_flow_indicator")], ids=["PS", "DFS"]
)
def test_the_spaces_are_those_of_the_presets(place: Path, file: str, preset: str) -> None:
    def dimensions(run: PreparedRun) -> Any:
        return run.stages[0].space.dimensions

    written = prepare(place / f"{file}.yml")
    same = prepare(place / f"{file}.yml", overrides=[f"search_space=../../search_spaces/{preset}.yml"])
    assert dimensions(written) == dimensions(same)


# Both spaces


def test_the_stages_search_weights_and_then_paths_from_their_winner(place: Path) -> None:
    weights, layers = planned(place / "ps_dfs_10b.yml").stages
    assert (weights.name, weights.dimensions["continuous"], weights.population) == ("weights", 6, 9)
    assert (layers.name, layers.dimensions["continuous"]) == ("layers", (3 * 64 - 2) + 21)
    assert (layers.population, layers.evaluations) == (128, 12_800)
    assert layers.hops is not None
    assert (layers.hops.start, layers.hops.most) == (32, 192)
    start = prepare(place / "ps_dfs_10b.yml").stages[1].space
    assert start.decode(tuple(item.start for item in start.dimensions)).model_names == ("weights",)


def test_the_stages_have_the_settings_of_the_single_runs() -> None:
    both = settings("ps_dfs_10b.yml")
    for stage, file in zip(both.stages, ("ps_7b.yml", "dfs_10b.yml"), strict=True):
        alone = settings(file)
        assert stage.search == alone.search
        assert isinstance(stage.search_space, dict)
        assert isinstance(alone.search_space, dict)
        differing = {key for key, value in stage.search_space.items() if alone.search_space.get(key) != value}
        assert differing == set()


def test_the_page_says_how_to_run_the_layers_after_the_weights_with_two_models(place: Path) -> None:
    (command,) = re.findall(r"evomerge run (.* --set .*)", PAGE)
    file, *options = shlex.split(command)
    overrides = [text for text in options if text != "--set"]
    plan = planned(place.parents[1] / file, *overrides)
    assert plan.name == "evollm-jp-ps-then-dfs-10b"
    assert plan.stages[0].dimensions["continuous"] == 211
    run = prepare(place.parents[1] / file, overrides=overrides)
    assert [os.path.normpath(source) for source in run.sources] == [
        str(place.parents[1] / WINNER),
        str(place / "augmxnt" / "shisa-gamma-7b-v1"),
    ]
    assert settings("ps_7b.yml").finish.export_model
    assert Path(WINNER).parts[1] == settings("ps_7b.yml").name


# The page


def test_the_page_names_every_file_and_its_commands_are_those_of_the_files() -> None:
    assert {f"`{file.name}`" for file in FILES} <= set(re.findall(r"`\w+\.yml`", PAGE))
    for line in re.findall(r"^ {4}(?:evomerge|python) .*$", PAGE, re.MULTILINE):
        (path,) = re.findall(r"experiments/\S+", line)
        assert (ROOT / path).is_file()


def test_a_translation_of_ones_own_is_a_task_without_code(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    text = "\n".join(line.removeprefix("  ") for line in text.splitlines())
    name = yaml.safe_load(text)["task"]
    text = text.replace("../../tasks", str(ROOT / "tasks"))
    (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    row = {
        "question": "リンゴが2個とミカンが3個あります。全部で何個ですか。",
        "answer": "5",
        "language": "ja",
    }
    data = yaml.safe_load(text)["dataset_kwargs"]["data_files"]["test"]
    (tmp_path / data).write_text(json.dumps(row) + "\n", encoding="utf-8")
    library = TaskLibrary([name], [tmp_path], allow_code=False)
    task = library.tasks[name]
    assert row["question"] in task.doc_to_text(task.eval_docs[0])
    scores = task.process_results(task.eval_docs[0], ["リンゴとミカンを足すと、2 + 3 = 5個です。"])
    assert (scores["acc_lang"], scores["acc_lang_sakana"]) == (1.0, 1.0)
    assert library.split_name(name) == "gsm8k_test_rest"


# Making the models loadable


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evollm_jp_prepare", FOLDER / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pickles(folder: Path, *, extra: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tiny Mistral as hubs had them: weights in two pickles, and `extra` tokens behind the base's."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=WORDS + extra,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM"],
    )
    torch.manual_seed(extra)
    tensors = dict(MistralForCausalLM(config).to(dtype).state_dict())
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<added{index}>" for index in range(extra)])
    tokenizer.save_pretrained(folder)
    names = sorted(tensors)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        torch.save(
            {name: tensors[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin"
        )
    return tensors


@pytest.mark.parametrize(
    ("extra", "dtype"), [(0, torch.bfloat16), (32, torch.float32)], ids=["as it is", "cut"]
)
def test_pickles_become_checkpoints_of_the_bases_vocabulary(
    script: ModuleType, tmp_path: Path, extra: int, dtype: torch.dtype
) -> None:
    base = make_standin(
        tmp_path / "base",
        model_type="mistral",
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    expected = write_pickles(tmp_path / "pickles", extra=extra, dtype=dtype)
    with pytest.raises(CheckpointError, match="pickle"):
        Checkpoint.open(tmp_path / "pickles")
    script.convert(tmp_path / "pickles", base, tmp_path / "made")
    made = Checkpoint.open(tmp_path / "made")
    check_compatible(made, Checkpoint.open(base), "base", movable=False)
    assert same_vocabulary(made.folder, base)
    assert made.config["vocab_size"] == WORDS
    found: dict[str, torch.Tensor] = {}
    for file in made.folder.glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        whole = expected[name][:WORDS] if name in script.PER_TOKEN else expected[name]
        assert torch.equal(tensor, whole.to(torch.bfloat16)), name


def test_a_model_with_other_tokens_is_not_cut(script: ModuleType, tmp_path: Path) -> None:
    write_pickles(tmp_path / "pickles", extra=0, dtype=torch.float32)
    shutil.copytree(tmp_path / "pickles", tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace('"q"', '"Q"'))
    with pytest.raises(ValueError, match="not those of"):
        script.convert(tmp_path / "pickles", tmp_path / "base", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_script_makes_the_models_that_the_experiments_name(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def snapshot_download(name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return f"cache/{name}"

    made = []
    monkeypatch.setattr(script, "snapshot_download", snapshot_download)
    monkeypatch.setattr(script, "convert", lambda *paths: made.append(paths))
    monkeypatch.setattr("sys.argv", ["prepare.py", "--out", str(tmp_path)])
    script.main()
    used = {
        Path(model).name
        for file in FILES
        for model in settings(file.name).models
        if model.startswith("models/")
    }
    assert capsys.readouterr().out.split() == [str(target) for _, _, target in made]
    assert {target.name for _, _, target in made} == used
    assert [name for name, _, _ in asked] == [
        MODELS[0],
        "WizardLMTeam/WizardMath-7B-V1.1",
        "GAIR/Abel-7B-002",
    ]
    assert all("pytorch_model*.bin" in patterns for _, _, patterns in asked[1:])
