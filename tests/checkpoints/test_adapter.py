"""Merging an adapter gives PEFT's tensors, and what cannot be merged is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evomerge.checkpoints.adapted import adapted
from evomerge.checkpoints.adapter import Adapter
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from tests.adapters import by_peft, edit, make_adapter, make_gpt2
from tests.modular import add_processor, make_family
from tests.tiny import make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "llama", seed=0, dtype="float32", num_hidden_layers=2
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def adapter(tmp_path: Path, llama: Path) -> Path:
    return make_adapter(tmp_path / "adapter", llama, target_modules=["q_proj", "down_proj"])


def assert_as_peft(model: Path, adapter: Path) -> None:
    """All tensors are PEFT's to the bit, and the adapter changed some and not all of them."""
    expected, before = by_peft(model, adapter), Checkpoint.open(model)
    merged = Checkpoint.open(adapted(model, adapter))
    assert set(merged.tensors) == set(before.tensors)
    for name in merged.tensors:
        assert merged.tensor(name).dtype == before.tensor(name).dtype
        assert merged.tensor(name).equal(expected[name]), name
    kept = [name for name in merged.tensors if merged.tensor(name).equal(before.tensor(name))]
    assert 0 < len(kept) < len(merged.tensors)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 3},
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"q_proj": 1, "o_proj": 9},
        },
        {"rank_pattern": {r"^model.layers.0.*_proj": 2}, "use_rslora": True, "alpha_pattern": {"k_proj": 3}},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_a_llama_with_an_adapter_is_what_peft_makes_of_it(
    tmp_path: Path, llama: Path, config: dict[str, Any]
) -> None:
    assert_as_peft(llama, make_adapter(tmp_path / "adapter", llama, **config))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("of_adapter", [None, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once_to_the_type_of_the_model(
    tmp_path: Path, dtype: str, of_adapter: torch.dtype | None
) -> None:
    model = make_model(tmp_path / "model", seed=0, dtype=dtype, num_hidden_layers=2)
    assert_as_peft(model, make_adapter(tmp_path / "adapter", model, dtype=of_adapter, use_rslora=True))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
        {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True, "bias": "all"},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "lora_bias": True},
    ],
    ids=str,
)
def test_a_gpt2_which_stores_its_weights_the_other_way_round_is_what_peft_makes_of_it(
    tmp_path: Path, gpt2: Path, config: dict[str, Any]
) -> None:
    assert_as_peft(gpt2, make_adapter(tmp_path / "adapter", gpt2, **config))


