"""Methods create tensors where their inputs are: what goes to another device by default shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.merge.kernels import reference
from evomerge.merge.methods import METHODS, MergeInputs, Scope
from evomerge.merge.methods.base import Axis, Combination
from tests.merge.kernels.gpu_cases import elements

from .inputs import family
from .test_methods import arguments, members


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [(6,), (4, 1), (5, 7)])
def test_formulas_stay_on_the_device_of_their_inputs(name: str, shape: tuple[int, ...]) -> None:
    given = arguments(name, members(name, *shape))
    method = METHODS[name]
    own = {item.name: item.default for item in method.parameters if item.scope is not Scope.RECIPE}
    shared = {item.name: item.default for item in method.parameters if item.scope is Scope.RECIPE}
    inputs = MergeInputs(
        name="w",
        tensors=given["tensors"],
        base=given["base"],
        shared=shared | {key: given[key] for key in shared if key in given},
        values=[own | values for values in given["values"]],
        seed=0,
    )
    expected = method.formula(inputs)
    # Nothing can be computed on this device, nor with tensors of another.
    with torch.device("meta"):
        assert torch.equal(method.formula(inputs), expected)


@pytest.mark.parametrize("axis", list(Axis))
@pytest.mark.parametrize("base", [None, 0])
def test_combinations_stay_on_the_device_of_their_inputs(axis: Axis, base: int | None) -> None:
    lines = {Axis.WHOLE: (), Axis.ROWS: (5,), Axis.COLUMNS: (7,)}[axis]
    operation = Combination(coefficients=np.ones((*lines, 3)), axis=axis, around_base=base is not None)
    given = elements([tensor.view(-1) for tensor in family(5, 7, count=2)], shape=(5, 7), base=base)
    out = torch.empty(35)
    with torch.device("meta"):
        assert reference.run(operation, given, out)
