"""A merge in chunks equals the merge at once, stays within its memory, and fails before it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.stream import NUM_BUFFERS
from evomerge.errors import CheckpointError, ConfigurationError
from evomerge.merge import memory as memory_module
from evomerge.merge import streaming
from evomerge.merge.export import export_model
from evomerge.merge.finite import not_finite
from evomerge.merge.memory import Memory, is_made, spec_of
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe

from .models import variant
from .zoo import assert_same, merged, models, recipe, tensors

TASK_VECTORS = "models: [{model: $one}, {model: $two}]\nbase_model: $base\nparameters: {weight: 0.5%s}\n"
METHODS = {
    "linear": "models: [{model: $one}, {model: $two}]\nparameters: {weight: 1}\nmerge_method: linear\n",
    "task_arithmetic": TASK_VECTORS % "" + "merge_method: task_arithmetic\n",
    "dare_ties": TASK_VECTORS % ", density: 0.5" + "merge_method: dare_ties\n",
    "ties": TASK_VECTORS % ", density: 0.5" + "merge_method: ties\n",
    "della": TASK_VECTORS % ", density: 0.5, epsilon: 0.1" + "merge_method: della\n",
    "nearswap": "models: [{model: $one}, {model: $base}]\nbase_model: $base\nparameters: {t: 0.01}\n"
    "merge_method: nearswap\n",
    "sce": "models: [{model: $one}, {model: $two}]\nbase_model: $base\nmerge_method: sce\n",
    "slerp": "models: [{model: $one}, {model: $base}]\nbase_model: $base\nparameters: {t: 0.3}\n"
    "merge_method: slerp\n",
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that tensors of the tiny models have several."""
    monkeypatch.setattr(memory_module, "GRAIN", 64)
    monkeypatch.setattr("evomerge.merge.finite.GRAIN", 64)
    monkeypatch.setattr(memory_module, "BUFFER_BYTES", 1024)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [None, 200_000])
def test_chunks_make_the_same_tensors_as_a_merge_at_once(
    method: str, budget: int | None, tiny_zoo: Path, tmp_path: Path, small_pieces: None
) -> None:
    wanted = recipe(METHODS[method], tiny_zoo)
    export_model(wanted, models(wanted), tmp_path / "out", memory_budget=budget, shard_bytes=50_000)
    assert_same(tensors(tmp_path / "out"), merged(wanted), exact=True)


@pytest.mark.usefixtures("small_pieces")
def test_native_tensors_and_others_may_alternate(tiny_zoo: Path, tmp_path: Path) -> None:
    def widen(state: dict[str, torch.Tensor]) -> None:
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"):
            state[name] = state[name].half()

    for name in ("one", "two"):
        variant(tiny_zoo / name, tmp_path / name, change=widen)
    wanted = recipe(METHODS["linear"] + "out_dtype: bfloat16\n", tmp_path)
    export_model(wanted, models(wanted), tmp_path / "out", shard_bytes=30_000)
    assert_same(tensors(tmp_path / "out"), merged(wanted), exact=True)


def test_copied_tensors_of_any_type_are_streamed(tiny_zoo: Path, tmp_path: Path, small_pieces: None) -> None:
    counts = torch.arange(3000, dtype=torch.int64)

    def add(state: dict[str, torch.Tensor]) -> None:
        state["model.counts"] = counts.clone()
        state["model.flag"] = torch.tensor(True)
        state["model.empty"] = torch.zeros(0, 4)

    for name in ("one", "two"):
        variant(tiny_zoo / name, tmp_path / name, change=add)
    wanted = recipe(METHODS["linear"], tmp_path)
    export_model(wanted, models(wanted), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["model.counts"], counts)
    assert found["model.flag"].item() is True
    assert found["model.empty"].shape == (0, 4)


# The budget.


def memory_of(text: str, zoo: Path, budget: int | None) -> tuple[Memory, Recipe]:
    wanted = recipe(text, zoo)
    sources = models(wanted)
    return Memory.plan(plan_merge(wanted, sources).tensors, sources, budget), wanted