def test_a_square_weight_of_a_gpt2_is_transposed_whatever_the_config_says(tmp_path: Path, gpt2: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", gpt2, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    # PEFT itself writes false when the last module it came to was a plain Linear.
    assert_as_peft(gpt2, edit(folder, fan_in_fan_out=False))


def test_the_head_of_a_gpt2_is_not_transposed(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "model", tied=False)
    assert_as_peft(
        model, make_adapter(tmp_path / "adapter", model, target_modules=["attn.c_proj", "lm_head"])
    )


def test_the_formula_by_hand(tmp_path: Path, llama: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", llama, target_modules=["up_proj"], r=5, lora_alpha=3)
    state, name = load_file(folder / "adapter_model.safetensors"), "model.layers.1.mlp.up_proj"
    a, b = (state[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    before = Checkpoint.open(llama).tensor(f"{name}.weight").double()
    for rslora, scale in ((False, 3 / 5), (True, 3 / math.sqrt(5))):
        merged = Checkpoint.open(adapted(llama, edit(folder, use_rslora=rslora)))
        found = merged.tensor(f"{name}.weight").double()
        torch.testing.assert_close(found, before + scale * b @ a, rtol=0, atol=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("peft_type", "LOHA", "peft_type: expected 'LORA', found 'LOHA'; merge the adapter with peft"),
        ("use_dora", True, "use_dora: expected it to be off, found True"),
        ("use_qalora", True, "use_qalora"),
        ("use_something_new", True, "use_something_new"),
        ("layer_replication", [[0, 1], [0, 1]], "layer_replication"),
        ("target_parameters", ["mlp.experts.down_proj"], "target_parameters"),
        ("trainable_token_indices", [3, 4], "trainable_token_indices"),
        ("alora_invocation_tokens", [3], "alora_invocation_tokens"),
        (
            "init_lora_weights",
            "pissa_niter_4",
            "found 'pissa_niter_4'; save the adapter with peft's path_initial",
        ),
        ("init_lora_weights", "olora", "leaves the model as it is"),
        ("r", 0, "r: expected a whole number above 0, found 0"),
        ("r", True, "r: expected a whole number above 0, found True"),
        ("r", None, "r: expected"),
        ("lora_alpha", "16", "lora_alpha: expected a number above 0, found '16'"),
        ("lora_alpha", math.nan, "lora_alpha: expected"),
        ("use_rslora", "yes", "use_rslora: expected true or false"),
        ("rank_pattern", {"q_proj": 1.5}, "rank_pattern: expected names mapped to numbers"),
        ("alpha_pattern", ["q_proj"], "alpha_pattern: expected names mapped to numbers"),
        ("rank_pattern", {"(a+)+b": 1}, "rank_pattern: expected regular expressions without nested"),
        ("alpha_pattern", {".*.*.*.*b": 1}, "alpha_pattern: expected regular expressions without"),
        ("rank_pattern", {"(": 1}, "rank_pattern: expected regular expressions"),
        ("fan_in_fan_out", True, "fan_in_fan_out: expected false, as .* has model_type 'llama', found true"),
    ],
)
def test_what_the_formula_does_not_cover_is_refused_by_its_field(
    llama: Path, adapter: Path, field: str, value: Any, words: str
) -> None:
    edit(adapter, **{field: value})
    with pytest.raises(CheckpointError, match=words) as caught:
        adapted(llama, adapter)
    assert str(caught.value).startswith(f"{adapter / 'adapter_config.json'}: {field}: ")


def test_a_real_adapter_with_dora_is_refused(tmp_path: Path, llama: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", llama, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora: expected it to be off"):
        adapted(llama, folder)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.*expected lora_A, lora_B"):
        adapted(llama, edit(folder, use_dora=False))


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path, llama: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json, so this is a full model; name the"):
        Adapter.open(llama)
    with pytest.raises(CheckpointError, match="so this is no adapter"):
        Adapter.open(tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors; pickles such as .* run code"):
        Adapter.open(adapter)


def test_a_weight_file_outside_the_folder_is_refused(tmp_path: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the model's folder"):
        Adapter.open(adapter)


def test_a_damaged_weight_file_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        Adapter.open(adapter)


def test_an_adapter_without_tensors_is_refused(adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the tensors of an adapter, found none"):
        Adapter.open(edit(adapter, lambda state: {}))


def test_quantised_numbers_are_refused(llama: Path, adapter: Path) -> None:
    with pytest.raises(CheckpointError, match="expected one of F32, F16, BF16, found I8"):
        adapted(llama, edit(adapter, lambda state: {n: t.to(torch.int8) for n, t in state.items()}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_with_nan_or_infinity_is_refused(
    llama: Path, adapter: Path, cache: Path, value: float, factor: str
) -> None:
    name = f"base_model.model.model.layers.1.self_attn.q_proj.{factor}.weight"

    def spoil(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state[name][0, 0] = value
        return state

    with pytest.raises(CheckpointError, match=f"tensor '{name}': expected finite numbers") as caught:
        adapted(llama, edit(adapter, spoil))
    assert str(caught.value).startswith(str(adapter / "adapter_model.safetensors"))
    assert [path for path in (cache / "adapters").iterdir() if path.is_dir()] == []


def test_a_sum_beyond_the_range_of_the_models_type_is_refused(tmp_path: Path, llama: Path) -> None:
    model = make_model(tmp_path / "model", seed=0, dtype="float16", num_hidden_layers=2)
    folder = make_adapter(tmp_path / "adapter", model, lora_alpha=2**24)
    with pytest.raises(
        CheckpointError, match=r"with this adapter 'model.*' of .*model holds NaN or infinity"
    ):
        adapted(model, folder)


def test_every_default_that_peft_writes_is_accepted(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert len(config) > 30
    settings = Adapter.open(adapter).settings
    assert (settings.rank, settings.alpha, settings.rslora) == (4, 6, False)


@pytest.mark.parametrize("as_held", [False, True])
def test_the_language_model_and_the_tower_of_a_larger_model_are_adapted(
    tmp_path: Path, as_held: bool
) -> None:
    """Whatever the names of its tensors on the disk; in training they are those that transformers holds."""
    model = make_family(tmp_path, "Llava", as_held=as_held) / "one"
    add_processor(model)
    targets = r".*(language_model.*(q_proj|down_proj)|vision_tower.*fc1)"
    folder = make_adapter(tmp_path / "adapter", model, target_modules=targets)
    expected, before = by_peft(model, folder), Checkpoint.open(model)
    merged = Checkpoint.open(adapted(model, folder))
    assert set(merged.tensors) == set(before.tensors)
    changed = set()
    for held, tensor in expected.items():
        name = held if as_held else _stored(held)
        assert merged.tensor(name).equal(tensor), name
        if not merged.tensor(name).equal(before.tensor(name)):
            changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "down_proj", "fc1"}
    assert (merged.folder / "preprocessor_config.json").exists()


def _stored(name: str) -> str:
    """What transformers calls a tensor of a LLaVA when it writes it."""
    name = name.replace("model.language_model.", "language_model.model.").replace(
        "lm_head", "language_model.lm_head"
    )
    return name if name.startswith("language_model") else name.removeprefix("model.")
