"""What every method promises: the declared parameters, pure formulas, and mergekit's numbers."""

from __future__ import annotations

import ast
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from evomerge.merge.methods import METHODS, BasePolicy, Scope

from .inputs import close, family, merge, mergekit, weights
from .trimming import at_ends

DETERMINISTIC = ["linear", "task_arithmetic", "ties", "slerp", "passthrough"]
TASK_VECTORS = sorted(name for name, method in METHODS.items() if method.task_vectors)
SHAPES = [(1,), (2,), (7,), (3, 5), (17, 31), (2, 3, 5), (1000,)]


def arguments(name: str, tensors: list[torch.Tensor], **overrides: Any) -> dict[str, Any]:
    """Sensible arguments of a method for a family of tensors."""
    method = METHODS[name]
    own: dict[str, Any] = {"weight": 0.7, "density": 0.5, "scale": 0.7}
    own = {key: value for key, value in own.items() if method.parameter(key)}
    base = 0 if method.base is BasePolicy.REQUIRED else None
    has_own = any(parameter.scope is Scope.NON_BASE for parameter in method.parameters)
    values = [{} if index == base and has_own else dict(own) for index in range(len(tensors))]
    shared = {"t": 0.3} if method.parameter("t") else {}
    return {"tensors": tensors, "values": values, "base": base, **shared, **overrides}


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"evomerge.merge.methods.{name}")


def members(name: str, *shape: int) -> list[torch.Tensor]:
    return family(*shape)[: METHODS[name].max_models]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_table_and_the_declaration_agree(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.reference.startswith("https://")
    assert module_of(name).METHOD is method
    for text in (method.summary, *(parameter.description for parameter in method.parameters)):
        assert text.endswith(".")
    for parameter in method.parameters:
        if parameter.default is not None and not parameter.required:
            assert parameter.check(parameter.default) == parameter.default
    assert inspect.getdoc(method.combination or method.task_vectors or method.formula)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_modules_of_methods_import_torch_only_inside_formulas(name: str) -> None:
    tree = ast.parse(inspect.getsource(module_of(name)))
    imported = [node for node in tree.body if isinstance(node, ast.Import)]
    assert not [alias.name for node in imported for alias in node.names if alias.name.startswith("torch")]


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (3, 5)])
def test_formulas_take_any_shape_and_leave_their_inputs_alone(name: str, shape: tuple[int, ...]) -> None:
    assert merge(name, **arguments(name, members(name, *shape))).isfinite().all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_formulas_give_the_same_bits_every_time(name: str) -> None:
    first, second = (merge(name, **arguments(name, members(name, 17, 31))) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    """A merge must never hide a broken source, whatever it drops."""
    tensors = members(name, 4, 4)
    tensors[-1] = tensors[-1].clone()
    tensors[-1][1, 2] = bad
    assert not merge(name, **arguments(name, tensors)).isfinite().all()
    tensors[-1].fill_(bad)
    assert not merge(name, **arguments(name, tensors)).isfinite().any()


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("shape", SHAPES)
def test_deterministic_methods_give_mergekits_numbers(name: str, shape: tuple[int, ...]) -> None:
    given = arguments(name, members(name, *shape))
    clear = torch.ones(shape, dtype=torch.bool)
    if name == "ties":
        base, *others = given["tensors"]
        count = base.numel()
        for tensor in others:
            clear &= ~at_ends(tensor - base, count - max(1, count // 2), count)
        assert clear.double().mean() > 0.9
    close(merge(name, **given)[clear], mergekit(name, **given)[clear])


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_nothing_is_random_at_density_1(name: str) -> None:
    given = {"tensors": family(5, 7), "values": weights(0.5, 0.7, -0.3, density=1.0), "base": 0}
    close(merge(name, **given), mergekit(name, **given))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
@pytest.mark.parametrize(
    "numbers",
    [(0.5, 0.7, 0.3), (-0.5, 0.7, 0.3), (0.5, -0.5, 0.0), (0.25, 0.25, -0.5), (0.0, 0.0, 0.0), (2, 3, 4)],
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.5])
def test_signs_sums_and_scales_of_task_vectors_are_mergekits(
    name: str, numbers: tuple[float, ...], normalize: bool, scale: float
) -> None:
    given = {"tensors": family(9, 11), "values": weights(*numbers), "base": 0, "normalize": normalize}
    close(merge(name, **given, **{"lambda": scale}), mergekit(name, **given, **{"lambda": scale}))


@pytest.mark.parametrize("name", TASK_VECTORS)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_the_base_may_stand_anywhere_among_the_inputs(name: str, position: int) -> None:
    tensors = family(5, 7)
    values = weights(0.5, 0.7, 0.3, density=1.0)
    expected = merge(name, tensors, values, base=0)
    order = [1, 2, 3]
    order.insert(position, 0)
    moved = merge(name, [tensors[i] for i in order], [values[i] for i in order], base=position)
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("name", TASK_VECTORS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_base_alone_stays_as_it_is(name: str, normalize: bool) -> None:
    (base, *_) = family(5, 7)
    assert torch.equal(merge(name, [base], [{}], base=0, normalize=normalize), base)


@pytest.mark.parametrize("name", TASK_VECTORS)
def test_sources_equal_to_the_base_change_nothing(name: str) -> None:
    (base, *_) = family(5, 7)
    given = weights(0.5, 0.7, density=0.5)
    assert torch.equal(merge(name, [base, base.clone(), base.clone()], given, base=0), base)