@pytest.mark.parametrize("budget", [3_500_000, 10**7, 10**8, 10**9, 10**12])
def test_buffers_and_mapped_pages_fit_into_the_budget(budget: int, tiny_zoo: Path) -> None:
    memory, _ = memory_of(METHODS["ties"], tiny_zoo, budget)
    num_inputs = 3
    in_flight = memory.buffer_bytes * (NUM_BUFFERS + num_inputs)
    assert in_flight <= budget
    assert memory.buffer_bytes <= memory_module.BUFFER_BYTES
    assert budget < 10**9 or memory.buffer_bytes == memory_module.BUFFER_BYTES


def test_a_budget_below_any_merge_is_refused_with_the_need(tiny_zoo: Path, tmp_path: Path) -> None:
    wanted = recipe(METHODS["linear"], tiny_zoo)
    with pytest.raises(ConfigurationError, match=r"--memory-budget: .* need at least 26\d+ bytes, got 1000"):
        export_model(wanted, models(wanted), tmp_path / "out", memory_budget=1000)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_needs_more_is_named_before_anything_is_written(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Greedy:
        numel, dtype, divisible, workspace_bytes = 64 * 32, torch.bfloat16, False, 10**12

    monkeypatch.setattr(streaming, "prepare_tensor", lambda plan, bank: Greedy())
    monkeypatch.setattr(streaming, "write_tensors", lambda *args, **options: pytest.fail("written"))
    wanted = recipe(METHODS["sce"], tiny_zoo)
    sources = models(wanted)
    plans = plan_merge(wanted, sources).tensors
    small = Memory(budget=100_000, buffer_bytes=1024, held_bytes=0)
    with pytest.raises(ConfigurationError) as caught:
        streaming.check_memory(plans, sources, small, device="cpu")
    message = str(caught.value)
    assert "tensor 'lm_head.weight' needs 1000000" in message
    assert "sce merges it in one piece; the budget is 100000" in message


def test_a_need_that_only_shows_half_way_stops_the_merge_too(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.merge.export.check_memory", lambda *args, **options: None)
    monkeypatch.setattr(memory_module, "GRAIN", 64)
    wanted = recipe(METHODS["nearswap"], tiny_zoo)
    with pytest.raises(
        ConfigurationError, match=r"tensor '.*' needs \d+ bytes in memory; the budget is 3000;"
    ):
        export_model(wanted, models(wanted), tmp_path / "out", memory_budget=3000)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_is_made_counts_as_held(tiny_zoo: Path, tmp_path: Path) -> None:
    from evomerge.merge.vocabulary import align_vocabularies

    content = json.loads((tiny_zoo / "two" / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other = variant(tiny_zoo / "two", tmp_path / "other")
    (other / "tokenizer.json").write_text(json.dumps(content))
    text = METHODS["linear"].replace("$two", str(other)) + "tokenizer_source: $one\n"
    wanted = recipe(text, tiny_zoo)
    sources = align_vocabularies(wanted, models(wanted)).checkpoints
    plans = plan_merge(wanted, sources).tensors
    made = {name for name, info in sources[str(other)].tensors.items() if is_made(info)}
    assert made == {"model.embed_tokens.weight", "lm_head.weight"}
    assert Memory.plan(plans, sources, None).held_bytes == 2 * 64 * 32 * 2


LARGE = """
import sys
from pathlib import Path
from evomerge.merge.export import export_model
from evomerge.merge.load import open_models
from evomerge.recipe import Recipe
wanted = Recipe.read(Path(sys.argv[1]))
checkpoints = open_models(wanted, Path("/"))

def status(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024

small = Recipe.read(Path(sys.argv[2]))
export_model(small, open_models(small, Path("/")), Path(sys.argv[3]))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
export_model(wanted, checkpoints, Path(sys.argv[4]), memory_budget=int(sys.argv[5]))
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(("budget", "limit"), [(12 * 10**6, 24 * 10**6), (60 * 10**6, 72 * 10**6)])
def test_the_process_grows_by_no_more_than_the_budget(
    budget: int, limit: int, tiny_zoo: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        config = json.loads((tiny_zoo / name / "config.json").read_text())
        (tmp_path / name).mkdir()
        config |= {"num_hidden_layers": 1, "tie_word_embeddings": True}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        large = {
            f"model.layers.0.{part}.weight": torch.randn(4096, 4096, generator=generator).bfloat16()
            for part in ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
        }
        large["model.embed_tokens.weight"] = torch.randn(64, 4096, generator=generator).bfloat16()
        save_file(large, tmp_path / name / "model.safetensors", {"format": "pt"})
    (tmp_path / "large.yml").write_text(recipe(METHODS["linear"], tmp_path).to_yaml())
    (tmp_path / "small.yml").write_text(recipe(METHODS["linear"], tiny_zoo).to_yaml())
    # Pages that the allocator keeps for later are not counted to the merge: the limit has 12 MB of air.
    command = [sys.executable, "-c", LARGE, "large.yml", "small.yml", "warm", "out", str(budget)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= limit
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 100 * 10**6


# What is not finite.


def test_the_first_source_that_is_not_finite_is_named_with_its_element(
    tiny_zoo: Path, tmp_path: Path, small_pieces: None
) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.embed_tokens.weight"].view(-1)[1234] = float("inf")

    spoilt = variant(tiny_zoo / "two", tmp_path / "spoilt", change=spoil)
    wanted = recipe(METHODS["linear"].replace("$two", str(spoilt)), tiny_zoo)
    with pytest.raises(CheckpointError, match=rf"as {spoilt} does: element 1234 of model\.embed_tokens"):
        export_model(wanted, models(wanted), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_of_finite_sources_that_overflows_says_so(tiny_zoo: Path) -> None:
    wanted = recipe(METHODS["linear"], tiny_zoo)
    sources = models(wanted)
    plan = plan_merge(wanted, sources).tensors[0]
    assert "the merge overflowed bfloat16" in str(not_finite(plan, sources))
    assert spec_of(plan, sources).dtype == "bfloat16"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, small_pieces: None) -> list[tuple[str, str, int]]:
    """What is done with elements of the sources: the verb, the tensor, and the first element."""
    found: list[tuple[str, str, int]] = []
    for verb in ("prefetch", "read", "release"):
        real = getattr(Checkpoint, verb)

        def spy(self: Checkpoint, name: str, first: int = 0, *rest: Any, verb=verb, real=real) -> None:
            found.append((verb, name, first))
            real(self, name, first, *rest)

        monkeypatch.setattr(Checkpoint, verb, spy)
    return found


def test_sources_are_read_ahead(tiny_zoo: Path, tmp_path: Path, seen: list[tuple[str, str, int]]) -> None:
    wanted = recipe(METHODS["linear"], tiny_zoo)
    export_model(wanted, models(wanted), tmp_path / "out")
    read = {(name, first) for verb, name, first in seen if verb == "read"}
    ahead = {(name, first) for verb, name, first in seen if verb == "prefetch"}
    assert len({name for name, _ in read}) == 39
    assert len(read) > 39
    assert ahead <= read
    for name, first in ahead:
        assert seen.index(("prefetch", name, first)) < seen.index(("read", name, first))


def test_what_is_mapped_is_read_ahead_and_given_back(
    tiny_zoo: Path, tmp_path: Path, seen: list[tuple[str, str, int]]
) -> None:
    wanted = recipe(METHODS["nearswap"], tiny_zoo)
    export_model(wanted, models(wanted), tmp_path / "out")
    ahead = {(name, first) for verb, name, first in seen if verb == "prefetch"}
    released = {(name, first) for verb, name, first in seen if verb == "release"}
    assert len({name for name, _ in ahead}) == 39
    assert len(ahead) > 39
    assert ahead <= released
    for name, first in ahead:
        assert seen.index(("prefetch", name, first)) < seen.index(("release", name, first))
