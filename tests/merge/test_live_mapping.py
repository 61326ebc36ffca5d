"""Tensors of a checkpoint divide the live parameters among them, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import core_model_loading
from transformers.core_model_loading import Chunk, Interleave, WeightConverter, WeightRenaming

from evomerge.errors import CheckpointError
from evomerge.merge.live_mapping import live_targets
from tests.architectures import tiny

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
Targets = dict[str, Tensor]


@pytest.fixture
def model() -> Any:
    return tiny("Llama")


@pytest.fixture
def saved_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Targets], None]], None]:
    """Change what transformers says a model is saved as."""

    def replace(change: Callable[[Targets], None]) -> None:
        def revert(_: Any, state: Targets) -> Targets:
            change(state)
            return state

        monkeypatch.setattr(core_model_loading, "revert_weight_conversion", revert)

    return replace


def test_every_parameter_is_a_target_itself_where_nothing_is_converted(model: Any) -> None:
    targets = live_targets(model)
    for name, parameter in model.named_parameters():
        assert targets[name].data_ptr() == parameter.data_ptr()
        assert targets[name.removeprefix("model.")] is targets[name]


def test_names_that_transformers_changes_lead_to_the_parameter(model: Any) -> None:
    model._weight_conversions = [WeightRenaming("transformer.old_norm", "model.norm")]
    targets = live_targets(model)
    assert targets["transformer.old_norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert NORM not in targets


def test_halves_of_a_parameter_are_targets_without_a_copy(saved_as: Any, model: Any) -> None:
    def halve(targets: Targets) -> None:
        whole = targets.pop(UP)
        targets["left"], targets["right"] = whole[:, :5].contiguous(), whole[:, 5:].t().contiguous()

    saved_as(halve)
    targets = live_targets(model)
    targets["left"].fill_(1.0)
    targets["right"].copy_(torch.arange(11 * 32).reshape(11, 32))
    parameter = model.get_parameter(UP)
    assert bool((parameter[:, :5] == 1.0).all())
    assert torch.equal(parameter[:, 5:].detach(), torch.arange(11.0 * 32).reshape(11, 32).t())


def drop(targets: Targets) -> None:
    del targets[UP]


def miss_a_row(targets: Targets) -> None:
    targets[UP] = targets[UP][1:]


def overlap(targets: Targets) -> None:
    whole = targets.pop(UP)
    targets["low"], targets["high"] = whole[:20], whole[19:]


def overlap_and_miss(targets: Targets) -> None:
    whole = targets.pop(UP)
    targets["low"], targets["again"] = whole[:16], whole[1:17]


def repeat(targets: Targets) -> None:
    targets[UP] = targets[UP][:1].expand(32, 16)


def transpose_too(targets: Targets) -> None:
    targets["turned"] = targets[UP].t()


@pytest.mark.parametrize("change", [drop, miss_a_row, overlap, overlap_and_miss, repeat, transpose_too])
def test_elements_that_are_missed_or_reached_twice_are_an_error(
    saved_as: Any, model: Any, change: Callable[[Targets], None]
) -> None:
    saved_as(change)
    with pytest.raises(CheckpointError, match="must reach each of its elements once") as caught:
        live_targets(model)
    assert [fault.path for fault in caught.value.faults] == [UP]


@pytest.mark.parametrize(
    ("converter", "computed", "unreached"),
    [
        (
            WeightConverter(
                "mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]
            ),
            "model.layers.0.mlp.both.weight",
            "model.layers.0.mlp.gate_proj.weight",
        ),
        (
            WeightConverter("mlp.mixed.weight", "mlp.up_proj.weight", [Interleave(dim=0)]),
            "model.layers.0.mlp.mixed.weight",
            UP,
        ),
    ],
)
def test_what_is_computed_from_parameters_is_refused(
    model: Any, converter: WeightConverter, computed: str, unreached: str
) -> None:
    model._weight_conversions = [converter]
    with pytest.raises(CheckpointError) as caught:
        live_targets(model)
    reasons = {fault.path: fault.reason for fault in caught.value.faults}
    assert "transformers computes it from parameters" in reasons[computed]
    assert reasons[unreached].endswith("those that reach it: none")


def test_parameters_that_share_memory_in_two_shapes_are_refused(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data[1:])
    with pytest.raises(CheckpointError, match="shares memory with"):
        live_targets(model)


def test_the_conversion_of_the_loaded_checkpoint_counts_not_the_default(tmp_path: Path) -> None:
    made = tiny("Mixtral")
    made.save_pretrained(tmp_path, save_original_format=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in live_targets(loaded)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in live_targets(made)
