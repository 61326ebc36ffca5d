"""The tensors of an adapter find the tensors they change, whatever either calls them; or say why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints.adapted import adapted
from evomerge.checkpoints.adapter import Adapter
from evomerge.checkpoints.adapter_plan import plan_updates
from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from tests.adapters import by_peft, edit, make_adapter, make_gpt2
from tests.tiny import make_model

State = dict[str, torch.Tensor]
LAYER = "base_model.model.model.layers.0."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "llama", seed=0, dtype="float32", num_hidden_layers=2
    )


@pytest.fixture
def adapter(tmp_path: Path, llama: Path) -> Path:
    return make_adapter(tmp_path / "adapter", llama, target_modules=["q_proj", "up_proj"])


def renamed(model: Path, folder: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of a model with other names for its tensors."""
    folder.mkdir()
    state = load_file(model / "model.safetensors")
    new = {name: tensor for old, tensor in state.items() if (name := rename(old)) is not None}
    save_file(new, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def rename_all(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def changed(model: Path, adapter: Path) -> list[str]:
    return list(plan_updates(Adapter.open(adapter), Checkpoint.open(model)))


TARGETS = [
    f"model.layers.{layer}.{module}.weight"
    for layer in (0, 1)
    for module in ("mlp.up_proj", "self_attn.q_proj")
]


def test_names_as_in_training_are_found(llama: Path, adapter: Path) -> None:
    assert changed(llama, adapter) == TARGETS


@pytest.mark.parametrize(
    ("stored", "trained"),
    [
        ("language_model.model.", "model."),
        ("", "model."),
        ("model.", ""),
        ("", "a.b.c."),
        ("model.", "a.model."),
    ],
)
def test_a_model_saved_with_another_beginning_is_found(
    tmp_path: Path, llama: Path, adapter: Path, stored: str, trained: str
) -> None:
    edit(adapter, rename_all("base_model.model.model.", f"base_model.model.{trained}"))
    other = renamed(llama, tmp_path / "other", lambda name: name.replace("model.", stored, 1))
    assert changed(other, adapter) == [name.replace("model.", stored, 1) for name in TARGETS]


def test_a_beginning_is_not_exchanged(tmp_path: Path, llama: Path, adapter: Path) -> None:
    other = renamed(llama, tmp_path / "other", lambda name: name.replace("model.", "vision.", 1))
    with pytest.raises(CheckpointError, match=r"changes 'model\.layers\.0\.mlp\.up_proj\.weight', which"):
        changed(other, adapter)


def test_a_gpt2_saved_without_its_head_takes_an_adapter_of_one_with_it(tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "model", base_class=True)
    assert "h.0.attn.c_attn.weight" in Checkpoint.open(model).tensors
    folder = make_adapter(tmp_path / "adapter", model, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    merged, expected = Checkpoint.open(adapted(model, folder)), by_peft(model, folder)
    for name in merged.tensors:
        assert merged.tensor(name).equal(expected[f"transformer.{name}"])
    assert changed(model, folder) == [
        f"h.{n}.{m}.weight" for n in (0, 1) for m in ("attn.c_attn", "mlp.c_fc")
    ]


def test_a_head_stands_outside_the_part_whose_beginning_differs(tmp_path: Path, llama: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", llama, target_modules=["q_proj", "lm_head"])
    other = renamed(llama, tmp_path / "other", lambda name: name.replace("model.", "decoder.model.", 1))
    assert changed(other, folder)[-1] == "lm_head.weight"


def test_keys_of_a_model_that_was_wrapped_twice_are_found(llama: Path, adapter: Path) -> None:
    edit(adapter, rename_all("base_model.model.", "base_model.model.base_model.model."))
    assert changed(llama, adapter) == TARGETS


def test_ambiguous_names_are_refused(tmp_path: Path, llama: Path, adapter: Path) -> None:
    other = renamed(llama, tmp_path / "other", lambda name: f"left.{name}")
    state = load_file(other / "model.safetensors")
    both = {**state, **{name.replace("left.", "right.", 1): state[name].clone() for name in state}}
    save_file(both, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"could be any of left\.model.*, right\.model.*; rename"):
        changed(other, adapter)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_tensor_of_the_adapter_must_be_found(tmp_path: Path, llama: Path, layers: int) -> None:
    other = make_model(tmp_path / "other", seed=0, num_hidden_layers=layers)
    folder = make_adapter(tmp_path / "adapter", other, target_modules=["q_proj"])
    if layers == 1:
        assert changed(llama, folder) == ["model.layers.0.self_attn.q_proj.weight"]
        edit(
            folder, lambda state: {name.replace("q_proj", "q_prj"): tensor for name, tensor in state.items()}
        )
    with pytest.raises(
        CheckpointError, match=r"adapter changes 'model\.layers.*does not have.*did you mean 'mo"
    ):
        changed(llama, folder)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path, llama: Path) -> None:
    model = make_gpt2(tmp_path / "gpt2")
    folder = make_adapter(tmp_path / "adapter", model, target_modules=["c_attn"])
    with pytest.raises(
        CheckpointError, match=r"changes 'transformer\.h\.0\.attn\.c_attn\.weight', which .*llama"
    ):
        changed(llama, edit(folder, fan_in_fan_out=False))


def test_a_factor_without_the_other_is_refused(llama: Path, adapter: Path) -> None:
    edit(adapter, without(f"{LAYER}self_attn.q_proj.lora_B.weight"))
    with pytest.raises(
        CheckpointError, match=r"q_proj\.lora_A\.weight': expected its other factor, the B of"
    ):
        changed(llama, adapter)


def test_tensors_of_an_unknown_kind_are_refused(llama: Path, adapter: Path) -> None:
    edit(adapter, lambda state: {**state, f"{LAYER}self_attn.q_proj.lora_C.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lora_C\.weight': expected lora_A, lora_B"):
        changed(llama, adapter)
    edit(adapter, without(f"{LAYER}self_attn.q_proj.lora_C.weight"))
    edit(adapter, lambda state: {**state, "base_model.model.router.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"changes 'router\.weight', which .* does not have"):
        changed(llama, adapter)


def test_one_tensor_under_two_names_is_refused(llama: Path, adapter: Path) -> None:
    name = "self_attn.q_proj.lora_A.weight"
    edit(adapter, lambda state: {**state, f"model.layers.0.{name}": state[LAYER + name].clone()})
    with pytest.raises(CheckpointError, match="both give A of model"):
        changed(llama, adapter)


@pytest.mark.parametrize(
    ("tensor", "shape", "words"),
    [
        (
            "self_attn.q_proj.lora_A.weight",
            (5, 32),
            r"expected shape \[4, 32\], for rank 4 .*, found \[5, 32\]",
        ),
        ("self_attn.q_proj.lora_B.weight", (32, 5), r"expected shape \[32, 4\], .*, found \[32, 5\]"),
        ("mlp.up_proj.lora_A.weight", (4, 48), r"expected shape \[4, 32\]"),
        ("mlp.up_proj.lora_B.weight", (32, 4), r"expected shape \[48, 4\]"),
        ("mlp.up_proj.lora_B.weight", (48, 2, 2), r"expected shape \[48, 4\]"),
        (
            "input_layernorm.weight",
            (33,),
            r"expected shape \[32\], as 'model\.layers\.0\.input_layernorm\.weight'",
        ),
        ("input_layernorm.lora_A.weight", (4, 32), "expected a LoRA of a matrix|expected its other factor"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    llama: Path, adapter: Path, tensor: str, shape: tuple[int, ...], words: str
) -> None:
    edit(adapter, lambda state: {**state, LAYER + tensor: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=words) as caught:
        changed(llama, adapter)
    assert f"tensor '{LAYER}{tensor}': " in str(caught.value)


def test_a_lora_of_a_vector_is_refused(llama: Path, adapter: Path) -> None:
    both = {f"{LAYER}input_layernorm.lora_{factor}.weight": torch.zeros(4, 32) for factor in "AB"}
    with pytest.raises(CheckpointError, match=r"expected a LoRA of a matrix, .* has shape \[32\]"):
        changed(llama, edit(adapter, lambda state: {**state, **both}))


def test_a_square_matrix_of_rank_one_is_not_mixed_up(tmp_path: Path, llama: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", llama, target_modules=["q_proj"], r=32)
    (update, *_) = plan_updates(Adapter.open(folder), Checkpoint.open(llama)).values()
    assert update.factors == (
        f"{LAYER}self_attn.q_proj.lora_A.weight",
        f"{LAYER}self_attn.q_proj.lora_B.weight",
    )
    assert not update.transposed


def test_a_quantised_model_is_refused(tmp_path: Path, llama: Path, adapter: Path) -> None:
    other = renamed(llama, tmp_path / "other", lambda name: name)
    state = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, other / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"'{name}': expected one of F32.*found F8_E4M3; use a model that"
    ):
        changed(other, adapter)


def test_a_model_whose_layers_are_not_numbered_is_refused(tmp_path: Path, llama: Path, adapter: Path) -> None:
    other = renamed(llama, tmp_path / "other", lambda name: name.replace("layers.1.", "layers.2."))
    with pytest.raises(CheckpointError, match="layers must be numbered from 0 without a gap"):
        changed(other, adapter)


def test_a_hostile_config_of_the_model_does_no_harm(tmp_path: Path, llama: Path, adapter: Path) -> None:
    other = renamed(llama, tmp_path / "other", lambda name: name)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": ["gpt2"], "vocab_size": {"a": 1}}))
    assert changed(other, adapter) == TARGETS
