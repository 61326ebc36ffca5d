"""What a merge method is: its parameters, what it asks of its inputs, and its formula.

A method declares its parameters once; the recipe checker, the search spaces and the documentation read them
here. Modules of methods import torch only inside their formula, so that listing methods is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from evomerge.recipe import Kind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from evomerge.merge.histogram import Histogram
    from evomerge.merge.methods.task_vectors import TaskVectorSum


class Scope(StrEnum):
    """Whose parameter it is."""

    RECIPE = "recipe"
    """One value for the tensor."""
    MODEL = "model"
    """One value per input model."""
    NON_BASE = "non-base model"
    """One value per input model other than the base."""


class BasePolicy(StrEnum):
    """Whether a method needs a base model."""

    REQUIRED = "required"
    """It works on task vectors, the differences from the base."""
    OPTIONAL = "optional"
    """It works on task vectors when the recipe names a base, else on the models themselves."""
    IGNORED = "ignored"
    """A base is an input model like the others."""


class GramKind(StrEnum):
    """Whose inner products a Gram matrix holds."""

    TENSORS = "tensors"
    """Of all N inputs, the base included, in the recipe's order: [..., N, N]."""
    TASK_VECTORS = "task vectors"
    """Of the differences of the M = N - 1 other inputs from the base, in the recipe's order: [..., M, M].

    Taken from the differences, not from the Gram matrix of the tensors, where they would cancel.
    """


class Axis(StrEnum):
    """Which vectors of a tensor are multiplied with each other, and share a coefficient.

    A scalar counts as a tensor of shape [1]; so a tensor of one dimension is a single row and a single
    column, the whole of it.
    """

    WHOLE = "whole"
    """The flattened tensor: one Gram matrix [N, N]."""
    ROWS = "rows"
    """The vectors along the last dimension, the tensor seen as [R, shape[-1]]: Gram matrices [R, N, N]."""
    COLUMNS = "columns"
    """The vectors along the first dimension, the tensor seen as [shape[0], C]: Gram matrices [C, N, N]."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: Name in the recipe.
        kind: Type of its value.
        scope: Whose parameter it is.
        description: One sentence.
        default: Value when the recipe says nothing; ignored when `required`.
        required: Whether the recipe must say something.
        low: Smallest value allowed.
        high: Largest value allowed.
        exclude_low: Whether `low` itself is not allowed.
    """

    name: str
    kind: Kind
    scope: Scope
    description: str
    default: bool | int | float | None = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    exclude_low: bool = False

    def check(self, value: bool | int | float) -> bool | int | float:
        """Return the value if it lies in the allowed range.

        Raises:
            ValueError: It does not.
        """
        too_low = self.low is not None and (value < self.low or (self.exclude_low and value == self.low))
        if too_low or (self.high is not None and value > self.high):
            raise ValueError(f"expected a number in {self.range}, got {value!r}")
        return value

    @property
    def range(self) -> str:
        """The allowed range in words, empty when any value is allowed."""
        if self.low is None and self.high is None:
            return ""
        left = "(" if self.exclude_low or self.low is None else "["
        right = ")" if self.high is None else "]"
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{left}{low}, {high}{right}"


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Everything a formula needs for one output tensor, or for a run of elements of one.

    Attributes:
        name: Name of the output tensor.
        tensors: One float32 tensor per input model, in the recipe's order, all of one shape.
        first: Position in the whole tensor of the first element of `tensors`; 0 unless the method is
            elementwise and gets the tensor in pieces.
        base: Position of the base model in `tensors`, or None.
        shared: Values of the parameters of scope `recipe`.
        values: Per input model, the values of its parameters; empty for a base without any.
        seed: The recipe's seed.
    """

    name: str
    tensors: Sequence[Tensor]
    base: int | None
    shared: Mapping[str, Any]
    values: Sequence[Mapping[str, Any]]
    seed: int
    first: int = 0

    @property
    def base_tensor(self) -> Tensor:
        """The base model's tensor, for methods that require one."""
        assert self.base is not None
        return self.tensors[self.base]

    @property
    def others(self) -> list[int]:
        """Positions of the input models other than the base."""
        return [index for index in range(len(self.tensors)) if index != self.base]

    def task_vectors(self) -> list[Tensor]:
        """δ_i = θ_i - θ_base for every input other than the base, made anew."""
        return [self.tensors[index] - self.base_tensor for index in self.others]


