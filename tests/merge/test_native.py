"""What is merged straight from the files is what torch would merge, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merge.execute import merge_tensor
from evomerge.merge.kernels import cpu
from evomerge.merge.methods import METHODS
from evomerge.merge.native import is_native, native_type, prepare_native
from evomerge.merge.plan import TensorPlan
from evomerge.merge.vocabulary_rows import AlignedCheckpoint, AlignedTensor, RowPlan
from tests.checkpoints.files import model

from .test_execute import given, plan_for

SHAPE = (37, 29)
BY_TORCH = {"nearswap", "della", "della_linear", "arcee_fusion", "ram", "ramplus_tl", "sce"}
"""Formulas, and ranks within rows."""
NATIVE = sorted(set(METHODS) - BY_TORCH)


def stored(tensors: Sequence[Tensor], tmp_path: Path) -> dict[str, Checkpoint]:
    """Models of one tensor each, as `test_execute` names them."""
    folders = [model(tmp_path / str(index), {"layer.weight": tensor}) for index, tensor in enumerate(tensors)]
    return {f"model {index}": Checkpoint.open(folder) for index, folder in enumerate(folders)}


def native(plan: TensorPlan, sources: dict[str, Checkpoint], piece: int) -> tuple[Tensor, bool]:
    """The merged tensor, and whether it is finite."""
    prepared = prepare_native(plan, sources, piece=piece)
    out = torch.full(plan.shape, 7.0, dtype=getattr(torch, plan.dtype or ""))
    array = cpu.flat(out)
    assert array.dtype == native_type(plan)
    finite = [prepared.write(array[:500]), prepared.write(array[500:], 500)]
    return out, all(finite)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    ("stored_as", "dtype"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("piece", [64, 1 << 17])
def test_a_native_merge_has_the_bits_of_one_by_torch(
    name: str, stored_as: str, dtype: str, piece: int, tmp_path: Path
) -> None:
    tensors = given(name, *SHAPE, dtype=getattr(torch, stored_as))
    plan, sources = plan_for(name, tensors, dtype=dtype), stored(tensors, tmp_path)
    assert is_native(plan, sources)
    found, finite = native(plan, sources, piece)
    assert finite
    assert torch.equal(found, merge_tensor(plan, sources))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_which_methods_are_native(name: str, tmp_path: Path) -> None:
    tensors = given(name, *SHAPE)
    plan, sources = plan_for(name, tensors), stored(tensors, tmp_path)
    assert is_native(plan, sources) is (name in NATIVE)
    assert not is_native(dataclasses.replace(plan, dtype=None), sources)
    assert not is_native(dataclasses.replace(plan, dtype="float16"), sources)
    assert not is_native(dataclasses.replace(plan, rescale=(2.0, 0.0)), sources)


@pytest.mark.parametrize(
    ("name", "setting"), [("nuslerp", {"nuslerp_flatten": False}), ("model_stock", {"filter_wise": True})]
)
def test_inner_products_of_rows_are_left_to_torch(name: str, setting: dict[str, Any], tmp_path: Path) -> None:
    tensors = given(name, *SHAPE)
    sources = stored(tensors, tmp_path)
    assert is_native(plan_for(name, tensors), sources)
    assert not is_native(plan_for(name, tensors, **setting), sources)


@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.int32])
def test_other_and_mixed_types_are_left_to_torch(other: torch.dtype, tmp_path: Path) -> None:
    tensors = given("linear", *SHAPE)
    plan = plan_for("linear", tensors)
    assert not is_native(plan, stored([tensors[0], tensors[1].to(other)], tmp_path))


def test_a_tensor_that_lies_in_no_file_is_left_to_torch(tmp_path: Path) -> None:
    tensors = given("linear", *SHAPE)
    plan, sources = plan_for("linear", tensors), stored(tensors, tmp_path)
    rows = RowPlan(num_rows=37, own={row: 36 - row for row in range(37)}, given={})
    aligned = AlignedTensor(name="layer.weight", axis=0, rows=rows, others={})
    inner = sources["model 1"]
    assert is_native(plan, {**sources, "model 1": AlignedCheckpoint(inner, {}, {}, exact=False)})
    made = AlignedCheckpoint(inner, {"layer.weight": aligned}, {}, exact=False)
    assert not is_native(plan, {**sources, "model 1": made})


def test_a_model_seen_through_a_vocabulary_is_checked_for_changes_too(tmp_path: Path) -> None:
    tensors = given("linear", *SHAPE)
    plan, sources = plan_for("linear", tensors), stored(tensors, tmp_path)
    sources["model 1"] = AlignedCheckpoint(sources["model 1"], {}, {}, exact=False)
    model(tmp_path / "1", {"layer.weight": tensors[1].float()})
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        native(plan, sources, 64)


@pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported(name: str, bad: float, tmp_path: Path) -> None:
    tensors = given(name, *SHAPE)
    tensors[1].view(-1)[700] = bad
    _, finite = native(plan_for(name, tensors), stored(tensors, tmp_path), 64)
    assert not finite


def test_a_tensor_at_an_odd_address_is_native(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3.0], np.float32)
    (tmp_path / "config.json").write_text("{}")
    header = b'{"layer.weight":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    assert len(header) % 4
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + values.tobytes()
    )
    sources = {"model 0": Checkpoint.open(tmp_path)}
    plan = plan_for("passthrough", [torch.from_numpy(values)], dtype="float32")
    found = np.zeros(3, np.float32)
    assert prepare_native(plan, sources, piece=2).write(found)
    np.testing.assert_array_equal(found, values * np.float32(1.3))