@dataclass(frozen=True, kw_only=True)
class CombinationInputs:
    """Everything a method needs to know of one output tensor to say which combination of its inputs it is.

    Attributes:
        name: Name of the output tensor.
        base: Position of the base model among the inputs, or None.
        num_inputs: Number of input models, the base included.
        shared: Values of the parameters of scope `recipe`.
        values: Per input model, the values of its parameters; empty for a base without any.
        gram: Gives the Gram matrices of that kind along that axis, float64.
    """

    name: str
    base: int | None
    num_inputs: int
    shared: Mapping[str, Any]
    values: Sequence[Mapping[str, Any]]
    gram: Callable[[GramKind, Axis], NDArray[np.float64]]

    @property
    def others(self) -> list[int]:
        """Positions of the input models other than the base."""
        return [index for index in range(self.num_inputs) if index != self.base]


class TaskVectorInputs(NamedTuple):  # cheaper to make than a dataclass: a candidate takes hundreds
    """Everything a method needs to know of one output tensor to say which sum of task vectors it is.

    Attributes:
        name: Name of the output tensor.
        shape: Its shape.
        others: Positions of the input models other than the base.
        shared: Values of the parameters of scope `recipe`.
        values: Per input model, the values of its parameters; empty for a base without any.
        histogram: Position of an input -> histogram of its task vector.
    """

    name: str
    shape: tuple[int, ...]
    others: Sequence[int]
    shared: Mapping[str, Any]
    values: Sequence[Mapping[str, Any]]
    histogram: Callable[[int], Histogram]


@dataclass(frozen=True, kw_only=True, eq=False)
class Combination:
    """A tensor as a sum of its inputs with one coefficient each, for the whole tensor, a row or a column.

    Attributes:
        coefficients: c, float64: one per input, the base included, in the recipe's order; [N] for the whole
            tensor, [R, N] for rows, [C, N] for columns.
        axis: What shares a coefficient.
        around_base: Whether the result is θ_base + Σ_i c_i (θ_i - θ_base), where the base's own coefficient
            is 0, rather than Σ_i c_i θ_i.
        divisor: What the sum is divided by.
    """

    coefficients: NDArray[np.float64]
    axis: Axis = Axis.WHOLE
    around_base: bool = False
    divisor: float = 1.0

    @property
    def ranked(self) -> tuple[int, ...]:
        """Positions of the inputs whose ranks are asked for: none, unlike in some sums of task vectors."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merge method.

    Attributes:
        name: The name people cite, as recipes write it.
        title: The name in prose.
        summary: One sentence: what it does.
        reference: Where it comes from.
        parameters: Its parameters.
        base: Whether a base model is needed.
        min_others: Fewest input models besides the base; a base that is ignored counts as one of them.
        max_others: Most input models besides the base, or None.
        random: Whether the result depends on the recipe's seed.
        elementwise: Whether an element of the result depends on the same element of the inputs only; such a
            method is given tensors in pieces that fit the processor's cache, with the same result.
        formula: Merges one tensor: float32 in, float32 of the same shape out, inputs left unchanged.
        combination: For methods whose result is a combination of the inputs with coefficients that depend
            on their inner products at most: gives these; it agrees with `formula` but for rounding.
        task_vectors: For methods whose result is a sum of task vectors: gives it; `formula` carries it out.
        concept: How it works, in a sentence or two, for the documentation.
        when: When to use it.
        differences: Where it departs from mergekit's method of the same name, or empty.
    """

    name: str
    title: str
    summary: str
    reference: str
    parameters: tuple[Parameter, ...]
    base: BasePolicy
    formula: Callable[[MergeInputs], Tensor]
    combination: Callable[[CombinationInputs], Combination] | None = None
    task_vectors: Callable[[TaskVectorInputs], TaskVectorSum] | None = None
    min_others: int = 0
    max_others: int | None = None
    random: bool = False
    elementwise: bool = False
    concept: str = ""
    when: str = ""
    differences: str = ""

    @property
    def min_models(self) -> int:
        """Fewest input models, the base counted when it is required."""
        return max(1, self.min_others + (self.base is BasePolicy.REQUIRED))

    @property
    def max_models(self) -> int | None:
        """Most input models, the base counted when it is required, or None."""
        return None if self.max_others is None else self.max_others + (self.base is BasePolicy.REQUIRED)

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name, if the method has it."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)
